"""HDF5 files of trials x bins x units, as written by the Neural Latents Benchmark's tools."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilqr_vae.errors import RecordingError, did_you_mean, number_of
from ilqr_vae.recordings.checks import (
    Found,
    channels_of,
    existing_file,
    sha256_of,
    stated_width,
    whole_counts,
)
from ilqr_vae.recordings.h5 import File
from ilqr_vae.recordings.recording import Recording, Trials
from ilqr_vae.recordings.spec import ClockSpec, Hdf5Spec, RecordingSpec
from ilqr_vae.recordings.unbinned import differentiated
from ilqr_vae.recordings.units import labels_of, selected_units

Array = NDArray[np.float64]
_DEFAULT = Hdf5Spec()


@dataclass(frozen=True, slots=True)
class _Part:
    """The trials of a part: counts (K, T, N), kinematics (K, T, D) or None, and conditions."""

    counts: NDArray[Any]
    kinematics: Array | None
    condition: NDArray[np.str_] | None


def read_hdf5(path: str | Path, spec: RecordingSpec) -> Recording:
    """Read an HDF5 file of trials as a recording of concatenated segments.

    The file does not state the bin width: ``spec.bin_width`` does. Units are named ``heldin0``, ...
    and ``heldout0``, ...; NaN counts are bins that were not recorded. The file's test trials are
    the test part if it has their kinematics (or none at all); the others are split by number. A
    trial with a kinematic channel of only NaN is left out; single NaN are interpolated within their
    trial and not scored.

    Raises:
        RecordingError: no such file, not HDF5, a dataset is absent (those present are listed),
            shapes disagree, counts are not whole numbers, features are asked for, ``mode`` is not
            "trials", or ``lag`` is
            not zero (the kinematics of such a file have their lag in them).
    """
    path = existing_file(path)
    if spec.mode != "trials":
        raise RecordingError("data.mode", expected="'trials' for an HDF5 file", got=repr(spec.mode))
    if spec.lag:
        raise RecordingError(
            "data.lag", expected="0: the file's kinematics have theirs", got=f"{spec.lag:g} s"
        )
    if spec.clocks != ClockSpec():
        raise RecordingError(
            "data.clocks", expected="none for an HDF5 file of bins", got=str(spec.clocks)
        )
    if spec.features:
        got = ", ".join(spec.features)
        raise RecordingError("data.features", expected="none for an HDF5 file", got=got)
    spec = stated_width(spec, "HDF5")
    with closing(File(path, "an HDF5 file")) as file:
        parts, n_held_in, columns = _read(file, spec.hdf5, tuple(spec.units))
    made = _joined(parts, n_held_in, spec, path.name, sha256_of(path))
    rows, notes = selected_units(spec.units, lambda name: columns[name], made.n_units)
    if not notes:
        return made
    chosen = made.select_units(tuple(made.unit_names[i] for i in rows))
    return replace(chosen, notes=made.notes + notes)


def _read(
    file: File, names: Hdf5Spec, unit_columns: tuple[str, ...]
) -> tuple[list[_Part], int, dict[str, NDArray[np.str_]]]:
    """Return the parts, the number of held-in units, and columns of the units as text."""
    group = file.child(file.root, names.group) if names.group else file.root
    if not file.is_group(group):
        raise RecordingError(
            "data.hdf5.group",
            expected=f"one of {', '.join(file.names(file.root)) or 'none'}",
            got=repr(names.group),
        )
    present = file.names(group)

    def read(name: str, field: str) -> NDArray[Any]:
        """Return the numbers or text of a dataset. Raises RecordingError."""
        node = file.child(group, name)
        if node is None:
            listed = ", ".join(present) or "none"
            raise RecordingError(
                field, expected=f"one of {listed}", got=repr(name) + did_you_mean(name, present)
            )
        found = file.value(node)
        if not isinstance(found, np.ndarray):
            what = found.what if isinstance(found, Found) else f"a list of {len(found)}"
            raise RecordingError(name, expected="an array of numbers", got=what)
        return found

    def cube(name: str, field: str) -> NDArray[Any]:
        values = read(name, field)
        if values.ndim != 3 or 0 in values.shape or values.dtype.kind not in "biuf":
            raise RecordingError(
                name,
                expected="trials x bins x channels of numbers, also of a single trial",
                got=f"{'text' if values.dtype.kind == 'U' else values.dtype} {values.shape}",
            )
        return values

    def optional(name: str, usual: str, field: str) -> NDArray[Any] | None:
        absent = not name or (name == usual and file.child(group, name) is None)
        return None if absent else cube(name, field)

    def conditions(name: str, field: str) -> NDArray[np.str_] | None:
        return labels_of(np.ravel(read(name, field))) if name else None

    held_in = cube(names.spikes, "data.hdf5.spikes")
    held_out = optional(names.held_out, _DEFAULT.held_out, "data.hdf5.held_out")
    counts = {names.spikes: held_in} | ({} if held_out is None else {names.held_out: held_out})
    moving = optional(names.kinematics, _DEFAULT.kinematics, "data.hdf5.kinematics")
    told = conditions(names.conditions, "data.hdf5.conditions")
    parts = [_part(counts, {names.kinematics: moving}, told)]
    if file.child(group, names.test_spikes) is not None:
        test = {names.test_spikes: cube(names.test_spikes, "data.hdf5.test_spikes")}
        if len(counts) == 2 and file.child(group, names.test_held_out) is not None:
            test[names.test_held_out] = cube(names.test_held_out, "data.hdf5.test_held_out")
        field = "data.hdf5.test_kinematics"
        seen = optional(names.test_kinematics, _DEFAULT.test_kinematics, field)
        if len(test) == len(counts) and (moving is None) == (seen is None):
            told = conditions(names.test_conditions, "data.hdf5.test_conditions")
            parts.append(_part(test, {names.test_kinematics: seen}, told))
    columns = {name: labels_of(np.ravel(read(name, f"data.units.{name}"))) for name in unit_columns}
    return parts, held_in.shape[2], columns


def _part(
    counts: dict[str, NDArray[Any]],
    kinematics: dict[str, NDArray[Any] | None],
    condition: NDArray[np.str_] | None,
) -> _Part:
    """Read datasets by name; the first sets the numbers of trials and bins."""
    first, shape = next((name, values.shape[:2]) for name, values in counts.items())
    for name, values in (counts | kinematics).items():
        if values is not None and values.shape[:2] != shape:
            raise RecordingError(
                name,
                expected=f"{shape[0]} trials x {shape[1]} bins x channels, as {first} has",
                got=str(values.shape),
            )
    if condition is not None and len(condition) != shape[0]:
        raise RecordingError(
            "data.hdf5.conditions", expected=f"{shape[0]}, one a trial", got=str(len(condition))
        )
    (moving,) = kinematics.values()
    return _Part(
        np.concatenate(list(counts.values()), axis=2),
        None if moving is None else moving.astype(np.float64),
        condition,
    )


def _rows(part: _Part, rows: list[int], hdf5: Hdf5Spec) -> Array:
    """Select channels of a part's kinematics. Raises RecordingError if it has fewer."""
    assert part.kinematics is not None  # all parts or none have them: see _read
    if max(rows) >= part.kinematics.shape[2]:
        raise RecordingError(
            hdf5.test_kinematics,
            expected=f"{max(rows) + 1} channels or more",
            got=str(part.kinematics.shape),
        )
    return part.kinematics[:, :, rows]


