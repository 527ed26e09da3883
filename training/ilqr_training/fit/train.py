"""Training end to end: recording -> model file, with validation, early stop, resume and a log."""

from __future__ import annotations

import hashlib
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import msgspec
import torch
from torch.utils.tensorboard import SummaryWriter

from ilqr_training.config import TrainConfig
from ilqr_training.fit.build import build_model, model_spec
from ilqr_training.fit.checkpoint import Progress, load_checkpoint, save_checkpoint
from ilqr_training.fit.crops import Crops, Prepared, prepare
from ilqr_training.fit.loop import Report, Run, start, train_steps
from ilqr_training.fit.memory import refuse_hopeless
from ilqr_training.fit.validate import Validation, validate
from ilqr_vae.artifact import Manifest, save_artifact
from ilqr_vae.kernels.backend import device_of
from ilqr_vae.recordings import Recording, load_recording


class Watcher(Protocol):
    """Who is told how training goes."""

    def prepared(self, data: Prepared) -> None: ...
    def stepped(self, report: Report) -> None: ...
    def validating(self, what: str, done: int, of: int) -> None: ...
    def validated(self, step: int, validation: Validation, best: bool) -> None: ...


class Silent:
    """A watcher that shows nothing."""

    def prepared(self, data: Prepared) -> None: ...
    def stepped(self, report: Report) -> None: ...
    def validating(self, what: str, done: int, of: int) -> None: ...
    def validated(self, step: int, validation: Validation, best: bool) -> None: ...


@dataclass(frozen=True)
class Trained:
    """What came of it.

    Attributes:
        manifest: as written into the model file.
        seconds: wall-clock, this call's.
        steps: gradient steps done in all.
        best_step: the step whose parameters were kept.
        history: (step, validation score).
    """

    manifest: Manifest
    seconds: float
    steps: int
    best_step: int
    history: tuple[tuple[int, float], ...]


def checkpoint_path(out: Path) -> Path:
    """Where a run that writes ``out`` keeps its checkpoint."""
    return out.with_name(out.name + ".checkpoint")


def _identity(config: TrainConfig, recording: Recording) -> str:
    content = msgspec.json.encode(config) + recording.sha256.encode()
    return hashlib.sha256(content).hexdigest()


def _log(writer: SummaryWriter | None, report: Report) -> None:
    if writer is not None:
        for name, value in vars(report).items():
            if name != "step":
                writer.add_scalar(f"train/{name}", value, report.step)


def _steps_until_stop(
    run: Run,
    data: Prepared,
    config: TrainConfig,
    progress: Progress,
    watcher: Watcher,
    writer: SummaryWriter | None,
    checkpoint: Path,
    identity: str,
) -> Iterator[Report]:
    """Gradient steps, with a validation and a checkpoint every so often; ends on early stop."""
    loop = config.training
    for report in train_steps(run, loop):
        _log(writer, report)
        yield report
        due = loop.validate_every and report.step % loop.validate_every == 0
        if not due and report.step < loop.steps:
            continue
        scored = validate(run.model, data, config, thorough=False, progress=watcher.validating)
        best = progress.offer(report.step, scored.score, run.model)
        watcher.validated(report.step, scored, best)
        if writer is not None:
            for name, value in scored.scores.items():
                if name != "coverage_90":  # no score here, see ``Manifest.measured``
                    writer.add_scalar(f"validation/{name}", value, report.step)
        save_checkpoint(checkpoint, identity, run, progress)
        if loop.patience and progress.waited >= loop.patience:
            return


def train(
    config: TrainConfig,
    recording_path: Path,
    out: Path,
    watcher: Watcher,
    *,
    resume: bool = False,
    log_dir: Path | None = None,
) -> Trained:
    """Fit a model to a recording and write it.

    Args:
        out: the model file; nothing is there until training has ended well.
        resume: continue from the checkpoint beside ``out`` if there is one.
        log_dir: TensorBoard events, or None.

    Raises:
        RecordingError, ConfigError, TrainingError: see their places.
    """
    recording = load_recording(recording_path, config.data)
    return train_on(config, recording, out, watcher, resume=resume, log_dir=log_dir)


def train_on(
    config: TrainConfig,
    recording: Recording,
    out: Path,
    watcher: Watcher,
    *,
    resume: bool = False,
    log_dir: Path | None = None,
) -> Trained:
    """``train``, on a recording that is read already."""
    began = time.monotonic()
    loop = config.training
    data = prepare(recording, config.data, chunk=loop.chunk)
    watcher.prepared(data)
    refuse_hopeless(config, data)
    torch.manual_seed(loop.seed)
    model = build_model(config.model, data).to(device_of(loop.device), getattr(torch, loop.dtype))
    run = start(model, Crops(data, model, loop.chunk, loop.seed), loop)
    progress = Progress()
    checkpoint, identity = checkpoint_path(out), _identity(config, recording)
    if resume and checkpoint.exists():
        load_checkpoint(checkpoint, identity, run, progress)
    writer = None if log_dir is None else SummaryWriter(str(log_dir), purge_step=run.step + 1)
    stopped = bool(loop.patience and progress.waited >= loop.patience)
    try:
        if not stopped:
            for report in _steps_until_stop(
                run, data, config, progress, watcher, writer, checkpoint, identity
            ):
                watcher.stepped(report)
    finally:
        if writer is not None:
            writer.close()
    model.load_state_dict(progress.best_model)
    final = validate(model, data, config, thorough=True, progress=watcher.validating)
    manifest = save_artifact(
        out,
        msgspec.structs.replace(
            manifest_of(config, data, final, run.step, progress.best_step),
            history=tuple(progress.history),
        ),
        model,
        final.readout,
        final.mean_rate,
    )
    checkpoint.unlink(missing_ok=True)
    return Trained(
        manifest,
        time.monotonic() - began,
        run.step,
        progress.best_step,
        tuple(progress.history),
    )


def manifest_of(
    config: TrainConfig, data: Prepared, final: Validation, steps: int, best_step: int
) -> Manifest:
    """The manifest of a trained model: shapes, causal validation scores, where it came from."""
    recording = data.recording
    decoded = final.readout is not None
    return Manifest(
        bin_width=recording.bin_width,
        unit_names=recording.unit_names,
        kinematic_names=recording.kinematic_names if decoded else (),
        kinematic_units=recording.kinematic_units if decoded else (),
        data=config.data,
        horizon=config.estimator,
        model=model_spec(config.model, data),
        readout=None if final.readout is None else final.readout.shape,
        scores=final.scores,
        provenance={
            "recording": recording.name,
            "recording_sha256": recording.sha256,
            "train_bins": f"{data.train[0]}:{data.train[1]}",
            "validation_bins": f"{data.validation[0]}:{data.validation[1]}",
            "scores_on": "validation bins, causal, newest bin",
            "steps": str(steps),
            "best_step": str(best_step),
            "seed": str(config.training.seed),
            "trained_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "ilqr_vae": version("ilqr-vae"),
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        },
        config=msgspec.to_builtins(config),
    )
