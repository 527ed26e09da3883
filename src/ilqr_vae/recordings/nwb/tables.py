"""The units and trials tables of an NWB file, and counts already binned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilqr_vae.errors import RecordingError, did_you_mean
from ilqr_vae.recordings.checks import (
    known_spikes,
    same_bin_width,
    unique_names,
    whole_counts,
)
from ilqr_vae.recordings.nwb.series import clock, contents, told_channels
from ilqr_vae.recordings.recording import RecordingWarning
from ilqr_vae.recordings.spec import RecordingSpec
from ilqr_vae.recordings.trials import TrialRows
from ilqr_vae.recordings.units import labels_of, selected_units

NAME_COLUMNS = ("unit_name", "name")
GROUP_COLUMNS = ("probe", "probe_name", "electrode_group", "group", "shank", "array", "tetrode")
HELD_OUT = "heldout"


@dataclass(frozen=True, slots=True)
class Units:
    """The units table: N units, see ``session.RecordedSession``."""

    times: list[NDArray[Any]]
    names: tuple[str, ...]
    held_out: tuple[str, ...]
    observed: list[NDArray[np.float64]] | None
    trials: list[NDArray[np.int64]] | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[RecordingWarning, ...] = ()


def binned_counts(item: Any, spec: RecordingSpec) -> tuple[NDArray[np.uint16], float, float]:
    """Return counts (T, N), the start of their first bin and the bin width, in seconds."""
    data = contents(item.data, spec.nwb.counts)
    if data.ndim != 2:
        raise RecordingError(spec.nwb.counts, expected="bins x units", got=f"shape {data.shape}")
    counts = whole_counts(data, spec.nwb.counts)
    times, interval = clock(item, len(counts))
    width = interval if spec.bin_width is None and interval else spec.width
    if len(counts) > 1:
        same_bin_width(interval, width, spec.nwb.counts)
        late = np.abs(times - times[0] - np.arange(len(times)) * width)
        if float(late.max()) > 0.01 * width:
            raise RecordingError(
                f"{spec.nwb.counts}.timestamps",
                expected=f"one bin every {width:g} s",
                got=f"one {float(late.max()):g} s off",
            )
    return counts, float(times[0]), width


def spikes_of(nwb: Any, series: dict[str, Any], spec: RecordingSpec) -> Units:
    """Return the unchanged spike times of the selected units (``spec.units``), with their names,
    held-out flags and observation intervals.

    Raises:
        RecordingError: there are none (existing series are listed), times are not finite, the
            index of the column does not fit it, or the selection names something absent.
    """
    units = nwb.units
    if units is None or len(units) == 0 or "spike_times" not in units.colnames:
        raise RecordingError(
            "units.spike_times",
            expected="a units table with spike times (or data.nwb.counts naming binned counts: "
            f"{', '.join(series) or 'the file has no series'})",
            got=_elsewhere(nwb)
            if units is None
            else f"{len(units)} units with {', '.join(units.colnames)}",
        )
    rows, notes = selected_units(
        spec.units, lambda name: unit_labels(units, name, f"data.units.{name}"), len(units)
    )
    pieces = ragged(units, "spike_times", "units.spike_times", rows)
    known, odd = known_spikes(pieces, "units.spike_times")
    # among all units, so that a name does not depend on the selection
    names, repeats = _unit_names(units, spec.nwb.unit_names)
    held_out, chosen = _held_out(units, names), tuple(names[i] for i in rows)
    return Units(
        times=[t[k] for t, k in zip(pieces, known, strict=True)],
        names=chosen,
        held_out=tuple(name for name in held_out if name in set(chosen)),
        observed=_observed(units, rows),
        trials=_spike_trials(nwb, spec.nwb.spike_trials, rows, known),
        notes=notes,
        warnings=odd + repeats,
    )


def _elsewhere(nwb: Any) -> str:
    """Describe units tables in other places of the file, which are not read."""
    there = [item for item in nwb.objects.values() if type(item).__name__ == "Units"]
    named = ", ".join(f"{item.parent.name}/{item.name}" for item in there)
    return f"none at /units, where it belongs, but {named}" if named else "none"


def _spike_trials(
    nwb: Any, column: str, rows: NDArray[np.int64], known: list[NDArray[np.bool_]]
) -> list[NDArray[np.int64]] | None:
    """Return the row in the trials table of each spike; None if no column states it."""
    if not column:
        return None
    field, units, trials = "data.nwb.spike_trials", nwb.units, nwb.trials
    if column not in units.colnames or trials is None:
        got = repr(column) if trials is not None else "no trials"
        raise RecordingError(
            field, expected=f"a column of the units: {', '.join(units.colnames)}", got=got
        )
    ids = {int(each): row for row, each in enumerate(contents(trials.id.data, "trials.id"))}
    made: list[NDArray[np.int64]] = []
    for numbers, kept in zip(ragged(units, column, f"units.{column}", rows), known, strict=True):
        wrong = [n for n in np.unique(numbers).tolist() if n not in ids]
        if numbers.shape != kept.shape or wrong:
            got = f"{wrong[0]:g}" if wrong else f"{len(numbers)} for {len(kept)} spikes"
            raise RecordingError(
                f"units.{column}",
                expected=f"ids of trials, {min(ids)} to {max(ids)}, one a spike",
                got=got,
            )
        made.append(np.array([ids[int(n)] for n in numbers[kept]], dtype=np.int64))
    return made


def unit_columns(units: Any) -> list[str]:
    """Return the names of columns by which units can be selected (``unit_labels``)."""
    own = [n for n in units.colnames if not hasattr(units[n], "target") and n != "electrodes"]
    table = _electrodes(units)
    further = [n for n in ([] if table is None else table[0].colnames) if n not in own]
    grouped = ["location"] if "electrode_group" in own else []
    return [*own, *further, *(n for n in grouped if n not in own + further), "id"]


def unit_labels(units: Any, name: str, field: str) -> NDArray[np.str_]:
    """Return a column of the units, or of their electrodes, as text.

    Raises:
        RecordingError: there is no such column, or it cannot be read.
    """
    if name not in (there := unit_columns(units)):
        expected = f"a column of the units: {', '.join(there)}"
        raise RecordingError(field, expected=expected, got=repr(name) + did_you_mean(name, there))
    if name == "id" or (name in units.colnames and name != "electrodes"):
        return np.array(_labels(units.id if name == "id" else units[name], name), dtype=np.str_)
    found = _electrodes(units)
    if found is None or name not in found[0].colnames:  # location of the group
        groups = contents(units["electrode_group"].data, field)
        return labels_of(np.array([g.location for g in groups], dtype=object))
    table, rows = found
    labels = np.array(_labels(table[name], name), dtype=np.str_)
    if any(((r < 0) | (r >= len(labels))).any() for r in rows):
        raise RecordingError(
            "units.electrodes", expected=f"rows of {len(labels)} electrodes", got="others"
        )
    return np.array(["/".join(sorted(set(labels[r].tolist()))) for r in rows], dtype=np.str_)


def _electrodes(units: Any) -> tuple[Any, list[NDArray[np.int64]]] | None:
    """Return the table of electrodes and each unit's rows in it; None if units have none."""
    if "electrodes" not in units.colnames:
        return None
    node = units["electrodes"]
    region = getattr(node, "target", node)
    flat = contents(region.data, "units.electrodes")
    if flat.dtype.kind not in "iu" or getattr(region, "table", None) is None:
        return None
    every = np.arange(len(units))
    pieces = (
        ragged(units, "electrodes", "units.electrodes", every)
        if hasattr(node, "target")
        else [flat[i : i + 1] for i in every]
    )
    return region.table, [np.asarray(p, dtype=np.int64) for p in pieces]


