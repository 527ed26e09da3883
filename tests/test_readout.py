"""Latents to kinematics: the affine map, its standard deviations, and how it is fitted."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from numpy.typing import NDArray

from ilqr_training.config import ReadoutConfig
from ilqr_training.readout.causal import Causal
from ilqr_training.readout.fit import ReadoutBins, ReadoutFit, calibrate
from ilqr_training.readout.fit import fit_readout as fit_bins
from ilqr_training.readout.intervals import fit_intervals
from ilqr_vae.model.intervals import stated
from ilqr_vae.model.readout import KinematicReadout, ReadoutShape
from ilqr_vae.scoring.metrics import interval_coverage
from ilqr_vae.scoring.score import coverage_by_speed

N, D, UNITS = 3, 2, 4
SHAPE = ReadoutShape(lags=2, residuals=1, hidden=5)
F = SHAPE.features(N, UNITS)
READS = ReadoutConfig(lags=2, residuals=1)


def readout(rng: np.random.Generator, shape: ReadoutShape = SHAPE) -> KinematicReadout:
    made = KinematicReadout(N, D, shape, units=UNITS).double()
    for b in made.buffers():
        b.copy_(torch.as_tensor(rng.random(tuple(b.shape)) + 0.1))
    return made


def covariances(rng: np.random.Generator, T: int) -> NDArray[np.float64]:
    half = rng.normal(size=(T, N, N)) * rng.gamma(1.0, size=(T, 1, 1))
    return half @ half.transpose(0, 2, 1) + 0.01 * np.eye(N)


def test_mean_and_variance_are_what_the_docstring_says() -> None:
    rng = np.random.default_rng(0)
    made, Sigma = readout(rng), covariances(rng, 5)
    x = 0.3 * rng.normal(size=(5, F))
    mean, std = made(torch.as_tensor(x), torch.as_tensor(Sigma))
    m = {k: v.numpy() for k, v in made.named_buffers()}
    for t in range(5):
        unit = np.maximum(m["U"] @ x[t] + m["c"], 0)
        y = m["W"] @ x[t] + m["b"] + m["O"] @ unit
        np.testing.assert_allclose(mean[t], y, rtol=1e-13)
        # the derivative of the decode in the newest latents, by central differences
        J = np.empty((D, N))
        for i in range(N):
            step = np.zeros(F)
            step[i] = 1e-6
            up, down = made.mean(torch.as_tensor(np.stack([x[t] + step, x[t] - step])))
            J[:, i] = (up - down).numpy() / 2e-6
        q = np.mean(((y - m["centre"]) / m["spread"]) ** 2)
        variance = m["gain"] * np.diag(J @ Sigma[t] @ J.T) + m["variance"] + m["kappa"] * q
        np.testing.assert_allclose(std[t], np.sqrt(variance), rtol=1e-7)


def test_any_leading_axes() -> None:
    rng = np.random.default_rng(1)
    made, Sigma = readout(rng), torch.as_tensor(covariances(rng, 6))
    x = torch.as_tensor(rng.normal(size=(6, F)))
    flat = made(x, Sigma)
    square = made(x.view(2, 3, -1), Sigma.view(2, 3, N, N))
    for a, b in zip(flat, square, strict=True):
        torch.testing.assert_close(a.view(2, 3, D), b, rtol=1e-13, atol=0)


def causal(rng: np.random.Generator, T: int) -> Causal:
    """Made-up latents with a covariance that changes from bin to bin."""
    empty = np.zeros((T, 0))
    return Causal(
        window=rng.normal(size=(T, F)),
        latent_std=np.ones((T, N)),
        covariance=covariances(rng, T),
        rates=np.zeros((T, UNITS)),
        kinematics=empty,
        kinematics_std=empty,
        inputs=empty,
        bits=np.zeros(T),
        spikes=np.zeros(T),
        statuses={},
        iterations=1.0,
    )


def fit_readout(
    train: Causal,
    train_y: NDArray[np.float64],
    held: Causal,
    held_y: NDArray[np.float64],
    n: int,
    config: ReadoutConfig,
    *,
    seed: int = 0,
    quick: bool = False,
) -> ReadoutFit:
    parts = [ReadoutBins.of(train, train_y)], [ReadoutBins.of(held, held_y)]
    return fit_bins(*parts, n, UNITS, config, seed=seed, quick=quick)


def _inputs(x: Causal) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.as_tensor(x.window), torch.as_tensor(x.covariance)


def decoded_by(truth: KinematicReadout, x: Causal, rng: np.random.Generator) -> NDArray[np.float64]:
    mean, std = truth(*_inputs(x))
    return mean.numpy() + std.numpy() * rng.normal(size=std.shape)


def test_fitting_finds_the_map_and_intervals_that_cover() -> None:
    rng = np.random.default_rng(2)
    truth = readout(rng, ReadoutShape(lags=2, residuals=1))
    truth.W.mul_(4)
    train, held, fresh = (causal(rng, T) for T in (3000, 1500, 4000))
    ys = [decoded_by(truth, x, rng) for x in (train, held, fresh)]
    fit = fit_readout(train, ys[0], held, ys[1], N, READS)
    assert fit.readout.shape == ReadoutShape(lags=2, residuals=1)
    assert fit.score > 0.2
    noise = float(np.std(ys[0] - truth(*_inputs(train))[0].numpy()))
    assert float((fit.readout.W - truth.W).abs().max()) < 6 * noise / np.sqrt(3000)
    assert fit.truth is ys[1]
    mean, std = (t.numpy() for t in fit.readout(*_inputs(fresh)))
    np.testing.assert_allclose(interval_coverage(ys[2], mean, std, 0.9), 0.9, atol=0.03)
    # the stated deviation follows the errors: larger where they are
    wide = std > np.median(std, axis=0)
    error = np.abs(ys[2] - mean)
    assert (error[wide].mean() / error[~wide].mean()) > 1.3


def test_penalties_are_chosen_on_the_held_out_part() -> None:
    rng = np.random.default_rng(3)
    train, held = causal(rng, 12), causal(rng, 500)
    noise = [rng.normal(size=(len(x.bits), D)) for x in (train, held)]
    strong = fit_readout(train, noise[0], held, noise[1], N, READS)
    weak = ReadoutConfig(lags=2, residuals=1, alphas=(1e-3,), hidden=0)
    assert strong.score > fit_readout(train, noise[0], held, noise[1], N, weak).score
    assert strong.score == pytest.approx(0, abs=0.1)  # nothing to find


def test_unexplained_spikes_are_read_only_where_they_say_something() -> None:
    rng = np.random.default_rng(6)
    latents = (READS.lags + 1) * N
    for matters in (False, True):
        truth = readout(rng, ReadoutShape(lags=2, residuals=1))
        truth.variance.mul_(20)
        if not matters:
            truth.W[:, latents:] = 0
        train, held = causal(rng, 60), causal(rng, 3000)
        ys = [decoded_by(truth, x, rng) for x in (train, held)]
        linear = replace(READS, alphas=(1.0, 1e6), hidden=0)
        fit = fit_readout(train, ys[0], held, ys[1], N, linear)
        size = float(fit.readout.W[:, latents:].abs().max()) if fit.readout.shape.residuals else 0.0
        assert (size > 1e-2) == matters


def test_a_hidden_layer_is_taken_where_it_decodes_better_and_is_the_same_each_time() -> None:
    rng = np.random.default_rng(7)
    train, held = causal(rng, 3000), causal(rng, 500)
    config = replace(READS, hidden=16, members=2, steps=460, dropout=0.1)
    noise = [0.1 * rng.normal(size=(len(x.bits), D)) for x in (train, held)]
    seen = [x.window[:, :D] for x in (train, held)]
    bent = [np.tanh(3 * x) + e for x, e in zip(seen, noise, strict=True)]
    fits = [fit_readout(train, bent[0], held, bent[1], N, config, seed=3) for _ in range(2)]
    assert fits[0].readout.shape.hidden == 32
    assert fits[0].score > fit_readout(train, bent[0], held, bent[1], N, config, quick=True).score
    for a, b in zip(fits[0].readout.buffers(), fits[1].readout.buffers(), strict=True):
        assert torch.equal(a, b)
    straight = [x + e for x, e in zip(seen, noise, strict=True)]
    assert fit_readout(train, straight[0], held, straight[1], N, config).readout.shape.hidden == 0


def test_calibration_finds_what_the_errors_scale_with() -> None:
    rng = np.random.default_rng(4)
    x = causal(rng, 20000)
    for gain, variance, kappa in ((0.0, 1.0, 0.0), (0.5, 0.5, 0.0), (0.1, 0.1, 0.8)):
        truth = readout(rng)
        truth.gain.fill_(gain)
        truth.variance.fill_(variance)
        truth.kappa.fill_(kappa)
        made = copy.deepcopy(truth)
        y = decoded_by(truth, x, rng)
        mean, std = calibrate(made, x.window, y, x.covariance)
        stated = truth(*_inputs(x))[1].numpy()
        assert float(np.median(np.abs(std / stated - 1))) < 0.05
        np.testing.assert_allclose((np.abs(y - mean) <= 1.6449 * std).mean(0), 0.9, atol=1e-3)


def test_errors_of_zero_and_certain_latents_are_no_special_case() -> None:
    rng = np.random.default_rng(5)
    x, made = causal(rng, 10), readout(rng)
    exact = made.mean(torch.as_tensor(x.window)).numpy()
    for y, covariance in (
        (exact, x.covariance),
        (exact + rng.normal(size=(10, D)), np.zeros_like(x.covariance)),
    ):
        _, std = calibrate(made, x.window, y, covariance)
        assert bool(np.isfinite(std).all())
        for name in ("gain", "variance", "kappa"):
            values = getattr(made, name)
            assert bool((values >= 0).all())
            assert bool(values.isfinite().all())
    assert bool((made.variance > 0).all())


@pytest.mark.parametrize("rests_at_zero", [False, True], ids=["noise at rest", "exactly at rest"])
def test_intervals_hold_at_every_speed_though_the_hand_rests_most_of_the_time(
    rests_at_zero: bool,
) -> None:
    """A stated deviation of one size, errors of another at rest, in slow and in fast movement."""
    rng = np.random.default_rng(0)
    T = 6000
    speed = np.where(rng.random(T) < 0.7, 0.0, rng.uniform(1.0, 9.0, T))
    angle = rng.uniform(0, 2 * np.pi, T)
    decoded = speed[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
    if not rests_at_zero:
        decoded += 0.1 * rng.normal(size=(T, 2))
    actual = np.select([speed == 0, speed < 5], [0.4, 2.0], 1.0)[:, None]
    truth = decoded + actual * rng.normal(size=(T, 2))
    half, std, units = slice(0, T // 2), np.full((T, 2), 1.5), ("m/s", "m/s")
    scale = fit_intervals(truth[half], decoded[half], std[half], np.ones(2), 0.05)
    assert scale is not None
    assert (scale.knots.diff() > 0).all()
    later = slice(T // 2, T)
    said = stated(scale, decoded, std)
    by = coverage_by_speed(truth[later], decoded[later], said[later], units, "decoded")
    assert len(by.ratio) == (3 if rests_at_zero else 4)
    assert 0.8 < min(by.ratio) <= max(by.ratio) < 1.25
    assert 0.84 < min(by.coverage) <= max(by.coverage) < 0.96
    before = coverage_by_speed(truth[later], decoded[later], std[later], units, "decoded")
    assert max(before.ratio) > 2
    # the same errors within 15 s are 6, within 150 s 60: the 95 % quantiles of Student's t
    brief = fit_intervals(truth[half], decoded[half], std[half], np.ones(2), 0.005)
    assert brief is not None
    np.testing.assert_allclose(brief.factors / scale.factors, 1.9432 / 1.6706, rtol=1e-4)
    # too few bins to tell speeds apart
    assert fit_intervals(truth[:30], decoded[:30], std[:30], np.ones(2), 0.05) is None
