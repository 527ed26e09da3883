"""iLQR-VAE: latent states, inputs and movement from spike counts, offline and in real time.

Start with ``load``, ``train`` or ``load_recording``; everything takes and returns numpy arrays.
Names are imported on first use, so that clients need no torch.
"""

from __future__ import annotations

TYPE_CHECKING = False  # typing's, without its import: Ctrl-C has no effect until this is loaded
if TYPE_CHECKING:
    from typing import Any

    from ilqr_vae import plots
    from ilqr_vae.api import Stream, TrainedModel, load, train
    from ilqr_vae.arrays import Inference, Samples, StreamAnswer
    from ilqr_vae.errors import IlqrVaeError
    from ilqr_vae.recordings import Recording, load_recording

__all__ = [
    "IlqrVaeError",
    "Inference",
    "Recording",
    "Samples",
    "Stream",
    "StreamAnswer",
    "TrainedModel",
    "load",
    "load_recording",
    "plots",
    "train",
]

_ROOMS = {"IlqrVaeError": "errors", "Recording": "recordings", "load_recording": "recordings"}
_ROOMS |= dict.fromkeys(("Inference", "Samples", "StreamAnswer"), "arrays")
_ROOMS |= dict.fromkeys(("Stream", "TrainedModel", "load", "train"), "api")


def __getattr__(name: str) -> Any:
    import importlib

    if name == "plots":
        return importlib.import_module(f"{__name__}.plots")
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
