"""Checks and conversions shared by all readers."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilqr_vae.arrays import MAX_COUNT as MAX_COUNT
from ilqr_vae.errors import RecordingError
from ilqr_vae.recordings.physical_units import conversion, unstated
from ilqr_vae.recordings.recording import RecordingWarning
from ilqr_vae.recordings.spec import Hdf5Spec, MatSpec, NwbSpec, RecordingSpec

MOST_VALUES = 1_000_000_000
"""Of one array of a file: more than any recording has, and than memory holds."""
MAX_GAP_SECONDS = 1.0
"""Kinematics missing for longer than this are filled, and their bins marked invalid."""


FEW_LOST = 0.01
"""Share of spike times that may be NaN and left out."""


@dataclass(frozen=True, slots=True)
class Found:
    """A description of a value that is no array of numbers, text or cell array."""

    what: str


class Cells(list[Any]):
    """The values of a cell array, in MATLAB's order, column by column.

    Attributes:
        shape: shape of the array.
    """

    def __init__(self, values: Iterable[Any], shape: tuple[int, ...]) -> None:
        super().__init__(values)
        self.shape = shape


def existing_file(path: str | Path) -> Path:
    """Return the path of a file that opens. Raises RecordingError naming what is there instead."""
    path = Path(path)
    try:
        if not path.is_file():
            other = "no regular file" if path.exists() else "no such file"
            what = "a directory" if path.is_dir() else other
            raise RecordingError("recording", expected="a file", got=f"{what}: {path}")
        path.open("rb").close()
    except (OSError, ValueError) as error:  # a null byte in a name is a ValueError
        raise RecordingError(
            "recording", expected="a file that can be read", got=f"{path}: {error}"
        ) from error
    return path


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def whole_counts(values: NDArray[Any], field: str) -> NDArray[np.uint16]:
    """Convert counts of any shape to uint16 without changing a value.

    Raises:
        RecordingError: the array is empty, or a count is NaN, infinite, negative, fractional or
            above 65535; the error names ``field``.
    """
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise RecordingError(field, expected="numbers", got=f"dtype {array.dtype}")
    if array.size == 0:
        raise RecordingError(field, expected="at least one bin", got=f"shape {array.shape}")
    if array.dtype.kind == "f":
        array = array.astype(np.float64)  # float16 has no MAX_COUNT
        _refuse(array, ~np.isfinite(array), field, "finite whole numbers")
        _refuse(array, array != np.floor(array), field, "whole numbers")
    if array.dtype.kind in "if":
        _refuse(array, array < 0, field, "counts of zero or more")
    _refuse(array, array > MAX_COUNT, field, f"counts up to {MAX_COUNT}")
    return np.ascontiguousarray(array, dtype=np.uint16)


def _refuse(array: NDArray[Any], bad: NDArray[np.bool_], field: str, expected: str) -> None:
    n = int(bad.sum())
    if n:
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        raise RecordingError(
            field, expected=expected, got=f"{n} that are not, the first {array[where]} at {where}"
        )


def same_bin_width(file: float, spec: float, field: str) -> None:
    """Raise RecordingError unless the file and the spec have the same bin width (relative 1e-6)."""
    if not (np.isfinite(file) and abs(file - spec) <= 1e-6 * abs(spec)):
        # enough digits to distinguish the two widths
        raise RecordingError(
            "data.bin_width", expected=f"the file's {file:.10g} s ({field})", got=f"{spec:.10g} s"
        )


def stated_width(spec: RecordingSpec, kind: str) -> RecordingSpec:
    """Return the spec. Raises RecordingError if nothing states the bin width of counts."""
    if spec.bin_width is None:
        raise RecordingError(
            "data.bin_width",
            expected=f"the width of the counts' bins in seconds, which {kind} files do not say"
            + (" (or data.mat.bin_width, the variable that does)" if kind == "MAT" else ""),
            got="none",
        )
    return spec


def unique_names(names: tuple[str, ...], field: str) -> tuple[str, ...]:
    """Return the names. Raises RecordingError if one is repeated."""
    if len(set(names)) != len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise RecordingError(field, expected="unique names", got=f"{twice!r} more than once")
    return names


def name_words(name: str) -> list[str]:
    """Return the words of a name in snake, kebab or camel case, in lower case."""
    parted = re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", name)
    return [word.lower() for word in re.split(r"[^A-Za-z0-9]+", parted) if word]


def channels_of(
    given: MatSpec | NwbSpec | Hdf5Spec,
    names: tuple[str, ...],
    units: tuple[str, ...],
    field: str,
) -> tuple[list[int], tuple[str, ...], tuple[str, ...], tuple[RecordingWarning, ...]]:
    """Return the channels to decode, their names and units, and warnings about the units.

    Names and units are those of the configuration, or else those of the file.

    Args:
        names, units: the file's, one per channel.
        field: key of ``given`` in the configuration, e.g. ``data.mat``.

    Raises:
        RecordingError: a row does not exist or is repeated, there are more or fewer names or units
            than channels, or a name is repeated.
    """
    rows = list(given.kinematic_rows or range(len(names)))
    bad = [row for row in rows if not 0 <= row < len(names)]
    if bad or len(set(rows)) < len(rows):
        raise RecordingError(
            f"{field}.kinematic_rows",
            expected=f"different rows of 0 to {len(names) - 1} ({', '.join(names)})",
            got=str(bad[0]) if bad else str(rows),
        )
    own = tuple(names[row] for row in rows), tuple(units[row] for row in rows)
    chosen = given.kinematic_names or own[0], given.kinematic_units or own[1]
    for what, each in zip(("names", "units"), chosen, strict=True):
        if len(each) != len(rows):
            raise RecordingError(
                f"{field}.kinematic_{what}",
                expected=f"{len(rows)}, one a channel ({', '.join(own[0])})",
                got=f"{len(each)}",
            )
    unique_names(chosen[0], f"{field}.kinematic_names")
    odd = tuple(
        f"{name} is in {theirs} by the file and in {mine} by {field}.kinematic_units"
        for name, theirs, mine in zip(own[0], own[1], chosen[1], strict=True)
        if not (unstated(theirs) or unstated(mine) or conversion(theirs, mine) == 1.0)
    )
    if not odd:
        return rows, *chosen, ()
    text = f"{'; '.join(odd)}: the values are taken as they are, in the latter."
    return rows, *chosen, (RecordingWarning("units-contradict", text),)


def fill_gaps(
    values: NDArray[Any],
    seconds_per_row: float,
    field: str,
    wanted: NDArray[np.bool_] | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return kinematics without NaN, and which rows are valid.

    Each channel of a row with a missing value is interpolated linearly in time. Before the first
    and after the last measurement, the nearest one is used.

    Args:
        values: (T, D), NaN or infinite where missing.
        seconds_per_row: seconds per row, to distinguish short gaps from long ones.
        field: name for errors.
        wanted: (T,), rows of which at most half may lie in long gaps; None means all rows.

    Returns:
        float64 (T, D), finite; and bool (T,), False inside gaps above ``MAX_GAP_SECONDS``.

    Raises:
        RecordingError: a channel has no finite value, or more than half the wanted rows lie in long
            gaps.
    """
    array = np.array(values, dtype=np.float64)
    finite = np.isfinite(array)
    empty = ~finite.any(axis=0)
    if empty.any():
        channel = int(np.argmax(empty))
        raise RecordingError(field, expected="some finite values", got=f"none in channel {channel}")
    valid = np.ones(len(array), dtype=bool)
    if finite.all():
        return array, valid
    rows = np.arange(len(array))
    for channel in range(array.shape[1]):
        good = finite[:, channel]
        array[~good, channel] = np.interp(rows[~good], rows[good], array[good, channel])
    missing = ~finite.all(axis=1)
    edges = np.flatnonzero(np.diff(np.concatenate(([0], missing.astype(np.int8), [0]))))
    for start, stop in edges.reshape(-1, 2):
        if (stop - start) * seconds_per_row > MAX_GAP_SECONDS * (1 + 1e-9):
            valid[start:stop] = False
    wanted = np.ones_like(valid) if wanted is None else wanted
    lost, total = int((wanted & ~valid).sum()), int(wanted.sum())
    if 2 * lost > total:
        raise RecordingError(
            field,
            expected=f"gaps above {MAX_GAP_SECONDS:g} s in at most half the bins",
            got=f"them in {lost} of {total} bins",
        )
    return array, valid


