"""A new model of the right sizes for a recording, with rates initialised from the data."""

from __future__ import annotations

import math

import numpy as np
import torch

from ilqr_training.config import ModelConfig
from ilqr_training.fit.crops import Prepared
from ilqr_vae.artifact import GroupSpec, ModelSpec, build
from ilqr_vae.model.generative import Model
from ilqr_vae.model.likelihoods import Gaussian, Poisson, SoftplusPoisson


def model_spec(config: ModelConfig, data: Prepared) -> ModelSpec:
    """Return the families and sizes of a model for a recording."""
    a, b = data.train
    counts = data.recording.counts[a:b]
    poisson = SoftplusPoisson if config.link == "softplus" else Poisson
    family = Gaussian if config.likelihood == "gaussian" else poisson
    # the exponential link becomes linear beyond any rate that the data could require
    log_rate_max = math.log(10.0 * (1.0 + float(counts.max())))
    groups = {
        "spikes": GroupSpec(
            family=family.family,
            channels=counts.shape[1],
            log_rate_max=log_rate_max,
            gain=config.gain,
            floor=config.floor,
        )
    }
    if data.recording.kinematics is not None and config.kinematics:
        channels = data.recording.kinematics.shape[1]
        groups["kinematics"] = GroupSpec(family=Gaussian.family, channels=channels)
    return ModelSpec(
        dynamics=config.dynamics,
        prior=config.prior,
        latents=config.latents,
        inputs=config.inputs,
        groups=groups,
        options=config.options,
        nu=config.nu,
        initial_mean=config.initial_mean,
    )


def build_model(config: ModelConfig, data: Prepared) -> Model:
    """Return a new model whose rates start at those of the training part."""
    model = build(model_spec(config, data))
    mean = data.recording.mean_counts(*data.train)
    spikes = model.group("spikes")
    spikes.start_at(torch.as_tensor(mean))
    with torch.no_grad():
        spikes.C.mul_(0.5)
        if isinstance(spikes, Gaussian):
            part = slice(*data.train)
            seen = data.recording.mask()[part]
            squares = np.where(seen, data.recording.counts[part].astype(np.float64) ** 2, 0.0)
            variance = squares.sum(0) / np.maximum(seen.sum(0), 1) - mean**2
            variance = np.maximum(variance, 1e-6)
            spikes.log_scale.copy_(torch.as_tensor(0.5 * np.log(variance)))
    return model
