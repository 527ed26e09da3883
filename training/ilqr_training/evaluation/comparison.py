"""Compare a model and baselines on one recording, over several seeds and under stress.

For each seed the model is trained on the full training part and on a share of it. It is compared
with a Wiener filter, a Kalman filter and a GRU of that seed on the same bins: R2, coverage of the
90 % interval, silent units and lost bins, co-smoothing, training time.

This takes hours, so each result is saved in its own file. A result of the same configuration,
recording and span is not computed again; an interrupted training continues from its checkpoint.

The span ``validation`` uses a nested split (``recordings.split``): the test part is removed before
anything is fitted, and the validation part takes its place. ``test`` is for the final run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import msgspec

from ilqr_training.config import TrainConfig, with_fraction
from ilqr_training.evaluation.baselines import Baseline, fit_baselines, names_of
from ilqr_training.evaluation.cosmoothing import cosmooth, held_out_units
from ilqr_training.evaluation.stress import under_stress
from ilqr_training.evaluation.stress_scores import StressPlan
from ilqr_training.fit.crops import prepare
from ilqr_training.fit.train import train_on
from ilqr_training.readout.causal import causal_pass
from ilqr_vae.artifact import Artifact, load_artifact
from ilqr_vae.errors import ConfigError
from ilqr_vae.files import write_whole
from ilqr_vae.progress import SILENT, Progress
from ilqr_vae.recordings import Recording
from ilqr_vae.recordings.split import nested_split, warmup_start
from ilqr_vae.report.data import plain
from ilqr_vae.scoring.score import score_decodes

Piece = dict[str, Any]
Scored = Literal["validation", "test"]
FULL, LESS = "full", "less"


@dataclass(frozen=True)
class ComparisonPlan:
    """What to compare.

    Attributes:
        span: the scored part: test, or validation in a nested split.
        seeds: number of seeds, counted from the configuration's.
        fraction: share of the recording in the small training part; zero for no such fit.
        held_out: share of the units held out in co-smoothing; zero for none.
        stress: the faults; their seed is the first seed.
        gru: whether to fit a GRU, which takes minutes.
    """

    span: Scored = "validation"
    seeds: int = 3
    fraction: float = 0.1
    held_out: float = 0.25
    stress: StressPlan = field(default_factory=StressPlan)
    gru: bool = True

    def checked(self) -> ComparisonPlan:
        """Return itself. Raises ConfigError naming an option that is out of range."""
        if self.seeds < 1:
            raise ConfigError("--seeds", expected="1 or more", got=str(self.seeds))
        for name, value in (("--fraction", self.fraction), ("--held-out", self.held_out)):
            if not 0 <= value < 1:
                raise ConfigError(name, expected="0 or more, below 1", got=str(value))
        self.stress.checked()
        return self


@dataclass(frozen=True)
class ResultFiles:
    """Results of one identity by name, one file each in a folder."""

    folder: Path
    identity: str
    progress: Progress

    def get(self, name: str, make: Callable[[], Piece]) -> Piece:
        """Return the result; compute it if it is missing or has another identity."""
        path = self.folder / f"{name}.json"
        if path.exists():
            held: Piece = json.loads(path.read_text())
            if held.get("identity") == self.identity:
                self.progress.log(f"{name}: there already")
                return held
        self.progress.log(name)
        made = plain({"identity": self.identity} | make())
        write_whole(path, json.dumps(made, indent=1) + "\n")
        return made


class _Run:
    """The model and baselines of one seed and amount of data, fitted when first needed."""

    def __init__(
        self,
        config: TrainConfig,
        recording: Recording,
        plan: ComparisonPlan,
        model: Path,
        progress: Progress,
    ) -> None:
        self.config, self.recording, self.plan = config, recording, plan
        self.model, self.progress = model, progress
        self.seed = config.training.seed

    def train(self) -> Piece:
        done = train_on(self.config, self.recording, self.model, self.progress, resume=True)
        return {
            "seconds": done.seconds,
            "steps": done.steps,
            "best_step": done.best_step,
            "model": done.manifest.model_id,
            "validation": done.manifest.scores,
            "train_bins": done.manifest.provenance["train_bins"],
            "validation_bins": done.manifest.provenance["validation_bins"],
        }

    @cached_property
    def artifact(self) -> Artifact:
        if not self.model.exists():  # deleted after training
            self.train()
        return load_artifact(self.model)

    @cached_property
    def read(self) -> Recording:
        return self.recording.select_units(self.artifact.manifest.unit_names)

    @cached_property
    def bins(self) -> tuple[int, int]:
        return self.config.data.split.occupied("test", self.read)

    @cached_property
    def baselines(self) -> dict[str, Baseline]:
        names, split = names_of(self.plan.gru), self.config.data.split
        return fit_baselines(self.read, split, names, seed=self.seed, progress=self.progress)

    def decode(self) -> Piece:
        start, stop = self.bins
        result = causal_pass(
            self.artifact.estimator(),
            self.read,
            start,
            stop,
            run_in=start - warmup_start(start),
            progress=self.progress,
        )
        scores = score_decodes(
            self.read,
            self.config.data.split,
            bins=self.bins,
            decoded=result.kinematics,
            std=result.kinematics_std,
            baseline=False,
            others={name: baseline.decode(self.bins) for name, baseline in self.baselines.items()},
        )
        return {
            "bins": list(self.bins),
            "scores": scores.methods,
            "intervals_95": scores.intervals,
            "resampled": scores.resampled,
            "validation_r2": {name: r.validation_r2 for name, r in self.baselines.items()},
            "coverage_by_speed": None if scores.by_speed is None else scores.by_speed.coverage,
            "bits_per_spike": result.bits_per_spike,
        }

    def stress(self) -> Piece:
        plan = replace(self.plan.stress, seed=self.seed * self.plan.stress.draws)
        baselines = tuple(self.baselines.values())
        found = under_stress(
            self.artifact.estimator(), self.read, self.bins, baselines, plan, progress=self.progress
        )
        return found.to_json()

    def cosmooth(self) -> Piece:
        units, selection = held_out_units(self.read, self.plan.held_out, self.seed)
        found = cosmooth(
            self.artifact,
            self.read,
            self.config.data.split,
            self.bins,
            units,
            selection,
            progress=self.progress,
        )
        return found.to_json()


def identity_of(config: TrainConfig, recording: Recording, plan: ComparisonPlan) -> str:
    """Return the digest of all that affects the results; of the code, only the version."""
    said = msgspec.json.encode([config, recording.sha256, len(recording), version("ilqr-vae")])
    asked = repr(replace(plan, seeds=1)).encode()
    return hashlib.sha256(said + asked).hexdigest()[:16]


def compare(
    config: TrainConfig,
    recording: Recording,
    folder: Path,
    plan: ComparisonPlan,
    progress: Progress = SILENT,
) -> Piece:
    """Compute the missing results; return all of them, ready for ``json.dumps``.

    Args:
        recording: the whole recording, with kinematics.
        folder: folder of results and models; created if it does not exist.

    Raises:
        ConfigError: there are no kinematics to decode.
        RecordingError, ShapeError: a part is too short.
    """
    if recording.kinematics is None:
        raise ConfigError("--recording", expected="one with kinematics to decode", got="none")
    seen, fraction = recording, plan.fraction
    if plan.span == "validation":
        seen = nested_split(recording, config.data.split)
        fraction = min(1.0, fraction * len(recording) / len(seen))  # the same number of bins
    for share in {1.0, fraction or 1.0}:  # check before hours are spent on the first run
        prepare(seen, with_fraction(config, share).data, chunk=config.training.chunk)
    folder.mkdir(parents=True, exist_ok=True)
    identity = identity_of(config, recording, plan)
    seeds: list[Piece] = []
    for i in range(plan.seeds):
        loop = msgspec.structs.replace(config.training, seed=config.training.seed + i)
        each = msgspec.structs.replace(config, training=loop)
        seeds.append(
            _of_seed(each, seen, folder, plan, fraction, ResultFiles(folder, identity, progress))
        )
    return {
        "identity": identity,
        "recording": recording.name,
        "recording_sha256": recording.sha256,
        "span": plan.span,
        "plan": msgspec.to_builtins(plan),
        "config": msgspec.to_builtins(config),
        "versions": {"ilqr_vae": version("ilqr-vae")},
        "seeds": seeds,
    }


def _of_seed(
    config: TrainConfig,
    recording: Recording,
    folder: Path,
    plan: ComparisonPlan,
    fraction: float,
    pieces: ResultFiles,
) -> Piece:
    seed = config.training.seed
    amounts = {FULL: config} | ({LESS: with_fraction(config, fraction)} if fraction else {})
    made: Piece = {"seed": seed}
    for amount, settings in amounts.items():
        name = f"seed{seed}-{amount}"
        model = folder / f"{name}-{pieces.identity}.safetensors"
        run = _Run(settings, recording, plan, model, pieces.progress)
        found = {"train": pieces.get(f"{name}-train", run.train)}
        found["decode"] = pieces.get(f"{name}-decode", run.decode)
        if amount == FULL:
            found["stress"] = pieces.get(f"{name}-stress", run.stress)
            if plan.held_out:
                found["cosmoothing"] = pieces.get(f"{name}-cosmoothing", run.cosmooth)
        made[amount] = found
    return made
