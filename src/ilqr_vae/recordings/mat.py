"""Counts or spike times from MAT files, version 5 (scipy) and 7.3 (h5py), by a field map."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilqr_vae.errors import RecordingError
from ilqr_vae.recordings.binning import left_edges
from ilqr_vae.recordings.checks import (
    channels_of,
    existing_file,
    same_bin_width,
    sha256_of,
    whole_counts,
)
from ilqr_vae.recordings.mat_variables import described, read_variables
from ilqr_vae.recordings.plausible import usable_stamps
from ilqr_vae.recordings.recording import Recording, RecordingWarning
from ilqr_vae.recordings.session import Moving, Session
from ilqr_vae.recordings.spec import MatSpec, RecordingSpec
from ilqr_vae.recordings.trials import Table
from ilqr_vae.recordings.unbinned import recording_of


def read_mat(path: str | Path, spec: RecordingSpec) -> Recording:
    """A MAT file as a recording; units are named ``unit0``, ``unit1``, ... in the file's order.

    ``spec.mat`` says which variable is what. Kinematics with missing samples are interpolated;
    bins inside a gap above one second are marked invalid (``checks.fill_gaps``).

    Raises:
        RecordingError: no such file, no MAT file, a variable is absent (those present are listed),
            counts are not whole numbers 0..65535, the file's bin width is not the spec's, shapes
            disagree, spike times are not finite, or the file is version 7.3 and h5py is not
            installed.
    """
    path, mat = existing_file(path), spec.mat
    if spec.clocks.trials != (1.0, 0.0):
        raise RecordingError(
            "data.clocks.trials",
            expected="(1, 0) for a MAT file, whose trials are bins",
            got=str(spec.clocks.trials),
        )
    timed = bool(mat.spike_times)
    wanted = {
        "data.mat.spike_times" if timed else "data.mat.spikes": mat.spike_times or mat.spikes,
        "data.mat.bin_width": mat.bin_width,
        "data.mat.time": mat.time,
        "data.mat.kinematics": mat.kinematics,
        "data.mat.trial_starts": mat.trial_starts,
        "data.mat.trial_stops": mat.trial_stops,
        "data.mat.trial_conditions": mat.trial_conditions,
    } | {f"data.mat.trial_events[{i}]": name for i, name in enumerate(mat.trial_events)}
    variables = read_variables(path, {field: name for field, name in wanted.items() if name})
    made = _timed(variables, spec) if timed else _binned(variables, spec)
    return replace(made, name=path.name, sha256=sha256_of(path))


def _binned(variables: dict[str, Any], spec: RecordingSpec) -> Recording:
    mat, width = spec.mat, spec.bin_width
    counts = _counts(variables[mat.spikes], mat)
    if mat.bin_width:
        stated = _vector(variables[mat.bin_width], mat.bin_width)
        if stated.size != 1:
            raise RecordingError(mat.bin_width, expected="one number", got=f"{stated.size}")
        same_bin_width(float(stated[0]), width, mat.bin_width)
    n_bins = len(counts)
    begin = left_edges(0.0, width, n_bins)
    moving: Moving | None = None
    if mat.kinematics:
        whole_lag(spec)
        shape = getattr(variables[mat.kinematics], "shape", ())
        if n_bins not in shape and counts.shape[1] == max(shape, default=0):
            raise RecordingError(
                "data.mat.spikes_axes",
                expected=f"the order by which {mat.kinematics}, of shape {shape}, is as long",
                got=f"{mat.spikes_axes!r}, which makes {n_bins} bins of {counts.shape[1]} units",
            )
        raw, names, units = _kinematics(variables[mat.kinematics], mat, n_bins, "bins")
        moving = Moving(mat.kinematics, raw.astype(np.float64), begin, width, names, units)
    names = tuple(f"unit{i}" for i in range(counts.shape[1]))
    table = _table(variables, mat, begin, width)
    return recording_of(Session(names, counts=counts, moving=moving, table=table), spec)


def _timed(variables: dict[str, Any], spec: RecordingSpec) -> Recording:
    mat = spec.mat
    cells = variables[mat.spike_times]
    if not isinstance(cells, list):
        raise RecordingError(
            mat.spike_times,
            expected="a cell array of vectors of seconds, or a field of a struct array",
            got=described(cells),
        )
    units = [_vector(c, f"{mat.spike_times}{{{i + 1}}}") for i, c in enumerate(cells)]
    if not all(np.isfinite(times).all() for times in units):
        raise RecordingError(mat.spike_times, expected="finite seconds", got="some that are not")
    if not any(times.size for times in units):
        raise RecordingError(mat.spike_times, expected="cells with spike times", got="none")
    moving: Moving | None = None
    table: Table | None = None
    odd: tuple[RecordingWarning, ...] = ()
    if mat.kinematics:
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
        stamped = f"samples, as {mat.time} has"
        raw, names, kinds = _kinematics(variables[mat.kinematics], mat, n, stamped)
        interval = float(np.median(np.diff(times)))
        moving = Moving(mat.kinematics, raw.astype(np.float64)[rows], times, interval, names, kinds)
        # where each sample of the file begins, those left out too
        at = np.interp(np.arange(n), rows, times)
        table = _table(variables, mat, at, interval)
    elif mat.trial_starts:
        raise RecordingError(
            "data.mat.trial_starts",
            expected="kinematics beside them: with spike times, trials count their samples",
            got="none",
        )
    session = Session(
        tuple(f"unit{i}" for i in range(len(units))),
        units,
        spikes_field=mat.spike_times,
        moving=moving,
        table=table,
        warnings=odd,
    )
    return recording_of(session, spec)


def _numbers(value: Any, field: str) -> NDArray[Any]:
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "biuf":
        raise RecordingError(field, expected="an array of numbers", got=described(value))
    return value


def _vector(value: Any, field: str) -> NDArray[np.float64]:
    """Numbers along one axis, flat, float64."""
    array = _numbers(value, field)
    if sum(size != 1 for size in array.shape) > 1 and array.size:
        raise RecordingError(field, expected="a vector", got=f"shape {array.shape}")
    return np.ravel(array).astype(np.float64)


def _counts(value: Any, mat: MatSpec) -> NDArray[np.uint16]:
    array = _numbers(value, mat.spikes)
    if array.ndim != 2:
        raise RecordingError(mat.spikes, expected=mat.spikes_axes, got=f"shape {array.shape}")
    return whole_counts(array.T if mat.spikes_axes == "units,bins" else array, mat.spikes)


def _kinematics(
    value: Any, mat: MatSpec, n_bins: int, what: str
) -> tuple[NDArray[Any], tuple[str, ...], tuple[str, ...]]:
    array = np.atleast_2d(_numbers(value, mat.kinematics))
    if array.ndim != 2 or n_bins not in array.shape:
        raise RecordingError(
            mat.kinematics, expected=f"channels x {n_bins} {what}", got=f"shape {array.shape}"
        )
    if array.shape[1] == n_bins:
        array = array.T
    rows = mat.kinematic_rows or tuple(range(array.shape[1]))
    bad = [row for row in rows if not 0 <= row < array.shape[1]]
    if bad:
        raise RecordingError(
            "data.mat.kinematic_rows",
            expected=f"rows 0 to {array.shape[1] - 1} of {mat.kinematics}",
            got=str(bad[0]),
        )
    own = tuple(f"{mat.kinematics}{row}" for row in rows)
    return array[:, list(rows)], *channels_of(mat, own, ("",) * len(rows), "data.mat")


def whole_lag(spec: RecordingSpec) -> None:
    """Raises RecordingError unless the lag is a whole number of bins, as binned files need."""
    bins = spec.lag / spec.bin_width
    if abs(bins - round(bins)) > 1e-6:
        raise RecordingError(
            "data.lag",
            expected=f"a whole number of the file's bins of {spec.bin_width:g} s",
            got=f"{spec.lag:g} s",
        )


def _table(
    variables: dict[str, Any], mat: MatSpec, at: NDArray[np.float64], width: float
) -> Table | None:
    """One-based bins as a trials table in seconds; bins begin at ``at``, each ``width`` long."""
    if not mat.trial_starts:
        return None
    n_bins = len(at)

    def seconds(index: NDArray[Any]) -> NDArray[np.float64]:
        whole = np.nan_to_num(index).clip(0, n_bins - 1).astype(np.int64)
        return at[whole] + width * (index - whole)

    start = _bin_numbers(variables[mat.trial_starts], mat.trial_starts)
    if start[0] < 1 or start[-1] > n_bins or (np.diff(start) <= 0).any():
        raise RecordingError(
            mat.trial_starts,
            expected=f"increasing one-based bins up to {n_bins}",
            got=f"{len(start)} from {start[0]} to {start[-1]}",
        )
    stop = np.append(start[1:] - 1, n_bins)
    if mat.trial_stops:
        stop = _bin_numbers(variables[mat.trial_stops], mat.trial_stops)
        _one_a_trial(stop, len(start), mat.trial_stops)
        if (stop < start).any() or stop.max() > n_bins:
            raise RecordingError(
                mat.trial_stops,
                expected=f"one-based last bins, from each trial's first to {n_bins}",
                got="some that are not",
            )
    columns: dict[str, NDArray[Any]] = {}
    if mat.trial_conditions:
        values = _vector(variables[mat.trial_conditions], mat.trial_conditions)
        _one_a_trial(values, len(start), mat.trial_conditions)
        columns["condition"] = values
    for name in mat.trial_events:
        values = _vector(variables[name], name)
        _one_a_trial(values, len(start), name)
        columns[name if name.endswith("_time") else f"{name}_time"] = seconds(values - 1)
    # a column of the file's own name too, so that ``data.trials.event`` may say it as it is
    columns |= {name: columns[f"{name}_time"] for name in mat.trial_events if name not in columns}
    return Table(seconds(start - 1), seconds(stop), columns)


def _one_a_trial(values: NDArray[Any], trials: int, field: str) -> None:
    if len(values) != trials:
        raise RecordingError(field, expected=f"{trials}, one a trial", got=str(len(values)))


def _bin_numbers(value: Any, field: str) -> NDArray[np.int64]:
    """Bin numbers as flat int64. Raises RecordingError where one is not a whole number."""
    flat = _vector(value, field)
    if flat.size == 0 or not (np.abs(flat) < 2**53).all() or (flat != np.floor(flat)).any():
        raise RecordingError(field, expected="whole numbers of bins", got=f"{flat[:3]}")
    return flat.astype(np.int64)
