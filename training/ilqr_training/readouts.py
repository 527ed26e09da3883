"""Fitting the kinematic readout on causal latents, and its stated uncertainty on held-out ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import Ridge

from ilqr_training.causal import Causal
from ilqr_training.config import ReadoutConfig
from ilqr_vae.metrics import r2
from ilqr_vae.readout import KinematicReadout

Array = NDArray[np.float64]


@dataclass(frozen=True)
class ReadoutFit:
    """A fitted readout and what it did on the held-out part before it was refitted on both.

    Attributes:
        readout: ridge on the training and held-out parts together.
        score: mean R2 on the held-out part, of the ridge that saw the training part alone.
        truth, decoded, std: (T, D) on the held-out part, of that same ridge.
    """

    readout: KinematicReadout
    score: float
    truth: Array
    decoded: Array
    std: Array


@dataclass(frozen=True)
class _Affine:
    """y = x W' + b."""

    W: Array
    b: Array

    def __call__(self, x: Array) -> Array:
        return x @ self.W.T + self.b


def _ridge(x: Array, y: Array, alpha: float) -> _Affine:
    """Ridge on standardised features and targets, folded back into their units."""
    mean, scale = x.mean(0), x.std(0) + 1e-9
    y_mean, y_scale = y.mean(0), y.std(0) + 1e-12
    ridge = Ridge(alpha=alpha).fit((x - mean) / scale, (y - y_mean) / y_scale)
    coefficients = np.asarray(ridge.coef_).reshape(y.shape[1], x.shape[1])
    W = coefficients / scale * y_scale[:, None]
    return _Affine(W, np.ravel(ridge.intercept_) * y_scale + y_mean - W @ mean)


def _module(fit: _Affine, n: int, lags: int) -> KinematicReadout:
    readout = KinematicReadout(n, len(fit.b), lags=lags).double()
    readout.W.copy_(torch.as_tensor(fit.W))
    readout.b.copy_(torch.as_tensor(fit.b))
    return readout


def fit_readout(
    train: Causal, train_y: Array, held: Causal, held_y: Array, n: int, config: ReadoutConfig
) -> ReadoutFit:
    """Ridge from causal latents to kinematics: strength and noise from held-out bins.

    Once they are chosen, the weights are fitted again on both parts, as the Wiener filter's are.
    """
    fits = {alpha: _ridge(train.window, train_y, alpha) for alpha in config.alphas}
    scores = {alpha: r2(held_y, fit(held.window)) for alpha, fit in fits.items()}
    alpha = max(scores, key=lambda a: scores[a])
    decoded = fits[alpha](held.window)
    trained = _module(fits[alpha], n, config.lags)
    calibrate(trained, held_y - decoded, held.covariance)
    std = trained(torch.as_tensor(held.window), torch.as_tensor(held.covariance))[1].numpy()
    both = _ridge(
        np.concatenate([train.window, held.window]), np.concatenate([train_y, held_y]), alpha
    )
    readout = _module(both, n, config.lags)
    readout.gain.copy_(trained.gain)
    readout.variance.copy_(trained.variance)
    return ReadoutFit(readout, scores[alpha], held_y, decoded, std)


def calibrate(readout: KinematicReadout, residual: Array, covariance: Array) -> None:
    """Set tau^2 and gain: e ~ N(0, gain v_t + tau^2), v_t the propagated latent variance.

    Maximum likelihood over the share of the error variance that is given to the latent, per channel
    (the likelihood of a heteroscedastic Gaussian has no closed form); the two always add up to the
    residuals' mean square.
    """
    v = readout.latent_variance(torch.as_tensor(covariance)).numpy()
    for d in range(residual.shape[1]):
        e2, vd = residual[:, d] ** 2, v[:, d]
        total = max(float(e2.mean()), 1e-300)
        scale = total / max(float(vd.mean()), 1e-300)

        shares = np.linspace(0.0, 0.95, 20)
        variance = shares[:, None] * scale * vd + (1 - shares[:, None]) * total
        share = float(shares[np.argmin((np.log(variance) + e2 / variance).mean(1))])
        readout.gain[d], readout.variance[d] = share * scale, (1 - share) * total
