"""The contents of a file in seconds, as all readers of spike times or counts return them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilqr_vae.errors import RecordingError
from ilqr_vae.recordings.binning import full_turn
from ilqr_vae.recordings.plausible import Reference, check_spikes, check_values
from ilqr_vae.recordings.plausible_trials import check_trials
from ilqr_vae.recordings.recording import RecordingWarning
from ilqr_vae.recordings.spec import RecordingSpec
from ilqr_vae.recordings.trials import TrialRows

Array = NDArray[np.float64]

_RARE = 5.0
"""Bins from one sample of behaviour to the next, above which there is a warning."""


@dataclass(frozen=True, slots=True)
class Moving:
    """A behaviour series.

    Attributes:
        path: name in errors.
        values: (K, D), NaN where missing.
        times: (K,), increasing, in seconds: start of the time that each sample covers.
        interval: seconds between samples.
        names, units: D each.
        circular: whether the channels are angles regardless of their units.
        turns: (D,), period of channels that wrapped and are unwrapped in ``values``, else 0.
        lows: (D,), where their range began.
    """

    path: str
    values: Array
    times: Array
    interval: float
    names: tuple[str, ...]
    units: tuple[str, ...]
    circular: bool = False
    turns: Array = field(default_factory=lambda: np.zeros(0))
    lows: Array = field(default_factory=lambda: np.zeros(0))

    def unwrapped(self) -> Moving:
        """Return angles without jumps at the ends of their range, for averages and
        interpolation.
        """
        values = self.values.copy()
        turns, lows = np.zeros(values.shape[1]), np.zeros(values.shape[1])
        for d, unit in enumerate(self.units):
            turns[d], lows[d] = full_turn(values[:, d], unit, circular=self.circular)
            if turns[d]:
                known = np.isfinite(values[:, d])
                values[known, d] = np.unwrap(values[known, d], period=turns[d])
        return replace(self, values=values, turns=turns, lows=lows) if turns.any() else self

    def wrapped(self, values: Array) -> Array:
        """Return values (T, D) of unwrapped channels in their original range."""
        for d in np.flatnonzero(self.turns):
            values[:, d] = self.lows[d] + (values[:, d] - self.lows[d]) % self.turns[d]
        return values

    @property
    def end(self) -> float:
        """End of the last sample in seconds."""
        return float(self.times[-1]) + self.interval


@dataclass(frozen=True, slots=True)
class RecordedSession:
    """The contents of a file, in seconds.

    Attributes:
        unit_names: one per unit.
        spike_times: one array per unit, in the file's order; or
        counts: uint16 (T, N) already binned, ``data.bin_width`` each, and
        begin: start of their first bin in seconds.
        spikes_field: name of the spikes in errors.
        held_out: names of units held out for co-smoothing.
        observed: (k, 2) intervals per unit in which it was recorded; None for always.
        moving: the behaviour, or None.
        features: continuous series to observe beside the spikes.
        scored: a channel with its own times, nonzero where behaviour is to be scored; or None.
        table: trials, or None.
        spike_trials: row in ``table`` of each spike, one array per unit, if the file states it.
        invalid: (M, 2) intervals of invalid data.
        notes, warnings: as in ``Recording``.
    """

    unit_names: tuple[str, ...]
    spike_times: Sequence[NDArray[Any]] = ()
    counts: NDArray[np.uint16] | None = None
    begin: float = 0.0
    spikes_field: str = "units.spike_times"
    held_out: tuple[str, ...] = ()
    observed: list[Array] | None = None
    moving: Moving | None = None
    features: tuple[Moving, ...] = ()
    scored: Moving | None = None
    table: TrialRows | None = None
    spike_trials: Sequence[NDArray[np.int64]] | None = None
    invalid: Array | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[RecordingWarning, ...] = ()

    def keeping(self, rows: NDArray[np.int64]) -> RecordedSession:
        """Return the session with only these units."""
        names = tuple(self.unit_names[i] for i in rows)
        trials, observed = self.spike_trials, self.observed
        return replace(
            self,
            unit_names=names,
            spike_times=[self.spike_times[i] for i in rows] if self.counts is None else (),
            counts=None if self.counts is None else self.counts[:, rows],
            held_out=tuple(name for name in self.held_out if name in set(names)),
            spike_trials=None if trials is None else [trials[i] for i in rows],
            observed=None if observed is None else [observed[i] for i in rows],
        )


def unrolled(session: RecordedSession) -> RecordedSession:
    """Convert spike times that are relative to the starts of trials to the session's clock.

    Units are then observed only in their trials. A spike that lies in another trial than its own is
    dropped, since that trial has it too.

    Raises:
        RecordingError: there are no trials or no spike times, the trial of each spike cannot be
            determined, or most spikes lie outside of their trials.
    """
    field, table = "data.trials.relative_spikes", session.table
    if table is None or session.counts is not None:
        got = "no trials" if table is None else "counts"
        raise RecordingError(field, expected="false, or spike times and trials", got=got)
    order = np.argsort(table.start, kind="stable")
    start, stop = table.start[order], table.stop[order]
    place = np.argsort(order)  # of each row of the table among the trials in order
    session, rows = _trials_of_spikes(session, len(start))
    before = np.concatenate(
        [[-np.inf], np.maximum.accumulate(np.nan_to_num(stop[:-1], nan=-np.inf))]
    )
    after = np.append(start[1:], np.inf)
    last = np.array(stop, dtype=np.float64)
    lead, inside, total = 0.0, 0, 0
    times: list[Array] = []
    for unit, row in zip(session.spike_times, rows, strict=True):
        k = place[row]
        when = np.asarray(unit, dtype=np.float64) + start[k]
        known = np.isfinite(when) & np.isfinite(stop[k])
        k, when = k[known], when[known]
        slack = stop[k] - start[k]
        inside += int(((when >= start[k] - slack) & (when <= stop[k] + slack)).sum())
        total += len(when)
        own = (when >= np.minimum(before[k], start[k])) & ~((when > stop[k]) & (when >= after[k]))
        times.append(np.sort(when[own]))
        lead = min(lead, float((when - start[k])[own].min(initial=0.0)))
        np.maximum.at(last, k[own], when[own])
    if 2 * inside < total:
        raise RecordingError(
            session.spikes_field,
            expected="seconds from each trial's start, within the trial (" + field + ")",
            got=f"{total - inside} of {total} spikes outside of theirs",
        )
    pairs = np.stack(
        [np.maximum(start + lead, before), np.minimum(last, np.maximum(after, stop))], 1
    )
    pairs = pairs[np.isfinite(pairs).all(axis=1) & (pairs[:, 1] > pairs[:, 0])]
    seen = [pairs] * len(times)
    return replace(session, spike_times=times, observed=session.observed or seen, spike_trials=None)


def _trials_of_spikes(
    session: RecordedSession, n: int
) -> tuple[RecordedSession, list[NDArray[np.int64]]]:
    """Return the row of each spike's trial, as stated or counted from restarts of the times.

    Units for which it cannot be counted are left out.
    """
    if session.spike_trials is not None:
        return session, list(session.spike_trials)
    rows = [np.cumsum(np.append(0, np.diff(t) < 0))[: len(t)] for t in session.spike_times]
    keep = np.array([not len(r) or r[-1] + 1 == n for r in rows], dtype=bool)
    clear = sum(1 for r, k in zip(rows, keep, strict=True) if k and len(r))
    if 2 * clear < sum(1 for r in rows if len(r)) or not clear:
        worst = next(i for i, k in enumerate(keep) if not k)
        raise RecordingError(
            session.spikes_field,
            expected=f"times that start again at each of {n} trials, or spike_trials (data.nwb, "
            "data.mat) naming the trial of each spike",
            got=f"{len(rows) - clear} of {len(rows)} units that do not, e.g. "
            f"{session.unit_names[worst]} in {int(rows[worst][-1]) + 1} runs",
        )
    if not keep.all():
        text = f"{int((~keep).sum())} of {len(keep)} units have no spike in some trial, so that it "
        text += "cannot be told which trials theirs are of: left out (spike_trials would say it)."
        session = session.keeping(np.flatnonzero(keep))
        odd = RecordingWarning("units-ambiguous", text)
        session = replace(session, warnings=(*session.warnings, odd))
    return session, [r for r, k in zip(rows, keep, strict=True) if k]


def span_of(times: Sequence[NDArray[Any]]) -> tuple[float, float]:
    """Return the first and last of sorted, non-empty spike times."""
    return min(float(t[0]) for t in times if len(t)), max(float(t[-1]) for t in times if len(t))


def plausible(session: RecordedSession, spec: RecordingSpec) -> RecordedSession:
    """Return the session with sorted spike times in seconds, and warnings. Raises
    RecordingError.
    """
    if session.counts is not None and spec.clocks.spikes != (1.0, 0.0):
        raise RecordingError(
            "data.clocks.spikes",
            expected="(1, 0) for counts already binned",
            got=str(spec.clocks.spikes),
        )
    scale, offset = spec.clocks.spikes
    times = [np.asarray(t, dtype=np.float64) * scale + offset for t in session.spike_times]
    if session.observed is not None:
        session = replace(session, observed=[p * scale + offset for p in session.observed])
    if spec.trials.relative_spikes:
        session = unrolled(replace(session, spike_times=times))
        times = [np.asarray(t, dtype=np.float64) for t in session.spike_times]
    found = list(session.warnings)
    moving, table = session.moving, session.table
    against = None
    if moving is not None:
        found += check_values(moving.unwrapped().values, moving.names, moving.path)
        found += _slow(moving, spec.width)
        against = Reference(moving.path, *_recorded(session, float(moving.times[0]), moving.end))
    elif table is not None and np.isfinite(table.stop).any():
        start, stop = float(np.nanmin(table.start)), float(np.nanmax(table.stop))
        against = Reference("the trials", start, stop, refutes=False)
    if session.counts is None:
        found += check_spikes(times, session.spikes_field, against, spec.width)
    times = [np.sort(t) for t in times]
    found += _unobserved(times, session.observed)
    if table is not None:
        begin = end = session.begin
        if session.counts is not None:
            end += spec.width * len(session.counts)
        elif moving is not None:
            begin, end = float(moving.times[0]), moving.end
        elif any(len(t) for t in times):
            begin, end = span_of(times)
        needed = spec.mode == "trials"
        found += check_trials(table.start, table.stop, begin, end, needed=needed)
    return replace(session, spike_times=times, warnings=tuple(found))


def _slow(moving: Moving, width: float) -> list[RecordingWarning]:
    """Return a warning about samples so rare that most bins have values between two of them."""
    if moving.interval <= _RARE * width:
        return []
    text = f"{moving.path} has a sample every {moving.interval:.3g} s, and bins are {width:g} s: "
    text += "most values are interpolated, and so is what a model learns and is scored by."
    return [RecordingWarning("kinematics-slow", text)]


def _unobserved(
    times: Sequence[NDArray[Any]], observed: list[Array] | None
) -> list[RecordingWarning]:
    """Return a warning about spikes outside their unit's own intervals, which are not counted."""
    total = sum(len(t) for t in times)
    if observed is None or not total:
        return []
    lost = units = 0
    slack = np.array([-1e-6, 1e-6])
    for t, pairs in zip(times, observed, strict=True):
        inside = np.zeros(len(t), dtype=bool)
        for a, b in np.searchsorted(t, pairs + slack).tolist():
            inside[a:b] = True
        lost += int((~inside).sum())
        units += not inside.all()
    if lost <= 0.01 * total:
        return []
    text = f"{lost} of {total} spikes, of {units} units, lie outside of their obs_intervals: they "
    text += "are not counted."
    return [RecordingWarning("spikes-unobserved", text)]


def _recorded(session: RecordedSession, begin: float, end: float) -> tuple[float, float, bool]:
    """Return the part of [begin, end] in which units were recorded according to the file, and
    whether the file states nothing about that."""
    if session.observed is None or not any(len(pairs) for pairs in session.observed):
        return begin, end, session.invalid is None
    pairs = np.concatenate(session.observed)
    return max(begin, float(pairs[:, 0].min())), min(end, float(pairs[:, 1].max())), False
