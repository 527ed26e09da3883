"""Fitting the kinematic readout on causal latents, and its stated uncertainty on held-out ones."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import Ridge

from ilqr_training.causal import Causal
from ilqr_training.config import ReadoutConfig
from ilqr_vae.metrics import r2
from ilqr_vae.readout import KinematicReadout

Array = NDArray[np.float64]


def _standardised(x: Array) -> tuple[Array, Array]:
    return x.mean(0), x.std(0) + 1e-9


def fit_readout(
    train: Causal, train_y: Array, held: Causal, held_y: Array, n: int, config: ReadoutConfig
) -> tuple[KinematicReadout, float]:
    """Ridge from causal latents to kinematics; strength chosen on, and noise fitted to, held-out bins.

    Returns:
        the readout and its mean R2 on the held-out part.
    """
    mean, scale = _standardised(train.window)
    y_mean, y_scale = _standardised(train_y)
    best: tuple[float, Ridge] | None = None
    for alpha in config.alphas:
        ridge = Ridge(alpha=alpha).fit((train.window - mean) / scale, (train_y - y_mean) / y_scale)
        prediction = np.atleast_2d(ridge.predict((held.window - mean) / scale))
        score = r2(held_y, prediction.reshape(held_y.shape) * y_scale + y_mean)
        if best is None or score > best[0]:
            best = (score, ridge)
    assert best is not None
    score, ridge = best
    W = np.atleast_2d(ridge.coef_) / scale * y_scale[:, None]
    b = np.atleast_1d(ridge.intercept_) * y_scale + y_mean - W @ mean
    readout = KinematicReadout(n, train_y.shape[1], lags=config.lags).double()
    readout.W.copy_(torch.as_tensor(W))
    readout.b.copy_(torch.as_tensor(b))
    residual = held_y - (held.window @ W.T + b)
    calibrate(readout, residual, held.covariance)
    return readout, score


def calibrate(readout: KinematicReadout, residual: Array, covariance: Array) -> None:
    """Set tau^2 and gain: e ~ N(0, gain v_t + tau^2), v_t the propagated latent variance.

    Maximum likelihood over a grid of gains per channel (the likelihood of a one-dimensional
    heteroscedastic Gaussian has no closed form); tau^2 then scales so that the stated variances
    average to the residuals'.
    """
    v = readout.latent_variance(torch.as_tensor(covariance)).numpy()
    for d in range(residual.shape[1]):
        e2, vd = residual[:, d] ** 2, v[:, d]
        total = float(e2.mean())
        share = total / max(float(vd.mean()), 1e-300)
        best = (np.inf, 0.0, total)
        for fraction in np.linspace(0.0, 0.95, 20):
            gain = fraction * share
            tau2 = total * (1 - fraction)
            variance = gain * vd + tau2
            nll = float(np.mean(np.log(variance) + e2 / variance))
            if nll < best[0]:
                best = (nll, gain, tau2)
        readout.gain[d], readout.variance[d] = best[1], best[2]
