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

from ilqr_vae.errors import RecordingError, number_of
from ilqr_vae.recordings.recording import Recording, RecordingWarning

Array = NDArray[np.float64]

FEWEST_SPIKES = 50
"""Fewest spikes for a check of the unit of their times."""
SURELY = 20.0
"""A range without spikes where this many are expected was not recorded (exp(-20))."""
USUAL_RATES = (0.05, 500.0)
"""Range of the mean rate of firing units in Hz; outside it, times are hardly in seconds."""


_REPEATED = 20
"""Spikes of one unit at one time that were not recorded."""
_LOOKED_AT = 20_000
"""Spikes of a unit that are compared with others'."""
_FAR = 1000.0
"""Ranges of the middle 98 % of values beyond which no value of behaviour lies."""


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
    times: Sequence[NDArray[Any]], field: str, against: Reference | None, width: float
) -> list[RecordingWarning]:
    """Check the finite spike times of N units, in the file's order.

    Args:
        width: bin width in seconds.

    Raises:
        RecordingError: the times are whole numbers, restart, lie outside ``against``, or cover
            little of it.
    """
    total = sum(len(t) for t in times)
    if not total:
        return []
    first = min(float(t.min()) for t in times if len(t))
    last = max(float(t.max()) for t in times if len(t))
    found = [*_order(times, field, first, last, against), *_alike(times)]
    if total < FEWEST_SPIKES:
        return found
    if last <= first:
        raise RecordingError(
            field, expected="seconds that differ", got=f"{total} spikes, all of them at {first:g}"
        )
    if all(bool((t == np.floor(t)).all()) for t in times):
        raise RecordingError(
            field,
            expected="seconds (data.clocks.spikes converts other units)",
            got=f"whole numbers from {first:g} to {last:g}, as samples or milliseconds are",
        )
    found += _resolution(times, width)
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
    """Return units that have exactly the same spikes as another unit."""
    long = [t.tobytes() for t in times if len(t) >= FEWEST_SPIKES]
    n = len(long) - len(set(long))
    if not n:
        return []
    have = "has" if n == 1 else "have"
    text = f"{number_of(n, 'unit')} {have} exactly the spikes of another: each counts as a unit."
    return [RecordingWarning("units-coincide", text)]


def _resolution(times: Sequence[NDArray[Any]], width: float) -> list[RecordingWarning]:
    """Return warnings about times that repeat within a unit, as padding does, and about times with
    a resolution as coarse as the bins, such as large times in 32 bits."""
    found: list[RecordingWarning] = []
    each = [np.unique(t, return_counts=True) for t in times if len(t)]
    total = sum(int(n.sum()) for _, n in each)
    again = total - sum(len(n) for _, n in each)
    most, when = max((int(n.max()), float(at[n.argmax()])) for at, n in each)
    if again > 0.1 * total or most >= _REPEATED:
        text = f"{again} of {total} spike times come more than once in their unit, {when:g} s "
        text += f"{most} times: does the file fill up its rows, or have each spike twice?"
        found.append(RecordingWarning("spikes-repeat", text))
    some = np.unique(np.concatenate([at[:_LOOKED_AT] for at, _ in each]))
    # random distinct times come closer than this in nearly every recording
    closest = 20.0 * float(np.ptp(some)) / len(some) ** 2
    step = float(np.diff(some).min(initial=np.inf))
    if len(some) > FEWEST_SPIKES and step > max(0.25 * width, closest):
        text = f"Spike times are multiples of {step:.3g} s, bins {width:g} s wide: counts of "
        text += "single bins are wrong by as much."
        found.append(RecordingWarning("spike-resolution", text))
    return found


