"""Scores of causal decodes beside those of a Wiener filter on the same bins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from ilqr_vae.errors import ShapeError
from ilqr_vae.recordings import Recording, SplitSpec
from ilqr_vae.recordings.split import segment_start, varies
from ilqr_vae.scoring.baselines import WienerFilter
from ilqr_vae.scoring.bootstrap import FEWEST, interval, pieces, r2_draws
from ilqr_vae.scoring.metrics import r2, r2_per_axis
from ilqr_vae.scoring.spacing import spaced_out

Array = NDArray[np.float64]

LEVELS: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
HISTORIES_S: tuple[float, ...] = (0.25, 0.5, 0.75)
MOST_WEIGHTS = 3000
"""Of a Wiener filter, per channel."""
OURS = "iLQR-VAE"
WIENER = "Wiener filter"


def later_name(lag: int) -> str:
    """Return the name of our fixed-lag decodes with this lag."""
    return f"{OURS}, {lag} bin{'s' if lag > 1 else ''} later"


@dataclass(frozen=True, slots=True)
class BySpeed:
    """Calibration of the deviations by quarter of the bins, slowest first.

    Quarters that end at the same speed, e.g. at rest, are merged.

    Attributes:
        upto: speed at the end of each quarter, increasing.
        coverage: coverage of the 90 % interval in each.
        what: description of the speed, with its unit.
        ratio: ratio of stated to actual error in each, root mean squares.
    """

    upto: tuple[float, ...]
    coverage: tuple[float, ...]
    what: str
    ratio: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores on the n valid, answered bins.

    Attributes:
        methods: by decoder and metric: ``r2`` (mean over the channels that vary), ``r2.<channel>``
            (NaN for a constant one, with a note), and ``coverage_90`` if the decoder states a
            standard deviation.
        n: number of scored bins.
        nominal, actual: calibration: share of true values inside the central interval of each
            nominal level; empty without a standard deviation.
        by_speed, by_decoded_speed: calibration by true and by decoded speed, or None without a
            standard deviation.
        wiener: (T, D) decodes of the Wiener filter, or None if it could not be fitted.
        notes: notes for the reader.
        intervals: by decoder: ``r2``, the 95 % bootstrap interval of its mean R2, and for other
            decoders ``ahead``, that of ours minus theirs on the same draws. All n bins are drawn.
        resampled: what the bootstrap draws, and how many, e.g. ``34 trials``; "" for none.
    """

    methods: dict[str, dict[str, float]]
    n: int
    nominal: tuple[float, ...]
    actual: tuple[float, ...]
    wiener: Array | None
    by_speed: BySpeed | None = None
    by_decoded_speed: BySpeed | None = None
    notes: tuple[str, ...] = ()
    intervals: dict[str, dict[str, tuple[float, float]]] = field(
        default_factory=dict[str, dict[str, tuple[float, float]]]
    )
    resampled: str = ""


def calibration(
    truth: Array, decoded: Array, std: Array, levels: tuple[float, ...] = LEVELS
) -> tuple[float, ...]:
    """Return the share of true values inside the central Gaussian interval of each level.

    Args:
        truth, decoded, std: (T, D), finite, ``std`` >= 0.
    """
    error = np.abs(truth - decoded)
    return tuple(float((error <= ndtri(0.5 + level / 2) * std).mean()) for level in levels)


def coverage_by_speed(
    truth: Array,
    decoded: Array,
    std: Array,
    units: tuple[str, ...] = (),
    of: Literal["true", "decoded"] = "true",
) -> BySpeed:
    """Return the coverage of the 90 % interval by quarter of the size of the kinematics.

    Size is the Euclidean norm over channels, each in its standard deviations if units differ.

    Args:
        truth, decoded, std: (T, D), finite, ``std`` >= 0.
        units: units of the channels.
        of: the kinematics whose size is used.
    """
    alike, scale = len(set(units)) == 1, speed_unit(truth, units)
    speed = np.linalg.norm((decoded if of == "decoded" else truth) / scale, axis=1)
    edges = np.unique(np.quantile(speed, (0.25, 0.5, 0.75, 1.0), method="higher"))
    band = np.searchsorted(edges, speed)  # equal speeds share a band
    parts = [np.flatnonzero(band == i) for i in range(len(edges))]
    sizes = [
        [float(np.sqrt((x[part] ** 2).mean())) for x in (std, truth - decoded)] for part in parts
    ]
    return BySpeed(
        tuple(float(edge) for edge in edges),
        tuple(calibration(truth[part], decoded[part], std[part], (0.9,))[0] for part in parts),
        f"size of the {of} kinematics ({units[0] if alike else 'standard deviations'})",
        tuple(stated / actual if actual else np.nan for stated, actual in sizes),
    )


