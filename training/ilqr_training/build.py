"""A fresh model of the right sizes for a recording, its rates started at the data's."""

from __future__ import annotations

import math

import numpy as np
import torch

from ilqr_training.config import ModelConfig
from ilqr_training.data import Prepared
from ilqr_vae.dynamics import MGU2, Dynamics, Linear
from ilqr_vae.likelihoods import Gaussian, Likelihood, Poisson
from ilqr_vae.model import Model
from ilqr_vae.priors import GaussianPrior, InitialPrior


def build_dynamics(config: ModelConfig) -> Dynamics:
    """The configured family."""
    if config.dynamics == "mgu2":
        return MGU2(config.latents, config.inputs, forget_bias=config.forget_bias)
    return Linear(config.latents, config.inputs)


def build_model(config: ModelConfig, data: Prepared) -> Model:
    """Dynamics, priors and one group per kind of observation."""
    n, m = config.latents, config.inputs
    a, b = data.train
    counts = data.recording.counts[a:b]
    # rates beyond anything seen: where the exponential link goes linear
    log_rate_max = math.log(10.0 * (1.0 + float(counts.max())))
    spikes = Poisson(n, counts.shape[1], log_rate_max=log_rate_max)
    with torch.no_grad():
        mean = np.maximum(counts[data.recording.valid[a:b]].mean(0), 1e-3)
        spikes.b.copy_(torch.as_tensor(np.log(mean)))
        spikes.C.mul_(0.5)
    groups: dict[str, Likelihood] = {"spikes": spikes}
    if data.recording.kinematics is not None:
        groups["kinematics"] = Gaussian(n, data.recording.kinematics.shape[1])
    return Model(build_dynamics(config), GaussianPrior(m), InitialPrior(n), groups)
