"""Training end to end: recording -> model file, with validation, early stop, resume and a log."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from ilqr_training.config import TrainConfig
from ilqr_training.fit.build import build_model
from ilqr_training.fit.checkpoint import EarlyStopping, keep_checkpoint, load_checkpoint
from ilqr_training.fit.crops import Crops, Prepared, prepare
from ilqr_training.fit.log import TrainingLog
from ilqr_training.fit.loop import Report, TrainingRun, gradient_step, start
from ilqr_training.fit.members import (
    jobs_of,
    mean_of,
    remove,
    seeds_of,
    side_by_side,
    train_members,
)
from ilqr_training.fit.memory import estimate, refuse_hopeless
from ilqr_training.fit.model_file import manifest_of, save_model
from ilqr_training.fit.origin import first_model, stamped
from ilqr_training.fit.pace import Pace
from ilqr_training.fit.validate import Validation, scored, validate
from ilqr_training.readout.classes import ClassFit, class_names
from ilqr_vae.artifact import Artifact, Manifest, load_artifact
from ilqr_vae.errors import number_of
from ilqr_vae.files import check_space
from ilqr_vae.kernels.backend import device_of
from ilqr_vae.progress import SILENT, Progress, duration
from ilqr_vae.recordings import Recording, load_recording
from ilqr_vae.report.table import number

_READOUT_BYTES = 2**24
"""Largest size of a model file beyond its parameters, in bytes."""


@dataclass(frozen=True)
class Trained:
    """A finished training run.

    Attributes:
        manifest: manifest in the model file.
        seconds: wall-clock time of this call.
        steps: total number of gradient steps.
        best_step: the step whose parameters were kept.
        history: (step, validation score).
        reports: gradient steps of this call.
        data: the training data.
        validation: validation of these parameters; of the first member of an ensemble.
    """

    manifest: Manifest
    seconds: float
    steps: int
    best_step: int
    history: tuple[tuple[int, float], ...]
    reports: tuple[Report, ...]
    data: Prepared
    validation: Validation


def checkpoint_path(out: Path) -> Path:
    """Return the checkpoint file of a run that writes ``out``."""
    return out.with_name(out.name + ".checkpoint")


def _identity(config: TrainConfig, recording: Recording, origin: Artifact | None = None) -> str:
    began = "" if origin is None else origin.manifest.model_id
    content = msgspec.json.encode(config) + (recording.sha256 + began).encode()
    return hashlib.sha256(content).hexdigest()


def train(
    config: TrainConfig,
    recording_path: Path,
    out: Path,
    progress: Progress = SILENT,
    *,
    resume: bool = False,
    log_dir: Path | None = None,
    before: Callable[[Prepared], object] | None = None,
    origin: Artifact | None = None,
) -> Trained:
    """Fit a model to a recording and write it.

    Args:
        out: the model file, written when training has succeeded.
        progress: receives steps, validations and a description of the recording.
        resume: continue from the checkpoint beside ``out`` if there is one.
        log_dir: folder for TensorBoard events, or None.
        before: called with the prepared recording before the first step.
        origin: model to start from, see ``fit.origin``.

    Raises:
        RecordingError: the recording cannot be read, or a part of it is too short.
        ConfigError: a setting is invalid, or memory or disk space do not suffice.
        TrainingError: a value is not finite, the checkpoint is of another run, or the model file
            could not be written (the message says where it was saved instead).
    """
    recording = load_recording(recording_path, config.data)
    return train_on(
        config,
        recording,
        out,
        progress,
        resume=resume,
        log_dir=log_dir,
        before=before,
        origin=origin,
    )


def train_on(
    config: TrainConfig,
    recording: Recording,
    out: Path,
    progress: Progress = SILENT,
    *,
    resume: bool = False,
    log_dir: Path | None = None,
    before: Callable[[Prepared], object] | None = None,
    afterwards: int = 0,
    validated: Callable[[int, Mapping[str, float]], object] | None = None,
    identity: str = "",
    origin: Artifact | None = None,
) -> Trained:
    """Train on a recording that has been read; otherwise as ``train``.

    Args:
        afterwards: number of thorough validations that the caller adds, for the time left.
        validated: called with step and scores after each validation and its checkpoint.
        identity: identity of the run in its checkpoint; default: configuration and recording.
    """
    if config.training.members > 1:
        return _ensemble(config, recording, out, progress, resume, log_dir, before)
    began = time.monotonic()
    loop = config.training
    data = prepare(recording, config.data, chunk=loop.chunk)
    if config.readout.classes:
        class_names(data)  # so that errors in them are raised before the first step
    describe(config, data, progress)
    refuse_hopeless(config, data)
    torch.manual_seed(loop.seed)
    if origin is None:
        model = build_model(config.model, data)
    else:
        model = first_model(origin, data, loop.seed, progress)
    model = model.to(device_of(loop.device), getattr(torch, loop.dtype))
    run = start(model, Crops(data, model, loop.chunk, loop.seed), loop)
    check_space(out.absolute().parent, _output_bytes(run), "--out")
    stopping = EarlyStopping()
    checkpoint, identity = checkpoint_path(out), identity or _identity(config, recording, origin)
    if resume and checkpoint.exists():
        load_checkpoint(checkpoint, identity, run, stopping)
    if before is not None:
        before(data)
    log, newest = TrainingLog(log_dir, run.step + 1, progress), ""
    pace = Pace(model, data, config, afterwards=afterwards)
    quarters = {-(-loop.steps * k // 4) for k in (1, 2, 3)}
    reports: list[Report] = []
    stopped = stopping.over(loop.patience)
    try:
        while not stopped and run.step < loop.steps:
            with pace.step():
                report = gradient_step(run, loop)
            reports.append(report)
            log.add("train", {k: v for k, v in vars(report).items() if k != "step"}, report.step)
            note, left = (
                f"bound {report.bound:.1f}, KL {report.kl:.2f}{newest}",
                pace.left(run.step),
            )
            if not math.isnan(left):
                log.add("time", {"left": left}, report.step)
            progress("training", report.step, loop.steps, note, left)
            due = loop.validate_every and report.step % loop.validate_every == 0
            if not due and report.step < loop.steps:
                if report.step in quarters:
                    progress.log(f"step {report.step}: {_left(pace, report.step)}")
                continue
            with pace.validation(progress) as parts:
                found = validate(model, data, config, thorough=False, progress=parts)
            best = stopping.offer(report.step, found.score, model)
            # intervals are calibrated on these bins: their coverage says nothing
            shown = {k: v for k, v in found.scores.items() if k != "coverage_90"}
            log.add("validation", shown, report.step)
            newest = f", R2 {shown['r2']:.3f}" if "r2" in shown else ""
            stopped = stopping.over(loop.patience)
            progress.log(
                f"step {report.step}: {_scores(shown)} on the validation part"
                f"{' (best so far)' if best else ''}; "
                f"{_left(pace, loop.steps if stopped else report.step)}"
            )
            keep_checkpoint(checkpoint, identity, run, stopping, progress)
            if validated is not None:
                validated(report.step, found.scores)
        progress("training", loop.steps, loop.steps)
        model.load_state_dict(stopping.best_model)
        parts = pace.final(progress, lambda seconds: log.add("time", {"left": seconds}, run.step))
        final = validate(model, data, config, thorough=True, progress=parts)
        manifest = manifest_of(config, data, final, run.step, stopping.best_step)
        manifest = manifest if origin is None else stamped(manifest, origin)
        manifest = msgspec.structs.replace(
            manifest,
            history=tuple(stopping.history),
            provenance=manifest.provenance | _took(began),
        )
        manifest = save_model(out, manifest, model, final)
        log.end(run.step)
    finally:
        log.close()
    checkpoint.unlink(missing_ok=True)
    return Trained(
        manifest,
        time.monotonic() - began,
        run.step,
        stopping.best_step,
        tuple(stopping.history),
        tuple(reports),
        data,
        final,
    )


def _ensemble(
    config: TrainConfig,
    recording: Recording,
    out: Path,
    progress: Progress,
    resume: bool,
    log_dir: Path | None,
    before: Callable[[Prepared], object] | None,
) -> Trained:
    """Train several members as ``train_on`` does; see ``fit.members``."""
    began = time.monotonic()
    data = prepare(recording, config.data, chunk=config.training.chunk)
    if before is not None:
        before(data)
    jobs = jobs_of(config, recording, out, log_dir, _identity(config, recording), resume=resume)
    train_members(jobs, side_by_side(config), progress)
    first, *others = (load_artifact(job.out) for job in jobs)
    held, each = mean_of(jobs), [first.manifest, *(other.manifest for other in others)]
    intervals, decoded = (None, dict[str, float]()) if held is None else scored(held, data)
    final = Validation(
        decoded.get("r2", first.manifest.scores["bits_per_spike"]),
        first.manifest.scores | decoded,
        first.readout,
        first.mean_rate,
        first.seen,
        intervals,
        held,
        None if first.classes is None else ClassFit(first.manifest.classes or (), first.classes),
    )

    def said(values: Iterable[object]) -> str:
        return ", ".join(map(str, values))

    provenance = {
        "seed": said(seeds_of(config)),
        "steps": said(m.provenance["steps"] for m in each),
        "best_step": said(m.provenance["best_step"] for m in each),
        "scores_on": "validation bins, causal, newest bin; kinematics of all members, the rest of "
        "the first",
    }
    if held is not None:
        provenance["members_r2"] = said(f"{m.scores['r2']:.4f}" for m in each)
    manifest = msgspec.structs.replace(
        first.manifest,
        scores=final.scores,
        provenance=first.manifest.provenance | provenance | _took(began),
        config=msgspec.to_builtins(config),
    )
    manifest = save_model(out, manifest, first.model, final, others)
    remove(jobs)
    steps, best = (int(first.manifest.provenance[name]) for name in ("steps", "best_step"))
    seconds = time.monotonic() - began
    return Trained(manifest, seconds, steps, best, manifest.history, (), data, final)


def _took(began: float) -> dict[str, str]:
    """Return the training time for the provenance; of a resumed run, since it was resumed."""
    return {"training_seconds": f"{time.monotonic() - began:.0f}"}


def _left(pace: Pace, step: int) -> str:
    """Describe the time left of the whole run."""
    seconds = pace.left(step)
    return "time left unknown" if math.isnan(seconds) else f"about {duration(seconds)} left in all"


def describe(config: TrainConfig, data: Prepared, progress: Progress) -> None:
    """Log the contents of the recording, its split, and the estimated memory."""
    r, spans = data.recording, ("train", "validation", "test")
    split = ", ".join("{} {}:{}".format(span, *getattr(data, span)) for span in spans)
    progress.log(
        f"{r.name}: {number_of(len(r), 'bin')} of {r.bin_width * 1e3:g} ms, "
        f"{number_of(r.counted, 'unit')}{f' and {r.features} features' if r.features else ''}, "
        f"kinematics: {', '.join(r.kinematic_names) or 'none'}; {split}"
    )
    for line in (*r.warnings, *r.notes, str(estimate(config, data))):
        progress.log(f"  {line}")


def _scores(scores: dict[str, float]) -> str:
    decoded = f"causal R2 {number(scores['r2'])}, " if "r2" in scores else ""
    return f"{decoded}bits per spike {number(scores['bits_per_spike'])}"


def _output_bytes(run: TrainingRun) -> int:
    """Estimate the bytes of the model file and two checkpoints (the new one beside the last)."""
    modules = [run.model] if run.posterior is None else [run.model, run.posterior]
    tensors = [t for m in modules for t in m.state_dict().values()]
    # parameters, best parameters, two moments of Adam
    numbers = 4 * sum(t.numel() for t in tensors)
    numbers += run.crops.z.numel() + run.crops.u.numel()
    return 2 * numbers * run.crops.z.element_size() + _READOUT_BYTES