def speed_unit(kinematics: Array, units: tuple[str, ...]) -> Array:
    """Return the divisors (D,) of channels in a speed: their standard deviations if units differ.

    Args:
        kinematics: (T, D), finite.
    """
    one = np.ones(kinematics.shape[1])
    return one if len(set(units)) == 1 else kinematics.std(axis=0) + 1e-300


def _methods(truth: Array, decoded: Array, names: tuple[str, ...]) -> dict[str, float]:
    each = zip(names, r2_per_axis(truth, decoded), strict=True)
    return {"r2": r2(truth, decoded)} | {f"r2.{name}": float(v) for name, v in each}


def histories(bin_width: float, n_units: int) -> tuple[int, ...]:
    """Return the lengths of history, in bins, that a Wiener filter may choose from."""
    most = max(1, MOST_WEIGHTS // n_units)
    return tuple(sorted({min(max(1, round(s / bin_width)), most) for s in HISTORIES_S}))


def fit_wiener(
    recording: Recording, split: SplitSpec, choices: tuple[int, ...] | None = None
) -> WienerFilter:
    """Fit the Wiener filter on the train span; choose history and penalty on the validation span.

    Args:
        choices: lengths of history to choose from; None for ``histories``.

    Raises:
        ShapeError: the recording has no kinematics, or a span has no valid bin.
    """
    if recording.kinematics is None:
        raise ShapeError("recording.kinematics", expected="a behaviour to decode", got="none")
    tried = choices or histories(recording.bin_width, recording.n_units)
    made = [_wiener_of(recording, split, history) for history in tried]
    return max(made, key=lambda wiener: wiener.validation_r2)


def _wiener_of(recording: Recording, split: SplitSpec, history: int) -> WienerFilter:
    train, validation = split.span("train", recording), split.span("validation", recording)
    spaced, place = spaced_out(recording, history)
    assert spaced.kinematics is not None  # checked by the caller
    counts = spaced.counts.astype(np.float64)
    # as the filter treats missing bins
    counts = np.where(spaced.mask(), counts, spaced.mean_counts(0, len(spaced)))
    return WienerFilter.fit(
        counts,
        spaced.kinematics,
        train=(place[train[0]], place[train[1] - 1] + 1) if train[1] > train[0] else train,
        validation=(place[validation[0]], place[validation[1] - 1] + 1)
        if validation[1] > validation[0]
        else validation,
        history=history,
        valid=spaced.scored,
    )


def wiener_decodes(
    wiener: WienerFilter, recording: Recording, counts: Array, bins: tuple[int, int]
) -> Array:
    """Return decodes (stop - start, D) of bins [start, stop), without history across segments.

    Args:
        counts: (T, N) counts of the whole ``recording``, with missing values replaced.
    """
    return np.concatenate(
        [
            wiener.predict(counts[whole:b], a - whole, b - whole)
            for a, b in recording.segments(*bins)
            for whole in [segment_start(recording, a)]
        ]
    )


def score_decodes(
    recording: Recording,
    split: SplitSpec,
    *,
    bins: tuple[int, int],
    decoded: NDArray[Any],
    std: NDArray[Any] | None = None,
    seen: NDArray[np.bool_] | None = None,
    baseline: bool = True,
    others: Mapping[str, NDArray[Any]] | None = None,
    others_std: Mapping[str, NDArray[Any]] | None = None,
    fit_on: Recording | None = None,
) -> Scores:
    """Score decodes of the bins [a, b) of ``recording``, and those of a Wiener filter.

    Args:
        recording: the whole recording, with only the model's units, and kinematics.
        split: split of the recording; the Wiener filter is fitted on its train span.
        bins: half-open range to score, T = b - a.
        decoded: (T, D); rows that are not finite were not answered and are excluded for both.
        std: (T, D) standard deviations, or None.
        seen: bool (T,), False for bins that the decoder did not receive; the Wiener filter receives
            the mean there. None means all.
        baseline: whether to fit and score the Wiener filter.
        others: (T, D) decodes of further decoders by name, scored on the same bins and listed in
            this order; ``others_std``: their standard deviations where they state them.
        fit_on: recording for the Wiener filter and ``split``; None for ``recording``.

    Raises:
        ShapeError: there are no kinematics or no bin to score, or shapes are wrong.
    """
    truth_all = recording.kinematics
    if truth_all is None:
        raise ShapeError("recording.kinematics", expected="a behaviour to score on", got="none")
    start, stop = bins
    truth = truth_all[start:stop]
    if decoded.shape != truth.shape or (std is not None and std.shape != truth.shape):
        got = decoded.shape if std is None else (decoded.shape, std.shape)
        raise ShapeError("decoded", expected=str(truth.shape), got=str(got))
    rows = recording.scored[start:stop] & np.isfinite(decoded).all(axis=1)
    if not rows.any():
        raise ShapeError("decoded", expected="at least one valid, answered bin", got="none")
    names = recording.kinematic_names
    methods = {OURS: _methods(truth[rows], decoded[rows], names)}
    still = [name for name, m in zip(names, varies(truth[rows]), strict=True) if not m]
    notes = (f"No movement in these bins, so no R2: {', '.join(still)}.",) if still else ()
    # a constant channel is always covered and carries no information
    live = varies(truth_all) if varies(truth_all).any() else np.ones(len(names), dtype=bool)
    actual: tuple[float, ...] = ()
    by_speed: BySpeed | None = None
    by_decoded: BySpeed | None = None
    if std is not None:
        seen_here = truth[rows][:, live], decoded[rows][:, live], std[rows][:, live]
        actual = calibration(*seen_here)
        methods[OURS]["coverage_90"] = actual[LEVELS.index(0.9)]
        units = tuple(np.array(recording.kinematic_units)[live].tolist())
        by_speed = coverage_by_speed(*seen_here, units)
        by_decoded = coverage_by_speed(*seen_here, units, "decoded")
    wiener: Array | None = None
    if baseline:
        recording = recording.without_features()
        try:
            own = recording if fit_on is None else fit_on.without_features()
            fitted = fit_wiener(own, split)
        except ShapeError as error:
            notes += (f"No Wiener filter beside it: {error}.",)
        else:
            counts = recording.counts.astype(np.float64)
            unseen = ~recording.mask()
            counts[unseen] = np.broadcast_to(fitted.mean, counts.shape)[unseen]
            if seen is not None:
                counts[start:stop][~seen] = fitted.mean
            wiener = wiener_decodes(fitted, recording, counts, bins)
            methods[WIENER] = _methods(truth[rows], wiener[rows], names)
    decodes: dict[str, NDArray[Any]] = {OURS: decoded}
    if wiener is not None:
        decodes[WIENER] = wiener
    for name, values in (others or {}).items():
        if values.shape != truth.shape or not np.isfinite(values[rows]).all():
            raise ShapeError(
                f"others.{name}", expected=f"finite {truth.shape}", got=str(values.shape)
            )
        decodes[name] = values
        methods[name] = _methods(truth[rows], values[rows], names)
        if others_std is not None and name in others_std:
            theirs = truth[rows][:, live], values[rows][:, live], others_std[name][rows][:, live]
            methods[name]["coverage_90"] = calibration(*theirs, (0.9,))[0]
    intervals, resampled = _intervals(recording.slice(start, stop), truth, decodes, rows)
    return Scores(
        methods=methods,
        n=int(rows.sum()),
        nominal=LEVELS if actual else (),
        actual=actual,
        wiener=wiener,
        by_speed=by_speed,
        by_decoded_speed=by_decoded,
        notes=notes,
        intervals=intervals,
        resampled=resampled,
    )


def _intervals(
    part: Recording, truth: Array, decodes: Mapping[str, NDArray[Any]], rows: NDArray[np.bool_]
) -> tuple[dict[str, dict[str, tuple[float, float]]], str]:
    made = pieces(rows, part.bin_width, part.trials)
    moves = varies(truth[rows])
    if made.number < FEWEST or not moves.any():
        return {}, ""
    draws = {
        name: r2_draws(truth[rows][:, moves], d[rows][:, moves], made.of, made.number)
        for name, d in decodes.items()
    }
    intervals: dict[str, dict[str, tuple[float, float]]] = {}
    for name, values in draws.items():
        both = {"r2": interval(values)}
        if name != OURS:
            both["ahead"] = interval(draws[OURS] - values)
        intervals[name] = {key: found for key, found in both.items() if found is not None}
    return intervals, f"{made.number} {made.what}"
