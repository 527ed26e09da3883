"""Plausibility checks of the contents of a file: order, spans, shares, rates.

Impossible contents are refused with a ``RecordingError``; implausible ones cause a
``RecordingWarning``. All readers of times use these checks (``unbinned.recording_of``), and all
recordings pass through ``silences``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilqr_vae.errors import RecordingError
from ilqr_vae.recordings.recording import Recording, RecordingWarning

Array = NDArray[np.float64]

FEWEST_SPIKES = 50
"""Fewest spikes for a check of the unit of their times."""
SURELY = 20.0
"""A range without spikes where this many are expected was not recorded (exp(-20))."""
USUAL_RATES = (0.05, 500.0)
"""Range of the mean rate of firing units in Hz; outside it, times are hardly in seconds."""


@dataclass(frozen=True, slots=True)
class Reference:
    """The span to compare spikes with: that of the kinematics, else of the trials.

    Attributes:
        name: name for messages.
        begin, end: seconds.
        refutes: whether spikes that cover little of it prove a wrong clock.
    """

    name: str
    begin: float
    end: float
    refutes: bool


def check_spikes(
    times: Sequence[NDArray[Any]], field: str, against: Reference | None
) -> list[RecordingWarning]:
    """Check the finite spike times of N units, in the file's order.

    Raises:
        RecordingError: they are whole numbers, restart, lie elsewhere than ``against``, or cover
            little of it.
    """
    total = sum(len(t) for t in times)
    if not total:
        return []
    first = min(float(t.min()) for t in times if len(t))
    last = max(float(t.max()) for t in times if len(t))
    found = [*_order(times, field, first, last, against), *_alike(times)]
    if total < FEWEST_SPIKES or last <= first:
        return found
    if all(bool((t == np.floor(t)).all()) for t in times):
        raise RecordingError(
            field,
            expected="seconds (data.clocks.spikes converts other units)",
            got=f"whole numbers from {first:g} to {last:g}, as samples or milliseconds are",
        )
    per_unit = total / (last - first) / sum(1 for t in times if len(t))
    low, high = USUAL_RATES
    if not low <= per_unit <= high:
        found.append(
            RecordingWarning(
                "spike-rate",
                f"The units fire {per_unit:.2g} times a second on average ({total} spikes from "
                f"{first:g} to {last:g} s): are the spike times in seconds (data.clocks.spikes)?",
            )
        )
    if against is None or against.end <= against.begin:
        return found
    return found + _spans(times, field, (first, last), against, slow=per_unit < 2 * low)


def _alike(times: Sequence[NDArray[Any]]) -> list[RecordingWarning]:
    """Return units with exactly the same spikes as another."""
    long = [t.tobytes() for t in times if len(t) >= FEWEST_SPIKES]
    n = len(long) - len(set(long))
    if not n:
        return []
    text = f"{n} units have exactly the spikes of another: each is counted as a unit of its own."
    return [RecordingWarning("units-coincide", text)]


def check_values(values: Array, names: Sequence[str], field: str) -> list[RecordingWarning]:
    """Check behaviour (K, D), NaN if missing, for sentinel values such as -9999.

    A frequent value far from all others marks lost samples (``kinematics-sentinel``).
    """
    found: list[RecordingWarning] = []
    for name, column in zip(names, values.T, strict=True):
        known = column[np.isfinite(column)]
        for end in (known.min(initial=np.inf), known.max(initial=-np.inf)):
            rest = known[known != end]
            n = len(known) - len(rest)
            if n < 3 or not len(rest) or np.ptp(rest) == 0:
                continue
            if np.abs(rest - end).min() > 5 * np.ptp(rest):
                text = f"{n} of {len(known)} samples of {name} ({field}) are {end:g}, far from all "
                text += f"others ({rest.min():g} to {rest.max():g}): do they stand for lost ones?"
                found.append(RecordingWarning("kinematics-sentinel", text))
    return found


def _order(
    times: Sequence[NDArray[Any]], field: str, first: float, last: float, against: Reference | None
) -> list[RecordingWarning]:
    steps = [np.diff(t) for t in times if len(t) > 1]
    back = [int((s < 0).sum()) for s in steps]
    units = sum(1 for b in back if b)
    if not units:
        return []
    largest = max(-float(s.min()) for s in steps)
    said = f"of {units} of {len(steps)} units run backwards {sum(back)} times, "
    said += f"by up to {largest:.4g} s"
    # Few long runs are a clock that restarts; many short ones are times that were never sorted.
    run = (sum(len(s) for s in steps) + len(steps)) / (sum(back) + len(steps))
    share = 0.9 if run >= 8 else 0.5
    whole = 0.0 if against is None else against.end - against.begin
    if 2 * units >= len(steps) and largest > 0.5 * (last - first) and last - first < share * whole:
        raise RecordingError(
            field,
            expected=f"times on one clock throughout {against.name if against else 'the file'}, "
            f"{whole:g} s long (data.trials.relative_spikes = true where they are seconds from the "
            "start of each trial)",
            got=f"times that restart: those {said}, and they span {last - first:g} s",
        )
    return [
        RecordingWarning(
            "spike-order",
            f"Spike times {said}. They are sorted; if the clock restarts during the recording, "
            "the counts are wrong.",
        )
    ]


def _spans(
    times: Sequence[NDArray[Any]],
    field: str,
    span: tuple[float, float],
    against: Reference,
    *,
    slow: bool,
) -> list[RecordingWarning]:
    (first, last), begin, end = span, against.begin, against.end
    total = sum(len(t) for t in times)
    inside = sum(int(((t >= begin) & (t <= end)).sum()) for t in times)
    where = f"{against.name}, {begin:g} to {end:g} s"
    if inside == 0 or (inside < 0.05 * total and slow):
        raise RecordingError(
            field,
            expected=f"most spikes within {where} (data.clocks.spikes converts other units)",
            got=f"{inside} of {total}: all of them elsewhere, from {first:g} to {last:g} s"
            if not inside
            else f"{inside} of {total}; they span {first:g} to {last:g} s",
        )
    found: list[RecordingWarning] = []
    if inside < 0.95 * total:
        found.append(
            RecordingWarning(
                "spikes-outside",
                f"{total - inside} of the {total} spikes lie outside {where}: they span {first:g} "
                f"to {last:g} s.",
            )
        )
    covered = max(min(last, end) - max(first, begin), 0.0)
    if against.refutes and covered < 0.1 * (end - begin):
        raise RecordingError(
            field,
            expected=f"spikes throughout {where}",
            got=f"spikes from {first:g} to {last:g} s alone, {100 * covered / (end - begin):.2g} % "
            "of it; is its rate samples per second, and its clock the spikes' (data.clocks)? "
            "Or are they seconds from each trial's start (data.trials.relative_spikes)?",
        )
    return found


def silences(recording: Recording) -> Recording:
    """Add warnings about counts, and mask bins before and after all spikes.

    A range at either end without spikes, in which ``SURELY`` were expected, is marked invalid.
    """
    found, counted = list(recording.warnings), recording.without_features()
    width, mask = counted.bin_width, counted.mask()
    each = np.where(mask, counted.counts, 0).sum(axis=1, dtype=np.int64)
    seen = np.flatnonzero(recording.valid)
    spiking = np.flatnonzero(each)
    if not len(spiking):
        return recording
    found += _counts(counted, each)
    per_bin = float(each.sum()) / max(int(recording.valid[spiking[0] : spiking[-1] + 1].sum()), 1)
    least = max(SURELY / per_bin, 1.0 / width)
    position = np.flatnonzero(each[seen])  # among the valid bins
    lead, tail = int(position[0]), len(seen) - 1 - int(position[-1])
    valid = recording.valid.copy()
    said: list[str] = []
    if lead > least:
        valid[seen[:lead]] = False
        said.append(f"the first {lead * width:.4g} s")
    if tail > least:
        valid[seen[len(seen) - tail :]] = False
        said.append(f"the last {tail * width:.4g} s")
    if said:
        where = " and ".join(said)
        found.append(
            RecordingWarning(
                "spikes-cover",
                f"No spikes in {where} of {len(seen) * width:.4g} s of recording: these bins are "
                "masked, and neither learnt from nor scored.",
            )
        )
    pause = int(np.diff(position).max(initial=1)) - 1
    if pause > max(least, 5.0 / width):
        found.append(
            RecordingWarning(
                "spikes-pause",
                f"No unit fires for {pause * width:.4g} s in the middle of the recording "
                f"({SURELY:g} spikes or more were expected).",
            )
        )
    return replace(recording, valid=valid, scored=recording.scored & valid, warnings=tuple(found))


def _counts(recording: Recording, each: NDArray[np.int64]) -> list[RecordingWarning]:
    """Return warnings about counts; ``each`` (T,) are the sums of bins."""
    found: list[RecordingWarning] = []
    firing = int(np.count_nonzero(recording.counts.any(axis=0)))
    seconds = recording.bin_width * max(int(recording.valid.sum()), 1)
    per_unit = float(each.sum()) / seconds / max(firing, 1)
    low, high = USUAL_RATES
    told = {warning.name for warning in recording.warnings}
    enough = each.sum() >= FEWEST_SPIKES
    if enough and not low <= per_unit <= high and not told & {"spike-rate", "spikes-outside"}:
        text = f"The units fire {per_unit:.2g} times a second on average: are these counts, and is "
        text += f"a bin {recording.bin_width:g} s long?"
        found.append(RecordingWarning("spike-rate", text))
    values = np.flatnonzero(np.bincount(recording.counts.ravel(), minlength=2)[1:]) + 1
    common = int(np.gcd.reduce(values)) if len(values) > 1 else 1
    if common > 1:
        text = f"All counts are multiples of {common}: are they spikes a bin, or rates?"
        found.append(RecordingWarning("counts-multiples", text))
    return found


def check_trials(
    start: Array, stop: Array, begin: float, end: float, *, needed: bool
) -> list[RecordingWarning]:
    """Check K trials, NaN if unknown, of a recording from ``begin`` to ``end`` seconds.

    Args:
        needed: whether the recording is cut at its trials.

    Raises:
        RecordingError: most trials stop before they start, or, if needed, all lie outside the
            recording.
    """
    known = np.isfinite(start) & np.isfinite(stop)
    start, stop = start[known], stop[known]
    n = len(start)
    if not n:
        return []
    found: list[RecordingWarning] = []

    def odd(name: str, bad: NDArray[np.bool_], text: str) -> None:
        if bad.any():
            found.append(RecordingWarning(name, f"{int(bad.sum())} of {n} trials {text}."))

    negative = stop < start
    if 2 * int(negative.sum()) > n:
        raise RecordingError(
            "trials.stop_time",
            expected="seconds after each trial's start_time",
            got=f"{int(negative.sum())} of {n} that lie before it, e.g. {stop[negative][0]:g} for "
            f"a start at {start[negative][0]:g} (a duration, or another clock?)",
        )
    odd("trials-negative", negative, "stop before they start: left out")
    odd("trials-empty", stop == start, "have no length: left out")
    outside = (stop < begin) | (start > end)
    if needed and outside.all():
        raise RecordingError(
            "trials.start_time",
            expected=f"trials within the recording, {begin:g} to {end:g} s (data.clocks.trials "
            "converts other units)",
            got=f"{n} trials from {start.min():g} to {stop.max():g} s",
        )
    if needed and float(np.median(stop - start)) > 2 * (end - begin):
        raise RecordingError(
            "trials.stop_time",
            expected=f"trials shorter than the recording, {begin:g} to {end:g} s "
            "(data.clocks.trials converts other units)",
            got=f"half of {n} trials longer than {float(np.median(stop - start)):g} s",
        )
    odd(
        "trials-outside",
        outside,
        f"lie outside the recording, {begin:g} to {end:g} s; they span {start.min():g} to "
        f"{stop.max():g} s",
    )
    odd("trials-order", np.diff(start) < 0, "start before the trial above them in the table")
    _, which, counts = np.unique(start, return_inverse=True, return_counts=True)
    odd("trials-coincide", counts[which] > 1, "start at the same time as another")
    span = float(stop.max() - start.min())
    if n >= 10 and not outside.any() and span < 0.05 * (end - begin):
        found.append(
            RecordingWarning(
                "trials-cover",
                f"All {n} trials lie within {span:.4g} s of {end - begin:.4g} s of recording: are "
                "their times seconds (data.clocks.trials)?",
            )
        )
    return found


def check_event(name: str, when: Array, start: Array, stop: Array) -> RecordingWarning | None:
    """Return warnings about the times of an event in seconds, one per trial.

    ``event-relative``: they are relative to the start of their trials; ``event-outside``: some lie
    outside their trials.
    """
    known = np.isfinite(when) & np.isfinite(start) & np.isfinite(stop) & (stop > start)
    when, start, stop = when[known], start[known], stop[known]
    if not len(when):
        return None
    slack = np.maximum(0.5 * (stop - start), 1.0)
    outside = (when < start - slack) | (when > stop + slack)
    n = int(outside.sum())
    if not n:
        return None
    within = (when[outside] >= -1e-6) & (when[outside] <= (stop - start)[outside] + 1e-6)
    said = f"{n} of {len(when)} times of {name} lie outside of their trials"
    if within.mean() > 0.9 and 2 * n >= len(when):
        return RecordingWarning(
            "event-relative",
            f"{said}: they look like seconds from each trial's start (data.trials.relative).",
        )
    return RecordingWarning(
        "event-outside",
        f"{said}, e.g. {when[outside][0]:g} s for one from "
        f"{start[outside][0]:g} to {stop[outside][0]:g} s.",
    )


def check_windows(begin: Array, length: Array) -> list[RecordingWarning]:
    """Check K windows in seconds that are to be cut out.

    Raises:
        RecordingError: they overlap so much that all parts of a split have the same bins.
    """
    order = np.argsort(begin, kind="stable")
    low, high = begin[order], (begin + length)[order]
    before = np.maximum.accumulate(np.concatenate([[-np.inf], high[:-1]]))
    alone = float((high - np.maximum(low, before)).clip(0).sum())
    total = float(length.sum())
    if len(begin) > 1 and alone < 0.5 * total:
        raise RecordingError(
            "data.trials",
            expected="windows of trials that lie apart",
            got=f"{len(begin)} windows of {total:.4g} s in all that cover {alone:.4g} s: most lie "
            "over one another",
        )
    if total - alone > 1e-3 * total:
        return [
            RecordingWarning(
                "windows-overlap",
                f"Windows of trials overlap by {total - alone:.4g} of {total:.4g} s: bins of one "
                "are bins of another.",
            )
        ]
    return []
