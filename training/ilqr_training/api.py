"""Training from a notebook; ``ilqr_vae.train`` calls this and loads the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ilqr_training.config import TrainConfig, check, load_config
from ilqr_training.fit.train import Trained, train_on
from ilqr_training.options import use_threads
from ilqr_vae.files import check_writable, with_settings
from ilqr_vae.progress import SILENT, Bar, Progress
from ilqr_vae.recordings import Recording, load_recording
from ilqr_vae.recordings.load import kinematics_key


def train(
    recording: str | Path | Recording,
    *,
    out: str | Path,
    config: str | Path | TrainConfig | None = None,
    kinematics: str | None = None,
    progress: bool | Progress = True,
    resume: bool = False,
    **settings: Any,
) -> Trained:
    """Fit a model to a recording and write it.

    Args:
        recording: a .nwb, .mat or .h5 file, or a recording.
        out: the model file.
        config: a TOML file or a configuration; default: the default configuration.
        kinematics: name of the series to decode; None keeps the configuration's.
        progress: whether to show a bar on standard error, or an object that receives progress.
        resume: continue from the checkpoint beside ``out`` if there is one.
        settings: overrides by key of ``TrainConfig``: ``bin_width=0.02``, ``latents=10``,
            ``training={"steps": 500}``; see ``files.with_settings``.

    Raises:
        ConfigError: a key is unknown or ambiguous, a value is invalid, or a path is not writable.
        RecordingError, TrainingError: see ``fit.train``.
    """
    out = Path(out)
    check_writable(out, "out")
    if isinstance(config, str | Path):
        config = load_config(config)
    if kinematics is not None and not isinstance(recording, Recording):
        settings[f"data.{kinematics_key(recording)}"] = kinematics
    chosen = check(with_settings(config or TrainConfig(), settings))
    data = recording if isinstance(recording, Recording) else load_recording(recording, chosen.data)
    threads = torch.get_num_threads()
    use_threads(None)
    try:
        if progress is not True:
            return train_on(chosen, data, out, progress or SILENT, resume=resume)
        with Bar() as bar:
            return train_on(chosen, data, out, bar, resume=resume)
    finally:
        torch.set_num_threads(threads)