def ragged(
    table: Any, column: str, field: str, rows: NDArray[np.int64]
) -> list[NDArray[np.float64]]:
    """Return rows of a ragged column of numbers. Raises RecordingError if its index is invalid."""
    n, node = len(table), table[column]
    indexed = hasattr(node, "target")
    flat = contents((node.target if indexed else node).data, field)
    if flat.dtype.kind not in "iuf":
        raise RecordingError(field, expected="numbers", got=f"dtype {flat.dtype}")
    values = flat.astype(np.float64)
    if not indexed:
        if n != 1:
            raise RecordingError(
                f"{field}_index", expected=f"an index of {n} rows", got="a column without one"
            )
        return [values for _ in rows]
    raw = contents(node.data, f"{field}_index")
    if raw.ndim != 1 or raw.dtype.kind not in "iu" or len(raw) != n:
        raise RecordingError(
            f"{field}_index", expected=f"{n} row ends", got=f"{raw.dtype} {raw.shape}"
        )
    ends = raw.astype(np.int64)
    wrong = ""
    if (np.diff(ends) < 0).any() or ends[0] < 0:
        at = int(np.argmax(np.diff(ends) < 0)) if len(ends) > 1 else 0
        wrong = f"{ends[at]} and then {ends[min(at + 1, n - 1)]} ({raw.dtype}; has it overflowed?)"
    elif ends[-1] > len(flat):
        wrong = f"ends up to {ends[-1]}, beyond the data"
    elif ends[-1] < len(flat):
        wrong = f"a last end of {ends[-1]}" + (", as if it held starts" if ends[0] == 0 else "")
    if wrong:
        raise RecordingError(
            f"{field}_index",
            expected=f"row ends that do not decrease, the last of them {len(flat)}",
            got=wrong,
        )
    pieces = np.split(values, ends[:-1])
    return [pieces[i] for i in rows]


