"""What was followed while a model was trained: from the model file, and from the log beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ilqr_vae.artifact import Manifest

CURVES = {"train/bound": "bound (nats per bin)", "validation/r2": "causal R2, validation"}
_MOST_POINTS = 300


def log_folder(model: Path) -> Path:
    """Where training a model leaves its TensorBoard events unless told otherwise."""
    return model.with_name(model.stem + "-log")


def learning_curves(model: Path, manifest: Manifest) -> dict[str, tuple[tuple[int, float], ...]]:
    """(step, value) by name; at most ``_MOST_POINTS`` of each.

    The validations are in the model file. The bound is in the log, where that is still beside the
    model; a log that cannot be read is no error, since nothing depends on it.
    """
    curves: dict[str, tuple[tuple[int, float], ...]] = {}
    folder = log_folder(model)
    if folder.is_dir():
        curves = _logged(folder)
    if manifest.history:
        decoded = "r2" in manifest.scores
        name = CURVES["validation/r2"] if decoded else "bits per spike, validation"
        curves[name] = manifest.history
    return curves


def _logged(folder: Path) -> dict[str, tuple[tuple[int, float], ...]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": _MOST_POINTS})
    events.Reload()
    tags: dict[str, Any] = events.Tags()
    return {
        shown: tuple((event.step, event.value) for event in events.Scalars(name))
        for name, shown in CURVES.items()
        if name in tags["scalars"]
    }
