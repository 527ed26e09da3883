"""Causal validation: the scores of the streaming service with the current parameters."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from msgspec.structs import replace
from numpy.typing import NDArray

from ilqr_training.config import ReadoutConfig, TrainConfig
from ilqr_training.fit.crops import Prepared
from ilqr_training.readout.causal import Causal, causal_pass
from ilqr_training.readout.classes import ClassFit, fit_classes
from ilqr_training.readout.fit import ReadoutBins, ReadoutFit, fit_readout
from ilqr_training.readout.fixed_lag import LagWindows, fit_fixed_lag, with_fixed_lag
from ilqr_training.readout.intervals import fit_intervals
from ilqr_vae.model.generative import Model
from ilqr_vae.model.intervals import SpeedScale, stated
from ilqr_vae.model.likelihoods import Likelihood
from ilqr_vae.model.readout import KinematicReadout
from ilqr_vae.progress import SILENT, Progress
from ilqr_vae.recordings.split import warmup_start
from ilqr_vae.scoring.metrics import interval_coverage, r2, r2_per_axis
from ilqr_vae.scoring.score import speed_unit
from ilqr_vae.streaming.bounds import TrainingRange, highest_counts
from ilqr_vae.streaming.horizon import MovingHorizon

LOST_BINS = 10_000
"""Bins of each part in a pass with lost bins; more would cost memory and gain little."""


_STREAMS = {True: (16, 1), False: (48, 24)}
"""Number of pieces of the training and the validation part, thorough or not."""

_LOST_STREAMS, _RUN_IN = 16, 40

_PASSES, _LOST = ("latents, training", "latents, validation"), "latents, bins lost"
"""Names of their progress bars."""


@dataclass(frozen=True)
class Validation:
    """Scores on the validation part, and the readout that was scored.

    Attributes:
        score: the objective of early stopping: mean R2, or bits per spike without kinematics.
        scores: scores by name, without channels that do not vary in the validation part.
        readout: the fitted readout; None without kinematics.
        mean_rate: (N,) mean counts in the training part.
        seen: statistics of the training part.
        intervals: scale of the deviations by speed, or None.
        held_out: decodes of the validation part; None without kinematics.
        classes: discrete output, if configured and the validation is thorough.
    """

    score: float
    scores: dict[str, float]
    readout: KinematicReadout | None
    mean_rate: torch.Tensor
    seen: TrainingRange | None
    intervals: SpeedScale | None = None
    held_out: HeldOut | None = None
    classes: ClassFit | None = None


class HeldOut(NamedTuple):
    """Bins that the readout was not fitted on, (T, D) each: truth, decodes, unscaled deviations."""

    truth: NDArray[np.float64]
    decoded: NDArray[np.float64]
    std: NDArray[np.float64]


def scored(held: HeldOut, data: Prepared) -> tuple[SpeedScale | None, dict[str, float]]:
    """Return the scale of the deviations by speed, and the scores with it."""
    r, k = data.recording, held.truth
    unit = speed_unit(k, r.kinematic_units)
    intervals = fit_intervals(*held, unit, r.bin_width)
    std = stated(intervals, held.decoded, held.std)
    each = zip(r.kinematic_names, r2_per_axis(k, held.decoded), strict=True)
    # a constant channel has no R2 and is always covered
    scores = {"r2": r2(k, held.decoded)}
    scores |= {f"r2.{n}": float(v) for n, v in each if np.isfinite(v)}
    some = data.kinematic_scale > 0
    scores["coverage_90"] = interval_coverage(k[:, some], held.decoded[:, some], std[:, some], 0.9)
    return intervals, scores


def _seen(data: Prepared, latents: NDArray[np.float64], spikes: Likelihood) -> TrainingRange:
    """Return statistics of the training part, including its causal latents."""
    recording, part = data.recording, slice(*data.train)
    k = np.zeros((1, 0)) if recording.kinematics is None else recording.kinematics[part]
    k = k[np.isfinite(k).all(-1)]
    values: NDArray[Any] = recording.counts[part]
    if recording.features:
        values = spikes.standard(torch.as_tensor(values)).abs().numpy()
    highest = highest_counts(values, recording.mask()[part])
    ranges = (np.stack([x.min(0), x.max(0)]).astype(np.float64) for x in (latents, k))
    return TrainingRange(*(torch.as_tensor(x) for x in (highest, *ranges)))


def _reads(config: TrainConfig, thorough: bool = True) -> ReadoutConfig:
    reads = config.readout.within(config.estimator.horizon)
    return reads if thorough else replace(reads, recurrent=0, lost=(), later=0)


def estimator_of(
    model: Model, data: Prepared, config: TrainConfig, *, thorough: bool = True
) -> MovingHorizon:
    """Return a float64 copy of the model as a moving-horizon estimator with a blank readout.

    The blank readout only sets the number of lags in the window of each estimate.
    """
    k = data.recording.kinematics
    blank = None
    if k is not None:
        blank = KinematicReadout(
            model.n,
            k.shape[1],
            _reads(config, thorough).shape,
            units=data.recording.counts.shape[1],
        ).double()
    double = copy.deepcopy(model).double().cpu()
    mean_rate = torch.as_tensor(data.recording.mean_counts(*data.train))
    mean_rate = double.group("spikes").standard(mean_rate)
    return MovingHorizon(double, blank, mean_rate, config.estimator)


def validate(
    model: Model,
    data: Prepared,
    config: TrainConfig,
    *,
    thorough: bool,
    progress: Progress = SILENT,
) -> Validation:
    """Fit the readout on causal latents of the training part; score it on the validation part.

    Args:
        thorough: stream the validation part as a single exact stream, as for the final scores; else
            in parallel pieces, which is fast enough during training.
    """
    estimator = estimator_of(model, data, config, thorough=thorough)
    streams = _STREAMS[thorough]
    train = causal_pass(
        estimator,
        data.recording,
        *data.train,
        streams=streams[0],
        run_in=_RUN_IN,
        progress=progress,
        what=_PASSES[0],
    )
    held = causal_pass(
        estimator,
        data.recording,
        *data.validation,
        streams=streams[1],
        run_in=_run_in(data, thorough),
        progress=progress,
        what=_PASSES[1],
    )
    scores = {"bits_per_spike": held.bits_per_spike, "iterations": held.iterations}
    k = data.recording.kinematics
    seen = _seen(data, train.window[:, : model.n], estimator.spikes)
    reads, classes = _reads(config, thorough), None
    if thorough and config.readout.classes:
        lags = 0 if k is None else reads.lags
        features = (lags + 1) * model.n
        classes, scores["class_accuracy"] = fit_classes(train, held, data, features)
    if k is None:
        about = (None, estimator.mean_rate, seen)
        return Validation(held.bits_per_spike, scores, *about, classes=classes)
    parts = {"train": [train], "validation": [held]}
    for i, share in enumerate(reads.lost):
        lost = _lost(data, share, (config.training.seed, i))
        for name, causals in parts.items():
            span = _latest(getattr(data, name))
            causals.append(
                causal_pass(
                    estimator, data.recording, *span, streams=_LOST_STREAMS, run_in=_RUN_IN,
                    dropped=lost,
                    progress=progress, what=_LOST,
                )
            )  # fmt: skip
    seed = config.training.seed
    fit = _decode(parts, k, data, model.n, reads, seed, progress, quick=not thorough)
    held_out = HeldOut(fit.truth, fit.decoded, fit.std)
    intervals, decoded = scored(held_out, data)
    scores |= decoded
    readout = _later(fit, train, held, data, reads) if reads.later else fit.readout
    return Validation(
        fit.score, scores, readout, estimator.mean_rate, seen, intervals, held_out, classes
    )


def _later(
    fit: ReadoutFit, train: Causal, held: Causal, data: Prepared, reads: ReadoutConfig
) -> KinematicReadout:
    """Return the readout with maps that decode a bin again after later bins."""
    r, readout = data.recording, fit.readout
    assert r.kinematics is not None  # otherwise nothing was fitted
    segment = np.zeros(len(r), dtype=np.int64)
    segment[r.breaks] = 1
    segment = segment.cumsum()
    columns = readout.W.shape[1]
    parts: list[LagWindows] = []
    for causal, span in ((train, data.train), (held, data.validation)):
        rows = slice(*span)
        parts.append(
            LagWindows(
                causal.window[:, :columns], r.kinematics[rows], r.scored[rows], segment[rows]
            )
        )
    decoded = np.full(parts[1].y.shape, np.nan)
    decoded[parts[1].scored] = fit.decoded
    lag = fit_fixed_lag(parts[0], parts[1], decoded, reads.later, reads.alphas)
    return readout if lag is None else with_fixed_lag(readout, lag, r.n_units)


def _run_in(data: Prepared, thorough: bool) -> int:
    """Return the number of bins that are streamed before the validation part."""
    begin = data.validation[0]
    return begin - warmup_start(begin) if thorough else _RUN_IN


def planned_passes(
    data: Prepared, config: TrainConfig, *, thorough: bool
) -> list[tuple[str, int, int]]:
    """Return the causal passes of a validation: (name of the bar, bins per stream, streams)."""
    spans = [data.train, data.validation]
    plan = list(
        zip(_PASSES, spans, _STREAMS[thorough], (_RUN_IN, _run_in(data, thorough)), strict=True)
    )
    if data.recording.kinematics is not None:
        for _ in _reads(config, thorough).lost:
            plan += [(_LOST, _latest(span), _LOST_STREAMS, _RUN_IN) for span in spans]
    return [(what, -(-(b - a) // streams) + lead, streams) for what, (a, b), streams, lead in plan]


def _latest(span: tuple[int, int]) -> tuple[int, int]:
    """Return the last bins of a span, which a pass with lost bins uses."""
    return max(span[0], span[1] - LOST_BINS), span[1]


def _lost(data: Prepared, share: float, seed: tuple[int, int]) -> NDArray[np.bool_]:
    """Draw independently lost bins of the recording."""
    return np.random.default_rng(seed).random(len(data.recording)) < share


def _decode(
    parts: dict[str, list[Causal]],
    k: NDArray[np.float64],
    data: Prepared,
    n: int,
    reads: ReadoutConfig,
    seed: int,
    progress: Progress,
    *,
    quick: bool,
) -> ReadoutFit:
    valid = data.recording.scored
    bins: dict[str, list[ReadoutBins]] = {}
    for name, causals in parts.items():
        span = getattr(data, name)
        for i, causal in enumerate(causals):
            rows = slice(*(_latest(span) if i else span))
            made = ReadoutBins.of(causal.rows(valid[rows]), k[rows][valid[rows]])
            bins.setdefault(name, []).append(made)
    return fit_readout(
        bins["train"],
        bins["validation"],
        n,
        data.recording.n_units,
        reads,
        seed=seed,
        quick=quick,
        progress=progress,
    )
