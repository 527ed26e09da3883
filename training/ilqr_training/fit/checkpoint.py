"""Checkpoints: the whole state of a run, so that a resumed run equals an uninterrupted one."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ilqr_training.fit.loop import TrainingRun
from ilqr_vae.errors import ConfigError, TrainingError
from ilqr_vae.files import write_whole
from ilqr_vae.progress import Progress


@dataclass
class EarlyStopping:
    """The best validation so far, and the number of validations since.

    Attributes:
        best_score, best_step: score and step of the best causal validation so far.
        best_model: the parameters at that step.
        waited: validations since then.
        history: (step, score) of each validation.
    """

    best_score: float = float("-inf")
    best_step: int = 0
    best_model: dict[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    waited: int = 0
    history: list[tuple[int, float]] = field(default_factory=list[tuple[int, float]])

    def over(self, patience: int) -> bool:
        """Return whether the score has not improved for ``patience`` validations; zero is never."""
        return bool(patience and self.waited >= patience)

    def offer(self, step: int, score: float, model: torch.nn.Module) -> bool:
        """Record a validation; return whether it is the best so far.

        Raises:
            TrainingError: the score is not a number.
        """
        if math.isnan(score):
            raise TrainingError(
                f"validation at step {step}", expected="a score that is a number", got="NaN"
            )
        self.history.append((step, score))
        if score > self.best_score:
            self.best_score, self.best_step, self.waited = score, step, 0
            self.best_model = {k: v.detach().clone() for k, v in model.state_dict().items()}
            return True
        self.waited += 1
        return False


def save_checkpoint(path: Path, identity: str, run: TrainingRun, stopping: EarlyStopping) -> None:
    """Write a checkpoint.

    Args:
        identity: digest of the configuration and the recording.

    Raises:
        ConfigError: the file could not be written; the previous one is kept.
    """
    crops = run.crops
    content: dict[str, Any] = {
        "identity": identity,
        "model": run.model.state_dict(),
        "posterior": None if run.posterior is None else run.posterior.state_dict(),
        "optimiser": run.optimiser.state_dict(),
        "generator": run.generator.get_state(),
        "crops": {"z": crops.z, "u": crops.u, "rng": crops.rng.bit_generator.state},
        "step": run.step,
        "progress": vars(stopping),
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_whole(path, buffer.getvalue(), "checkpoint")


def load_checkpoint(path: Path, identity: str, run: TrainingRun, stopping: EarlyStopping) -> None:
    """Restore ``run`` and ``stopping`` from a checkpoint, in place.

    Raises:
        TrainingError: the file is not readable, not such a checkpoint, or of another configuration
            or recording.
    """
    try:
        content: Any = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises many types for a file that is not a checkpoint
        raise TrainingError(
            f"checkpoint {path.name}", expected="a readable checkpoint", got=str(error)
        ) from error
    if not isinstance(content, dict) or "identity" not in content:
        raise TrainingError(
            f"checkpoint {path.name}", expected="a checkpoint of train", got="something else"
        )
    if content["identity"] != identity:
        raise TrainingError(
            f"checkpoint {path.name}",
            expected="the configuration and recording of this run",
            got="another's; remove it, or train without --resume",
        )
    run.model.load_state_dict(content["model"])
    if run.posterior is not None:
        run.posterior.load_state_dict(content["posterior"])
    run.optimiser.load_state_dict(content["optimiser"])
    run.generator.set_state(content["generator"])
    run.crops.z = content["crops"]["z"].to(run.crops.z)
    run.crops.u = content["crops"]["u"].to(run.crops.u)
    run.crops.rng.bit_generator.state = content["crops"]["rng"]
    run.step = content["step"]
    for name, value in content["progress"].items():
        setattr(stopping, name, value)
    stopping.history = [(int(s), float(v)) for s, v in stopping.history]


def keep_checkpoint(
    path: Path, identity: str, run: TrainingRun, stopping: EarlyStopping, progress: Progress
) -> None:
    """Write a checkpoint. If that fails, warn and continue training."""
    try:
        save_checkpoint(path, identity, run, stopping)
    except ConfigError as error:
        kept = "the last one is kept" if path.exists() else "there is none yet"
        progress.log(f"warning: step {run.step}: {error}; {kept}, training goes on")
