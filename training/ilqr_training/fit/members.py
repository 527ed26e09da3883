"""Training of an ensemble: the members in parallel, then one model file.

Each member is trained in its own process with its own seed, and writes a model file and its decodes
of the validation part beside ``--out``. The process is local, or a Ray task if ``--address`` names
a cluster. With ``--resume``, results of the same configuration and recording are reused. The
intervals of the ensemble are calibrated on the members' mean decode of the validation part.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ilqr_training.config import TrainConfig
from ilqr_training.fit.validate import HeldOut
from ilqr_vae import errors
from ilqr_vae.arrays import mixture
from ilqr_vae.cluster import TASK_RETRIES, as_they_end, drives_cluster
from ilqr_vae.errors import ConfigError, IlqrVaeError, TrainingError, number_of
from ilqr_vae.kernels.backend import device_of
from ilqr_vae.machine import cores
from ilqr_vae.progress import SILENT, Progress
from ilqr_vae.recordings import Recording

_SEEDS_APART = 10_007
"""Distance between members' seeds, so that runs with adjacent seeds share no member."""


@dataclass(frozen=True)
class MemberJob:
    """The training of one member.

    Attributes:
        config: configuration of one member, with its seed.
        out: its model file.
        log_dir: folder for TensorBoard events, or None.
        threads: number of threads of the kernels.
        identity: digest of configuration and recording.
        resume: whether to continue from its checkpoint.
    """

    config: TrainConfig
    recording: Recording
    out: Path
    log_dir: Path | None
    threads: int
    identity: str
    resume: bool

    @property
    def decodes(self) -> Path:
        """File of the decodes of the validation part."""
        return self.out.with_name(self.out.name + ".npz")

    @property
    def done(self) -> bool:
        """Return whether its results exist."""
        if not (self.out.exists() and self.decodes.exists()):
            return False
        with np.load(self.decodes) as held:
            return str(held["identity"]) == self.identity


def _plain(value: object) -> object:
    """Encode the fields that msgpack does not know."""
    match value:
        case np.ndarray():
            return value.dtype.str, value.shape, value.tobytes()
        case Path():
            return str(value)
        case Mapping():
            return dict(value)
        case _:
            raise NotImplementedError(f"{type(value)}")


def _made(kind: type, value: Any) -> object:
    """Decode what ``_plain`` encoded."""
    if kind is Path:
        return Path(value)
    dtype, shape, content = value
    return np.frombuffer(content, dtype).reshape(shape).copy()


def seeds_of(config: TrainConfig) -> list[int]:
    """Return the seeds of the members; the first one is that of a single model."""
    return [config.training.seed + _SEEDS_APART * i for i in range(config.training.members)]


def side_by_side(config: TrainConfig) -> int:
    """Return how many members are trained at once: one per core, or one on a GPU."""
    on_cpu = device_of(config.training.device).type == "cpu"
    return min(config.training.members, cores()) if on_cpu else 1


