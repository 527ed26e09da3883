"""Recordings from NWB files, read with pynwb (extra ``nwb``)."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilqr_vae.errors import RecordingError
from ilqr_vae.recordings.binning import bin_spikes, bins_of, resample
from ilqr_vae.recordings.checks import (
    existing_file,
    fill_gaps,
    missing_extra,
    same_bin_width,
    sha256_of,
    unique_names,
    whole_counts,
)
from ilqr_vae.recordings.spec import NwbSpec, RecordingSpec
from ilqr_vae.recordings.types import Recording, Trials

NAME_COLUMNS = ("unit_name", "name")
CONDITION_COLUMNS = ("condition", "target_index", "target_id", "target", "trial_type")
_MOST_COUNTS = 4_000_000_000


def read_nwb(path: str | Path, spec: RecordingSpec) -> Recording:
    """An NWB file as a recording.

    Bins begin where the kinematic series (or the series of binned counts) begins, and at 0 of the
    file's clock where there is neither; only whole bins are kept. Counts come from the spike times
    of the units table, or from a series already binned (``spec.nwb.counts``). Kinematics are the
    mean of the samples inside each bin, or interpolated at bin centres where samples come slower
    than bins. Missing samples are interpolated; bins inside a gap above one second, and those in
    the file's ``invalid_times``, are marked invalid. Unit names are the units table's column
    ``unit_name`` or ``name``, else its ids. Trials get their condition from the first of the
    columns condition, target_index, target_id, target, trial_type.

    Raises:
        RecordingError: no such file, no NWB file, a series is absent (those present are listed),
            no spikes, counts that are not whole numbers 0..65535, a bin width that is not the
            spec's, unit names that repeat, timestamps that do not increase, or pynwb is not
            installed.
    """
    path = existing_file(path)
    with _open(path) as (nwb, series):
        return replace(_read(nwb, series, spec), name=path.name, sha256=sha256_of(path))


@contextmanager
def _open(path: Path) -> Generator[tuple[Any, dict[str, Any]]]:
    """The file's contents, and every time series in it by its path."""
    try:
        import pynwb
        from hdmf.build.errors import BuildError, ConstructError
    except ModuleNotFoundError as error:
        raise missing_extra("recording", "pynwb", "nwb") from error
    # What h5py, hdmf and pynwb raise on a file that is no NWB file, or is damaged.
    unreadable = (
        OSError,
        RuntimeError,
        KeyError,
        ValueError,
        TypeError,
        AttributeError,
        BuildError,
        ConstructError,
    )
    try:
        # Files of other versions of NWB, or that break a recommendation, make pynwb and hdmf warn;
        # what matters here is checked here.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # pynwb's classes are made at run time: the checker knows nothing of what they take.
            reader: Any = pynwb.NWBHDF5IO
            with reader(str(path), mode="r") as file:
                nwb = file.read()
                yield nwb, _all_series(nwb, pynwb)
    except unreadable as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RecordingError(
            "recording", expected="an NWB file", got=f"{path.name}: {reason}"
        ) from error


def _all_series(nwb: Any, pynwb: Any) -> dict[str, Any]:
    """Every TimeSeries by its path inside the file, e.g. ``processing/behavior/Position/hand``."""
    found: dict[str, Any] = {}
    for item in nwb.objects.values():
        if isinstance(item, pynwb.TimeSeries):
            names, node = [item.name], item.parent
            while node is not None and node is not nwb:
                names.append(node.name)
                node = node.parent
            top = names[-1]
            for group in ("processing", "acquisition", "stimulus", "analysis"):
                if top in (getattr(nwb, group, None) or {}):
                    names.append(group)
                    break
            found["/".join(reversed(names))] = item
    return dict(sorted(found.items()))


