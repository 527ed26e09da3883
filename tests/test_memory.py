"""The memory a run is said to need, against what one took."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from ilqr_training.config import TrainConfig
from ilqr_training.fit.crops import Prepared, prepare
from ilqr_training.fit.memory import GIB, MemoryEstimate, estimate, refuse_hopeless
from ilqr_vae.errors import ConfigError
from ilqr_vae.recordings import Recording
from tiny import config

# In a process of its own, so that its peak is its own: a step and a validation, then both figures.
MEASURED = """
import numpy as np, torch
from test_memory import prepared
from ilqr_training.fit.build import build_model
from ilqr_training.config import LoopConfig, ModelConfig, ReadoutConfig, TrainConfig
from ilqr_training.fit.crops import Crops
from ilqr_training.fit.loop import gradient_step, start
from ilqr_training.fit.memory import estimate
from ilqr_vae.machine import peak_memory
from ilqr_training.fit.validate import validate
from ilqr_vae.streaming.horizon import HorizonConfig

torch.set_num_threads(1)
settings = TrainConfig(
    model=ModelConfig(latents=30, inputs=8),
    training=LoopConfig(batch=64, chunk=60, iterations=3),
    estimator=HorizonConfig(iterations=1),
    readout=ReadoutConfig(steps=5, recurrent_steps=5, alphas=(1.0, 10.0)),
)
data = prepared(2000, 150)
said = estimate(settings, data)
model = build_model(settings.model, data)
gradient_step(start(model, Crops(data, model, 60, 0), settings.training), settings.training)
validate(model, data, settings, thorough=True)
print(said.peak, peak_memory())
"""


def prepared(bins: int, units: int) -> Prepared:
    rng = np.random.default_rng(0)
    recording = Recording(
        counts=rng.poisson(0.5, (bins, units)).astype(np.uint16),
        bin_width=0.05,
        unit_names=tuple(f"u{i}" for i in range(units)),
        kinematics=rng.normal(size=(bins, 2)).cumsum(axis=0),
        kinematic_names=("vx", "vy"),
        kinematic_units=("m/s", "m/s"),
    )
    return prepare(recording, TrainConfig().data, chunk=15)


def test_the_estimate_is_near_what_a_run_takes() -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURED],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    said, took = (int(word) for word in done.stdout.split())
    assert 0.5 < said / took < 2.0


def test_it_grows_with_what_it_should() -> None:
    data, settings = prepared(2000, 30), config()
    base = estimate(settings, data)
    larger = msgspec.structs.replace(
        settings, training=msgspec.structs.replace(settings.training, batch=400)
    )
    assert estimate(larger, data).step > 20 * base.step
    assert estimate(settings, prepared(4000, 30)).validation > 1.3 * base.validation
    double = msgspec.structs.replace(
        settings, training=msgspec.structs.replace(settings.training, dtype="float64")
    )
    assert estimate(double, data).step == 2 * base.step


def test_what_does_not_fit_is_said_before_it_starts() -> None:
    fits = MemoryEstimate(now=GIB, data=0, step=GIB, validation=0, available=4 * GIB)
    assert "not fit" not in str(fits)
    assert "4.0 GiB are free" in str(fits)
    tight = replace(fits, step=8 * GIB)
    assert "it may not fit; smaller training.batch" in str(tight)


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [("model", "latents", 10**6), ("training", "batch", 10**10), ("training", "chunk", 10**10)],
)
def test_what_can_never_fit_is_refused_by_name(part: str, name: str, value: int) -> None:
    data, settings = prepared(400, 5), config()
    refuse_hopeless(settings, data)
    changed = msgspec.structs.replace(getattr(settings, part), **{name: value})
    with pytest.raises(ConfigError, match=rf"{part}\.{name}: expected what fits .*, got {value}, "):
        refuse_hopeless(msgspec.structs.replace(settings, **{part: changed}), data)
