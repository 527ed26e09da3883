"""Co-smoothing: how well held-out units are predicted from the others.

Offline, as in the Neural Latents Benchmark: training uses all units, inference on the scored span
only the held-in ones. Rates of the held-out units are predicted from all bins, including later
ones.

The model is scored twice. First, by the rates of the held-out units under the posterior of a
smoothing solve in which they are masked; nothing is refitted. Second, by a Poisson regression of
each unit on the latents of that solve. It is fitted as the baselines' regressions are
(``cosmoothing_baselines``): on the training part, where latents are also inferred without the
held-out units, chosen on the validation part, and refitted on both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ilqr_training.evaluation.cosmoothing_baselines import (
    ALPHAS,
    FACTORS,
    SMOOTHING,
    Candidate,
    factors,
    fit_offline,
    smoothing,
    standard,
)
from ilqr_vae.artifact import Artifact
from ilqr_vae.errors import ConfigError, number_of
from ilqr_vae.inference.prediction import infer, infer_long
from ilqr_vae.model.likelihoods import Observed, padded
from ilqr_vae.progress import SILENT, Progress
from ilqr_vae.recordings import Recording, SplitSpec
from ilqr_vae.report import Table
from ilqr_vae.report.table import number
from ilqr_vae.scoring.metrics import bits_per_spike
from ilqr_vae.scoring.score import OURS

Array = NDArray[np.float64]
Flags = NDArray[np.bool_]

OURS_REGRESSED = f"{OURS}, regression on latents"
LONG = 400
"""Segments of at least this many bins are first solved in chunks."""
_CHUNK, _AT_ONCE = 100, 32


@dataclass(frozen=True)
class CoSmoothing:
    """Scores of co-smoothing.

    Attributes:
        bits: bits per spike of the held-out units by method, over their own mean rates there.
        chosen: the hyperparameters of each baseline, chosen on the validation part, as text.
        held_out: names of the held-out units.
        selection: how they were chosen, as text.
    """

    bits: dict[str, float]
    chosen: dict[str, str]
    held_out: tuple[str, ...]
    selection: str

    def to_json(self) -> dict[str, Any]:
        return {
            "bits_per_spike": self.bits,
            "chosen": self.chosen,
            "held_out": list(self.held_out),
            "units": self.selection,
        }

    def table(self) -> Table:
        return Table(
            "Co-smoothing",
            f"{len(self.held_out)} units held out, {self.selection}; predicted offline from the "
            "others alone. Training used all units.",
            ("", "chosen on the validation part", "bits per spike"),
            tuple((name, self.chosen.get(name, ""), number(b)) for name, b in self.bits.items()),
            words=2,
        )


def held_out_units(recording: Recording, share: float, seed: int) -> tuple[Flags, str]:
    """Return which units (N,) are held out, and how they were chosen.

    They are those that the file names, else a random share.

    Raises:
        ConfigError: the share is not between 0 and 1, or would hold out no unit or all.
        RecordingError: there are features.
    """
    recording.require_counts("co-smoothing")
    if not 0 <= share <= 1:
        raise ConfigError("--held-out", expected="a share of the units, 0 to 1", got=f"{share:g}")
    if recording.held_out:
        named = set(recording.held_out)
        out = np.array([name in named for name in recording.unit_names])
        selection = "as the file names them"
    else:
        number = round(share * recording.n_units)
        out = np.zeros(recording.n_units, dtype=bool)
        out[np.random.default_rng(seed).choice(recording.n_units, number, replace=False)] = True
        selection = f"drawn by seed {seed}"
    if not out.any() or out.all():
        expected = f"a share of {recording.n_units} units that leaves some in and some out"
        raise ConfigError("--held-out", expected=expected, got=number_of(int(out.sum()), "unit"))
    return out, selection


@torch.no_grad()
def smoothing_solve(
    artifact: Artifact, recording: Recording, bins: tuple[int, int], held_out: Flags
) -> tuple[Array, Array]:
    """Infer latents (T, n) and expected counts (T, N) of the bins [start, stop).

    Inference uses the held-in counts of these bins only.

    Args:
        recording: the whole recording, with only the model's units.
        held_out: (N,), True for units whose counts are ignored.
    """
    model = artifact.model
    like = model.initial.mean
    seen = recording.mask() & ~held_out
    latents = np.empty((bins[1] - bins[0], model.n))
    rates = np.empty((bins[1] - bins[0], recording.n_units))

    def tensor(values: NDArray[Any]) -> torch.Tensor:
        return torch.as_tensor(values.astype(np.float64)).to(like)

    for group in _together(recording.segments(*bins)):
        parts = [slice(a, b) for a, b in group]
        values, live = padded([tensor(recording.counts[p] * seen[p]) for p in parts])
        mask = padded([tensor(seen[p]) for p in parts])[0].values
        observed = {"spikes": Observed(values.values, mask)}
        if live.shape[1] > LONG:
            found = infer_long(model, observed, chunk=_CHUNK, condition=("spikes",), check=False)
        else:
            found = infer(model, observed, condition=("spikes",), check=False)
        z, expected = found.z[:, 1:], found.posterior_rates("spikes")
        for (a, b), one, rate in zip(group, z, expected, strict=True):
            rows = slice(a - bins[0], b - bins[0])
            latents[rows] = one[: b - a].double().cpu().numpy()
            rates[rows] = rate[: b - a].double().cpu().numpy()
    return latents, rates


def _together(segments: list[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Group segments for batched solves: short ones of similar length; long ones alone."""
    batch: list[tuple[int, int]] = []
    for segment in sorted(segments, key=lambda s: s[1] - s[0]):
        alone = segment[1] - segment[0] > LONG
        if batch and (alone or len(batch) == _AT_ONCE):
            yield batch
            batch = []
        batch.append(segment)
        if alone:
            yield batch
            batch = []
    if batch:
        yield batch


