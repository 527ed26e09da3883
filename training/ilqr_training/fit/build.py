"""A fresh model of the right sizes for a recording, its rates started at the data's."""

from __future__ import annotations

import math

import numpy as np
import torch

from ilqr_training.config import ModelConfig
from ilqr_training.fit.crops import Prepared
from ilqr_vae.artifact import GroupSpec, ModelSpec, build
from ilqr_vae.model.dynamics import MGU2
from ilqr_vae.model.generative import Model
from ilqr_vae.model.likelihoods import Gaussian, Poisson


def model_spec(config: ModelConfig, data: Prepared) -> ModelSpec:
    """Families and sizes for a recording."""
    a, b = data.train
    counts = data.recording.counts[a:b]
    # the exponential link goes linear beyond any rate the data could ask for
    log_rate_max = math.log(10.0 * (1.0 + float(counts.max())))
    groups = {
        "spikes": GroupSpec(
            family=Poisson.family, channels=counts.shape[1], log_rate_max=log_rate_max
        )
    }
    if data.recording.kinematics is not None:
        channels = data.recording.kinematics.shape[1]
        groups["kinematics"] = GroupSpec(family=Gaussian.family, channels=channels)
    return ModelSpec(
        dynamics=config.dynamics, latents=config.latents, inputs=config.inputs, groups=groups
    )


def build_model(config: ModelConfig, data: Prepared) -> Model:
    """A fresh model whose rates start at the training part's."""
    model = build(model_spec(config, data))
    a, b = data.train
    seen = data.recording.mask()[a:b]
    mean = np.where(seen, data.recording.counts[a:b], 0).sum(0) / np.maximum(seen.sum(0), 1)
    spikes = model.group("spikes")
    with torch.no_grad():
        spikes.b.copy_(torch.as_tensor(np.log(np.maximum(mean, 1e-3))))
        spikes.C.mul_(0.5)
        if isinstance(model.dynamics, MGU2):
            model.dynamics.gate_bias.fill_(config.forget_bias)
    return model