def _usable(part: _Part) -> NDArray[np.bool_]:
    if part.kinematics is None:
        return np.ones(len(part.counts), dtype=bool)
    each = np.asarray(np.isfinite(part.kinematics).any(axis=1), dtype=bool)
    return np.asarray(each.all(axis=1), dtype=bool)


def _joined(
    parts: list[_Part], n_held_in: int, spec: RecordingSpec, name: str, sha256: str
) -> Recording:
    names, units, odd = (), (), ()
    if (moving := parts[0].kinematics) is not None:
        own = tuple(f"{spec.hdf5.kinematics}{i}" for i in range(moving.shape[2]))
        rows, names, units, odd = channels_of(spec.hdf5, own, ("",) * len(own), "data.hdf5")
        parts = [replace(p, kinematics=_rows(p, rows, spec.hdf5)) for p in parts]
    keep = [_usable(part) for part in parts]
    if not keep[0].any():
        raise RecordingError(
            spec.hdf5.kinematics, expected="some trial with every channel", got="none"
        )
    widths = {part.counts.shape[2] for part in parts}
    if len(widths) > 1:
        raise RecordingError(
            spec.hdf5.test_spikes, expected=f"{parts[0].counts.shape[2]} units", got=str(widths)
        )
    cubes = [part.counts[k] for part, k in zip(parts, keep, strict=True)]
    lengths = np.concatenate([np.full(len(c), c.shape[1], dtype=np.int64) for c in cubes])
    flat = np.concatenate([c.reshape(-1, c.shape[2]) for c in cubes]).astype(np.float64)
    seen = np.isfinite(flat)
    counts = whole_counts(np.where(seen, flat, 0.0), spec.hdf5.spikes)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    kinematics, scored = _filled(parts, keep, len(counts))
    told = [p.condition[k] for p, k in zip(parts, keep, strict=True) if p.condition is not None]
    condition = tuple(np.concatenate(told).tolist()) if len(told) == len(parts) else ()
    first = int(keep[0].sum())
    split, tested = spec.split, len(parts) > 1
    a = round(first * (split.train / split.validation if tested else split.train))
    b = first if tested else round(first * split.validation)
    lost = sum(int((~k).sum()) for k in keep)
    n_units = counts.shape[1]
    made = Recording(
        counts=counts,
        bin_width=spec.width,
        unit_names=tuple(
            f"heldin{i}" if i < n_held_in else f"heldout{i - n_held_in}" for i in range(n_units)
        ),
        kinematics=kinematics,
        kinematic_names=names,
        kinematic_units=units,
        trials=Trials(starts[:-1], starts[1:], condition),
        valid=np.asarray(seen.any(axis=1), dtype=bool),
        scored=scored,
        observed=None if (seen.all(axis=1) == seen.any(axis=1)).all() else seen,
        breaks=starts[1:-1],
        held_out=tuple(f"heldout{i}" for i in range(n_units - n_held_in)),
        bounds=(int(starts[a]), int(starts[b])),
        notes=(f"{number_of(lost, 'trial')} without kinematics: left out.",) if lost else (),
        warnings=odd,
        name=name,
        sha256=sha256,
    )
    return differentiated(made) if spec.differentiate else made


def _filled(
    parts: list[_Part], keep: list[NDArray[np.bool_]], n_bins: int
) -> tuple[Array | None, NDArray[np.bool_]]:
    if parts[0].kinematics is None:
        return None, np.ones(n_bins, dtype=bool)
    trials: list[Array] = []
    known: list[NDArray[np.bool_]] = []
    for part, kept in zip(parts, keep, strict=True):
        assert part.kinematics is not None  # all parts or none have them: see _read
        for values in part.kinematics[kept].copy():
            finite, rows = np.isfinite(values), np.arange(len(values))
            for d in range(values.shape[1]):
                good = finite[:, d]
                values[~good, d] = np.interp(rows[~good], rows[good], values[good, d])
            trials.append(values)
            known.append(finite.all(axis=1))
    return np.concatenate(trials), np.concatenate(known)
