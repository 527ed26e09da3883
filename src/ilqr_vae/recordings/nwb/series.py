"""Behaviour series of an NWB file: which, when, what their channels are called."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilqr_vae.errors import RecordingError
from ilqr_vae.recordings.checks import channels_of
from ilqr_vae.recordings.spec import NwbSpec
from ilqr_vae.recordings.unbinned import Moving


def find(series: dict[str, Any], wanted: str, field: str) -> Any:
    """The series of that path, or the only one whose path ends so."""
    wanted = wanted.strip("/")
    if wanted in series:
        return series[wanted]
    hits = [path for path in series if f"/{path}".endswith(f"/{wanted}")]
    if len(hits) == 1:
        return series[hits[0]]
    present = ", ".join(hits or series) or "none"
    what = "one of several of that name" if hits else "a series of the file"
    raise RecordingError(field, expected=f"{what}: {present}", got=repr(wanted))


def clock(item: Any, n: int, rate: float = 0.0) -> tuple[NDArray[np.float64], float]:
    """Times of a series' samples in seconds, and the interval between them."""
    if item.timestamps is not None and not rate:
        times = np.asarray(item.timestamps[:], dtype=np.float64)
        if len(times) != n or not np.isfinite(times).all():
            raise RecordingError(
                f"{item.name}.timestamps", expected=f"{n} finite seconds", got=f"{len(times)}"
            )
        return times, float(np.median(np.diff(times))) if n > 1 else 0.0
    rate = rate or float(item.rate or 0.0)
    if not rate > 0:
        raise RecordingError(f"{item.name}.rate", expected="samples per second", got=f"{item.rate}")
    start = float(item.starting_time or 0.0)
    return start + np.arange(n) / rate, 1.0 / rate


def _is_behaviour(path: str, item: Any) -> bool:
    kind = type(item).__name__
    if np.dtype(getattr(item.data, "dtype", object)).kind not in "iuf" or len(item.data) == 0:
        return False
    inside = re.search(r"(^|/)[^/]*behav[^/]*/|BehavioralTimeSeries|Position/", path, re.IGNORECASE)
    return kind == "SpatialSeries" or (
        kind == "TimeSeries" and (inside is not None or "vel" in item.name.lower())
    )


def _chosen(series: dict[str, Any], nwb: NwbSpec, binned: Any) -> dict[str, Any]:
    """The series to decode by path: one, or all of a container; empty where there is none."""
    if not nwb.kinematics:
        usual = [p for p, s in series.items() if s is not binned and _is_behaviour(p, s)]
        usual.sort(key=lambda p: "vel" not in p.rpartition("/")[2].lower())
        return {path: series[path] for path in usual[:1]}
    wanted = nwb.kinematics.strip("/")
    folder = [path for path in series if f"/{wanted}/" in f"/{path.rpartition('/')[0]}/"]
    single = [path for path in series if f"/{path}".endswith(f"/{wanted}")]
    if folder and not single:
        return {path: series[path] for path in folder}
    item = find(series, nwb.kinematics, "data.nwb.kinematics")
    return {path: s for path, s in series.items() if s is item}


def _values(path: str, item: Any) -> NDArray[np.float64]:
    raw = np.asarray(item.data[:])
    if raw.dtype.kind not in "iuf" or raw.ndim not in (1, 2) or len(raw) == 0:
        raise RecordingError(
            path, expected="samples x channels of numbers", got=f"{raw.dtype} {raw.shape}"
        )
    values = raw.astype(np.float64).reshape(len(raw), -1)
    return values * float(item.conversion) + float(getattr(item, "offset", 0.0) or 0.0)


def kinematics_of(series: dict[str, Any], nwb: NwbSpec, binned: Any) -> Moving | None:
    """The behaviour to decode, by the rule ``NwbSpec.kinematics`` states; None where there is none.

    Raises:
        RecordingError: it is not there, is not numbers, its parts have different clocks, or names
            or units given do not fit its channels.
    """
    chosen = _chosen(series, nwb, binned)
    if not chosen:
        return None
    path = next(iter(chosen)) if len(chosen) == 1 else nwb.kinematics.strip("/")
    parts = {place: _values(place, item) for place, item in chosen.items()}
    lengths = {place: len(values) for place, values in parts.items()}
    clocks = [clock(item, lengths[place], nwb.rate) for place, item in chosen.items()]
    times, interval = clocks[0]
    for place, (other, _) in zip(chosen, clocks, strict=True):
        if len(other) != len(times) or not np.allclose(other, times, rtol=0, atol=0.01 * interval):
            raise RecordingError(
                place, expected=f"the clock of {next(iter(chosen))}", got="another one"
            )
    values = np.concatenate(list(parts.values()), axis=1)
    each = [_channels(item, parts[place].shape[1]) for place, item in chosen.items()]
    names, units = channels_of(
        nwb,
        tuple(name for own, _ in each for name in own),
        tuple(unit for _, own in each for unit in own),
        "data.nwb",
    )
    if len(times) > 1 and not (np.diff(times) > 0).all():
        raise RecordingError(
            f"{path}.timestamps", expected="increasing seconds", got="some that do not"
        )
    if nwb.stamps == "end":
        times = times - interval
    return Moving(path, values, times, interval, names, units)


def mask_of(series: dict[str, Any], nwb: NwbSpec, moving: Moving | None) -> Moving | None:
    """The series ``NwbSpec.scored`` names; on the kinematics' clock where it is as long as they.

    Raises:
        RecordingError: it is not there or has more than one channel.
    """
    if not nwb.scored:
        return None
    item = find(series, nwb.scored, "data.nwb.scored")
    raw = np.asarray(item.data[:])
    if raw.size != len(raw) or raw.dtype.kind not in "biuf":
        raise RecordingError(
            "data.nwb.scored", expected="one channel of numbers", got=f"{raw.dtype} {raw.shape}"
        )
    values = (np.ravel(raw) != 0).astype(np.float64)[:, None]
    if moving is not None and len(values) == len(moving.times):
        times, interval = moving.times, moving.interval
    else:
        times, interval = clock(item, len(values))
    return Moving(str(item.name), values, times, interval, (str(item.name),), ("",))


def channel_comments(names: tuple[str, ...], units: tuple[str, ...]) -> str:
    """A series' comments, saying what its channels are, as ``write_nwb`` leaves them."""
    return json.dumps({"channels": names, "units": units})


def told_channels(item: Any, channels: int) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """Names and units of a series' channels where its comments say so (``channel_comments``)."""
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
    if listed is not None:  # as the Neural Latents Benchmark's files say it
        words = [word.strip() for word in listed[1].split(",")]
        if len(words) == channels:
            return tuple(f"{item.name}_{word}" for word in words), (str(item.unit),) * channels
    axes = "xyz" if channels <= 3 else [str(i) for i in range(channels)]
    names = tuple(f"{item.name}_{axis}" for axis in axes[:channels])
    return names if channels > 1 else (str(item.name),), (str(item.unit),) * channels
