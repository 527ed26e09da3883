"""Analyses of trials and of errors over time, for the figures and the JSON form of a report."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ilqr_vae.recordings.binning import bins_of
from ilqr_vae.recordings.checks import name_words
from ilqr_vae.scoring.aligned import aligned, mean_of, telling_apart

if TYPE_CHECKING:
    from ilqr_vae.report.data import ReportData

Array = NDArray[np.float64]

TARGET, MOVEMENT = "target onset", "movement onset"
BEFORE, AFTER = 0.4, 0.8
"""Window around an event in seconds."""
FEWEST_TRIALS = 3
MOST_CONDITIONS = 8
_SPEED_SHARE = 0.2
_ONE_WAY = 0.7
"""Length of the mean of unit vectors above which they count as one direction."""
_ON, _GO = {"on", "onset"}, {"go", "gocue"}
_MOVING = {"move", "moved", "moving", "movement"}


@dataclass(frozen=True, slots=True)
class Residuals:
    """Errors block by block: ``time`` (K,) seconds, middle of each; ``rms`` (K, D) what was missed
    by; ``stated`` (K, D), root mean square of the stated standard deviation, or empty."""

    time: Array
    rms: Array
    stated: Array


@dataclass(frozen=True, slots=True)
class Triggered:
    """Inputs around one event of K trials.

    Attributes:
        event: which.
        trials: K that had it.
        time: (L,), seconds from it.
        mean, error: (L,), mean over trials of the inputs' norm, and its standard error.
    """

    event: str
    trials: int
    time: Array
    mean: Array
    error: Array


@dataclass(frozen=True, slots=True)
class Psths:
    """Trial-averaged firing.

    Attributes:
        event: what trials are aligned to.
        time: (L,), seconds from it.
        conditions: C names, directions where the file has none; trials: how many of each had the
            event.
        units: columns of the recording shown: those whose modelled rates spread most over
            conditions, mean over time; over time where there is one condition.
        counted, modelled: (C, L, len(units)), spikes per second.
        correlation: over all units that fire and all conditions, of counted with modelled.
        n_units: how many those are.
        directions: radians, of each condition; NaN where its trials go several ways, or none.
    """

    event: str
    time: Array
    conditions: tuple[str, ...]
    trials: tuple[int, ...]
    units: tuple[int, ...]
    counted: Array
    modelled: Array
    correlation: float
    n_units: int
    directions: tuple[float, ...]


def summary(found: Residuals | Triggered | Psths | None) -> dict[str, Any] | None:
    """Return plain numbers."""
    return None if found is None else asdict(found)


def residuals(data: ReportData, blocks: int = 40) -> Residuals | None:
    """Return errors in up to ``blocks`` blocks of equal length; None without truth."""
    if data.decoded is None or data.truth is None or len(data.truth) < 2:
        return None
    n = len(data.truth)
    edges = np.unique(np.linspace(0, n, min(blocks, n) + 1).astype(int))

    def rms(values: Array) -> Array:
        rows: list[Array] = []
        for a, b in pairwise(edges.tolist()):
            good = np.isfinite(values[a:b]).all(axis=1)
            square = values[a:b][good] ** 2
            rows.append(
                np.sqrt(square.mean(axis=0)) if good.any() else np.full(values.shape[1], np.nan)
            )
        return np.stack(rows)

    time = data.start + data.bin_width * (edges[:-1] + edges[1:]) / 2
    stated = np.zeros((0, 0)) if data.decoded_std is None else rms(data.decoded_std)
    return Residuals(np.asarray(time, dtype=np.float64), rms(data.truth - data.decoded), stated)


def onsets(data: ReportData) -> dict[str, Array]:
    """Return target and movement onset of each trial in bins; NaN if there is none.

    The target by an event whose name has the word ``target`` with one of ``_ON``, else ``go``, else
    the trial's start. The movement by an event whose name has a word of moving, else, where
    velocity was measured, where the speed first passes a fifth of its greatest from the go on (an
    event with the word ``go``, else the target's, else the trial's start); NaN where it is above
    that there already, as the hand still moves from before. Left out where fewer
    than ``FEWEST_TRIALS`` have one.
    """
    trials = data.trials
    if trials is None or not len(trials):
        return {}
    found: dict[str, Array] = {}
    names = list(trials.events)
    said = {name: set(name_words(name)) for name in names}
    go = [n for n in names if said[n] & _GO]
    target = [n for n in names if "target" in said[n] and said[n] & _ON] or go
    if target:
        found[TARGET] = np.asarray(trials.events[target[0]], dtype=np.float64)
    else:
        found["trial start"] = trials.start.astype(np.float64)
    moving = [n for n in names if said[n] & _MOVING]
    if moving:
        found[MOVEMENT] = np.asarray(trials.events[moving[0]], dtype=np.float64)
    elif data.truth is not None and any(u.strip().endswith("/s") for u in data.units[:2]):
        since = trials.start.astype(np.float64)
        for name in [*target[:1], *go[:1]]:
            at = np.asarray(trials.events[name], dtype=np.float64)
            since = np.where(np.isfinite(at), np.maximum(at, trials.start), since)
        moved = _from_speed(data.truth[:, :2], since, trials.stop)
        if np.isfinite(moved).sum() >= FEWEST_TRIALS:
            found[MOVEMENT] = moved
    return found


def _from_speed(velocity: Array, since: Array, stop: NDArray[np.int64]) -> Array:
    when = np.full(len(since), np.nan)
    for k, (a, b) in enumerate(zip(bins_of(since, 0.0, 1.0).tolist(), stop.tolist(), strict=True)):
        speed = np.linalg.norm(velocity[a:b], axis=1)
        fast = speed > _SPEED_SHARE * speed.max(initial=0.0)
        if fast.any() and not fast[0]:
            when[k] = a + int(np.argmax(fast))
    return when


def _around(data: ReportData, values: Array, at: Array) -> tuple[Array, Array]:
    """(L,) seconds and (K, L, ...) values around each trial's event; NaN beyond the trial."""
    assert data.trials is not None  # there are events, so there are trials
    ranges = data.trials.start, data.trials.stop
    return aligned(values, at, data.bin_width, (-BEFORE, AFTER), ranges)


