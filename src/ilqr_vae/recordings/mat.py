"""Binned counts from MAT files, version 5 (scipy) and 7.3 (h5py), by a field map."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import io, sparse

from ilqr_vae.errors import RecordingError
from ilqr_vae.recordings.checks import (
    existing_file,
    fill_gaps,
    missing_extra,
    same_bin_width,
    sha256_of,
    whole_counts,
)
from ilqr_vae.recordings.spec import MatSpec, RecordingSpec
from ilqr_vae.recordings.types import Recording, Trials

_HDF5 = b"\x89HDF\r\n\x1a\n"

# What scipy's reader raises on bytes that are no MAT file, or half of one (found by truncating and
# corrupting files: it does not wrap what its parser trips over).
_UNREADABLE = (
    ValueError,
    TypeError,
    OSError,
    EOFError,
    KeyError,
    IndexError,
    OverflowError,
    MemoryError,
    NotImplementedError,
    UnicodeDecodeError,
    zlib.error,
    io.matlab.MatReadError,
)


def read_mat(path: str | Path, spec: RecordingSpec) -> Recording:
    """A MAT file as a recording; units are named ``unit0``, ``unit1``, ... in the file's order.

    ``spec.mat`` says which variable is what. Kinematics with missing samples are interpolated;
    bins inside a gap above one second are marked invalid (``checks.fill_gaps``).

    Raises:
        RecordingError: no such file, no MAT file, a variable is absent (those present are listed),
            counts are not whole numbers 0..65535, the file's bin width is not the spec's, shapes
            disagree, or the file is version 7.3 and h5py is not installed.
    """
    path, mat = existing_file(path), spec.mat
    wanted = {
        "data.mat.spikes": mat.spikes,
        "data.mat.bin_width": mat.bin_width,
        "data.mat.kinematics": mat.kinematics,
        "data.mat.trial_starts": mat.trial_starts,
    }
    variables = _variables(path, {field: name for field, name in wanted.items() if name})
    counts = _counts(variables[mat.spikes], mat)
    if mat.bin_width:
        width = np.ravel(_numbers(variables[mat.bin_width], mat.bin_width))
        if width.size != 1:
            raise RecordingError(mat.bin_width, expected="one number", got=f"{width.size}")
        same_bin_width(float(width[0]), spec.bin_width, mat.bin_width)
    n_bins = len(counts)
    valid = np.ones(n_bins, dtype=bool)
    kinematics: NDArray[np.float64] | None = None
    names: tuple[str, ...] = ()
    units: tuple[str, ...] = ()
    if mat.kinematics:
        raw, names, units = _kinematics(variables[mat.kinematics], mat, n_bins)
        kinematics, valid = fill_gaps(raw, spec.bin_width, mat.kinematics)
    trials = _trials(variables[mat.trial_starts], mat, n_bins) if mat.trial_starts else None
    return Recording(
        counts=counts,
        bin_width=spec.bin_width,
        unit_names=tuple(f"unit{i}" for i in range(counts.shape[1])),
        kinematics=kinematics,
        kinematic_names=names,
        kinematic_units=units,
        trials=trials,
        valid=valid,
        name=path.name,
        sha256=sha256_of(path),
    )


def _variables(path: Path, wanted: dict[str, str]) -> dict[str, Any]:
    """The wanted variables by name, in MATLAB's own axis order."""
    with path.open("rb") as file:
        head = file.read(1024)
    # A version 7.3 file is HDF5 behind a block of 512 bytes; Octave and others leave that out.
    if _HDF5 in (head[:8], head[512:520]):
        return _variables_v73(path, wanted)
    try:
        present = [name for name, _, _ in io.whosmat(path)]
        _require(wanted, present, path)
        return io.loadmat(path, variable_names=list(wanted.values()))
    except _UNREADABLE as error:
        raise RecordingError(
            "recording", expected="a MAT file (version 5 or 7.3)", got=f"{path.name}: {error}"
        ) from error