def check_values(values: Array, names: Sequence[str], field: str) -> list[RecordingWarning]:
    """Check behaviour (K, D), NaN if missing, for sentinel values such as -9999.

    A frequent value far from all others marks lost samples (``kinematics-sentinel``).
    """
    found: list[RecordingWarning] = []
    for name, column in zip(names, values.T, strict=True):
        known = column[np.isfinite(column)]
        found += [*_outliers(known, name, field), *_wraps(known, name, field)]
        for end in (known.min(initial=np.inf), known.max(initial=-np.inf)):
            rest = known[known != end]
            n = len(known) - len(rest)
            if n < 3 or not len(rest) or np.ptp(rest) == 0:
                continue
            alone = np.abs(rest - end).min() / np.ptp(rest)
            # one of a few values, such as positions of a lever, is as frequent as the others
            if alone > 5 or (alone > 0.25 and 5 * _most_often(rest) < n):
                text = f"{n} of {len(known)} samples of {name} ({field}) are {end:g}, far from all "
                text += f"others ({rest.min():g} to {rest.max():g}): do they stand for lost ones?"
                found.append(RecordingWarning("kinematics-sentinel", text))
    return found


def _most_often(values: Array) -> int:
    return int(np.unique(values, return_counts=True)[1].max())


def _outliers(known: Array, name: str, field: str) -> list[RecordingWarning]:
    low, middle, high = np.quantile(known, [0.01, 0.5, 0.99]) if len(known) else (0.0, 0.0, 0.0)
    with np.errstate(over="ignore"):
        far = np.abs(known - middle) > _FAR * (high - low)
    if high <= low or not far.any():
        return []
    text = f"{int(far.sum())} of {len(known)} samples of {name} ({field}) lie far from all others, "
    text += f"e.g. {known[far][0]:g} where most are {low:g} to {high:g}."
    return [RecordingWarning("kinematics-outlier", text)]


def _wraps(known: Array, name: str, field: str) -> list[RecordingWarning]:
    """Return a warning about a channel that leaves its range at one end and returns at the other,
    as angles do, but is not read as an angle."""
    low, size = float(known.min(initial=np.inf)), float(np.ptp(known)) if len(known) else 0.0
    if not 0 < size < np.inf:
        return []
    steps = np.abs(np.diff(known)) / size
    wraps, between = int((steps > 0.75).sum()), int(((steps > 0.25) & (steps <= 0.75)).sum())
    quarters = np.bincount(((known - low) / size * 4).astype(np.int64).clip(0, 3), minlength=4)
    if wraps < 3 or 20 * wraps > len(known) or between > wraps or 20 * quarters.min() < len(known):
        return []
    text = f"{name} ({field}) jumps {wraps} times from one end of its range to the other. Means of "
    text += "such bins are wrong: is it an angle (kinematic_units: rad, deg or turns)?"
    return [RecordingWarning("kinematics-wrap", text)]


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
    apart = sum(
        1
        for t in times
        if len(t) >= FEWEST_SPIKES and 2 * int(((t >= begin) & (t <= end)).sum()) < len(t)
    )
    if inside < 0.95 * total or apart:
        text = f"{total - inside} of the {total} spikes lie outside {where}: they span {first:g} "
        text += f"to {last:g} s." + (f" Units with most of theirs there: {apart}." if apart else "")
        found.append(RecordingWarning("spikes-outside", text))
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
    rates = recording.mean_counts(0, len(recording)) / recording.bin_width
    if per_unit <= high < rates.max():
        fast = int(np.argmax(rates))
        text = f"Unit {recording.unit_names[fast]} fires {rates[fast]:.3g} times a second on "
        text += f"average, {int((rates > high).sum())} units more than {high:g} times."
        found.append(RecordingWarning("unit-rate", text))
    if recording.n_units > len(recording):
        text = f"There are {recording.n_units} units and {len(recording)} bins: are the counts "
        text += "transposed?"
        found.append(RecordingWarning("counts-transposed", text))
    values = np.flatnonzero(np.bincount(recording.counts.ravel(), minlength=2)[1:]) + 1
    common = int(np.gcd.reduce(values)) if len(values) > 1 else 1
    if common > 1:
        text = f"All counts are multiples of {common}: are they spikes a bin, or rates?"
        found.append(RecordingWarning("counts-multiples", text))
    return found