def cosmooth(
    artifact: Artifact,
    recording: Recording,
    split: SplitSpec,
    bins: tuple[int, int],
    held_out: Flags,
    selection: str = "",
    *,
    progress: Progress = SILENT,
) -> CoSmoothing:
    """Score the model and the baselines on the bins [start, stop).

    Args:
        recording: the whole recording, with only the model's units.
        held_out, selection: see ``held_out_units``.

    Raises:
        ShapeError: a part of the split has no bin, or no spike of the held-out units.
    """
    part, held_in = slice(*bins), ~held_out
    truth = np.where(recording.mask()[part], recording.counts[part], np.nan)[:, held_out]
    progress("co-smoothing", 0, 4, OURS)
    latents = np.zeros((len(recording), artifact.model.n))
    rates = np.empty(0)
    # the scored bins last, so that their latents depend on these bins only
    for span in (split.span("train", recording), split.span("validation", recording), bins):
        latents[slice(*span)], rates = smoothing_solve(artifact, recording, span, held_out)
    bits = {OURS: bits_per_spike(rates[:, held_out], truth)}
    chosen: dict[str, str] = {}
    ways = {
        OURS_REGRESSED: _on_latents(latents),
        SMOOTHING: smoothing(recording, held_in),
        FACTORS: factors(recording, held_in),
    }
    for i, (name, candidates) in enumerate(ways.items()):
        progress("co-smoothing", i + 1, 4, name)
        fitted = fit_offline(candidates, recording, split, held_out)
        bits[name] = bits_per_spike(fitted.rates(bins), truth)
        chosen[name] = fitted.chosen
    progress("co-smoothing", 4, 4)
    return CoSmoothing(
        bits, chosen, tuple(np.array(recording.unit_names)[held_out].tolist()), selection
    )


def _on_latents(z: Array) -> list[Candidate]:
    both = np.concatenate([z, z**2], axis=1)
    return [
        Candidate("latents", lambda rows: standard(z, rows), ALPHAS[FACTORS]),
        Candidate("latents and their squares", lambda rows: standard(both, rows), ALPHAS[FACTORS]),
    ]