def triggered_inputs(data: ReportData) -> list[Triggered]:
    """Return inputs around target and movement onset; empty without inputs or trials."""
    if data.inputs is None or data.inputs.shape[1] == 0:
        return []
    norm = np.sqrt((data.inputs**2).sum(axis=1))
    made: list[Triggered] = []
    for event, at in onsets(data).items():
        time, each = _around(data, norm[:, None], at)
        each = each[..., 0]
        known = np.isfinite(each).sum(axis=0)
        shown = known >= FEWEST_TRIALS
        if shown.any():
            mean = np.nanmean(each[:, shown], axis=0)
            spread = np.nanstd(each[:, shown], axis=0, ddof=1) / np.sqrt(known[shown])
            had = int(np.isfinite(each).any(axis=1).sum())
            made.append(Triggered(event, had, time[shown], mean, spread))
    return made


def psths(data: ReportData, shown: int = 6) -> Psths | None:
    """Trial-averaged counts and rates by condition; None without rates, trials or conditions of
    ``FEWEST_TRIALS`` trials."""
    trials = data.trials
    if data.rates is None or trials is None or len(trials) < FEWEST_TRIALS:
        return None
    events = onsets(data)
    event = MOVEMENT if MOVEMENT in events else next(iter(events))
    _, angles = outward(data)
    kinds = np.array(trials.condition or _sectors(angles) or ("all",) * len(trials))
    had = np.isfinite(events[event])
    names, number = np.unique(kinds[had], return_counts=True)
    order = np.argsort(-number, kind="stable")[:MOST_CONDITIONS]
    chosen = sorted(str(names[i]) for i in order if number[i] >= FEWEST_TRIALS)
    if not chosen:
        return None
    time, counts = _around(data, np.asarray(data.counts, dtype=np.float64), events[event])
    _, rates = _around(data, data.rates, events[event])
    counted, modelled = (
        np.stack([mean_of(values[kinds == name], FEWEST_TRIALS) for name in chosen])
        / data.bin_width
        for values in (counts, rates)
    )
    known = np.isfinite(counted).all(axis=(0, 2)) & np.isfinite(modelled).all(axis=(0, 2))
    if known.sum() < 2:
        return None
    counted, modelled, time = counted[:, known], modelled[:, known], time[known]
    firing = counted.mean(axis=(0, 1)) > 0.5
    units = [u for u in telling_apart(modelled) if firing[u]][:shown]
    if not units:
        return None
    flat = [values[..., firing].ravel() for values in (counted, modelled)]
    correlation = (
        float(np.corrcoef(flat[0], flat[1])[0, 1]) if min(f.std() for f in flat) > 0 else np.nan
    )
    return Psths(
        event=event,
        time=time,
        conditions=tuple(chosen),
        trials=tuple(int((kinds[had] == name).sum()) for name in chosen),
        units=tuple(units),
        counted=counted[..., units],
        modelled=modelled[..., units],
        correlation=correlation,
        n_units=int(firing.sum()),
        directions=tuple(
            _direction(angles[kinds == name]) if len(angles) else float("nan") for name in chosen
        ),
    )


def outward(data: ReportData) -> tuple[NDArray[np.int64], Array]:
    """The outward part of each of K trials, where velocity was measured.

    Returns:
        (K, 2) half-open ranges of bins, from the trial's start to where the movement is farthest
        from where it began; and (K,) radians of the direction there. A trial that is not within the
        bins, or does not move, has an empty range and NaN.
    """
    trials, truth = data.trials, data.truth
    if trials is None or truth is None or not data.has_velocity:
        return np.zeros((0, 2), dtype=np.int64), np.zeros(0)
    ranges = np.zeros((len(trials), 2), dtype=np.int64)
    angles = np.full(len(trials), np.nan)
    for k, (a, b) in enumerate(zip(trials.start.tolist(), trials.stop.tolist(), strict=True)):
        if not 0 <= a < b <= len(data.counts):
            continue
        path = np.cumsum(np.nan_to_num(truth[a:b, :2]), axis=0)
        far = int(np.argmax(np.hypot(path[:, 0], path[:, 1])))
        if np.hypot(*path[far]) > 0:
            ranges[k] = a, a + far + 1
            angles[k] = np.arctan2(path[far, 1], path[far, 0])
    return ranges, angles


def _sectors(angles: Array) -> tuple[str, ...]:
    """Return the eighth of the circle of each direction."""
    return tuple(
        f"{45 * (round(a / (np.pi / 4)) % 8)}°" if np.isfinite(a) else "no movement"
        for a in angles.tolist()
    )


def _direction(angles: Array) -> float:
    """Return the mean direction of a condition's trials in radians; NaN if they differ."""
    known = angles[np.isfinite(angles)]
    mean = complex(np.exp(1j * known).mean()) if known.size else 0j
    return float(np.angle(mean)) if abs(mean) > _ONE_WAY else float("nan")
