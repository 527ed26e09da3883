"""Learning curves of a model, from the model file and from the log beside it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ilqr_vae.artifact import Manifest

CURVES = {"train/bound": "bound (nats per bin)", "validation/r2": "causal R2, validation"}
_MOST_POINTS = 300

Curves = dict[str, tuple[tuple[int, float], ...]]


def log_folder(model: Path) -> Path:
    """Return the default folder for the TensorBoard events of training a model."""
    return model.with_name(model.stem + "-log")


def learning_curves(model: Path, manifest: Manifest) -> tuple[Curves, tuple[str, ...]]:
    """Return curves of (step, value) by name, and notes on missing ones.

    A curve has at most ``_MOST_POINTS`` points. Validations are in the model file. The bound is in
    the log, if it is still beside the model. A log that cannot be read is a note, not an error.
    """
    curves: Curves = {}
    notes: tuple[str, ...] = ()
    folder = log_folder(model)
    if folder.is_dir():
        try:
            curves = _logged(folder)
        except Exception as error:  # its parsers may raise anything on a damaged file
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            notes = (f"No learning curve of the bound: {folder.name} cannot be read ({why}).",)
    if manifest.history:
        decoded = "r2" in manifest.scores
        name = CURVES["validation/r2"] if decoded else "bits per spike, validation"
        curves[name] = manifest.history
    return curves, notes


def _logged(folder: Path) -> Curves:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # silence its warnings about the log of a resumed run
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    events = EventAccumulator(str(folder), size_guidance={"scalars": _MOST_POINTS})
    events.Reload()
    tags: dict[str, Any] = events.Tags()
    return {
        shown: tuple((event.step, event.value) for event in events.Scalars(name))
        for name, shown in CURVES.items()
        if name in tags["scalars"]
    }
