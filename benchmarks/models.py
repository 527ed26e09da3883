"""Models and recordings for the benchmarks."""

from __future__ import annotations

import msgspec
import numpy as np
import torch

from ilqr_training.config import LoopConfig, ModelConfig, ReadoutConfig
from ilqr_training.fit.build import build_model
from ilqr_training.fit.crops import Crops, Prepared, prepare
from ilqr_training.fit.loop import TrainingRun, start
from ilqr_vae.artifact import GroupSpec, ModelSpec, build
from ilqr_vae.model.generative import Model
from ilqr_vae.model.readout import KinematicReadout
from ilqr_vae.recordings import MatSpec, Recording, RecordingSpec, SplitSpec
from ilqr_vae.streaming.ensemble import EnsembleHorizon
from ilqr_vae.streaming.horizon import HorizonConfig, MovingHorizon

BIN_S = 0.05


def model_of(n: int, m: int, units: int) -> Model:
    """Return an MGU2 model with Poisson units of about 0.4 spikes per bin, in float64."""
    groups = {"spikes": GroupSpec(family="poisson", channels=units)}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build(ModelSpec(dynamics="mgu2", latents=n, inputs=m, groups=groups)).double()
        with torch.no_grad():
            model.group("spikes").b.fill_(-1.0)
            model.group("spikes").C.mul_(0.5)
    return model


def estimator_of(
    n: int,
    m: int,
    units: int,
    horizon: int,
    iterations: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.float64,
) -> MovingHorizon:
    """Return a moving-horizon estimator of such a model."""
    rate = torch.full((units,), 0.4, dtype=dtype, device=device)
    config = HorizonConfig(horizon=horizon, iterations=iterations)
    return MovingHorizon(model_of(n, m, units).to(device, dtype), None, rate, config)


def decoder_of(
    members: int, n: int, m: int, units: int, horizon: int, iterations: int
) -> EnsembleHorizon:
    """Return an ensemble of such models, each with a two-channel readout of the default shape."""
    config = ReadoutConfig().within(horizon)
    shape = msgspec.structs.replace(config.shape, hidden=config.hidden * config.members)
    rate = torch.full((units,), 0.4, dtype=torch.float64)
    made: list[MovingHorizon] = []
    g = torch.Generator().manual_seed(0)
    for _ in range(members):
        readout = KinematicReadout(n, 2, shape, units=units).double()
        for name in ("W", "U", "O", "C", "A", "P", "G"):
            getattr(readout, name).normal_(0.0, 0.05, generator=g)
        options = HorizonConfig(horizon=horizon, iterations=iterations)
        made.append(MovingHorizon(model_of(n, m, units), readout, rate, options))
    return EnsembleHorizon(made)


def recording_of(units: int, bins: int = 6000) -> Recording:
    """Simulate units tuned to a smooth velocity in the plane."""
    rng = np.random.default_rng(0)
    phase = np.arange(bins) * BIN_S * 2 * np.pi
    velocity = 0.2 * np.stack([np.cos(0.31 * phase), np.sin(0.47 * phase)], 1)
    rates = np.exp(-1.0 + velocity @ rng.normal(size=(2, units)) * 4)
    return Recording(
        counts=rng.poisson(rates).astype(np.uint16),
        bin_width=BIN_S,
        unit_names=tuple(f"unit{i}" for i in range(units)),
        kinematics=velocity,
        kinematic_names=("vx", "vy"),
        kinematic_units=("m/s", "m/s"),
        name="simulated",
    )


def training_run(units: int, loop: LoopConfig) -> tuple[TrainingRun, Prepared]:
    """Return a new training run of a model of n = 20 on such a recording."""
    spec = RecordingSpec(
        bin_width=BIN_S,
        mat=MatSpec(spikes="spikes"),
        split=SplitSpec(train=0.6, validation=0.75),
    )
    data = prepare(recording_of(units), spec, chunk=loop.chunk)
    torch.manual_seed(loop.seed)
    model = build_model(ModelConfig(latents=20), data)
    return start(model, Crops(data, model, loop.chunk, loop.seed), loop), data
