"""An archive of recordings: train on, evaluate or decode each in a Ray task of its own.

Each recording has one result file, ``OUT/NAME.json``, written atomically when its task is done. A
result of the same settings is not computed again. A failure is recorded in the same way, and is
retried in the next run. Results of a folder keep the path below that folder, so that no two share a
name.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, cast

import msgspec
import numpy as np

from ilqr_training.config import TrainConfig
from ilqr_vae.cluster import TASK_RETRIES, as_they_end
from ilqr_vae.errors import ConfigError, IlqrVaeError, TrainingError
from ilqr_vae.files import replacing, write_whole
from ilqr_vae.progress import SILENT, Progress
from ilqr_vae.report.table import Table, number
from ilqr_vae.scoring.score import OURS

Task = Literal["train", "evaluate", "decode"]
SUFFIXES = (".nwb", ".mat", ".h5", ".hdf5")


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """The task for one recording.

    Attributes:
        task: train, evaluate or decode.
        name: name of the recording within the archive.
        recording, model, out: files. ``train`` writes ``model``, the other tasks read it; ``out``
            is the result file.
        config: configuration of ``train``.
        span: part of the recording that ``evaluate`` and ``decode`` process.
        cpus: number of threads.
        identity: digest of the recording and of all settings that affect the result.
    """

    task: Task
    name: str
    recording: str
    model: str
    out: str
    config: TrainConfig | None = None
    span: str = "test"
    cpus: int = 1
    identity: str = ""


class RecordingResult(msgspec.Struct, frozen=True, kw_only=True):
    """The content of the result file of one recording.

    Attributes:
        identity: see ``Job``.
        bins, units: size of the recording.
        scores: by name: ``r2`` (mean over channels) if there are kinematics, and
            ``bits_per_spike``.
        error: why there is no result; "" if there is one.
        report: all measurements, as ``evaluate --json`` writes them.
    """

    recording: str
    task: Task
    identity: str
    model: str = ""
    bins: int = 0
    units: int = 0
    seconds: float = 0.0
    scores: dict[str, float | None] = msgspec.field(default_factory=dict[str, float | None])
    error: str = ""
    report: dict[str, Any] = msgspec.field(default_factory=dict[str, Any])


def recordings_in(archive: Path) -> dict[str, Path]:
    """Return the recordings of an archive by name.

    An archive is a folder, or a text file that lists one path a line, relative to its own folder.

    Raises:
        ConfigError: there is no such folder or file, it has no recording, or one is named twice.
    """
    if archive.is_dir():
        paths = sorted(p for p in archive.rglob("*") if p.suffix.lower() in SUFFIXES)
        named = [(p.relative_to(archive).as_posix(), p) for p in paths if p.is_file()]
    else:
        try:
            lines = archive.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                "archive",
                expected="a folder of recordings, or a text file that lists them",
                got=f"{archive} ({error})",
            ) from error
        texts = [t for line in lines if (t := line.strip()) and not t.startswith("#")]
        # an absolute path, or one outside the folder, is named by its last part
        named = [(t if _below(t) else Path(t).name, archive.absolute().parent / t) for t in texts]
    found: dict[str, Path] = {}
    for name, path in named:
        if name in found:
            raise ConfigError("archive", expected="each recording once", got=f"{name} twice")
        found[name] = path
    if not found:
        raise ConfigError(
            "archive", expected=f"files ending in {', '.join(SUFFIXES)}", got=f"none in {archive}"
        )
    return found


def _below(text: str) -> bool:
    path = Path(text)
    return not path.is_absolute() and ".." not in path.parts


def jobs_of(
    archive: Path,
    task: Task,
    out: Path,
    *,
    config: TrainConfig | None = None,
    model: Path | None = None,
    span: str = "test",
    cpus: int = 1,
) -> list[Job]:
    """Return a job for each recording.

    Args:
        model: one model file for all, or the folder of models that ``train`` wrote.

    Raises:
        ConfigError: as ``recordings_in``.
    """
    made: list[Job] = []
    for name, path in recordings_in(archive).items():
        written = out / f"{name}.safetensors"
        read = written if model is None else model
        if model is not None and model.is_dir():
            read = model / f"{name}.safetensors"
        job = Job(
            task=task,
            name=name,
            recording=str(path.absolute()),
            model=str((written if task == "train" else read).absolute()),
            out=str((out / f"{name}.json").absolute()),
            config=config,
            span=span,
            cpus=cpus,
        )
        made.append(msgspec.structs.replace(job, identity=_identity(job)))
    return made


def _identity(job: Job) -> str:
    """Return the digest of the settings and of the files, by size and time of change."""
    content = msgspec.json.encode([job.task, job.config, job.span])
    for path in [job.recording] + ([] if job.task == "train" else [job.model]):
        try:
            stat = Path(path).stat()
            content += f"{path}:{stat.st_size}:{stat.st_mtime_ns}".encode()
        except OSError:
            content += f"{path}: none".encode()
    return hashlib.sha256(content).hexdigest()


def known(job: Job) -> RecordingResult | None:
    """Return the job's result if a complete one of the same settings exists."""
    try:
        outcome = msgspec.json.decode(Path(job.out).read_bytes(), type=RecordingResult)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return None
    done = outcome.identity == job.identity and not outcome.error
    return outcome if done and (job.task != "train" or Path(job.model).is_file()) else None


