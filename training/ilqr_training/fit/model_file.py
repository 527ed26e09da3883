"""The model file of a training run and its manifest."""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import msgspec
import torch

from ilqr_training.config import TrainConfig
from ilqr_training.fit.build import model_spec
from ilqr_training.fit.crops import Prepared
from ilqr_training.fit.validate import Validation
from ilqr_vae.artifact import Artifact, Manifest, save_artifact
from ilqr_vae.errors import ConfigError, TrainingError
from ilqr_vae.model.generative import Model


def save_model(
    out: Path,
    manifest: Manifest,
    model: Model,
    final: Validation,
    others: Sequence[Artifact] = (),
) -> Manifest:
    """Write the model file; return the manifest with its hash.

    Args:
        others: the further members of an ensemble.

    Raises:
        TrainingError: the file could not be written. The model is then saved in a temporary folder
            or the home folder if possible; the message says where.
    """
    classes = None if final.classes is None else final.classes.readout
    written = (final.readout, final.mean_rate, final.seen, final.intervals, others, classes)
    try:
        return save_artifact(out, manifest, model, *written)
    except ConfigError as error:
        rescued = "not saved elsewhere either"
        for parent in (None, Path.home()):
            with suppress(ConfigError, OSError):
                folder = Path(tempfile.mkdtemp(prefix="ilqr-vae-", dir=parent))
                try:
                    save_artifact(folder / out.name, manifest, model, *written)
                except ConfigError:
                    folder.rmdir()
                    raise
                rescued = f"saved as {folder / out.name} instead"
                break
        resume = "" if "instead" in rescued else "; free some space and continue with --resume"
        raise TrainingError(
            "--out",
            expected="a model file that can be written",
            got=f"{error.got}: {rescued}{resume}",
        ) from error


def manifest_of(
    config: TrainConfig, data: Prepared, final: Validation, steps: int, best_step: int
) -> Manifest:
    """Return the manifest of a trained model: shapes, causal validation scores, provenance."""
    recording = data.recording
    decoded = final.readout is not None
    return Manifest(
        bin_width=recording.bin_width,
        unit_names=recording.unit_names,
        kinematic_names=recording.kinematic_names if decoded else (),
        kinematic_units=recording.kinematic_units if decoded else (),
        data=msgspec.structs.replace(config.data, bin_width=recording.bin_width),
        horizon=config.estimator,
        model=model_spec(config.model, data),
        readout=None if final.readout is None else final.readout.shape,
        classes=msgspec.UNSET if final.classes is None else final.classes.names,
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
        warnings=recording.warnings,
    )