def jobs_of(
    config: TrainConfig,
    recording: Recording,
    out: Path,
    log_dir: Path | None,
    identity: str,
    *,
    resume: bool,
) -> list[MemberJob]:
    """Return the members' jobs; the first one logs where a single model would."""
    threads = max(1, cores() // side_by_side(config))
    made: list[MemberJob] = []
    for i, seed in enumerate(seeds_of(config), 1):
        loop = msgspec.structs.replace(config.training, members=1, seed=seed)
        own = msgspec.structs.replace(config, training=loop)
        logs = log_dir if log_dir is None or i == 1 else log_dir / f"member-{i}"
        path = out.with_name(f"{out.name}.member-{i}")
        made.append(MemberJob(own, recording, path, logs, threads, f"{identity}-{seed}", resume))
    return made


def train_members(jobs: Sequence[MemberJob], at_once: int, progress: Progress) -> None:
    """Run the unfinished jobs.

    Raises:
        IlqrVaeError: a member failed; the others are stopped.
    """
    if drives_cluster():
        _train_as_tasks(jobs, progress)
        return
    running: list[subprocess.Popen[bytes]] = []
    failed = threading.Event()

    def work(numbered: tuple[int, MemberJob]) -> None:
        number, job = numbered
        if failed.is_set() or (job.resume and job.done):
            return
        job.decodes.unlink(missing_ok=True)
        process = subprocess.Popen(
            [sys.executable, "-c", "from ilqr_training.fit.members import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        running.append(process)
        assert process.stdin is not None
        with process.stdin as pipe:
            pipe.write(msgspec.msgpack.encode(job, enc_hook=_plain))
        try:
            _follow(process, f"member {number}", progress)
        except IlqrVaeError:
            failed.set()
            for other in running:
                other.terminate()
            raise

    progress.log(f"{number_of(len(jobs), 'member')}, {at_once} at a time")
    with ThreadPoolExecutor(at_once) as pool:
        futures = [pool.submit(work, numbered) for numbered in enumerate(jobs, 1)]
        try:
            # report the first failure, not the members stopped because of it
            errors_ = [e for f in futures if (e := f.exception()) is not None]
        finally:
            failed.set()
            for process in running:
                process.terminate()
                process.wait()
    for error in sorted(errors_, key=lambda e: isinstance(e, _Stopped)):
        raise error


def _train_as_tasks(jobs: Sequence[MemberJob], progress: Progress) -> None:
    """``train_members`` as Ray tasks, of a core or a GPU each. All nodes see the jobs' folder."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    task: Any = ray.remote(_task)
    running: dict[Any, int] = {}
    for number, job in enumerate(jobs, 1):
        if job.resume and job.done:
            continue
        job.decodes.unlink(missing_ok=True)
        on_gpu = device_of(job.config.training.device).type != "cpu"
        options = task.options(num_cpus=1, num_gpus=int(on_gpu), max_retries=TASK_RETRIES)
        logs = None if job.log_dir is None else job.log_dir.absolute()
        own = replace(job, out=job.out.absolute(), log_dir=logs, threads=1)
        packed = msgspec.msgpack.encode(own, enc_hook=_plain)
        running[options.remote(packed)] = number
    progress.log(f"{number_of(len(jobs), 'member')}, {number_of(len(running), 'Ray task')}")
    try:
        for ended, number in as_they_end(running):
            try:
                ray.get(ended)
            except RayTaskError as error:
                raise (error.cause or error) from error
            except RayError as error:  # its worker died each time
                got = str(error).splitlines()[0]
                name = f"member {number}"
                raise _Stopped(name, expected="a run that ends", got=got) from error
            progress.log(f"member {number}: trained")
    finally:
        for left in running:
            ray.cancel(left, force=True)


class _Stopped(TrainingError):
    """A member ended without a result or a reason."""


def _follow(process: subprocess.Popen[bytes], name: str, progress: Progress) -> None:
    """Forward the progress of a member until it ends. Raises the error that it raised."""
    assert process.stdout is not None
    with process.stdout as lines:
        for line in lines:
            said: dict[str, Any] = json.loads(line)
            if "log" in said:
                progress.log(f"{name}: {said['log']}")
            elif "error" in said:
                kind = getattr(errors, said["error"], TrainingError)
                raise kind(said["field"], expected=said["expected"], got=said["got"])
            else:
                bar = f"{name}: {said['what']}"
                progress(bar, said["done"], said["of"], said["note"], said["left"])
    if process.wait() != 0:
        raise _Stopped(name, expected="a training run that ends", got=f"exit {process.returncode}")


def mean_of(jobs: Sequence[MemberJob]) -> HeldOut | None:
    """Return the mean of the members' decodes of the validation part; None without kinematics."""
    parts: list[HeldOut] = []
    for job in jobs:
        with np.load(job.decodes) as held:
            parts.append(HeldOut(*(held[name] for name in HeldOut._fields)))
    if not parts[0].truth.size:
        return None
    return HeldOut(parts[0].truth, *mixture([p.decoded for p in parts], [p.std for p in parts]))


def remove(jobs: Sequence[MemberJob]) -> None:
    """Remove the members' files beside the model file."""
    for job in jobs:
        job.out.unlink(missing_ok=True)
        job.decodes.unlink(missing_ok=True)


class _Pipe:
    """Progress as lines of JSON."""

    def __init__(self) -> None:
        self._to = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)  # other prints must not interleave with it
        self._last: tuple[str, int] = ("", -1)

    def __call__(
        self, what: str, done: int, of: int, note: str = "", left: float = math.nan
    ) -> None:
        if (what, 100 * done // max(of, 1)) != self._last or done >= of:
            self._last = (what, 100 * done // max(of, 1))
            self.say(what=what, done=done, of=of, note=note, left=left)

    def log(self, line: str) -> None:
        self.say(log=line)

    def say(self, **fields: Any) -> None:
        self._to.write(json.dumps(fields) + "\n")


def main() -> None:
    """Train the member whose job is read from standard input."""
    pipe = _Pipe()
    try:
        _train(sys.stdin.buffer.read(), pipe)
    except IlqrVaeError as error:
        kind = type(error).__name__
        pipe.say(error=kind, field=error.field, expected=error.expected, got=error.got)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _task(packed: bytes) -> None:
    """A Ray task: train the member of that job."""
    _train(packed, SILENT)


def _train(packed: bytes, progress: Progress) -> None:
    """Train a member, and write its model file and its decodes."""
    from ilqr_training.fit.train import train_on
    from ilqr_training.options import use_threads

    job = msgspec.msgpack.decode(packed, type=MemberJob, dec_hook=_made)
    use_threads(job.threads)
    done = train_on(
        job.config, job.recording, job.out, progress, resume=job.resume, log_dir=job.log_dir
    )
    none = np.zeros((0, 0))
    held = done.validation.held_out or HeldOut(none, none, none)
    with job.decodes.open("wb") as file:
        np.savez(
            file,
            identity=np.array(job.identity),
            truth=held.truth,
            decoded=held.decoded,
            std=held.std,
        )


def refuse_sessions(config: TrainConfig) -> None:
    """Raise ConfigError if an ensemble is to be trained on several recordings."""
    if config.training.members > 1:
        raise ConfigError(
            "training.members",
            expected="1 with several recordings",
            got=str(config.training.members),
        )