def _held_out(units: Any, names: tuple[str, ...]) -> tuple[str, ...]:
    if HELD_OUT not in units.colnames:
        return ()
    flags = contents(units[HELD_OUT].data, f"units.{HELD_OUT}")
    if flags.dtype.kind not in "biuf" or flags.shape != (len(names),):
        raise RecordingError(
            f"units.{HELD_OUT}", expected="true or false a unit", got=f"{flags.dtype} {flags.shape}"
        )
    return tuple(name for name, flag in zip(names, flags, strict=True) if flag)


def _observed(units: Any, rows: NDArray[np.int64]) -> list[NDArray[np.float64]] | None:
    if "obs_intervals" not in units.colnames:
        return None
    field = "units.obs_intervals"
    pieces = ragged(units, "obs_intervals", field, rows)
    if any(p.shape[1:] != (2,) or np.isnan(p).any() or (p[:, 1] < p[:, 0]).any() for p in pieces):
        raise RecordingError(field, expected="(start, stop) pairs", got="some that are not")
    return [np.ascontiguousarray(p) for p in pieces]


def _unit_names(units: Any, named_by: str) -> tuple[tuple[str, ...], tuple[RecordingWarning, ...]]:
    """Return a unique name for each unit, chosen as ``NwbSpec.unit_names`` states.

    Raises:
        RecordingError: the column is absent.
    """
    columns: dict[str, Any] = {name: units[name] for name in units.colnames} | {"id": units.id}
    if named_by and named_by not in columns:
        raise RecordingError(
            "data.nwb.unit_names",
            expected=f"a column of the units: {', '.join(columns)}",
            got=repr(named_by),
        )
    column = named_by or next((name for name in NAME_COLUMNS if name in columns), "id")
    names = _labels(columns[column], column)
    if len(set(names)) == len(names):
        return names, ()
    for group in GROUP_COLUMNS:
        if group in columns and not hasattr(columns[group], "target"):
            both = tuple(
                f"{g}/{n}" for g, n in zip(_labels(columns[group], group), names, strict=True)
            )
            if len(set(both)) == len(both):
                return both, (_renamed(column, group, both),)
    ids, by = _labels(units.id, "id"), "id"
    if len(set(ids)) < len(ids):
        ids, by = tuple(str(row) for row in range(len(names))), "row"
    both = tuple(f"{n}#{i}" for n, i in zip(names, ids, strict=True))
    return both, (_renamed(column, by, both),)


def _renamed(column: str, by: str, names: tuple[str, ...]) -> RecordingWarning:
    return RecordingWarning(
        "unit-names",
        f"Names of the units' column {column} repeat: units are named by it and {by}, as in "
        f"{names[0]} (data.nwb.unit_names chooses a column).",
    )


