"""Conversion of a session with spike times to a ``Recording``, continuous or by trials.

All readers of spike times return a ``RecordedSession`` that is converted here, so that bins, lag,
gaps and trials mean the same for any file format.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilqr_vae.errors import RecordingError, number_of
from ilqr_vae.recordings.binning import (
    EDGE,
    bin_spikes,
    bin_windows,
    bins_of,
    full_turn,
    left_edges,
    resample,
)
from ilqr_vae.recordings.checks import (
    MAX_GAP_SECONDS,
    MOST_VALUES,
    fill_gaps,
    inside_intervals,
    measured,
)
from ilqr_vae.recordings.features import with_features
from ilqr_vae.recordings.plausible import SURELY
from ilqr_vae.recordings.recording import Recording, RecordingWarning, Trials
from ilqr_vae.recordings.session import Moving, RecordedSession, plausible, span_of
from ilqr_vae.recordings.spec import RecordingSpec
from ilqr_vae.recordings.trials import (
    TrialRows,
    condition_of,
    cut,
    events_of,
    on_clock,
    plan,
    trials_of,
)

_MOST_BINS = 100_000_000

Array = NDArray[np.float64]


def recording_of(session: RecordedSession, spec: RecordingSpec) -> Recording:
    """Check the session (``plausible``) and bin it by ``spec.mode``.

    Raises:
        RecordingError: no spike falls inside the bins, there are more bins than any recording has,
            kinematics are missing nearly everywhere, trials are asked for that are not there, or
            times that cannot be (``plausible``).
    """
    trials = spec.mode == "trials"
    if session.table is not None:
        table, odd = on_clock(session.table, spec)
        session = replace(session, table=table, warnings=(*session.warnings, *odd))
    elif trials:
        raise RecordingError(
            "data.mode", expected="a file with a trials table for 'trials'", got="no trials"
        )
    session = plausible(session, spec)
    if session.moving is not None:
        session = replace(session, moving=session.moving.unwrapped())
    if session.counts is not None:
        begin = left_edges(session.begin, spec.width, len(session.counts))
        made = _finish(session.counts, begin, session, spec)
        return cut_on_grid(made, session.table, spec) if trials else made
    made = _trials(session, spec) if trials else _continuous(session, spec)
    if not made.counts.any():
        times = session.spike_times
        raise RecordingError(
            session.spikes_field,
            expected=f"spikes in the bins, the first of which begins at {made.start_time:g} s",
            got="none at all" if not any(len(t) for t in times) else _elsewhere(times),
        )
    return made


def _elsewhere(times: Sequence[NDArray[Any]]) -> str:
    first, last = span_of(times)
    return f"all of them elsewhere, from {first:g} to {last:g} s"


def possible(n_bins: float, n_units: int, width: float) -> None:
    """Raise RecordingError if there is no bin, or more than any recording has."""
    if not n_bins >= 1:  # also for NaN
        raise RecordingError("recording", expected=f"one bin of {width:g} s or more", got="none")
    if n_bins > _MOST_BINS or n_bins * n_units > MOST_VALUES:
        raise RecordingError(
            "data.bin_width",
            expected=f"so wide that there are at most {_MOST_BINS:g} bins and {MOST_VALUES:g} "
            "counts (are the recording's times in seconds?)",
            got=f"{width:g} s, which makes {n_bins:.4g} bins x {number_of(n_units, 'unit')}",
        )


def _continuous(session: RecordedSession, spec: RecordingSpec) -> Recording:
    width, moving = spec.width, session.moving
    if moving is not None:
        start, end = float(moving.times[0]), moving.end
    else:
        start, end = _of_spikes(session, width)
    possible((end - start) / width + EDGE, len(session.spike_times), width)
    n_bins = int(bins_of(np.array([end]), start, width)[0])
    counts = bin_spikes(session.spike_times, start, width, n_bins)
    begin = left_edges(start, width, n_bins)
    return _finish(counts, begin, session, spec)


def _of_spikes(session: RecordedSession, width: float) -> tuple[float, float]:
    """Return start and end of the bins in seconds, from spikes only.

    They begin at 0 of the file's clock; where it is said when units were recorded, or the stretch
    before the first spike is longer than ``plausible.SURELY`` spikes, at the multiple of the bin
    width before that.
    """
    times = session.spike_times
    if not any(len(t) for t in times):
        return 0.0, width
    first, last = span_of(times)
    pairs = np.concatenate(session.observed) if session.observed else np.empty((0, 2))
    stated = pairs[:, 0][np.isfinite(pairs[:, 0])]
    if len(stated):
        return width * np.floor(min(first, stated.min()) / width + EDGE), last + width
    rate = sum(len(t) for t in times) / max(last - first, width)
    if 0 <= first <= max(SURELY / rate, 1.0):
        return 0.0, last + width
    return width * np.floor(first / width + EDGE), last + width


def _finish(
    counts: NDArray[np.uint16], begin: Array, session: RecordedSession, spec: RecordingSpec
) -> Recording:
    """Build a continuous recording of counts (T, N) whose bins start at ``begin`` (T,) seconds."""
    width, start, n_bins = spec.width, float(begin[0]), len(begin)
    valid, observed = _observed(session, begin, width)
    if session.invalid is not None:
        valid = valid & ~_touched(session.invalid, start, width, n_bins)
    if not valid.any():
        text = "All bins lie in invalid_times or outside of obs_intervals: none can be used."
        session = replace(session, warnings=(*session.warnings, RecordingWarning("masked", text)))
    kinematics: Array | None = None
    scored = valid
    if session.moving is not None:
        moving = session.moving
        times = moving.times - spec.lag
        if times[-1] < start or times[0] > start + width * n_bins:
            raise RecordingError(
                f"{moving.path}.timestamps",
                expected=f"times within the bins, {start:g} to {start + width * n_bins:g} s",
                got=f"{times[0]:g} to {times[-1]:g} s",
            )
        raw = resample(moving.values, times, start, width, n_bins)
        # a pause of both the units and the kinematics is not a gap in either
        wanted = valid & (counts.any(axis=1) | np.isfinite(raw).all(axis=1))
        filled, believed = fill_gaps(raw, width, moving.path, wanted)
        kinematics = moving.wrapped(filled)
        lost = int((valid & ~believed).sum())
        if lost:
            text = (
                f"{lost * width:.4g} of {n_bins * width:.4g} s lie in gaps of {moving.path} above "
            )
            text += f"{MAX_GAP_SECONDS:g} s: these bins are masked."
            missing = RecordingWarning("kinematics-missing", text)
            session = replace(session, warnings=(*session.warnings, missing))
        valid = valid & believed
        scored = valid & measured(raw, _bridged(moving, width))
        scored = scored & _scored(session, spec, start, n_bins)
    names, units = _channels(session.moving)
    made = Recording(
        counts=counts,
        bin_width=width,
        unit_names=session.unit_names,
        kinematics=kinematics,
        kinematic_names=names,
        kinematic_units=units,
        start_time=start,
        trials=None if session.table is None else trials_of(session.table, spec, start, n_bins),
        valid=valid,
        scored=scored,
        observed=observed,
        held_out=session.held_out,
        notes=session.notes,
        warnings=session.warnings,
    )
    made = with_features(made, session.features, [(start, n_bins)])
    return differentiated(made, session.moving) if spec.differentiate else made


def _channels(moving: Moving | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return ((), ()) if moving is None else (moving.names, moving.units)


def _touched(intervals: Array, start: float, width: float, n_bins: int) -> NDArray[np.bool_]:
    bad = np.zeros(n_bins, dtype=bool)
    # an interval may be unbounded: clip it to the bins
    for begin, end in intervals.clip(start, start + width * n_bins):
        if end > begin:
            first = int(bins_of(np.array([begin]), start, width)[0])
            last = int(np.ceil((end - start) / width - EDGE))
            bad[max(first, 0) : max(last, 0)] = True
    return bad


def _scored(
    session: RecordedSession, spec: RecordingSpec, start: float, n_bins: int
) -> NDArray[np.bool_]:
    mark = session.scored
    if mark is None:
        return np.ones(n_bins, dtype=bool)
    share = resample(mark.values, mark.times - spec.lag, start, spec.width, n_bins)[:, 0]
    return np.nan_to_num(share) > 0.5


def _observed(
    session: RecordedSession, begin: Array, width: float
) -> tuple[NDArray[np.bool_], NDArray[np.bool_] | None]:
    """Return bins in which any unit was recorded, and which units were; None for all."""
    if session.observed is None:
        return np.ones(len(begin), dtype=bool), None
    alike: dict[bytes, NDArray[np.bool_]] = {}
    columns: list[NDArray[np.bool_]] = []
    for intervals in session.observed:
        key = intervals.tobytes()
        if key not in alike:
            alike[key] = inside_intervals(intervals, begin, begin + width)
        columns.append(alike[key])
    each = np.stack(columns, axis=1)
    valid = np.asarray(each.any(axis=1), dtype=bool)
    if not valid.any():
        raise RecordingError(
            "units.obs_intervals", expected="intervals that hold some whole bin", got="none"
        )
    return valid, None if len(alike) == 1 else each


# ---- trials ------------------------------------------------------------------------------------


def _trials(session: RecordedSession, spec: RecordingSpec) -> Recording:
    assert session.table is not None  # see recording_of
    width, moving = spec.width, session.moving
    planned, odd = plan(session.table, spec)
    possible(int(planned.bins.sum()), len(session.spike_times), width)
    pieces = [
        _piece(session, spec, b, int(n)) for b, n in zip(planned.begin, planned.bins, strict=True)
    ]
    keep = np.array([piece is not None for piece in pieces], dtype=bool)
    if not keep.any():
        raise RecordingError(
            "recording.trials",
            expected="at least one trial with kinematics",
            got=f"{len(keep)} without"
            + ("" if moving is None else f" any of {moving.path}")
            + "".join(f"; {w.text}" for w in session.warnings if w.name.startswith("event")),
        )
    planned = planned.keeping(keep, "have no kinematics")
    counts = bin_windows(session.spike_times, planned.begin, planned.bins, width)
    begin = np.concatenate(
        [left_edges(b, width, n) for b, n in zip(planned.begin, planned.bins, strict=True)]
    )
    valid, observed = _observed(session, begin, width)
    made_of = [piece for piece in pieces if piece is not None]
    names, units = _channels(moving)
    starts = np.concatenate([[0], np.cumsum(planned.bins)])
    if session.invalid is not None:
        for a, n, t in zip(starts[:-1], planned.bins, planned.begin, strict=True):
            valid[a : a + n] &= ~_touched(session.invalid, float(t), width, int(n))
    made = Recording(
        counts=counts,
        bin_width=width,
        unit_names=session.unit_names,
        kinematics=None if moving is None else np.concatenate([k for k, _ in made_of]),
        kinematic_names=names,
        kinematic_units=units,
        start_time=float(planned.begin[0]),
        trials=Trials(
            start=starts[:-1],
            stop=starts[1:],
            condition=condition_of(session.table, planned.rows, spec),
            events={
                name: starts[:-1] + (when - planned.begin) / width
                for name, when in events_of(session.table, planned.rows, spec).items()
            },
            begin=planned.begin,
        ),
        valid=valid,
        scored=np.concatenate([s for _, s in made_of]),
        observed=observed,
        breaks=starts[1:-1],
        held_out=session.held_out,
        bounds=planned.bounds,
        notes=session.notes + planned.notes,
        warnings=session.warnings + odd,
    )
    windows = list(zip(planned.begin.tolist(), planned.bins.tolist(), strict=True))
    made = with_features(made, session.features, windows)
    return differentiated(made, moving) if spec.differentiate else made


def _piece(
    session: RecordedSession, spec: RecordingSpec, begin: float, n_bins: int
) -> tuple[Array, NDArray[np.bool_]] | None:
    """Return kinematics of a trial's window and which bins had them; None if a channel has none.

    Gaps have their length in the continuous recording: samples up to ``MAX_GAP_SECONDS`` beyond the
    window are used too.
    """
    moving, width = session.moving, spec.width
    if moving is None:
        return np.zeros((n_bins, 0)), np.ones(n_bins, dtype=bool)
    times = moving.times - spec.lag
    reach = math.ceil(MAX_GAP_SECONDS / width)
    before = min(reach, max(0, math.ceil((begin - times[0]) / width)))
    after = min(reach, max(0, math.ceil((times[-1] - begin) / width) - n_bins))
    low, n_wide = begin - before * width, before + n_bins + after
    edge = 0.5 * moving.interval
    rows = slice(*np.searchsorted(times, [low - edge, low + n_wide * width + edge]).tolist())
    raw = resample(moving.values[rows], times[rows], low, width, n_wide, interval=moving.interval)
    if not np.isfinite(raw).any(axis=0).all():
        return None
    filled, believed = fill_gaps(raw, width, moving.path, np.zeros(n_wide, dtype=bool))
    known = (believed & measured(raw, _bridged(moving, width)))[before : before + n_bins]
    if not known.any():
        return None
    values = moving.wrapped(filled[before : before + n_bins])
    return values, known & _scored(session, spec, begin, n_bins)


def _bridged(moving: Moving, width: float) -> int:
    """Return how many consecutive bins may lack a sample because of jitter."""
    return 1 if moving.interval > 0.5 * width else 0


def cut_on_grid(recording: Recording, table: TrialRows | None, spec: RecordingSpec) -> Recording:
    """Cut the trials of a binned recording at the nearest edges of its bins.

    Raises:
        RecordingError: there are no trials, or none lies inside the recording.
    """
    assert table is not None  # see recording_of
    planned, odd = plan(table, spec)
    first = np.rint((planned.begin - recording.start_time) / spec.width).astype(np.int64)
    inside = (first >= 0) & (first + planned.bins <= len(recording))
    if not inside.any():
        raise RecordingError(
            "recording.trials", expected="trials inside the recording", got="none there"
        )
    planned = planned.keeping(inside, "are not inside the recording")
    condition = condition_of(table, planned.rows, spec)
    events = {
        name: (when - recording.start_time) / spec.width
        for name, when in events_of(table, planned.rows, spec).items()
    }
    made = cut(recording, first[inside], planned.bins, condition, events)
    return replace(
        made,
        bounds=planned.bounds,
        notes=recording.notes + planned.notes,
        warnings=recording.warnings + odd,
        start_time=float(planned.begin[0]),
    )


def differentiated(recording: Recording, moving: Moving | None = None) -> Recording:
    """Differentiate the kinematics within each segment; names and units reflect it.

    Args:
        moving: what they were resampled from, which knows the channels that wrap.
    """
    if recording.kinematics is None:
        return recording
    rate = np.zeros_like(recording.kinematics)
    if moving is not None:
        turns = moving.turns
    else:
        each = zip(recording.kinematics.T, recording.kinematic_units, strict=True)
        turns = np.array([full_turn(column, unit)[0] for column, unit in each])
    for a, b in recording.segments():
        if b - a > 1:
            part = recording.kinematics[a:b].copy()
            for d in np.flatnonzero(turns):
                part[:, d] = np.unwrap(part[:, d], period=turns[d])
            rate[a:b] = np.gradient(part, recording.bin_width, axis=0)
    return replace(
        recording,
        kinematics=rate,
        kinematic_names=tuple(f"d{name}/dt" for name in recording.kinematic_names),
        kinematic_units=tuple(f"{unit}/s" for unit in recording.kinematic_units),
    )
