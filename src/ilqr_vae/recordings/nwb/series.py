"""Behaviour series of an NWB file: their choice, times and channel names."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilqr_vae.errors import RecordingError, did_you_mean
from ilqr_vae.recordings.checks import MAX_GAP_SECONDS, channels_of, name_words
from ilqr_vae.recordings.recording import RecordingWarning
from ilqr_vae.recordings.session import Moving
from ilqr_vae.recordings.spec import NwbSpec, RecordingSpec
from ilqr_vae.recordings.stamps import usable_stamps


def find(series: dict[str, Any], wanted: str, field: str) -> Any:
    """Return the series with this path, or the only one whose path ends with it."""
    wanted = wanted.strip("/")
    if wanted in series:
        return series[wanted]
    hits = [path for path in series if f"/{path}".endswith(f"/{wanted}")]
    if len(hits) == 1:
        return series[hits[0]]
    present = ", ".join(hits or series) or "none"
    known = [*series, *(path.rpartition("/")[2] for path in series)]
    near = "" if hits else did_you_mean(wanted, known)
    what = "one of several of that name" if hits else "a series of the file"
    raise RecordingError(field, expected=f"{what}: {present}", got=repr(wanted) + near)


def contents(data: Any, field: str) -> NDArray[Any]:
    """Return the values of a dataset. Raises RecordingError if they cannot be read."""
    try:
        return np.asarray(data[:])
    except (OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
        raise RecordingError(field, expected="data that can be read", got=str(error)) from error


def clock(item: Any, n: int) -> tuple[NDArray[np.float64], float]:
    """Return the times of a series' samples and the interval between them, in seconds."""
    if item.timestamps is not None:
        times, rows, _ = usable_stamps(
            contents(item.timestamps, f"{item.name}.timestamps"), n, f"{item.name}.timestamps"
        )
        if len(rows) < n:
            raise RecordingError(
                f"{item.name}.timestamps", expected=f"{n} increasing seconds", got=str(len(rows))
            )
        return times, float(np.median(np.diff(times))) if n > 1 else 0.0
    rate, start = float(item.rate or 0.0), float(item.starting_time or 0.0)
    if not (0 < rate < np.inf and np.isfinite(start)):
        raise RecordingError(
            f"{item.name}.rate",
            expected="samples per second, from a finite time on",
            got=f"{item.rate} from {item.starting_time}",
        )
    return start + np.arange(n) / rate, 1.0 / rate


def _kinematic_clock(
    item: Any, n: int, spec: RecordingSpec, rate: float = 0.0
) -> tuple[NDArray[np.float64], NDArray[np.int64], float, tuple[RecordingWarning, ...]]:
    """Return the times of a series' samples, which samples have one, and the interval between them.

    ``rate`` replaces the file's rate unless it is 0."""
    field, (scale, offset) = f"{item.name}.timestamps", spec.clocks.kinematics
    if item.timestamps is None:
        if rate:
            start = float(item.starting_time or 0.0) * scale + offset
            return start + np.arange(n) / rate, np.arange(n), 1.0 / rate, ()
        times, interval = clock(item, n)
        return times * scale + offset, np.arange(n), interval * scale, ()
    raw = contents(item.timestamps, field)
    if rate and raw.size == n and raw.dtype.kind in "iuf":
        stamps = raw.ravel() * scale + offset
        return *_at_rate(stamps, rate, field), 1.0 / rate, _contradicted(stamps, rate, field)
    times, rows, odd = usable_stamps(raw, n, field)
    times = times * scale + offset
    return times, rows, float(np.median(np.diff(times))) if len(times) > 1 else 0.0, odd


def _contradicted(
    stamps: NDArray[np.float64], rate: float, field: str
) -> tuple[RecordingWarning, ...]:
    """Return a warning if the rate of the stamps differs from the stated one."""
    steps = np.diff(stamps[np.isfinite(stamps)])
    if not len(steps) or abs(float(np.median(steps)) * rate - 1.0) < 0.2:
        return ()
    text = f"{field} come every {float(np.median(steps)):g} s; data.nwb.rate says {1 / rate:g} s."
    return (RecordingWarning("rate-contradicts", text),)


