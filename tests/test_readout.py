"""Latents to kinematics: the affine map, its standard deviations, and how it is fitted."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ilqr_training.causal import Causal
from ilqr_training.config import ReadoutConfig
from ilqr_training.readouts import calibrate, fit_readout
from ilqr_vae.metrics import interval_coverage
from ilqr_vae.readout import KinematicReadout

N, D, LAGS = 3, 2, 2


def readout(rng: np.random.Generator, lags: int = LAGS) -> KinematicReadout:
    made = KinematicReadout(N, D, lags=lags).double()
    for b in made.buffers():
        b.copy_(torch.as_tensor(rng.random(tuple(b.shape)) + 0.1))
    return made


def covariances(rng: np.random.Generator, T: int) -> NDArray[np.float64]:
    half = rng.normal(size=(T, N, N)) * rng.gamma(1.0, size=(T, 1, 1))
    return half @ half.transpose(0, 2, 1) + 0.01 * np.eye(N)


def test_mean_and_variance_are_what_the_docstring_says() -> None:
    rng = np.random.default_rng(0)
    made, Sigma = readout(rng), covariances(rng, 5)
    x = rng.normal(size=(5, (LAGS + 1) * N))
    mean, std = made(torch.as_tensor(x), torch.as_tensor(Sigma))
    W, b, gain, tau2 = (t.numpy() for t in (made.W, made.b, made.gain, made.variance))
    np.testing.assert_allclose(mean, x @ W.T + b, rtol=1e-13)
    newest = W[:, :N]
    variance = np.stack([np.diag(newest @ S @ newest.T) for S in Sigma])
    np.testing.assert_allclose(std, np.sqrt(gain * variance + tau2), rtol=1e-13)


def test_any_leading_axes() -> None:
    rng = np.random.default_rng(1)
    made, Sigma = readout(rng), torch.as_tensor(covariances(rng, 6))
    x = torch.as_tensor(rng.normal(size=(6, (LAGS + 1) * N)))
    flat = made(x, Sigma)
    square = made(x.view(2, 3, -1), Sigma.view(2, 3, N, N))
    for a, b in zip(flat, square, strict=True):
        torch.testing.assert_close(a.view(2, 3, D), b, rtol=1e-13, atol=0)


def causal(rng: np.random.Generator, T: int) -> Causal:
    """Made-up latents with a covariance that changes from bin to bin."""
    empty = np.zeros((T, 0))
    return Causal(
        window=rng.normal(size=(T, (LAGS + 1) * N)),
        latent_std=np.ones((T, N)),
        covariance=covariances(rng, T),
        rates=empty,
        kinematics=empty,
        kinematics_std=empty,
        inputs=empty,
        bits=np.zeros(T),
        spikes=np.zeros(T),
        statuses={},
        iterations=1.0,
    )


def decoded_by(truth: KinematicReadout, x: Causal, rng: np.random.Generator) -> NDArray[np.float64]:
    mean, std = truth(torch.as_tensor(x.window), torch.as_tensor(x.covariance))
    return mean.numpy() + std.numpy() * rng.normal(size=std.shape)


def test_fitting_finds_the_map_and_intervals_that_cover() -> None:
    rng = np.random.default_rng(2)
    truth = readout(rng)
    truth.W.mul_(4)
    train, held, fresh = (causal(rng, T) for T in (3000, 1500, 4000))
    ys = [decoded_by(truth, x, rng) for x in (train, held, fresh)]
    fit = fit_readout(train, ys[0], held, ys[1], N, ReadoutConfig(lags=LAGS))
    assert fit.score > 0.3
    noise = float(np.std(ys[0] - truth(*_inputs(train))[0].numpy()))
    assert float((fit.readout.W - truth.W).abs().max()) < 6 * noise / np.sqrt(3000)
    assert fit.truth is ys[1]
    mean, std = (t.numpy() for t in fit.readout(*_inputs(fresh)))
    np.testing.assert_allclose(interval_coverage(ys[2], mean, std, 0.9), 0.9, atol=0.03)
    # the stated deviation follows the latent's: larger where it is
    wide = std > np.median(std, axis=0)
    error = np.abs(ys[2] - mean)
    assert (error[wide].mean() / error[~wide].mean()) > 1.3


def _inputs(x: Causal) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.as_tensor(x.window), torch.as_tensor(x.covariance)


def test_the_ridge_is_chosen_on_the_held_out_part() -> None:
    rng = np.random.default_rng(3)
    train, held = causal(rng, 12), causal(rng, 500)
    noise = [rng.normal(size=(len(x.bits), D)) for x in (train, held)]
    strong = fit_readout(train, noise[0], held, noise[1], N, ReadoutConfig(lags=LAGS))
    weak = fit_readout(train, noise[0], held, noise[1], N, ReadoutConfig(lags=LAGS, alphas=(1e-3,)))
    assert strong.score > weak.score  # nothing to find: the strongest shrinkage wins
    assert strong.score == pytest.approx(0, abs=0.1)


def test_calibration_keeps_the_mean_square_and_finds_the_share() -> None:
    rng = np.random.default_rng(4)
    x = causal(rng, 20000)
    for share in (0.0, 0.5, 0.9):
        made = readout(rng)
        v = made.latent_variance(torch.as_tensor(x.covariance)).numpy()
        scale = share / v.mean(0)
        e = rng.normal(size=v.shape) * np.sqrt(scale * v + (1 - share))
        calibrate(made, e, x.covariance)
        stated = made.gain.numpy() * v + made.variance.numpy()
        np.testing.assert_allclose(stated.mean(0), (e**2).mean(0), rtol=1e-9)
        found = made.gain.numpy() * v.mean(0) / (e**2).mean(0)
        np.testing.assert_allclose(found, share, atol=0.06)


def test_residuals_of_zero_are_no_special_case() -> None:
    rng = np.random.default_rng(5)
    x, made = causal(rng, 10), readout(rng)
    calibrate(made, np.zeros((10, D)), x.covariance)
    assert bool((made.variance >= 0).all())
    assert bool(made.gain.isfinite().all())
    still = replace(x, covariance=np.zeros_like(x.covariance))
    calibrate(made, rng.normal(size=(10, D)), still.covariance)
    assert bool(made.gain.isfinite().all())
    assert bool((made.variance > 0).all())