def _read(nwb: Any, series: dict[str, Any], spec: RecordingSpec) -> Recording:
    width = spec.bin_width
    binned = _find(series, spec.nwb.counts, "data.nwb.counts") if spec.nwb.counts else None
    moving = _kinematics(series, spec.nwb, binned)
    counts: NDArray[np.uint16] | None = None
    if binned is not None:
        counts, start = _binned_counts(binned, spec)
        n_bins, names = len(counts), _names_beside(nwb, binned, counts.shape[1])
    else:
        times, names = _spike_times(nwb, series)
        if moving is not None:
            start, end = moving.start, moving.end
        else:
            start, end = 0.0, max((float(t[-1]) for t in times if len(t)), default=0.0) + width
        n_bins = int(bins_of(np.array([end]), start, width)[0])
        _possible(n_bins, len(times), width)
        counts = bin_spikes(times, start, width, n_bins)
        if not counts.any():
            raise RecordingError(
                "units.spike_times",
                expected=f"spikes between {start:g} and {end:g} s",
                got="none at all" if not any(len(t) for t in times) else "all of them elsewhere",
            )
    valid = np.ones(n_bins, dtype=bool)
    kinematics: NDArray[np.float64] | None = None
    if moving is not None:
        raw = resample(moving.values, moving.times, start, width, n_bins)
        kinematics, valid = fill_gaps(raw, width, moving.path)
    valid &= ~_invalid(nwb, start, width, n_bins)
    return Recording(
        counts=counts,
        bin_width=width,
        unit_names=unique_names(names, "units"),
        kinematics=kinematics,
        kinematic_names=moving.names if moving else (),
        kinematic_units=moving.units if moving else (),
        start_time=start,
        trials=_trials(nwb, start, width, n_bins) if spec.nwb.trials else None,
        valid=valid,
    )


def _possible(n_bins: int, n_units: int, width: float) -> None:
    if n_bins < 1:
        raise RecordingError("recording", expected=f"one bin of {width:g} s or more", got="none")
    if n_bins * n_units > _MOST_COUNTS:
        raise RecordingError(
            "recording",
            expected=f"at most {_MOST_COUNTS} counts (are its times in seconds?)",
            got=f"{n_bins} bins x {n_units} units",
        )


# ---- series ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Moving:
    """A behaviour series: values (K, D) at times (K,), its extent, names and units."""

    path: str
    values: NDArray[np.float64]
    times: NDArray[np.float64]
    start: float
    end: float
    names: tuple[str, ...]
    units: tuple[str, ...]


def _find(series: dict[str, Any], wanted: str, field: str) -> Any:
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


def _clock(item: Any, n: int) -> tuple[NDArray[np.float64], float]:
    """Times of a series' samples in seconds, and the interval between them."""
    if item.timestamps is not None:
        times = np.asarray(item.timestamps[:], dtype=np.float64)
        if len(times) != n or not np.isfinite(times).all():
            raise RecordingError(
                f"{item.name}.timestamps", expected=f"{n} finite seconds", got=f"{len(times)}"
            )
        return times, float(np.median(np.diff(times))) if n > 1 else 0.0
    if not item.rate or item.rate <= 0:
        raise RecordingError(f"{item.name}.rate", expected="samples per second", got=f"{item.rate}")
    start = float(item.starting_time or 0.0)
    return start + np.arange(n) / float(item.rate), 1.0 / float(item.rate)


def _is_behaviour(path: str, item: Any) -> bool:
    kind = type(item).__name__
    if np.dtype(getattr(item.data, "dtype", object)).kind not in "iuf" or len(item.data) == 0:
        return False
    inside = re.search(r"(^|/)[^/]*behav[^/]*/|BehavioralTimeSeries|Position/", path, re.IGNORECASE)
    return kind == "SpatialSeries" or (
        kind == "TimeSeries" and (inside is not None or "vel" in item.name.lower())
    )


def _kinematics(series: dict[str, Any], nwb: NwbSpec, binned: Any) -> _Moving | None:
    """The series to decode, by the rule ``NwbSpec.kinematics`` states; None where there is none."""
    if nwb.kinematics:
        item = _find(series, nwb.kinematics, "data.nwb.kinematics")
    else:
        usual = [s for p, s in series.items() if s is not binned and _is_behaviour(p, s)]
        usual.sort(key=lambda s: "vel" not in s.name.lower())
        if not usual:
            return None
        item = usual[0]
    path = next(p for p, s in series.items() if s is item)
    raw = np.asarray(item.data[:])
    if raw.dtype.kind not in "iuf" or raw.ndim not in (1, 2) or len(raw) == 0:
        raise RecordingError(
            path, expected="samples x channels of numbers", got=f"{raw.dtype} {raw.shape}"
        )
    values = raw.astype(np.float64).reshape(len(raw), -1)
    values = values * float(item.conversion) + float(getattr(item, "offset", 0.0) or 0.0)
    channels = values.shape[1]
    times, interval = _clock(item, len(values))
    names, units = _channels(item, channels)
    names, units = nwb.kinematic_names or names, nwb.kinematic_units or units
    for field, given in (("kinematic_names", names), ("kinematic_units", units)):
        if len(given) != channels:
            raise RecordingError(
                f"data.nwb.{field}",
                expected=f"{channels}, one a channel of {path}",
                got=str(len(given)),
            )
    return _Moving(path, values, times, float(times[0]), float(times[-1]) + interval, names, units)