def _at_rate(
    stamps: NDArray[np.float64], rate: float, field: str
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return times at a stated rate that keep the first stamp and the first after each pause."""
    n = len(stamps)
    rows, known = np.arange(n), np.isfinite(stamps)
    if not known.any():
        raise RecordingError(field, expected="finite seconds", got=f"none of {n}")
    late = np.where(known, stamps - rows / rate, np.nan)
    first = int(np.argmax(known))
    times, begin = np.empty(n), 0
    shift = float(late[first])
    steps = np.flatnonzero(np.diff(stamps) > MAX_GAP_SECONDS + 1.0 / rate) + 1
    agree = abs(float(np.nanmedian(np.diff(stamps))) * rate - 1.0) < 0.2 if n > 1 else True
    for stop in [*(steps.tolist() if agree else []), n]:
        times[begin:stop] = rows[begin:stop] / rate + shift
        if stop < n:
            begin, shift = stop, float(late[stop])
    return times, rows


_LAST = re.compile(
    "eyes?|gaze|pupil|blink|saccade|fixation|feedback|rewards?|water|juice|lick(s|ing)?|valve|"
    "solenoid|sync|ttl|trigger|photodiode|temperature|confidence|likelihood|error|levels?|"
    "stimulus|targets?|cue|sound|tone|light|laser|battery|heart|respiration|whisk(er|ing)"
)
_FIRST = re.compile(
    "hands?|finger(s|tip)?|wrist|elbow|shoulder|arms?|joystick|manipulandum|reach(ing)?|"
    "limb|paws?|forelimb|pos|positions?|kinematics|running|wheel|tracking|location|mouse|head|body|"
    "speed"
)


RANKS = (
    "a velocity",
    "a position of limb or body",
    "several channels",
    "one channel",
    "a cursor",
    "eyes, reward, feedback, a stimulus or the like",
)
"""Kinds of series in the order in which they are decoded where none is named."""


def likeliest(path: str, item: Any) -> tuple[int, ...]:
    """Return the sort key of a series as a candidate to decode: its place in ``RANKS``, then among
    series of its kind. The smallest is the likeliest."""
    leaf, place = name_words(path.rpartition("/")[2]), name_words(path)
    fast = any(w.startswith("vel") or re.search(r"(?<!le)vel$|velocity", w) for w in leaf)
    data = getattr(item.data, "shape", ())
    one = len(data) < 2 or data[1] == 1
    if any(map(_LAST.fullmatch, place)):
        return 5, int(not fast), int(not _spatial(item))
    if any(re.fullmatch("cursors?|pointer", word) for word in place):
        return 4, int(not fast), int(not _spatial(item))
    if fast:
        rank = 0
    else:
        rank = (
            1
            if any(map(_FIRST.fullmatch, leaf)) or (any(map(_FIRST.fullmatch, place)) and not one)
            else 2 + one
        )
    return rank, int(not _spatial(item)) if rank else 0


def _core_types(item: Any) -> list[str]:
    """Return the names of the NWB core types of a series, the most specific first."""
    return [c.__name__ for c in type(item).__mro__ if getattr(c, "namespace", "") == "core"]


def _spatial(item: Any) -> bool:
    return "SpatialSeries" in _core_types(item)


def _is_behaviour(path: str, item: Any) -> bool:
    """A SpatialSeries or one of its kind; or a plain TimeSeries, or an extension's, that lies with
    behaviour or is called a velocity."""
    shape = getattr(item.data, "shape", None)
    if (
        getattr(getattr(item.data, "dtype", None), "kind", "O") not in "biuf"
        or not shape
        or not shape[0]
    ):
        return False
    inside = re.search(r"(^|/)[^/]*behav[^/]*/|BehavioralTimeSeries|Position/", path, re.IGNORECASE)
    plain = _core_types(item)[:1] == ["TimeSeries"]
    return _spatial(item) or (plain and (inside is not None or likeliest(path, item)[0] == 0))


def behaviour(series: dict[str, Any], binned: Any = None) -> dict[str, int]:
    """Return the paths of series that could be decoded, likeliest first, with their places in
    ``RANKS``."""
    usual = [p for p, s in series.items() if s is not binned and _is_behaviour(p, s)]
    return {
        p: likeliest(p, series[p])[0] for p in sorted(usual, key=lambda p: likeliest(p, series[p]))
    }


def _chosen(series: dict[str, Any], nwb: NwbSpec, binned: Any) -> dict[str, Any]:
    """Return the series to decode by path: one, or all of a container; empty if there is none."""
    if not nwb.kinematics:
        return {path: series[path] for path in list(behaviour(series, binned))[:1]}
    wanted = nwb.kinematics.strip("/")
    folder = [path for path in series if f"/{wanted}/" in f"/{path.rpartition('/')[0]}/"]
    single = [path for path in series if f"/{path}".endswith(f"/{wanted}")]
    if folder and not single:
        return {path: series[path] for path in folder}
    item = find(series, nwb.kinematics, "data.nwb.kinematics")
    return {path: s for path, s in series.items() if s is item}


def _values(path: str, item: Any) -> tuple[NDArray[np.float64], tuple[RecordingWarning, ...]]:
    """Return the values (K, D) in the series' unit."""
    raw, odd = contents(item.data, path), ()
    if raw.dtype.kind not in "biuf" or raw.ndim not in (1, 2) or 0 in raw.shape:
        raise RecordingError(
            path, expected="samples x channels of numbers", got=f"{raw.dtype} {raw.shape}"
        )
    stamps = item.timestamps
    if raw.ndim == 2 and raw.shape[0] != raw.shape[1]:
        channels_first = stamps is not None and np.size(stamps) == raw.shape[1]
        if channels_first:
            text = f"{path} is {raw.shape[0]} x {raw.shape[1]} with a time for each column: "
            odd = (RecordingWarning("kinematics-transposed", f"{text}read as transposed."),)
            raw = raw.T
        elif stamps is None and raw.shape[1] > max(100, 10 * raw.shape[0]):
            raise RecordingError(
                path,
                expected="samples x channels",
                got=f"{raw.shape[0]} x {raw.shape[1]}: are they transposed?",
            )
    values = raw.astype(np.float64).reshape(len(raw), -1)
    return values * float(item.conversion) + float(getattr(item, "offset", 0.0) or 0.0), odd


@dataclass(frozen=True, slots=True)
class Kinematics:
    """The chosen behaviour, or None, with notes and warnings about the choice."""

    moving: Moving | None
    notes: tuple[str, ...] = ()
    warnings: tuple[RecordingWarning, ...] = ()


def kinematics_of(series: dict[str, Any], spec: RecordingSpec, binned: Any) -> Kinematics:
    """Return the behaviour to decode, chosen as ``NwbSpec.kinematics`` states.

    Raises:
        RecordingError: it is absent or not numeric, its parts have different clocks, its times are
            not usable (``stamps.usable_stamps``), or the given names or units do not fit its
            channels.
    """
    nwb, others = spec.nwb, {path: s for path, s in series.items() if s is not binned}
    chosen = _chosen(series, nwb, binned)
    if not chosen:
        if not others:
            return Kinematics(None)
        listed = "; ".join(f"{path} ({type(s).__name__})" for path, s in others.items())
        text = (
            f"No series is numbers of behaviour; there are {listed}. data.nwb.kinematics names one."
        )
        return Kinematics(None, warnings=(RecordingWarning("kinematics-none", text),))
    path = next(iter(chosen)) if len(chosen) == 1 else nwb.kinematics.strip("/")
    notes: tuple[str, ...] = ()
    found = behaviour(series, binned)
    left = [p for p in found if p not in chosen]
    if left and not nwb.kinematics:
        notes = (
            f"Kinematics are {path} ({RANKS[found[path]]}); also possible: {', '.join(left)} "
            "(data.nwb.kinematics chooses).",
        )
    read = {place: _values(place, item) for place, item in chosen.items()}
    parts = {place: values for place, (values, _) in read.items()}
    warnings = [warning for _, odd in read.values() for warning in odd]
    clocks = [_kinematic_clock(item, len(parts[p]), spec, nwb.rate) for p, item in chosen.items()]
    times, rows, interval, odd = clocks[0]
    for place, (other, their_rows, _, _) in zip(chosen, clocks, strict=True):
        same = len(parts[place]) == len(parts[next(iter(chosen))]) and len(other) == len(times)
        if not (
            same
            and np.array_equal(rows, their_rows)
            and np.allclose(other, times, rtol=0, atol=0.01 * interval)
        ):
            raise RecordingError(
                place, expected=f"the clock of {next(iter(chosen))}", got="another one"
            )
    each = [_channels(item, parts[place].shape[1]) for place, item in chosen.items()]
    columns, names, units, doubt = channels_of(
        nwb,
        tuple(name for own, _ in each for name in own),
        tuple(unit for _, own in each for unit in own),
        "data.nwb",
    )
    if nwb.stamps == "end":
        times = times - interval
    values = np.concatenate(list(parts.values()), axis=1)[rows][:, columns]
    circular = any(type(item.parent).__name__ == "CompassDirection" for item in chosen.values())
    moving = Moving(path, values, times, interval, names, units, circular)
    return Kinematics(moving, notes, (*warnings, *odd, *doubt))


def features_of(series: dict[str, Any], spec: RecordingSpec) -> tuple[Moving, ...]:
    """Return the series that ``RecordingSpec.features`` names, on the kinematics' clock.

    Raises:
        RecordingError: one is absent or not numeric, or its times are not usable.
    """
    made: list[Moving] = []
    scale, offset = spec.clocks.kinematics
    for name in spec.features:
        item = find(series, name, "data.features")
        path = next(path for path, one in series.items() if one is item)
        values, _ = _values(path, item)
        times, interval = clock(item, len(values))
        channels = _channels(item, values.shape[1])
        times = times * scale + offset
        made.append(Moving(path, values, times, interval * scale, *channels))
    return tuple(made)


def mask_of(series: dict[str, Any], spec: RecordingSpec, moving: Moving | None) -> Moving | None:
    """Return the series that ``NwbSpec.scored`` names, on the kinematics' clock if as long.

    Raises:
        RecordingError: it is absent, or has more than one channel.
    """
    nwb = spec.nwb
    if not nwb.scored:
        return None
    item = find(series, nwb.scored, "data.nwb.scored")
    raw = contents(item.data, "data.nwb.scored")
    if raw.ndim == 0 or raw.size != len(raw) or raw.dtype.kind not in "biuf":
        raise RecordingError(
            "data.nwb.scored", expected="one channel of numbers", got=f"{raw.dtype} {raw.shape}"
        )
    values = (np.ravel(raw) != 0).astype(np.float64)[:, None]
    if moving is not None and len(values) == len(moving.times):
        times, interval = moving.times, moving.interval
    else:
        times, rows, interval, _ = _kinematic_clock(item, len(values), spec)
        values = values[rows]
        times = times - interval if nwb.stamps == "end" else times
    return Moving(str(item.name), values, times, interval, (str(item.name),), ("",))


def channel_comments(names: tuple[str, ...], units: tuple[str, ...]) -> str:
    """Return the comments with which ``write_nwb`` describes the channels of a series."""
    return json.dumps({"channels": names, "units": units})


def told_channels(item: Any, channels: int) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """Return names and units of channels if the comments state them (``channel_comments``)."""
    try:
        told = json.loads(item.comments or "")
        names, units = told["channels"], told["units"]
    except (ValueError, TypeError, KeyError):
        return None
    if not (len(names) == len(units) == channels):
        return None
    return tuple(str(name) for name in names), tuple(str(unit) for unit in units)


def _channels(item: Any, channels: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    told = told_channels(item, channels)
    if told is not None:
        return told
    listed = re.search(r"columns=\[([^\]]*)\]", item.comments or "")
    if listed is not None:  # the notation of the Neural Latents Benchmark's files
        words = [word.strip() for word in listed[1].split(",")]
        if len(words) == channels:
            return tuple(f"{item.name}_{word}" for word in words), (str(item.unit),) * channels
    axes = "xyz" if channels <= 3 else [str(i) for i in range(channels)]
    names = tuple(f"{item.name}_{axis}" for axis in axes[:channels])
    return names if channels > 1 else (str(item.name),), (str(item.unit),) * channels