def _variables_v73(path: Path, wanted: dict[str, str]) -> dict[str, Any]:
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise missing_extra("recording", "h5py", "nwb") from error
    try:
        with h5py.File(path, "r") as file:
            names = [str(name) for name in file]
            _require(wanted, [name for name in names if not name.startswith("#")], path)
            return {name: _v73_array(file[name], name, h5py) for name in wanted.values()}
    except (OSError, RuntimeError, KeyError) as error:
        raise RecordingError(
            "recording", expected="a MAT file of version 7.3", got=f"{path.name}: {error}"
        ) from error


def _v73_array(node: Any, name: str, h5py: Any) -> NDArray[Any]:
    if isinstance(node, h5py.Dataset):
        return np.asarray(node).T
    if "MATLAB_sparse" in node.attrs and "jc" in node:
        columns = np.asarray(node["jc"])
        shape = (int(node.attrs["MATLAB_sparse"]), len(columns) - 1)
        if "data" not in node:  # a sparse matrix of zeros
            return np.zeros(shape)
        parts = (np.asarray(node["data"]), np.asarray(node["ir"]), columns)
        return sparse.csc_matrix(parts, shape=shape).toarray()
    raise RecordingError(name, expected="an array of numbers", got="a struct or cell")


def _require(wanted: dict[str, str], present: list[str], path: Path) -> None:
    for field, name in wanted.items():
        if name not in present:
            raise RecordingError(
                field,
                expected=f"one of {path.name}'s variables: {', '.join(sorted(present)) or 'none'}",
                got=repr(name),
            )


def _numbers(value: Any, field: str) -> NDArray[Any]:
    array = value.toarray() if sparse.issparse(value) else np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise RecordingError(field, expected="an array of numbers", got=f"dtype {array.dtype}")
    return array


def _counts(value: Any, mat: MatSpec) -> NDArray[np.uint16]:
    array = _numbers(value, mat.spikes)
    if array.ndim != 2:
        raise RecordingError(mat.spikes, expected=mat.spikes_axes, got=f"shape {array.shape}")
    return whole_counts(array.T if mat.spikes_axes == "units,bins" else array, mat.spikes)


def _kinematics(
    value: Any, mat: MatSpec, n_bins: int
) -> tuple[NDArray[Any], tuple[str, ...], tuple[str, ...]]:
    array = np.atleast_2d(_numbers(value, mat.kinematics))
    if array.ndim != 2 or n_bins not in array.shape:
        raise RecordingError(
            mat.kinematics, expected=f"channels x {n_bins} bins", got=f"shape {array.shape}"
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
    names = mat.kinematic_names or tuple(f"{mat.kinematics}{row}" for row in rows)
    units = mat.kinematic_units or ("",) * len(rows)
    for field, given in (("kinematic_names", names), ("kinematic_units", units)):
        if len(given) != len(rows):
            raise RecordingError(
                f"data.mat.{field}", expected=f"{len(rows)}, one a channel", got=str(len(given))
            )
    return array[:, list(rows)], names, units


def _trials(value: Any, mat: MatSpec, n_bins: int) -> Trials:
    """One-based first bins; a trial lasts until the next begins, the last until the end."""
    starts = _bin_numbers(_numbers(value, mat.trial_starts), mat.trial_starts)
    if starts[0] < 1 or starts[-1] > n_bins or (np.diff(starts) <= 0).any():
        raise RecordingError(
            mat.trial_starts,
            expected=f"increasing one-based bins up to {n_bins}",
            got=f"{len(starts)} from {starts[0]} to {starts[-1]}",
        )
    start = starts - 1
    return Trials(start=start, stop=np.append(start[1:], n_bins))


def _bin_numbers(values: NDArray[Any], field: str) -> NDArray[np.int64]:
    """Bin numbers as flat int64. Raises RecordingError where one is not a whole number."""
    flat = np.ravel(values)
    if flat.size == 0 or not np.isfinite(flat).all() or (flat != np.floor(flat)).any():
        raise RecordingError(field, expected="whole numbers of bins", got=f"{flat[:3]}")
    return flat.astype(np.int64)
