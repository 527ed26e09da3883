"""The units and trials tables of an NWB file, and counts already binned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilqr_vae.errors import RecordingError
from ilqr_vae.recordings.checks import same_bin_width, whole_counts
from ilqr_vae.recordings.nwb.series import clock, told_channels
from ilqr_vae.recordings.spec import RecordingSpec
from ilqr_vae.recordings.trials import Table

NAME_COLUMNS = ("unit_name", "name")
HELD_OUT = "heldout"


@dataclass(frozen=True, slots=True)
class Units:
    """The units table: N units, see ``session.Session``."""

    times: list[NDArray[Any]]
    names: tuple[str, ...]
    held_out: tuple[str, ...]
    observed: list[NDArray[np.float64]] | None


def binned_counts(item: Any, spec: RecordingSpec) -> tuple[NDArray[np.uint16], float]:
    data = np.asarray(item.data[:])
    if data.ndim != 2:
        raise RecordingError(spec.nwb.counts, expected="bins x units", got=f"shape {data.shape}")
    counts = whole_counts(data, spec.nwb.counts)
    times, interval = clock(item, len(counts))
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


def spikes_of(nwb: Any, series: dict[str, Any]) -> Units:
    """Spike times, sorted, with names, held-out flags and observation intervals.

    Raises:
        RecordingError: there are none (the series there are listed), or a time is not finite.
    """
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
    times: list[NDArray[Any]] = [np.sort(t) for t in np.split(flat, ends[:-1])]
    names = _unit_names(units)
    return Units(times, names, _held_out(units, names), _observed(units))


def _held_out(units: Any, names: tuple[str, ...]) -> tuple[str, ...]:
    if HELD_OUT not in units.colnames:
        return ()
    flags = np.asarray(units[HELD_OUT].data[:])
    if flags.dtype.kind not in "biuf":
        raise RecordingError(
            f"units.{HELD_OUT}", expected="true or false a unit", got=str(flags.dtype)
        )
    return tuple(name for name, flag in zip(names, flags, strict=True) if flag)


def _observed(units: Any) -> list[NDArray[np.float64]] | None:
    if "obs_intervals" not in units.colnames:
        return None
    ends = np.asarray(units["obs_intervals"].data[:], dtype=np.int64)
    pairs = np.asarray(units["obs_intervals"].target.data[:], dtype=np.float64).reshape(-1, 2)
    if not np.isfinite(pairs).all() or (pairs[:, 1] < pairs[:, 0]).any():
        raise RecordingError(
            "units.obs_intervals", expected="finite (start, stop) pairs", got="some that are not"
        )
    return [np.ascontiguousarray(p) for p in np.split(pairs, ends[:-1])]


def _unit_names(units: Any) -> tuple[str, ...]:
    for column in NAME_COLUMNS:
        if column in units.colnames:
            return tuple(str(name) for name in units[column].data[:])
    return tuple(str(int(i)) for i in units.id[:])


def names_beside(nwb: Any, binned: Any, n_units: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names for binned counts, and which are held out: the series' own names, else the units
    table's of as many rows."""
    units = nwb.units
    beside = units is not None and len(units) == n_units
    told = told_channels(binned, n_units)
    if told is not None:
        names = told[0]
    elif beside:
        names = _unit_names(units)
    else:
        names = tuple(f"unit{i}" for i in range(n_units))
    return names, _held_out(units, names) if beside else ()


def intervals(table: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Starts and stops of a table of intervals, seconds."""
    begin, end = table["start_time"].data[:], table["stop_time"].data[:]
    return np.asarray(begin, dtype=np.float64), np.asarray(end, dtype=np.float64)


def trials_table(nwb: Any) -> Table | None:
    """The trials with every column of one value a trial; None where there are none."""
    table = nwb.trials
    if table is None or len(table) == 0:
        return None
    start, stop = intervals(table)
    columns: dict[str, NDArray[Any]] = {}
    for name in table.colnames:
        if name in ("start_time", "stop_time") or hasattr(table[name], "target"):
            continue
        values = np.asarray(table[name].data[:])
        if values.shape == start.shape:
            columns[name] = values
    return Table(start, stop, columns)
