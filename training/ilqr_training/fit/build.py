"""A new model of the right sizes for a recording, with rates initialised from the data."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from ilqr_training.config import ModelConfig
from ilqr_training.fit.crops import Prepared
from ilqr_vae.artifact import GroupSpec, ModelSpec, build
from ilqr_vae.errors import ConfigError
from ilqr_vae.model.generative import Model
from ilqr_vae.model.likelihoods import CountsAndFeatures, Gaussian, Poisson, SoftplusPoisson


def model_spec(config: ModelConfig, data: Prepared) -> ModelSpec:
    """Return the families and sizes of a model for a recording."""
    a, b = data.train
    features = data.recording.features
    counts = data.recording.counts[a:b]
    if features and config.likelihood == "gaussian":
        expected = "none beside Gaussian counts (model.likelihood)"
        raise ConfigError("data.features", expected=expected, got=str(features))
    poisson = SoftplusPoisson if config.link == "softplus" else Poisson
    family = Gaussian if config.likelihood == "gaussian" else poisson
    # the exponential link becomes linear beyond any rate that the data could require
    highest = float(counts[:, : counts.shape[1] - features].max())
    log_rate_max = math.log(10.0 * (1.0 + highest))
    groups = {
        "spikes": GroupSpec(
            family=family.family,
            channels=counts.shape[1],
            log_rate_max=log_rate_max,
            gain=config.gain,
            floor=config.floor,
            features=features or msgspec.UNSET,
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
    with torch.no_grad():
        if isinstance(spikes, CountsAndFeatures):
            first = len(mean) - spikes.features
            spikes.centre.copy_(torch.as_tensor(mean[first:]))
            spikes.scale.copy_(torch.as_tensor(np.sqrt(_variance(data, mean)[first:])))
        spikes.start_at(spikes.standard(torch.as_tensor(mean)))
        for part in spikes.parts:
            part.C.mul_(0.5)
        if isinstance(spikes, Gaussian):
            variance = np.maximum(_variance(data, mean), 1e-6)
            spikes.log_scale.copy_(torch.as_tensor(0.5 * np.log(variance)))
    return model


def _variance(data: Prepared, mean: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N,), of each channel where it was observed in the training part."""
    part = slice(*data.train)
    seen = data.recording.mask()[part]
    squares = np.where(seen, (data.recording.counts[part] - mean) ** 2, 0.0)
    return squares.sum(0) / np.maximum(seen.sum(0), 1)
