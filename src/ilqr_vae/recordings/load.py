"""Reading a recording of any file format."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import msgspec

from ilqr_vae.errors import RecordingError
from ilqr_vae.files import with_settings
from ilqr_vae.recordings.checks import existing_file
from ilqr_vae.recordings.physical_units import in_units
from ilqr_vae.recordings.plausible import silences
from ilqr_vae.recordings.recording import Recording
from ilqr_vae.recordings.spec import RecordingSpec
from ilqr_vae.recordings.split import at_rest


def kinematics_key(path: str | Path) -> str:
    """Return the key of ``RecordingSpec`` that names the kinematics for this suffix."""
    suffix = Path(path).suffix.lower()
    return f"{'hdf5' if suffix in ('.h5', '.hdf5') else suffix[1:]}.kinematics"


def load_recording(
    path: str | Path,
    spec: RecordingSpec | None = None,
    *,
    kinematics: str | None = None,
    **settings: Any,
) -> Recording:
    """Read a recording by its suffix: ``.nwb``, ``.mat``, or ``.h5`` and ``.hdf5``.

    Args:
        path: the file.
        spec: how to read it (bin width, fields); None means the defaults.
        kinematics: name of the series to decode; None keeps the spec's.
        settings: overrides by key of ``RecordingSpec``: ``bin_width=0.02``, ``nwb={"rate": 50.0}``;
            see ``files.with_settings``.

    Raises:
        ConfigError: a key is unknown, or a type is wrong.
        RecordingError: no such file, another suffix, a file that is not what its suffix says, a
            field that is absent, or contents that are no recording (``read_nwb``, ``read_mat``,
            ``read_hdf5``).
    """
    if kinematics is not None:
        settings[kinematics_key(path)] = kinematics
    path, spec = existing_file(path), with_settings(spec or RecordingSpec(), settings)
    suffix = path.suffix.lower()
    if suffix == ".mat":
        from ilqr_vae.recordings.mat import read_mat as read
    elif suffix == ".nwb":
        from ilqr_vae.recordings.nwb.read import read_nwb as read
    elif suffix in (".h5", ".hdf5"):
        from ilqr_vae.recordings.hdf5 import read_hdf5 as read
    else:
        raise RecordingError("recording", expected="a .nwb, .mat or .h5 file", got=path.name)
    recording = silences(read(path, spec))
    still = at_rest(recording, spec.split)
    return replace(recording, warnings=recording.warnings + still) if still else recording


class Decoder(Protocol):
    """What a recording must match to be decoded: a model, which decodes nothing without names."""

    @property
    def bin_width(self) -> float: ...
    @property
    def unit_names(self) -> tuple[str, ...]: ...
    @property
    def kinematic_names(self) -> tuple[str, ...]: ...
    @property
    def kinematic_units(self) -> tuple[str, ...]: ...


def load_at(path: str | Path, spec: RecordingSpec, bin_width: float) -> Recording:
    """Read a recording at a model's bin width. Raises RecordingError if it has another one."""
    if spec.bin_width is None:
        spec = msgspec.structs.replace(spec, bin_width=bin_width)
    recording = load_recording(path, spec)
    recording.require_bin_width(bin_width)
    return recording


def load_matching(path: str | Path, spec: RecordingSpec, model: Decoder) -> Recording:
    """Read a recording for a trained model: only its units, in its order, movement in its units.

    Args:
        spec: how to read it.
        model: the model's manifest, or a client's part of it.

    Raises:
        RecordingError: it cannot be read, has another bin width, lacks a unit, or its kinematics
            are not those the model decodes or have units that do not convert into the model's.
    """
    recording = load_at(path, spec, model.bin_width)
    decoded = model.kinematic_names and recording.kinematics is not None
    if decoded and recording.kinematic_names != model.kinematic_names:
        raise RecordingError(
            "recording.kinematics",
            expected=f"the channels the model decodes, {', '.join(model.kinematic_names)}",
            got=", ".join(recording.kinematic_names),
        )
    if decoded and model.kinematic_units:
        recording = in_units(recording, model.kinematic_units, "the model")
    return recording.select_units(model.unit_names)