def measured(values: NDArray[np.float64], bridged: int) -> NDArray[np.bool_]:
    """Return (T,), True for rows without NaN, and for up to ``bridged`` rows between two of them.

    If samples are as far apart as bins, jitter leaves single bins empty. Those are interpolated
    from their neighbours and count as measured; rows in longer gaps do not.
    """
    finite = np.isfinite(values).all(axis=1)
    edges = np.flatnonzero(np.diff(np.concatenate(([0], ~finite, [0])).astype(np.int8)))
    known = np.array(finite, dtype=bool)
    for start, stop in edges.reshape(-1, 2):
        known[start:stop] = start > 0 and stop < len(known) and stop - start <= bridged
    return known


def inside_intervals(
    intervals: NDArray[np.float64], begin: NDArray[np.float64], end: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """Return (T,), True if [begin, end) lies inside an interval, or inside several that touch.

    Args:
        intervals: (M, 2), seconds, in any order; they may overlap.
        begin, end: (T,), seconds.
    """
    slack = 1e-6
    merged: list[list[float]] = []
    for a, b in intervals[np.argsort(intervals[:, 0])].tolist():
        if merged and a <= merged[-1][1] + slack:
            merged[-1][1] = max(merged[-1][1], b)
        else:
            merged.append([a, b])
    if not merged:
        return np.zeros(len(begin), dtype=bool)
    starts, stops = np.array(merged).T
    which = np.searchsorted(starts, begin + slack, side="right") - 1
    return (which >= 0) & (stops[which.clip(0)] >= end - slack)


def missing_extra(field: str, package: str, extra: str) -> RecordingError:
    """Return the error for a reader whose package is not installed."""
    return RecordingError(
        field,
        expected=f"the package {package!r} (pip install '.[{extra}]')",
        got="not installed",
    )


def known_spikes(
    times: Sequence[NDArray[np.float64]], field: str
) -> tuple[list[NDArray[np.bool_]], tuple[RecordingWarning, ...]]:
    """Return which spike times of each unit are known, with a warning if a few are NaN.

    Raises:
        RecordingError: more than ``FEW_LOST`` of them are NaN, or one is infinite.
    """
    known = [np.isfinite(t) for t in times]
    lost, total = sum(int((~k).sum()) for k in known), sum(len(k) for k in known)
    if lost > FEW_LOST * total or any(np.isinf(t).any() for t in times):
        raise RecordingError(
            field, expected="finite seconds", got=f"{lost} of {total} that are not"
        )
    text = f"{lost} of {total} spike times are NaN: left out."
    return known, (RecordingWarning("spikes-missing", text),) if lost else ()