def carried_out(job: Job) -> RecordingResult:
    """Do a job and write its result file; errors caused by the recording go into the result."""
    began = time.monotonic()
    Path(job.out).parent.mkdir(parents=True, exist_ok=True)
    try:
        outcome = _train(job) if job.task == "train" else _evaluate(job)
    except IlqrVaeError as error:
        outcome = _failed(job, str(error))
    except Exception as error:  # raised by a library on an unexpected file
        outcome = _failed(job, f"{type(error).__name__}: {error}")
    outcome = msgspec.structs.replace(outcome, seconds=time.monotonic() - began)
    write_whole(Path(job.out), msgspec.json.format(msgspec.json.encode(outcome)) + b"\n")
    return outcome


def _failed(job: Job, why: str) -> RecordingResult:
    return RecordingResult(recording=job.name, task=job.task, identity=job.identity, error=why)


def _train(job: Job) -> RecordingResult:
    # imports torch, which the driver does not need
    from ilqr_training.fit.train import checkpoint_path, train
    from ilqr_training.options import use_threads

    use_threads(job.cpus)
    assert job.config is not None
    out, recording = Path(job.model), Path(job.recording)
    try:
        done = train(job.config, recording, out, resume=True)
    except TrainingError as error:
        if not error.field.startswith("checkpoint"):
            raise
        checkpoint_path(out).unlink(missing_ok=True)  # of other settings, or incomplete
        done = train(job.config, recording, out)
    scores = done.manifest.scores
    return RecordingResult(
        recording=job.name,
        task=job.task,
        identity=job.identity,
        model=done.manifest.model_id,
        bins=len(done.data.recording),
        units=done.data.recording.n_units,
        scores={k: scores.get(k) for k in ("r2", "bits_per_spike")},
        report={"scores": scores, "history": done.history, "steps": done.steps},
    )


def _evaluate(job: Job) -> RecordingResult:
    from ilqr_training.evaluation.report import evaluated
    from ilqr_training.options import use_threads
    from ilqr_vae.artifact import load_artifact
    from ilqr_vae.recordings import load_matching
    from ilqr_vae.recordings.split import parse_span
    from ilqr_vae.report import to_json

    use_threads(job.cpus)
    artifact = load_artifact(Path(job.model))
    manifest = artifact.manifest
    read = load_matching(Path(job.recording), manifest.data, manifest)
    done = evaluated(artifact, read, parse_span(job.span))
    report = done.report()
    if job.task == "decode":
        with replacing(Path(job.out).with_suffix(".npz")) as part:
            np.savez_compressed(part, allow_pickle=False, **done.arrays())
    ours = {} if report.scores is None else report.scores.methods[OURS]
    numbers = {"r2": ours.get("r2"), "bits_per_spike": report.bits_per_spike}
    return RecordingResult(
        recording=job.name,
        task=job.task,
        identity=job.identity,
        model=manifest.model_id,
        bins=len(read),
        units=read.n_units,
        scores=json.loads(json.dumps(numbers).replace("NaN", "null")),
        report=to_json(report),
    )


def run(
    jobs: Sequence[Job], *, gpus: float = 0.0, progress: Progress = SILENT
) -> list[RecordingResult]:
    """Run the jobs whose results are not known, and return the outcome of every job in order.

    Args:
        gpus: GPUs per task; may be a fraction.
        progress: receives the number of jobs done, and a line for each failure.

    Raises:
        ConfigError: a result file could not be written.
    """
    import ray
    from ray import exceptions

    outcomes = {job.name: done for job in jobs if (done := known(job)) is not None}
    task = ray.remote(carried_out)
    running: dict[Any, Job] = {}
    for job in jobs:
        if job.name not in outcomes:
            options = task.options(
                num_cpus=job.cpus, num_gpus=gpus, max_retries=TASK_RETRIES, name=job.name
            )
            running[options.remote(job)] = job
    try:
        for reference, job in as_they_end(running):
            try:
                outcome: RecordingResult = cast(Any, ray.get(reference))
            except exceptions.RayTaskError as error:
                # e.g. a full disk: not an error of the recording
                raise (error.cause or error) from error
            except exceptions.RayError as error:  # the worker died on each attempt
                outcome = _failed(job, f"{type(error).__name__}: {str(error).splitlines()[0]}")
                write_whole(Path(job.out), msgspec.json.encode(outcome) + b"\n")
            outcomes[job.name] = outcome
            if outcome.error:
                progress.log(f"{job.name}: {outcome.error}")
            progress(job.task, len(outcomes), len(jobs), job.name)
    finally:
        for reference in running:
            with suppress(exceptions.RayError):
                ray.cancel(reference)
    return [outcomes[job.name] for job in jobs]


def table_of(outcomes: Sequence[RecordingResult]) -> Table:
    """Return the table of results, one row per recording."""
    rows = tuple(
        (
            o.recording,
            o.error or "done",
            str(o.bins or "–"),
            str(o.units or "–"),
            number(o.scores.get("r2")),
            number(o.scores.get("bits_per_spike")),
            number(o.seconds, 1),
        )
        for o in outcomes
    )
    columns = ("recording", "result", "bins", "units", "R2", "bits per spike", "seconds")
    return Table("Recordings", "", columns, rows, words=2)