def _labels(column: Any, field: str) -> tuple[str, ...]:
    """Return a column as text; objects such as electrode groups are given by name."""
    named = [getattr(value, "name", value) for value in contents(column.data, f"units.{field}")]
    if any(np.ndim(value) for value in named):
        raise RecordingError(f"units.{field}", expected="one value a unit", got="several")
    return tuple(labels_of(np.array(named, dtype=object)).tolist())


@dataclass(frozen=True, slots=True)
class Beside:
    """Names and held-out units of binned counts, and the selected rows, with a note."""

    names: tuple[str, ...]
    held_out: tuple[str, ...]
    rows: NDArray[np.int64]
    notes: tuple[str, ...]
    warnings: tuple[RecordingWarning, ...]


def units_beside(nwb: Any, binned: Any, n_units: int, spec: RecordingSpec) -> Beside:
    """Return what a units table with as many rows states about binned counts; names are the series'
    own if it has any.

    Raises:
        RecordingError: units are to be selected, but there is no such table or column.
    """
    units, named_by = nwb.units, spec.nwb.unit_names
    beside = units is not None and len(units) == n_units
    if spec.units and not beside:
        raise RecordingError(
            "data.units",
            expected=f"a units table of {n_units} rows to select by",
            got="none" if units is None else f"one of {len(units)}",
        )
    rows, notes = selected_units(
        spec.units, lambda name: unit_labels(units, name, f"data.units.{name}"), n_units
    )
    told = told_channels(binned, n_units)
    odd: tuple[RecordingWarning, ...] = ()
    if told is not None:
        names = unique_names(told[0], "units")
    elif beside:
        names, odd = _unit_names(units, named_by)
    else:
        names = tuple(f"unit{i}" for i in range(n_units))
    return Beside(names, _held_out(units, names) if beside else (), rows, notes, odd)


def _column(table: Any, name: str, field: str) -> NDArray[np.float64]:
    values = contents(table[name].data, f"{field}.{name}")
    if values.dtype.kind not in "iuf" or values.shape != (len(table),):
        raise RecordingError(
            f"{field}.{name}",
            expected=f"{len(table)} seconds",
            got=f"{values.dtype} {values.shape}",
        )
    return values.astype(np.float64)


def invalid_times(nwb: Any, spec: RecordingSpec) -> NDArray[np.float64] | None:
    """Return starts and stops (M, 2) in seconds, infinite if unknown; None without a table.

    Raises:
        RecordingError: one stops before it starts.
    """
    table, (scale, offset) = nwb.invalid_times, spec.clocks.trials
    if table is None:
        return None
    begin = np.nan_to_num(_column(table, "start_time", "invalid_times"), nan=-np.inf)
    end = np.nan_to_num(_column(table, "stop_time", "invalid_times"), nan=np.inf)
    if (end < begin).any():
        row = int(np.argmax(end < begin))
        raise RecordingError(
            "invalid_times.stop_time",
            expected="seconds after each start_time",
            got=f"{end[row]:g} for a start at {begin[row]:g}",
        )
    return np.stack([begin, end], axis=1) * scale + offset


def trials_table(nwb: Any) -> TrialRows | None:
    """Return the trials with all columns of one value per trial; None if there are none.

    Raises:
        RecordingError: a column has another number of rows than the table.
    """
    table = nwb.trials
    if table is None or len(table) == 0:
        return None
    start, stop = _column(table, "start_time", "trials"), _column(table, "stop_time", "trials")
    columns: dict[str, NDArray[Any]] = {}
    for name in table.colnames:
        if name in ("start_time", "stop_time") or hasattr(table[name], "target"):
            continue
        values = contents(table[name].data, f"trials.{name}")
        if values.shape[:1] != start.shape:
            raise RecordingError(
                f"trials.{name}", expected=f"{len(start)}, one a trial", got=str(values.shape)
            )
        if values.ndim == 1:
            columns[name] = values
    return TrialRows(start, stop, columns)
