"""A training run that takes seconds from start to model file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import load_file

from ilqr_training.config import LoopConfig, ModelConfig, ReadoutConfig, TrainConfig
from ilqr_training.fit.train import Trained, train
from ilqr_vae.recordings.spec import RecordingSpec
from ilqr_vae.streaming.horizon import HorizonConfig
from rig import spec

LOOP = LoopConfig(steps=12, batch=4, chunk=15, kl_warmup=5, validate_every=4, iterations=4, seed=5)
READOUT = ReadoutConfig(hidden=16, steps=120, recurrent=8, recurrent_steps=60)


def config(
    *, kinematics: bool = True, data: RecordingSpec | None = None, **loop: Any
) -> TrainConfig:
    """For what ``rig.write_recording`` writes."""
    return TrainConfig(
        data=data or spec(kinematics=kinematics),
        model=ModelConfig(latents=4, inputs=2),
        training=msgspec.structs.replace(LOOP, **loop),
        estimator=HorizonConfig(horizon=4, iterations=2),
        readout=READOUT,
    )


def write_config(
    path: Path, settings: TrainConfig | dict[str, Any], **sections: dict[str, Any]
) -> Path:
    """The same as a file; ``sections`` change or add keys, known or not."""
    content: dict[str, Any] = msgspec.to_builtins(settings)
    for name, keys in sections.items():
        content[name] = content.get(name, {}) | keys
    lines: list[str] = []

    def table(name: str, values: dict[str, Any]) -> None:
        lines.append(f"[{name}]" if name else "")
        for key, value in values.items():
            if not isinstance(value, dict) and value is not None:
                lines.append(f"{key} = {msgspec.json.encode(value).decode()}")
        for key, value in values.items():
            if isinstance(value, dict):
                table(f"{name}.{key}" if name else key, value)

    table("", content)
    path.write_text("\n".join(lines) + "\n")
    return path


class Recorder:
    """Progress that remembers its lines, and interrupts training after a step if so asked."""

    def __init__(self, interrupt_after: int | None = None) -> None:
        self.lines: list[str] = []
        self.done: dict[str, int] = {}
        self.interrupt_after = interrupt_after

    def __call__(
        self, what: str, done: int, of: int, note: str = "", left: float = math.nan
    ) -> None:
        assert 0 <= done <= of, what
        self.done[what] = done
        if what == "training" and done == self.interrupt_after:
            raise KeyboardInterrupt

    def log(self, line: str) -> None:
        self.lines.append(line)


def fit(
    recording: Path, out: Path, settings: TrainConfig | None = None, **options: Any
) -> tuple[Trained, Recorder]:
    progress = options.pop("progress", Recorder())
    return train(settings or config(), recording, out, progress, **options), progress


def same_tensors(one: Path, other: Path) -> None:
    a, b = load_file(one), load_file(other)
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name
