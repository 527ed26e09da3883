"""Counts or spike times from MAT files, version 5 (scipy) and 7.3 (h5py), by a field map."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ilqr_vae.errors import RecordingError
from ilqr_vae.recordings.binning import left_edges
from ilqr_vae.recordings.checks import (
    channels_of,
    existing_file,
    known_spikes,
    same_bin_width,
    sha256_of,
    stated_width,
    unique_names,
    whole_counts,
)
from ilqr_vae.recordings.features import series_of
from ilqr_vae.recordings.mat_variables import Cells, described, read_variables
from ilqr_vae.recordings.recording import Recording, RecordingWarning
from ilqr_vae.recordings.session import Moving, RecordedSession
from ilqr_vae.recordings.spec import MatSpec, RecordingSpec
from ilqr_vae.recordings.stamps import usable_stamps
from ilqr_vae.recordings.trials import TrialRows
from ilqr_vae.recordings.unbinned import recording_of
from ilqr_vae.recordings.units import labels_of, selected_units

Array = NDArray[np.float64]

_LONGEST_BIN = 10.0
"""Seconds that a file may state: more are milliseconds or hertz."""


def read_mat(path: str | Path, spec: RecordingSpec) -> Recording:
    """Read a MAT file; units are named ``unit0``, ``unit1``, ... in the order of the file.

    ``spec.mat`` names the variables. Kinematics with missing samples are interpolated;
    bins inside a gap above one second are marked invalid (``checks.fill_gaps``).

    Raises:
        RecordingError: no such file, no MAT file, a variable is absent (those present are listed),
            counts are not whole numbers 0..65535, the file's bin width is not the spec's, shapes
            disagree, spike times are not finite, or the file is version 7.3 and h5py is not
            installed.
    """
    path, mat = existing_file(path), spec.mat
    if spec.clocks.trials != (1.0, 0.0) and mat.trial_times == "bins":
        raise RecordingError(
            "data.clocks.trials",
            expected='(1, 0) where trials are bins (data.mat.trial_times = "seconds")',
            got=str(spec.clocks.trials),
        )
    stems = tuple(name.removesuffix("_time") for name in mat.trial_events)
    if len(set(stems)) < len(stems):
        unique_names(mat.trial_events, "data.mat.trial_events")
        unique_names(stems, "data.mat.trial_events (with or without _time)")
    timed = bool(mat.spike_times)
    wanted = {
        "data.mat.spike_times" if timed else "data.mat.spikes": mat.spike_times or mat.spikes,
        "data.mat.spike_trials": mat.spike_trials,
        "data.mat.bin_width": mat.bin_width,
        "data.mat.time": mat.time,
        "data.mat.kinematics": mat.kinematics,
        **{f"data.features[{i}]": name for i, name in enumerate(spec.features)},
        "data.mat.trial_starts": mat.trial_starts,
        "data.mat.trial_stops": mat.trial_stops,
        "data.mat.trial_conditions": mat.trial_conditions,
    }
    wanted |= {f"data.mat.trial_events[{i}]": name for i, name in enumerate(mat.trial_events)}
    wanted |= {f"data.units.{name}": name for name in spec.units}
    variables = read_variables(path, {field: name for field, name in wanted.items() if name})
    session, spec = _timed(variables, spec) if timed else _binned(variables, spec)
    rows, notes = selected_units(
        spec.units, lambda name: _labels(variables[name], name), len(session.unit_names)
    )
    session = replace(session.keeping(rows), notes=notes) if notes else session
    return replace(recording_of(session, spec), name=path.name, sha256=sha256_of(path))


def _binned(
    variables: dict[str, Any], spec: RecordingSpec
) -> tuple[RecordedSession, RecordingSpec]:
    """Return the session, and the spec with the bin width that the file states."""
    mat = spec.mat
    counts = _counts(variables[mat.spikes], mat)
    if mat.bin_width:
        stated = _vector(variables[mat.bin_width], mat.bin_width)
        if stated.size != 1 or not 0 < stated[0] <= _LONGEST_BIN:
            expected = f"one number of seconds, above zero and at most {_LONGEST_BIN:g}"
            raise RecordingError(mat.bin_width, expected=expected, got=f"{stated[:3]}")
        if spec.bin_width is not None:
            same_bin_width(float(stated[0]), spec.width, mat.bin_width)
        spec = msgspec.structs.replace(spec, bin_width=float(stated[0]))
    spec, width, n_bins = stated_width(spec, "MAT"), spec.width, len(counts)
    begin = left_edges(0.0, width, n_bins)
    moving: Moving | None = None
    odd: tuple[RecordingWarning, ...] = ()
    if mat.kinematics:
        whole_lag(spec)
        shape = getattr(variables[mat.kinematics], "shape", ())
        if n_bins not in shape and counts.shape[1] == max(shape, default=0):
            raise RecordingError(
                "data.mat.spikes_axes",
                expected=f"the order by which {mat.kinematics}, of shape {shape}, is as long",
                got=f"{mat.spikes_axes!r}, which makes {n_bins} bins of {counts.shape[1]} units",
            )
        k = _kinematics(variables[mat.kinematics], mat, n_bins, "bins")
        moving, odd = Moving(mat.kinematics, k.values, begin, width, k.names, k.units), k.warnings
    raw = {name: _numbers(variables[name], name) for name in spec.features}
    session = RecordedSession(
        tuple(f"unit{i}" for i in range(counts.shape[1])),
        counts=counts,
        moving=moving,
        features=series_of(raw, n_bins, "bins", begin, width),
        table=_table(variables, mat, begin, width),
        warnings=odd,
    )
    return session, spec


def _timed(variables: dict[str, Any], spec: RecordingSpec) -> tuple[RecordedSession, RecordingSpec]:
    mat = spec.mat
    moving: Moving | None = None
    odd: tuple[RecordingWarning, ...] = ()
    at, interval = np.zeros(0), 0.0
    features: tuple[Moving, ...] = ()
    if mat.kinematics or spec.features:
        if not mat.time:
            raise RecordingError(
                "data.mat.time", expected="the variable with the samples' times", got="none"
            )
        stamps = _numbers(variables[mat.time], mat.time)
        n, (scale, offset) = max(stamps.shape, default=0), spec.clocks.kinematics
        if n < 2:
            raise RecordingError(mat.time, expected="two or more increasing seconds", got=f"{n}")
        times, rows, odd = usable_stamps(stamps, n, mat.time)
        times = times * scale + offset
        interval, what = float(np.median(np.diff(times))), f"samples, as {mat.time} has"
        raw = {name: _numbers(variables[name], name) for name in spec.features}
        features = series_of(raw, n, what, times, interval, rows)
        if mat.kinematics:
            k = _kinematics(variables[mat.kinematics], mat, n, what)
            moving = Moving(mat.kinematics, k.values[rows], times, interval, k.names, k.units)
            odd += k.warnings
        # start of each sample of the file, including those that are left out
        at = np.interp(np.arange(n), rows, times)
    elif mat.trial_starts and mat.trial_times == "bins":
        raise RecordingError(
            "data.mat.trial_starts",
            expected="kinematics beside them, whose samples they count (or seconds: "
            'data.mat.trial_times = "seconds")',
            got="none",
        )
    table = _table(variables, mat, at, interval)
    units, trials, lost = _spike_times(variables, spec, 0 if table is None else len(table.start))
    session = RecordedSession(
        tuple(f"unit{i}" for i in range(len(units))),
        units,
        spikes_field=mat.spike_times,
        moving=moving,
        features=features,
        table=table,
        spike_trials=trials,
        warnings=odd + lost,
    )
    return session, spec


def _spike_times(
    variables: dict[str, Any], spec: RecordingSpec, n_trials: int
) -> tuple[list[Array], list[NDArray[np.int64]] | None, tuple[RecordingWarning, ...]]:
    """Return the spike times of each unit, the trial of each spike if the file states it, and
    warnings."""
    mat = spec.mat
    cells = variables[mat.spike_times]
    if not isinstance(cells, list):
        raise RecordingError(
            mat.spike_times,
            expected="a cell array of vectors of seconds, or a field of a struct array",
            got=described(cells),
        )
    trials: list[NDArray[np.int64]] | None = None
    by_trial = _by_trial(cells, n_trials) if n_trials > 1 else None
    if by_trial is not None and not spec.trials.relative_spikes:
        raise RecordingError(
            mat.spike_times,
            expected="one cell a unit (data.trials.relative_spikes = true reads a cell a unit and "
            "trial, with seconds from the trial's start)",
            got=f"{len(cells)} cells for {n_trials} trials",
        )
    if by_trial is not None:
        each = [
            [_vector(c, f"{mat.spike_times}{{{i + 1},{k + 1}}}") for k, c in enumerate(unit)]
            for i, unit in enumerate(by_trial)
        ]
        units = [np.concatenate(unit) for unit in each]
        trials = [np.repeat(np.arange(n_trials), [len(t) for t in unit]) for unit in each]
    else:
        units = [_vector(c, f"{mat.spike_times}{{{i + 1}}}") for i, c in enumerate(cells)]
        if mat.spike_trials:
            trials = _trial_numbers(variables[mat.spike_trials], units, mat, n_trials)
    known, odd = known_spikes(units, mat.spike_times)
    units = [times[k] for times, k in zip(units, known, strict=True)]
    trials = trials and [rows[k] for rows, k in zip(trials, known, strict=True)]
    if not any(times.size for times in units):
        raise RecordingError(mat.spike_times, expected="cells with spike times", got="none")
    return units, trials, odd


def _by_trial(cells: list[Any], n_trials: int) -> list[list[Any]] | None:
    """Return cells of units x trials, or trials x units, as one list of trials per unit; None if
    there is one cell per unit."""
    if cells and all(isinstance(each, list) for each in cells):  # cells within cells
        lengths = {len(each) for each in cells}
        if lengths == {n_trials}:
            return cells
        if len(cells) == n_trials and len(lengths) == 1:
            return [list(unit) for unit in zip(*cells, strict=True)]
        return None
    shape = cells.shape if isinstance(cells, Cells) else ()
    if len(shape) != 2 or n_trials not in shape or (1 in shape and n_trials != 1):
        return None
    grid = np.empty(len(cells), dtype=object)
    grid[:] = cells
    grid = grid.reshape(shape, order="F")
    return (grid if shape[1] == n_trials else grid.T).tolist()


def _trial_numbers(
    value: Any, units: list[Array], mat: MatSpec, n_trials: int
) -> list[NDArray[np.int64]]:
    rows: list[NDArray[np.int64]] = []
    cells = value if isinstance(value, list) else [value]
    for i, (cell, times) in enumerate(zip(cells, units, strict=False)):
        field = f"{mat.spike_trials}{{{i + 1}}}"
        numbers = _bin_numbers(cell, field) if len(times) else np.zeros(0, dtype=np.int64)
        if len(numbers) != len(times) or (numbers < 1).any() or (numbers > n_trials).any():
            raise RecordingError(
                field,
                expected=f"{len(times)} numbers from 1 to {n_trials}, a spike's trial each",
                got=f"{len(numbers)} from {numbers.min(initial=0)} to {numbers.max(initial=0)}",
            )
        rows.append(numbers - 1)
    if len(cells) != len(units):
        raise RecordingError(mat.spike_trials, expected=f"{len(units)} cells", got=f"{len(cells)}")
    return rows


def _labels(value: Any, field: str) -> NDArray[np.str_]:
    """Return numbers or text, one per trial or unit, as text.

    Text is a cell array, or a matrix of characters with one row per entry.
    """
    if isinstance(value, list):
        each = [np.ravel(cell) if isinstance(cell, np.ndarray) else None for cell in value]
        for i, cell in enumerate(each):
            if cell is None or cell.size > 1 or cell.dtype.kind not in "biufU":
                raise RecordingError(
                    f"{field}{{{i + 1}}}",
                    expected="a number or a text",
                    got=described(value[i]),
                )
        return labels_of(
            np.array([c[0] if c is not None and c.size else "" for c in each], dtype=object)
        )
    if isinstance(value, np.ndarray) and value.dtype.kind == "U":
        return labels_of(np.ravel(value))
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "biuf":
        raise RecordingError(field, expected="numbers or texts", got=described(value))
    return labels_of(_vector(value, field))


def _numbers(value: Any, field: str) -> NDArray[Any]:
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "biuf":
        raise RecordingError(field, expected="an array of numbers", got=described(value))
    return value


def _vector(value: Any, field: str) -> NDArray[np.float64]:
    """Return numbers along one axis, flat, float64."""
    array = _numbers(value, field)
    if sum(size != 1 for size in array.shape) > 1 and array.size:
        raise RecordingError(field, expected="a vector", got=f"shape {array.shape}")
    return np.ravel(array).astype(np.float64)


def _counts(value: Any, mat: MatSpec) -> NDArray[np.uint16]:
    array = _numbers(value, mat.spikes)
    if array.ndim != 2:
        raise RecordingError(mat.spikes, expected=mat.spikes_axes, got=f"shape {array.shape}")
    return whole_counts(array.T if mat.spikes_axes == "units,bins" else array, mat.spikes)


@dataclass(frozen=True, slots=True)
class _Channels:
    """Kinematics (K, D) with names, units and warnings."""

    values: Array
    names: tuple[str, ...]
    units: tuple[str, ...]
    warnings: tuple[RecordingWarning, ...]


def _kinematics(value: Any, mat: MatSpec, n_bins: int, what: str) -> _Channels:
    array = np.atleast_2d(_numbers(value, mat.kinematics))
    if array.ndim != 2 or n_bins not in array.shape:
        raise RecordingError(
            mat.kinematics, expected=f"channels x {n_bins} {what}", got=f"shape {array.shape}"
        )
    if array.shape[1] == n_bins:
        array = array.T
    n = array.shape[1]
    own = tuple(f"{mat.kinematics}{row}" for row in range(n))
    rows, names, units, odd = channels_of(mat, own, ("",) * n, "data.mat")
    return _Channels(array[:, rows].astype(np.float64), names, units, odd)


def whole_lag(spec: RecordingSpec) -> None:
    """Raise RecordingError unless the lag is a whole number of bins, as binned files require."""
    bins = spec.lag / spec.width
    if abs(bins - round(bins)) > 1e-6:
        raise RecordingError(
            "data.lag",
            expected=f"a whole number of the file's bins of {spec.width:g} s",
            got=f"{spec.lag:g} s",
        )


def _table(variables: dict[str, Any], mat: MatSpec, at: Array, width: float) -> TrialRows | None:
    """Return trials in seconds. Bin numbers of the file count from one; bins begin at ``at`` and
    are ``width`` long."""
    if not mat.trial_starts:
        return None
    n_bins, bins = len(at), mat.trial_times == "bins"

    def seconds(index: NDArray[Any]) -> Array:
        if not bins:
            return index.astype(np.float64)
        index = index - 1
        whole = np.nan_to_num(index).clip(0, n_bins - 1).astype(np.int64)
        return at[whole] + width * (index - whole)

    numbers = _bin_numbers if bins else _vector
    start = numbers(variables[mat.trial_starts], mat.trial_starts)
    if bins and (start[0] < 1 or start[-1] > n_bins or (np.diff(start) <= 0).any()):
        raise RecordingError(
            mat.trial_starts,
            expected=f"increasing one-based bins up to {n_bins} (or data.mat.trial_times = "
            '"seconds")',
            got=f"{len(start)} from {start[0]} to {start[-1]}",
        )
    end = n_bins + 1 if bins else at[-1] + width if n_bins else np.nan
    stop = np.append(start[1:], end)
    if mat.trial_stops:
        stop = numbers(variables[mat.trial_stops], mat.trial_stops)
        _one_a_trial(stop, len(start), mat.trial_stops)
        if bins and ((stop < start).any() or stop.max() > n_bins):
            raise RecordingError(
                mat.trial_stops,
                expected=f"one-based last bins, from each trial's first to {n_bins}",
                got="some that are not",
            )
        stop = stop + 1 if bins else stop  # end of the last bin
    columns: dict[str, NDArray[Any]] = {}
    if mat.trial_conditions:
        values = _labels(variables[mat.trial_conditions], mat.trial_conditions)
        _one_a_trial(values, len(start), mat.trial_conditions)
        columns["condition"] = values
    for name in mat.trial_events:
        values = _vector(variables[name], name)
        _one_a_trial(values, len(start), name)
        columns[name if name.endswith("_time") else f"{name}_time"] = seconds(values)
    # also under the file's own name, so that ``data.trials.event`` accepts it
    columns |= {name: columns[f"{name}_time"] for name in mat.trial_events if name not in columns}
    return TrialRows(seconds(start), seconds(stop), columns)


def _one_a_trial(values: NDArray[Any], trials: int, field: str) -> None:
    if len(values) != trials:
        raise RecordingError(field, expected=f"{trials}, one a trial", got=str(len(values)))


def _bin_numbers(value: Any, field: str) -> NDArray[np.int64]:
    """Return bin numbers as flat int64. Raises RecordingError if one is not a whole number."""
    flat = _vector(value, field)
    if flat.size == 0 or not (np.abs(flat) < 2**53).all() or (flat != np.floor(flat)).any():
        raise RecordingError(field, expected="whole numbers of bins", got=f"{flat[:3]}")
    return flat.astype(np.int64)
