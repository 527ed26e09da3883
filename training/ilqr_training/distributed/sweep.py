"""Sweeps: train many configurations on one recording and choose on its validation part (Ray Tune).

A trial is a point of the space. It trains the seeds of its point one after another. After each
validation it reports the objective on the validation part, averaged over the seeds so far, so that
trials are compared after the same number of validations of the same seeds. Its checkpoint holds the
model files of the seeds that are done and the training checkpoint of the current one. So an
interrupted trial gives the same result as one that was never interrupted.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from ilqr_training.config import TrainConfig
from ilqr_training.distributed.space import Axis, at
from ilqr_vae.errors import ConfigError, TrainingError
from ilqr_vae.files import write_whole

Objective = Literal["r2", "bits_per_spike"]
Method = Literal["random", "bayesian", "population"]
MUTABLE = ("learning_rate", "decay", "clip", "kl_warmup", "kinematic_weight", "tolerance")
"""Keys of ``training`` that may change during training."""

_SCORES = "scores.json"
_TRIALS = "trials"
_PERTURB_EVERY = 2
_KEPT = 4
"""Checkpoints kept of a trial: after a crash Ray Tune may resume from an earlier one."""


class SweepPlan(msgspec.Struct, frozen=True, kw_only=True):
    """A sweep.

    Attributes:
        config: values of the keys that are not searched.
        recording: the file, with its size and time of change.
        axes: the space.
        trials: number of points, or size of the population.
        seeds: number of seeds per point, counted from the seed of ``config``.
        method, objective: search method, and the score to maximise.
        early_stop: stop poor trials by asynchronous successive halving.
        cpus, gpus: resources of each trial.
    """

    config: TrainConfig
    recording: str
    stamp: str = ""
    axes: tuple[Axis, ...]
    trials: int
    seeds: int = 1
    method: Method = "random"
    objective: Objective = "r2"
    early_stop: bool = True
    cpus: int = 1
    gpus: float = 0.0

    def checked(self) -> SweepPlan:
        """Return itself. Raises ConfigError if options contradict each other."""
        keys = [axis.key for axis in self.axes]
        if not keys:
            raise ConfigError("--search", expected="at least one key", got="none")
        if "training.seed" in keys and self.seeds > 1:
            raise ConfigError("--seeds", expected="1 where training.seed is searched", got="more")
        if self.method == "population":
            allowed = [f"training.{name}" for name in MUTABLE]
            if wrong := [key for key in keys if key not in allowed]:
                raise ConfigError(
                    "--search",
                    expected=f"with --method population one of {', '.join(allowed)}",
                    got=wrong[0],
                )
            if self.seeds > 1:
                raise ConfigError("--seeds", expected="1 with --method population", got="more")
        if not self.config.training.validate_every:
            raise ConfigError("training.validate_every", expected="at least 1", got="0")
        return self

    @property
    def slots(self) -> int:
        """Return the largest number of reports per seed: its validations and the final one."""
        loop = self.config.training
        return -(-loop.steps // loop.validate_every) + 1


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """A row of the results table.

    Attributes:
        point: values of the searched keys.
        score: mean of the objective over the seeds so far; None if there is none.
        seeds: score of each finished seed.
        validations: number of validations reported.
        state: done, stopped early, or the reason of its failure.
        curve: pairs (validations, score).
        model: model file of the best seed; "" if no seed is done.
    """

    point: dict[str, Any]
    score: float | None
    seeds: tuple[float, ...]
    validations: int
    state: str
    curve: tuple[tuple[int, float], ...] = ()
    model: str = ""


def stamp_of(recording: Path) -> str:
    """Return a text that changes whenever the file does. Raises ConfigError if there is no file."""
    try:
        stat = recording.stat()
    except OSError as error:
        raise ConfigError("--recording", expected="a file", got=str(error)) from error
    return f"{stat.st_size}:{stat.st_mtime_ns}"


def train_point(point: dict[str, Any], plan: SweepPlan) -> None:
    """Train the seeds of one trial; Ray Tune calls this in a worker process."""
    from ray import tune

    from ilqr_training.fit.train import train_on
    from ilqr_training.options import use_threads
    from ilqr_vae.recordings import load_recording

    use_threads(plan.cpus)
    first = at(plan.config, point)
    recording = load_recording(plan.recording, first.data)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if (checkpoint := tune.get_checkpoint()) is not None:
            with checkpoint.as_directory() as kept:
                shutil.copytree(kept, work, dirs_exist_ok=True)
        known, done, best = work / _SCORES, list[float](), list[float]()
        if known.exists():
            done, best = msgspec.json.decode(
                known.read_bytes(), type=tuple[list[float], list[float]]
            )

        def report(slot: int) -> None:
            known.write_bytes(msgspec.json.encode((done, best)))
            scores = [*done, *best]
            found = {
                "score": sum(scores) / len(scores),
                "validation": len(done) * plan.slots + slot,
                "seeds": list(done),
            }
            tune.report(found, checkpoint=tune.Checkpoint.from_directory(str(work)))

        def validated(step: int, scores: Mapping[str, float]) -> None:
            best[:] = [max([*best, _objective(scores, plan)])]
            report(-(-step // plan.config.training.validate_every))

        while len(done) < plan.seeds:
            seed = first.training.seed + len(done)
            trained = train_on(
                at(plan.config, {**point, "training.seed": seed}),
                recording,
                work / f"{len(done)}.safetensors",
                resume=True,
                validated=validated,
                identity=plan.stamp if plan.method == "population" else "",
            )
            best.clear()
            done.append(_objective(trained.manifest.scores, plan))
            report(0)


def _objective(scores: Mapping[str, float], plan: SweepPlan) -> float:
    if plan.objective not in scores:
        raise TrainingError("--objective", expected=f"one of {', '.join(scores)}", got="r2")
    return scores[plan.objective]


def tuner_of(plan: SweepPlan, out: Path, callbacks: list[Any]) -> Any:
    """Return a new sweep, or the interrupted one in ``out``.

    Raises:
        ConfigError: ``out`` holds another sweep.
    """
    from ray import tune

    out = out.absolute()
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "1")
    # the live table is the output; it names failed trials
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    trainable: Any = tune.with_resources(
        tune.with_parameters(train_point, plan=plan), {"cpu": plan.cpus, "gpu": plan.gpus}
    )
    written, trials = out / "plan.json", out / _TRIALS
    stated = msgspec.json.format(msgspec.json.encode(plan)) + b"\n"
    if written.exists() and tune.Tuner.can_restore(str(trials)):
        if written.read_bytes() != stated:
            raise ConfigError("--out", expected="a folder of the same sweep", got="another's")
        return tune.Tuner.restore(str(trials), trainable, restart_errored=True)
    # it was interrupted before Ray Tune could save anything
    shutil.rmtree(trials, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    write_whole(written, stated)
    return tune.Tuner(
        trainable,
        param_space={axis.key: axis.domain for axis in plan.axes},
        tune_config=tune.TuneConfig(
            metric="score",
            mode="max",
            num_samples=plan.trials,
            search_alg=_search(plan),
            scheduler=_scheduler(plan, trials),
            reuse_actors=True,  # a process takes seconds to start
            trial_name_creator=_name,
            trial_dirname_creator=_name,
        ),
        run_config=tune.RunConfig(
            name=_TRIALS,
            storage_path=str(out),
            verbose=0,
            callbacks=callbacks,
            checkpoint_config=tune.CheckpointConfig(num_to_keep=_KEPT),
        ),
    )


def _name(trial: Any) -> str:
    return str(trial.trial_id)


def _search(plan: SweepPlan) -> Any:
    seed = plan.config.training.seed
    if plan.method == "bayesian":
        import optuna
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # a resumed trial repeats its last report
        warnings.filterwarnings("ignore", "The reported value is ignored", UserWarning)
        return OptunaSearch(seed=seed)
    from ray.tune.search.basic_variant import BasicVariantGenerator

    return BasicVariantGenerator(random_state=seed)


def _scheduler(plan: SweepPlan, trials: Path) -> Any:
    from ray.tune import schedulers

    if plan.method == "population":
        axes = {axis.key: axis for axis in plan.axes}

        def within(config: dict[str, Any]) -> dict[str, Any]:
            return {k: axes[k].clipped(v) if k in axes else v for k, v in config.items()}

        return schedulers.PopulationBasedTraining(
            time_attr="validation",
            perturbation_interval=_PERTURB_EVERY,
            hyperparam_mutations={
                axis.key: list(axis.values) if axis.kind == "choice" else axis.domain
                for axis in plan.axes
            },
            custom_explore_fn=within,
        )
    if not plan.early_stop:
        return None
    most = plan.seeds * plan.slots
    from ilqr_training.distributed.halving import Halving  # Ray is installed

    return Halving(trials, time_attr="validation", max_t=most + 1, grace_period=min(2, most))


def table(grid: Any, plan: SweepPlan) -> list[Trial]:
    """Return the trials of a sweep: finished ones first, the best at the top."""
    rows = [_row(result, plan) for result in grid]
    order = {"done": 0, "stopped early": 1}
    return sorted(rows, key=lambda t: (order.get(t.state, 2), -(t.score or 0.0), str(t.point)))


def _row(result: Any, plan: SweepPlan) -> Trial:
    metrics: dict[str, Any] = result.metrics or {}
    done = tuple(float(s) for s in metrics.get("seeds") or ())
    state = "done" if len(done) == plan.seeds else "stopped early"
    if result.error is not None:
        state = str(result.error).strip().splitlines()[-1]
    frame, curve = result.metrics_dataframe, dict[int, float]()
    if frame is not None and "score" in frame:
        pairs = zip(frame["validation"], frame["score"], strict=True)
        curve = {int(v): float(s) for v, s in pairs}  # a repeated report has the same content
    model = ""
    if done and result.checkpoint is not None:
        best = max(range(len(done)), key=lambda k: done[k])
        model = str(Path(result.checkpoint.path) / f"{best}.safetensors")
    return Trial(
        point={axis.key: result.config.get(axis.key) for axis in plan.axes},
        score=metrics.get("score"),
        seeds=done,
        validations=int(metrics.get("validation", 0)),
        state=state,
        curve=tuple(sorted(curve.items())),
        model=model,
    )