def channel_comments(names: tuple[str, ...], units: tuple[str, ...]) -> str:
    """A series' comments, saying what its channels are, as ``write_nwb`` leaves them."""
    return json.dumps({"channels": names, "units": units})


def _told(item: Any, channels: int) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
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
    told = _told(item, channels)
    if told is not None:
        return told
    axes = "xyz" if channels <= 3 else [str(i) for i in range(channels)]
    names = tuple(f"{item.name}_{axis}" for axis in axes[:channels])
    return names if channels > 1 else (str(item.name),), (str(item.unit),) * channels


# ---- spikes ------------------------------------------------------------------------------------


def _binned_counts(item: Any, spec: RecordingSpec) -> tuple[NDArray[np.uint16], float]:
    data = np.asarray(item.data[:])
    if data.ndim != 2:
        raise RecordingError(spec.nwb.counts, expected="bins x units", got=f"shape {data.shape}")
    counts = whole_counts(data, spec.nwb.counts)
    times, interval = _clock(item, len(counts))
    if len(counts) > 1:
        same_bin_width(interval, spec.bin_width, spec.nwb.counts)
        late = np.abs(times - times[0] - np.arange(len(times)) * spec.bin_width)
        if float(late.max()) > 0.01 * spec.bin_width:
            raise RecordingError(
                f"{spec.nwb.counts}.timestamps",
                expected=f"one bin every {spec.bin_width:g} s",
                got=f"one {float(late.max()):g} s off",
            )
    return counts, float(times[0])


def _spike_times(
    nwb: Any, series: dict[str, Any]
) -> tuple[list[NDArray[np.float64]], tuple[str, ...]]:
    units = nwb.units
    if units is None or len(units) == 0 or "spike_times" not in units.colnames:
        raise RecordingError(
            "units.spike_times",
            expected="a units table with spike times (or data.nwb.counts naming binned counts: "
            f"{', '.join(series) or 'the file has no series'})",
            got="none" if units is None else f"{len(units)} units with {', '.join(units.colnames)}",
        )
    ends = np.asarray(units["spike_times"].data[:], dtype=np.int64)
    flat = np.asarray(units["spike_times"].target.data[:], dtype=np.float64)
    if not np.isfinite(flat).all():
        raise RecordingError(
            "units.spike_times", expected="finite seconds", got="some that are not"
        )
    times = [np.sort(t) for t in np.split(flat, ends[:-1])]
    return times, _unit_names(units)


def _unit_names(units: Any) -> tuple[str, ...]:
    for column in NAME_COLUMNS:
        if column in units.colnames:
            return tuple(str(name) for name in units[column].data[:])
    return tuple(str(int(i)) for i in units.id[:])


def _names_beside(nwb: Any, binned: Any, n_units: int) -> tuple[str, ...]:
    """Names for binned counts: the series' own, else the units table's of as many rows."""
    told = _told(binned, n_units)
    if told is not None:
        return told[0]
    if nwb.units is not None and len(nwb.units) == n_units:
        return _unit_names(nwb.units)
    return tuple(f"unit{i}" for i in range(n_units))


# ---- intervals ---------------------------------------------------------------------------------


def _intervals(table: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    begin, end = table["start_time"].data[:], table["stop_time"].data[:]
    return np.asarray(begin, dtype=np.float64), np.asarray(end, dtype=np.float64)


def _invalid(nwb: Any, start: float, width: float, n_bins: int) -> NDArray[np.bool_]:
    bad = np.zeros(n_bins, dtype=bool)
    if nwb.invalid_times is not None:
        for begin, end in zip(*_intervals(nwb.invalid_times), strict=True):
            if end > begin:
                first = int(bins_of(np.array([begin]), start, width)[0])
                last = int(np.ceil((end - start) / width - 1e-6))
                bad[max(first, 0) : max(last, 0)] = True
    return bad


def _trials(nwb: Any, start: float, width: float, n_bins: int) -> Trials | None:
    """Trials wholly inside the bins."""
    table = nwb.trials
    if table is None or len(table) == 0:
        return None
    begin, end = _intervals(table)
    known = np.isfinite(begin) & np.isfinite(end)
    first = bins_of(np.where(known, begin, -np.inf).clip(start - width), start, width)
    last = bins_of(np.where(known, end, -np.inf).clip(start - width), start, width)
    keep = known & (first >= 0) & (last <= n_bins) & (last > first)
    condition: tuple[str, ...] = ()
    for column in CONDITION_COLUMNS:
        if column in table.colnames and np.ndim(table[column].data[:]) == 1:
            values = table[column].data[:]
            condition = tuple(str(values[i]) for i in np.flatnonzero(keep))
            break
    return Trials(first[keep], last[keep], condition)
