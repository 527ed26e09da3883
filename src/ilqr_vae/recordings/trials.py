"""The selection of trials from a table, with their windows and order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilqr_vae.errors import RecordingError, did_you_mean
from ilqr_vae.recordings.binning import EDGE, bins_of
from ilqr_vae.recordings.checks import name_words
from ilqr_vae.recordings.plausible_trials import check_event, check_windows
from ilqr_vae.recordings.recording import Recording, RecordingWarning, Trials
from ilqr_vae.recordings.spec import RecordingSpec
from ilqr_vae.recordings.split import SplitSpec

_DURATIONS = {"reaction", "movement", "response", "hold", "delay", "duration", "latency", "wait"}
"""Words in the names of columns that are durations although they end in ``_time``."""
CONDITION_COLUMNS = ("condition", "target_index", "target_id", "target", "trial_type")

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class TrialRows:
    """A trials table.

    Attributes:
        start, stop: float64 (K,), seconds, NaN where unknown.
        columns: further columns, (K,) each, of any kind.
    """

    start: Array
    stop: Array
    columns: Mapping[str, NDArray[Any]]

    def column(self, name: str, field: str) -> NDArray[Any]:
        """Return a column by name, including start and stop. Raises RecordingError."""
        both = {"start_time": self.start, "stop_time": self.stop} | dict(self.columns)
        if name not in both:
            raise RecordingError(
                field,
                expected=f"a column of the trials: {', '.join(both)}",
                got=repr(name) + did_you_mean(name, both),
            )
        return both[name]

    def seconds(self, name: str, field: str) -> Array:
        """Return a column of times. Raises RecordingError if it holds other values."""
        values = self.column(name, field)
        if values.dtype.kind not in "iuf":
            raise RecordingError(
                field, expected="a column of seconds", got=f"{name}, {values.dtype}"
            )
        return values.astype(np.float64)


@dataclass(frozen=True, slots=True)
class TrialWindows:
    """The windows of K trials, in the order in which they are concatenated.

    Attributes:
        rows: int64 (K,), the trials' rows in the table.
        begin: float64 (K,), seconds: left edge of each window's first bin.
        bins: int64 (K,).
        part: int64 (K,), 0 train, 1 validation, 2 test; never decreasing.
        notes: see ``Recording.notes``.
    """

    rows: NDArray[np.int64]
    begin: Array
    bins: NDArray[np.int64]
    part: NDArray[np.int64]
    notes: tuple[str, ...] = ()

    @property
    def bounds(self) -> tuple[int, int]:
        """Return the first bins after the training and the validation part."""
        return int(self.bins[self.part < 1].sum()), int(self.bins[self.part < 2].sum())

    def keeping(self, keep: NDArray[np.bool_], why_not: str) -> TrialWindows:
        """Return the kept trials, with a note of how many are left out and why."""
        lost = int((~keep).sum())
        note = (f"{lost} of {len(keep)} trials {why_not}: left out.",) if lost else ()
        return replace(
            self,
            rows=self.rows[keep],
            begin=self.begin[keep],
            bins=self.bins[keep],
            part=self.part[keep],
            notes=self.notes + note,
        )


def on_clock(
    table: TrialRows, spec: RecordingSpec
) -> tuple[TrialRows, tuple[RecordingWarning, ...]]:
    """Convert the table to the recording's clock and its events to the session's, with warnings.

    Events outside their trials are left out unless requested.

    Raises:
        RecordingError: the event of the windows is relative to the start of its trial.
    """
    wanted, (scale, offset) = spec.trials, spec.clocks.trials
    start, stop = table.start * scale + offset, table.stop * scale + offset
    columns, found = dict(table.columns), list[RecordingWarning]()
    asked = {*wanted.events, *([wanted.event] if wanted.event else [])}
    for name in asked | {n for n in columns if is_event(table, n)}:
        if name not in columns or columns[name].dtype.kind not in "iuf":
            continue  # reported where it is used
        when = columns[name].astype(np.float64) * scale
        columns[name] = when = when + (start if wanted.relative else offset)
        odd = check_event(name, when, start, stop)
        if odd is None:
            continue
        if name == wanted.event and odd.name == "event-relative" and spec.mode == "trials":
            raise RecordingError(
                "data.trials.event", expected="seconds on the recording's clock", got=odd.text
            )
        if name in asked or not _DURATIONS.intersection(name_words(name)):
            found.append(odd)
        if name not in asked:
            del columns[name]
    return TrialRows(start, stop, columns), tuple(found)


def is_event(table: TrialRows, name: str) -> bool:
    """Return whether a column is kept as an event by default."""
    return name.endswith("_time") and table.columns[name].dtype.kind in "iuf"


def plan(
    table: TrialRows, spec: RecordingSpec
) -> tuple[TrialWindows, tuple[RecordingWarning, ...]]:
    """Choose windows and parts by ``spec.trials`` and ``spec.split``, with warnings.

    Raises:
        RecordingError: a column is absent or of the wrong kind, the window is empty or has no
            event, no trial carries a known label, none holds one bin, the windows lie over one
            another, or there are too few for the parts of the split.
    """
    wanted, width = spec.trials, spec.width
    if wanted.event:
        at = table.seconds(wanted.event, "data.trials.event")
        low, high = wanted.window
        if not high - low >= width * (1 - 1e-6):
            raise RecordingError(
                "data.trials.window",
                expected=f"(from, to) at least a bin of {width:g} s apart",
                got=f"({low:g}, {high:g})",
            )
        begin, end = at + low, at + high
    elif wanted.window != (0.0, 0.0):
        raise RecordingError(
            "data.trials.event", expected="a column that the window is laid around", got="none"
        )
    else:
        begin, end = table.start, table.stop
    known = np.isfinite(begin) & np.isfinite(end)
    length = np.where(known, end - np.where(known, begin, 0.0), 0.0)
    bins = np.floor(length / width + 1e-6).astype(np.int64)
    part = _labelled(table, spec.split)
    usable = known & (bins >= 1)
    rows = np.flatnonzero(usable & (part >= 0))
    if not len(rows):
        what = wanted.event or "start and stop"
        raise RecordingError(
            "recording.trials",
            expected=f"at least one trial with a known {what} and a label asked for",
            got=f"{len(known)} trials, {int(known.sum())} with times, {int(usable.sum())} of a bin "
            f"or more, {int((part >= 0).sum())} with a label",
        )
    # in the order of recording, not that of the table
    rows = rows[np.argsort(begin[rows], kind="stable")]
    split = spec.split
    parts = (split.train > 0) + (split.validation > split.train) + (split.validation < 1)
    if not split.column and len(rows) < parts:
        raise RecordingError(
            "recording.trials",
            expected=f"{parts} or more, one for each part of the split",
            got=f"{len(rows)} that can be used, of {len(known)}",
        )
    chosen = _parts(part[rows], split)
    order = np.argsort(chosen, kind="stable")
    rows, chosen = rows[order], chosen[order]
    made = TrialWindows(
        rows, begin[rows], bins[rows], chosen, _notes(known, bins, part, wanted.event)
    )
    odd = check_windows(made.begin, width * made.bins.astype(np.float64))
    return replace(made, notes=made.notes + _overlap(made, width)), tuple(odd)


def _labelled(table: TrialRows, split: SplitSpec) -> NDArray[np.int64]:
    """(K,) 0, 1, 2 by label, -1 for a label not asked for; all 0 without a column."""
    if not split.column:
        return np.zeros(len(table.start), dtype=np.int64)
    labels = words(table.column(split.column, "data.split.column"))
    part = np.full(len(labels), -1, dtype=np.int64)
    wanted = (split.train_labels, split.validation_labels, split.test_labels)
    for number, names in enumerate(wanted):
        part[np.isin(labels, names)] = number
    if not (part == 0).any():
        raise RecordingError(
            "data.split.train_labels",
            expected=f"labels of {split.column}: {', '.join(sorted(set(labels)))}",
            got=", ".join(split.train_labels),
        )
    return part


def _parts(part: NDArray[np.int64], split: SplitSpec) -> NDArray[np.int64]:
    """Parts of trials in time order: labelled ones keep theirs, the rest is split by number."""
    made = part.copy()
    n = int((part == 0).sum())
    first = np.flatnonzero(part == 0)
    if not split.column:
        made[first[round(split.train * n) :]] = 1
        made[first[round(split.validation * n) :]] = 2
    elif not split.validation_labels:
        made[first[round(n * split.train / split.validation) :]] = 1
    return made


def _notes(
    known: NDArray[np.bool_], bins: NDArray[np.int64], part: NDArray[np.int64], event: str
) -> tuple[str, ...]:
    said: list[str] = []
    for lost, why in (
        (int((~known).sum()), f"have no {event or 'start or stop'}"),
        (int((known & (bins < 1)).sum()), "are shorter than a bin"),
        (int((part < 0).sum()), "carry another label of the split"),
    ):
        if lost:
            said.append(f"{lost} of {len(known)} trials {why}: left out.")
    return tuple(said)


def _overlap(made: TrialWindows, width: float) -> tuple[str, ...]:
    order = np.argsort(made.begin, kind="stable")
    begin, end = made.begin[order], (made.begin + width * made.bins)[order]
    crossing = (end[:-1] - begin[1:] > 1e-3 * width) & (
        made.part[order][:-1] != made.part[order][1:]
    )
    lost = int(crossing.sum())
    if not lost:
        return ()
    return (f"{lost} windows reach into the next trial's, which is of another part of the split.",)


def words(values: NDArray[Any]) -> NDArray[np.str_]:
    """Return a column as text: whole floats without a decimal point, bytes decoded."""

    def word(value: Any) -> str:
        if isinstance(value, bytes):
            return value.decode(errors="replace")
        if isinstance(value, float | np.floating):
            return str(int(value)) if float(value).is_integer() else f"{float(value):g}"
        return str(value)

    return np.array([word(value) for value in values], dtype=np.str_)


def condition_of(table: TrialRows, rows: NDArray[np.int64], spec: RecordingSpec) -> tuple[str, ...]:
    """Return each trial's condition, with columns joined by a slash; empty without a column.

    Raises:
        RecordingError: a requested column is absent.
    """
    columns = spec.trials.condition
    if not columns:
        columns = tuple(name for name in CONDITION_COLUMNS if name in table.columns)[:1]
    if not columns:
        return ()
    each = [words(table.column(name, "data.trials.condition")[rows]) for name in columns]
    return tuple("/".join(parts) for parts in zip(*each, strict=True))


def events_of(table: TrialRows, rows: NDArray[np.int64], spec: RecordingSpec) -> dict[str, Array]:
    """Return the times of each event in seconds; NaN if it did not occur.

    Raises:
        RecordingError: a requested column is absent or not numeric.
    """
    names = spec.trials.events or tuple(n for n in table.columns if is_event(table, n))
    return {name: table.seconds(name, "data.trials.events")[rows] for name in names}


def trials_of(table: TrialRows, spec: RecordingSpec, start: float, n_bins: int) -> Trials | None:
    """Return the trials entirely inside the bins of a continuous recording, or None."""
    begin, end, width = table.start, table.stop, spec.width
    if not len(begin):
        return None
    known = np.isfinite(begin) & np.isfinite(end)
    first = bins_of(np.where(known, begin, -np.inf).clip(start - width), start, width)
    last = bins_of(np.where(known, end, -np.inf).clip(start - width), start, width)
    keep = np.flatnonzero(known & (first >= 0) & (last <= n_bins) & (last > first))
    return Trials(
        first[keep],
        last[keep],
        condition_of(table, keep, spec),
        {name: (when - start) / width for name, when in events_of(table, keep, spec).items()},
    )


def cut(
    recording: Recording,
    first: NDArray[np.int64],
    bins: NDArray[np.int64],
    condition: tuple[str, ...],
    events: Mapping[str, Array],
) -> Recording:
    """Concatenate windows of a continuous recording, each as a segment.

    Args:
        first, bins: (K,), first bin and length of each window in ``recording``.
        condition: one per window, or none.
        events: (K,) by name, in bins of ``recording``.
    """
    starts = np.concatenate([[0], np.cumsum(bins)])
    rows = np.concatenate([np.arange(a, a + n) for a, n in zip(first, bins, strict=True)])
    move = starts[:-1] - first
    return replace(
        recording,
        counts=recording.counts[rows],
        kinematics=None if recording.kinematics is None else recording.kinematics[rows],
        trials=Trials(
            starts[:-1],
            starts[1:],
            condition,
            {name: when + move for name, when in events.items()},
            recording.start_time + recording.bin_width * first.astype(np.float64),
        ),
        valid=recording.valid[rows],
        scored=recording.scored[rows],
        observed=None if recording.observed is None else recording.observed[rows],
        breaks=starts[1:-1],
    )


def in_course(
    course: Recording, windows: Recording, bins: tuple[int, int]
) -> tuple[Recording, NDArray[np.bool_]]:
    """Restrict the scored bins of a continuous recording to some of its trials.

    Args:
        course: the continuous recording.
        windows: the same recording as concatenated trials.
        bins: half-open range of ``windows`` with the wanted trials.

    Returns:
        ``course`` with only these trials, ``scored`` only in them; and bool (T,), the bins of
        ``course`` entirely inside them and outside of all other trials.

    Raises:
        RecordingError: the start times of the trials are not known (``Trials.begin``).
    """
    trials = windows.trials
    if trials is None or len(trials.begin) != len(trials):
        raise RecordingError("recording.trials", expected="when each begins", got="not known")
    first = (trials.begin - course.start_time) / course.bin_width
    last = first + (trials.stop - trials.start)
    wanted = (trials.start >= bins[0]) & (trials.stop <= bins[1])

    def covered(low: Array, high: Array) -> NDArray[np.bool_]:
        made = np.zeros(len(course), dtype=bool)
        for a, b in np.stack([low, high], axis=1).clip(0, len(course)).astype(np.int64):
            made[a:b] = True
        return made

    start, stop = np.ceil(first[wanted] - EDGE), np.floor(last[wanted] + EDGE)
    other = covered(np.floor(first[~wanted] + EDGE), np.ceil(last[~wanted] - EDGE))
    inside = covered(start, stop) & ~other
    kept = (start >= 0) & (stop <= len(course)) & (stop > start)
    move = (first - trials.start)[wanted][kept]
    chosen = trials.shifted(wanted, 0).shifted(kept, 0)
    made = Trials(
        start[kept].astype(np.int64),
        stop[kept].astype(np.int64),
        chosen.condition,
        {name: when + move for name, when in chosen.events.items()},
    )
    return replace(course, trials=made, scored=course.scored & inside), inside
