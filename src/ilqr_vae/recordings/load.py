"""One door for every file format."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

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
    """The key of ``RecordingSpec`` that names the kinematics of a file of this suffix."""
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
        kinematics: name of what to decode; None keeps the spec's.
        settings: keys of ``RecordingSpec`` instead of the spec's: ``bin_width=0.02``,
            ``nwb={"rate": 50.0}``; see ``files.with_settings``.

    Raises:
        ConfigError: an unknown key, a wrong type.
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


def load_matching(
    path: str | Path,
    spec: RecordingSpec,
    *,
    bin_width: float,
    unit_names: tuple[str, ...],
    kinematic_names: tuple[str, ...],
    kinematic_units: tuple[str, ...] = (),
) -> Recording:
    """Read a recording for a trained model: its units alone, in its order, movement in its units.

    Args:
        spec: how to read it.
        bin_width, unit_names, kinematic_names, kinematic_units: the model's; no names: it decodes
            nothing.

    Raises:
        RecordingError: it cannot be read, has another bin width, lacks a unit, or its kinematics
            are not those the model decodes or have units that do not convert into the model's.
    """
    if spec.bin_width is None:
        spec = msgspec.structs.replace(spec, bin_width=bin_width)
    recording = load_recording(path, spec)
    if abs(recording.bin_width - bin_width) > 1e-9:
        raise RecordingError(
            "recording.bin_width",
            expected=f"the model's {bin_width:.10g} s",
            got=f"{recording.bin_width:.10g} s",
        )
    decoded = kinematic_names and recording.kinematics is not None
    if decoded and recording.kinematic_names != kinematic_names:
        raise RecordingError(
            "recording.kinematics",
            expected=f"the channels the model decodes, {', '.join(kinematic_names)}",
            got=", ".join(recording.kinematic_names),
        )
    if decoded and kinematic_units:
        recording = in_units(recording, kinematic_units, "the model")
    return recording.select_units(unit_names)
