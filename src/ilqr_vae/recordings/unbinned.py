"""A session with spike times as a ``Recording``: its whole course, or its trials one by one.

Every reader of spike times fills a ``Session`` and hands it here, so that bins, lag, gaps and
trials mean the same whatever the file.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilqr_vae.errors import RecordingError
from ilqr_vae.recordings.binning import EDGE, bin_spikes, bin_windows, bins_of, left_edges, resample
from ilqr_vae.recordings.checks import fill_gaps, inside_intervals
from ilqr_vae.recordings.recording import Recording, Trials
from ilqr_vae.recordings.spec import RecordingSpec
from ilqr_vae.recordings.trials import Table, condition_of, cut, events_of, plan, trials_of

_MOST_BINS, _MOST_COUNTS = 100_000_000, 1_000_000_000

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Moving:
    """A behaviour series.

    Attributes:
        path: what to call it in errors.
        values: (K, D), NaN where missing.
        times: (K,), seconds, increasing: when what each sample covers begins.
        interval: seconds between samples.
        names, units: D each.
    """

    path: str
    values: Array
    times: Array
    interval: float
    names: tuple[str, ...]
    units: tuple[str, ...]

    @property
    def end(self) -> float:
        """Seconds, where the last sample ends."""
        return float(self.times[-1]) + self.interval


@dataclass(frozen=True, slots=True)
class Session:
    """What a file holds, in seconds.

    Attributes:
        spike_times: increasing, one array a unit.
        unit_names: one a unit.
        held_out: names of units kept back for co-smoothing.
        observed: (k, 2) intervals a unit in which it was recorded; None: all, always.
        moving: the behaviour, or None.
        scored: one channel at times of its own: nonzero where behaviour is to be scored; or None.
        table: trials, or None.
        invalid: (M, 2) intervals in which nothing is to be believed.
        notes: as ``Recording.notes``.
    """

    spike_times: list[NDArray[Any]]
    unit_names: tuple[str, ...]
    held_out: tuple[str, ...] = ()
    observed: list[Array] | None = None
    moving: Moving | None = None
    scored: Moving | None = None
    table: Table | None = None
    invalid: Array | None = None
    notes: tuple[str, ...] = ()


def recording_of(session: Session, spec: RecordingSpec) -> Recording:
    """The session on bins, as ``spec.mode`` asks.

    Raises:
        RecordingError: no spike falls inside the bins, there are more bins than any recording has,
            kinematics are missing nearly everywhere, or trials are asked for that are not there.
    """
    made = _trials(session, spec) if spec.mode == "trials" else _continuous(session, spec)
    if not made.counts.any():
        times = session.spike_times
        raise RecordingError(
            "units.spike_times",
            expected=f"spikes in the bins, the first of which begins at {made.start_time:g} s",
            got="none at all" if not any(len(t) for t in times) else _elsewhere(times),
        )
    return made


def _elsewhere(times: list[NDArray[Any]]) -> str:
    first = min(float(t[0]) for t in times if len(t))
    last = max(float(t[-1]) for t in times if len(t))
    return f"all of them elsewhere, from {first:g} to {last:g} s"


def possible(n_bins: float, n_units: int, width: float) -> None:
    """Raises RecordingError where there is no bin, or more than any recording has."""
    if not n_bins >= 1:  # nor where it is NaN
        raise RecordingError("recording", expected=f"one bin of {width:g} s or more", got="none")
    if n_bins > _MOST_BINS or n_bins * n_units > _MOST_COUNTS:
        raise RecordingError(
            "data.bin_width",
            expected=f"so wide that there are at most {_MOST_BINS:g} bins and {_MOST_COUNTS:g} "
            "counts (are the recording's times in seconds?)",
            got=f"{width:g} s, which makes {n_bins:.4g} bins x {n_units} units",
        )


def _continuous(session: Session, spec: RecordingSpec) -> Recording:
    width, moving = spec.bin_width, session.moving
    if moving is not None:
        start, end = float(moving.times[0]), moving.end
    else:
        last = max((float(t[-1]) for t in session.spike_times if len(t)), default=0.0)
        start, end = 0.0, last + width
    possible((end - start) / width + EDGE, len(session.spike_times), width)
    n_bins = int(bins_of(np.array([end]), start, width)[0])
    counts = bin_spikes(session.spike_times, start, width, n_bins)
    begin = left_edges(start, width, n_bins)
    return finish(counts, begin, session, spec)


def finish(
    counts: NDArray[np.uint16], begin: Array, session: Session, spec: RecordingSpec
) -> Recording:
    """A continuous recording of counts (T, N) whose bins begin at ``begin`` (T,) seconds.

    Raises:
        RecordingError: as ``recording_of``.
    """
    width, start, n_bins = spec.bin_width, float(begin[0]), len(begin)
    valid, observed = _observed(session, begin, width)
    kinematics: Array | None = None
    scored = valid
    if session.moving is not None:
        moving = session.moving
        raw = resample(moving.values, moving.times - spec.lag, start, width, n_bins)
        kinematics, believed = fill_gaps(raw, width, moving.path)
        valid = valid & believed
        scored = valid & _scored(session, spec, start, n_bins)
    if session.invalid is not None:
        valid = valid & ~_touched(session.invalid, start, width, n_bins)
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
    )
    return differentiated(made) if spec.differentiate else made


def _channels(moving: Moving | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return ((), ()) if moving is None else (moving.names, moving.units)


def _touched(intervals: Array, start: float, width: float, n_bins: int) -> NDArray[np.bool_]:
    bad = np.zeros(n_bins, dtype=bool)
    # one may be without end: the bins are all that matters
    for begin, end in intervals.clip(start, start + width * n_bins):
        if end > begin:
            first = int(bins_of(np.array([begin]), start, width)[0])
            last = int(np.ceil((end - start) / width - EDGE))
            bad[max(first, 0) : max(last, 0)] = True
    return bad


def _scored(session: Session, spec: RecordingSpec, start: float, n_bins: int) -> NDArray[np.bool_]:
    mark = session.scored
    if mark is None:
        return np.ones(n_bins, dtype=bool)
    share = resample(mark.values, mark.times - spec.lag, start, spec.bin_width, n_bins)[:, 0]
    return np.nan_to_num(share) > 0.5


def _observed(
    session: Session, begin: Array, width: float
) -> tuple[NDArray[np.bool_], NDArray[np.bool_] | None]:
    """Bins in which any unit was recorded, and which units were; None where all of them were."""
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


def _trials(session: Session, spec: RecordingSpec) -> Recording:
    if session.table is None:
        raise RecordingError(
            "data.mode", expected="a file with a trials table for 'trials'", got="no trials"
        )
    width, moving = spec.bin_width, session.moving
    planned = plan(session.table, spec)
    possible(int(planned.bins.sum()), len(session.spike_times), width)
    pieces = [
        _piece(session, spec, b, int(n)) for b, n in zip(planned.begin, planned.bins, strict=True)
    ]
    keep = np.array([piece is not None for piece in pieces], dtype=bool)
    if not keep.any():
        raise RecordingError(
            "recording.trials",
            expected="at least one trial with kinematics",
            got=f"{len(keep)} without" + ("" if moving is None else f" any of {moving.path}"),
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
    )
    return differentiated(made) if spec.differentiate else made


def _piece(
    session: Session, spec: RecordingSpec, begin: float, n_bins: int
) -> tuple[Array, NDArray[np.bool_]] | None:
    """Kinematics of one trial's window and which bins had them; None where some channel has none.

    Only samples inside the window (moved by the lag) and half an interval around are looked at.
    """
    moving = session.moving
    if moving is None:
        return np.zeros((n_bins, 0)), np.ones(n_bins, dtype=bool)
    times = moving.times - spec.lag
    edge = 0.5 * moving.interval
    first = int(np.searchsorted(times, begin - edge))
    last = int(np.searchsorted(times, begin + n_bins * spec.bin_width + edge))
    raw = resample(
        moving.values[first:last],
        times[first:last],
        begin,
        spec.bin_width,
        n_bins,
        interval=moving.interval,
    )
    finite = np.isfinite(raw)
    if not finite.any(axis=0).all():
        return None
    rows = np.arange(n_bins)
    for channel in range(raw.shape[1]):
        good = finite[:, channel]
        raw[~good, channel] = np.interp(rows[~good], rows[good], raw[good, channel])
    return raw, finite.all(axis=1) & _scored(session, spec, begin, n_bins)


def cut_on_grid(recording: Recording, table: Table | None, spec: RecordingSpec) -> Recording:
    """The trials of a recording already binned, cut at the nearest edges of its bins.

    Raises:
        RecordingError: there are no trials, or none lies inside the recording.
    """
    if table is None:
        raise RecordingError(
            "data.mode", expected="a file with a trials table for 'trials'", got="no trials"
        )
    planned = plan(table, spec)
    first = np.rint((planned.begin - recording.start_time) / spec.bin_width).astype(np.int64)
    inside = (first >= 0) & (first + planned.bins <= len(recording))
    if not inside.any():
        raise RecordingError(
            "recording.trials", expected="trials inside the recording", got="none there"
        )
    planned = planned.keeping(inside, "are not inside the recording")
    condition = condition_of(table, planned.rows, spec)
    events = {
        name: (when - recording.start_time) / spec.bin_width
        for name, when in events_of(table, planned.rows, spec).items()
    }
    made = cut(recording, first[inside], planned.bins, condition, events)
    return replace(
        made,
        bounds=planned.bounds,
        notes=recording.notes + planned.notes,
        start_time=float(planned.begin[0]),
    )


def differentiated(recording: Recording) -> Recording:
    """Kinematics as their rate of change, within each segment; names and units say so."""
    if recording.kinematics is None:
        return recording
    rate = np.zeros_like(recording.kinematics)
    for a, b in recording.segments():
        if b - a > 1:
            rate[a:b] = np.gradient(recording.kinematics[a:b], recording.bin_width, axis=0)
    return replace(
        recording,
        kinematics=rate,
        kinematic_names=tuple(f"d{name}/dt" for name in recording.kinematic_names),
        kinematic_units=tuple(f"{unit}/s" for unit in recording.kinematic_units),
    )
