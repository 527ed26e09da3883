"""The output of ``ilqr-vae train --check``: what training would do."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np

from ilqr_training.config import TrainConfig, with_fraction
from ilqr_training.fit.crops import Prepared, prepare
from ilqr_training.fit.joint import load_sessions
from ilqr_training.fit.members import side_by_side
from ilqr_training.fit.memory import GIB, estimate, refuse_hopeless
from ilqr_training.readout.classes import class_names
from ilqr_vae.kernels.backend import device_of
from ilqr_vae.recordings import Recording, RecordingWarning, load_recording
from ilqr_vae.recordings.joined import join
from ilqr_vae.report.table import Section, named


class TrainingPlan(msgspec.Struct, frozen=True):
    """A description of a training run.

    Attributes:
        recordings: names of the files.
        units, left_out: units to train on, and those that fire more slowly than ``data.min_rate``.
        bins, bin_width, masked: number of bins, their width in seconds, and the number of masked
            bins.
        split: first and last bin of each part.
        kinematics: channels with their units of measure.
        classes: classes of the discrete output, if configured.
        warnings, notes: see ``Recording``.
        settings: settings of model and training.
        device: device of the gradient steps.
        memory, free: peak memory and free memory, in bytes.
        seconds: None: the time is known only after the first steps.
    """

    recordings: list[str]
    units: list[str]
    features: list[str]
    left_out: list[str]
    bins: int
    bin_width: float
    masked: int
    split: dict[str, tuple[int, int]]
    kinematics: list[str]
    classes: list[str]
    warnings: list[RecordingWarning]
    notes: list[str]
    settings: TrainConfig
    device: str
    memory: int
    free: int
    seconds: float | None = None


def plan_of(config: TrainConfig, recordings: list[Path]) -> TrainingPlan:
    """Read the recordings as training would, and describe the run.

    Raises:
        RecordingError, ConfigError: training would be refused.
    """
    read, data = _data(config, recordings)
    refuse_hopeless(config, data)
    needed, r = estimate(config, data), data.recording
    channels = zip(r.kinematic_names, r.kinematic_units, strict=True)
    kept = set(r.unit_names)
    return TrainingPlan(
        recordings=[path.name for path in recordings],
        units=list(r.unit_names[: r.counted]),
        features=list(r.unit_names[r.counted :]),
        left_out=[name for name in read.unit_names if name not in kept],
        bins=len(r),
        bin_width=r.bin_width,
        masked=int(np.count_nonzero(~r.valid)),
        split={"train": data.train, "validation": data.validation, "test": data.test},
        kinematics=[named(name, unit) for name, unit in channels],
        classes=list(class_names(data)) if config.readout.classes else [],
        warnings=list(r.warnings),
        notes=list(r.notes),
        settings=config,
        device=str(device_of(config.training.device)),
        memory=needed.peak * side_by_side(config),
        free=needed.available,
    )


def _data(config: TrainConfig, recordings: list[Path]) -> tuple[Recording, Prepared]:
    """Return the recordings as read, and the data to train on."""
    if len(recordings) == 1:
        read = load_recording(recordings[0], config.data)
        return read, prepare(read, config.data, chunk=config.training.chunk)
    read = join(load_sessions(config, recordings), config.data.split)
    data = with_fraction(config, 1.0).data
    return read, prepare(read, data, chunk=config.training.chunk)


def sections_of(plan: TrainingPlan) -> list[Section]:
    """Return the plan as sections for the terminal."""
    loop, model, width = plan.settings.training, plan.settings.model, plan.bin_width
    seconds = {span: (b - a) * width for span, (a, b) in plan.split.items()}
    split = (f"{s} {a} to {b} ({seconds[s]:.4g} s)" for s, (a, b) in plan.split.items())
    units = f"{len(plan.units)}: {', '.join(plan.units[:6])}"
    units += ", ..." if len(plan.units) > 6 else ""
    if plan.left_out:
        units += f"; {len(plan.left_out)} left out: slower than data.min_rate, silent, or constant"
    rows = {
        "units": units,
        "features": ", ".join(plan.features) or "none",
        "bins": f"{plan.bins} of {width * 1e3:g} ms; {plan.masked} masked",
        "split": "; ".join(split),
        "kinematics": ", ".join(plan.kinematics) or "none: latents and rates alone",
        "classes": ", ".join(plan.classes) or "none",
        "model": f"{model.dynamics}, {model.latents} latents, {model.inputs} inputs, "
        f"{model.prior} prior, {model.likelihood} counts",
        "training": f"at most {loop.steps} steps of {loop.batch} crops of {loop.chunk} bins, a "
        f"validation every {loop.validate_every or loop.steps}, seed {loop.seed}, {loop.dtype} on "
        f"{plan.device}",
        "members": f"{loop.members}, {side_by_side(plan.settings)} at a time",
        "memory": f"about {plan.memory / GIB:.1f} GiB at most; {plan.free / GIB:.1f} GiB are free",
        "time": "known after the first steps, and shown then",
    }
    made = [Section(f"Training on {', '.join(plan.recordings)} would take", tuple(rows.items()))]
    said = [(f"warning {w.name}", w.text) for w in plan.warnings]
    said += [("note", note) for note in plan.notes]
    return made + ([Section("What a reader should know", tuple(said))] if said else [])
