"""First guesses of the experiments, the oracle beside them, and the learning rate of scales."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ilqr_training.config import LoopConfig
from ilqr_training.experiments.driver import NetConfig, TrialBatches, network, observed_of
from ilqr_training.experiments.generators import (
    LinearData,
    LinearSystem,
    lorenz_bouts,
    sparse_inputs,
    stable_matrix,
)
from ilqr_training.experiments.initialise import (
    StartConfig,
    difference_noise,
    start_linear,
    start_residual,
)
from ilqr_training.experiments.linear import eigenvalue_error
from ilqr_training.experiments.oracle import oracle_scores, smoothed_inputs
from ilqr_training.fit.loop import gradient_step, start
from ilqr_vae.artifact import GroupSpec
from ilqr_vae.errors import ShapeError
from ilqr_vae.model.generative import Model


def _model(dynamics: str, channels: int, *, latents: int, inputs: int) -> Model:
    net = NetConfig(dynamics=dynamics, prior="student", latents=latents, inputs=inputs)
    return network(net, GroupSpec(family="gaussian", channels=channels), seed=0, dtype="float64")


def _linear(seed: int, noise: float, *, trials: int = 4, bins: int = 300) -> LinearData:
    rng = np.random.default_rng(seed)
    A = stable_matrix(3, rng, slowest=0.97, fastest=0.85)
    B = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    u = sparse_inputs(rng, trials, bins, 3, 0.05)
    C = rng.normal(size=(6, 3))
    return LinearSystem(A, B, C).run(rng, u, noise=noise)


def test_difference_noise_sees_past_a_smooth_signal() -> None:
    rng = np.random.default_rng(0)
    x = lorenz_bouts(rng, 50, 100)
    scale = np.array([0.05, 0.1, 0.2])
    found = difference_noise(x + scale * rng.normal(size=x.shape))
    np.testing.assert_allclose(found, scale, rtol=0.1)


@pytest.mark.parametrize("seed", range(4))
def test_linear_start_is_the_regression(seed: int) -> None:
    data = _linear(seed, 0.01)
    model = _model("linear", 6, latents=3, inputs=3)
    start_linear(model, data.values)
    A, B = (t.detach().numpy() for t in model.dynamics.weights())
    assert np.linalg.norm(A, 2) < 1
    assert eigenvalue_error(data.A, A) < 0.05
    np.testing.assert_allclose(B.T @ B, np.eye(3), atol=1e-10)
    family = model.group("observations")
    noise = family.get_parameter("log_scale").detach().exp().numpy()
    np.testing.assert_allclose(noise, 0.01, rtol=0.1)
    # what it makes of the components: the next one, but for what inputs did
    C, b = family.C.detach().numpy(), family.b.detach().numpy()
    z = (data.values - b) @ np.linalg.pinv(C).T
    np.testing.assert_allclose(np.cov(z.reshape(-1, 3).T), np.eye(3), atol=1e-6)
    rest = (z[:, 1:] - z[:, :-1] @ A.T) @ B
    strength = model.prior.log_scale.detach().exp().numpy()
    np.testing.assert_allclose(rest.std((0, 1)), strength, rtol=0.05)


def test_residual_start_steps_along_the_lorenz_field() -> None:
    x = lorenz_bouts(np.random.default_rng(0), 60, 60)
    model = _model("mlp", 3, latents=6, inputs=4)
    start_residual(model, x, StartConfig())
    family = model.group("observations")
    C, b = family.C.detach(), family.b.detach()
    z = torch.zeros(60, 60, 6, dtype=torch.float64)
    z[..., :3] = (torch.as_tensor(x) - b) @ torch.linalg.inv(C[:, :3]).mT
    with torch.no_grad():
        w = model.dynamics.weights()
        u = torch.zeros(60, 60, 4, dtype=torch.float64)
        after = family.mean(model.dynamics.step(w, z, u)).numpy()
        moved = model.dynamics.step(w, z, torch.ones_like(u)) - model.dynamics.step(w, z, u)
    error, change = x[:, 1:] - after[:, :-1], np.diff(x, axis=1)
    assert (error.std((0, 1)) < 0.1 * change.std((0, 1))).all()
    np.testing.assert_allclose(moved[..., :3].numpy(), 1.0)


def test_starts_say_what_they_cannot_do() -> None:
    short, wide = np.zeros((2, 8, 3)), np.zeros((2, 30, 3))
    with pytest.raises(ShapeError, match="more than 3 channels"):
        start_linear(_model("linear", 3, latents=3, inputs=3), wide)
    with pytest.raises(ShapeError, match="dynamics: expected linear"):
        start_linear(_model("mgu2", 3, latents=2, inputs=2), wide)
    with pytest.raises(ShapeError, match="dynamics: expected mlp"):
        start_residual(_model("linear", 3, latents=3, inputs=3), wide, StartConfig())
    with pytest.raises(ShapeError, match="more than 10 bins"):
        start_residual(_model("mlp", 3, latents=4, inputs=3), short, StartConfig())


def test_oracle_is_the_posterior_mean_of_a_linear_regression() -> None:
    data = _linear(0, 0.1, trials=2, bins=7)
    K, T, m = data.inputs.shape
    n = 3
    variance = np.random.default_rng(1).uniform(0.1, 1, (K, T))
    found = smoothed_inputs(data, noise=0.1, start=0.5, variance=variance)
    for k in range(K):
        # values = M (z_0, u) + noise, written out
        M = np.zeros((T, 6, n + T * m))
        reach = np.eye(n, n + T * m)
        for t in range(T):
            reach = data.A @ reach
            reach[:, n + t * m : n + (t + 1) * m] += data.B
            M[t] = data.C @ reach
        M = M.reshape(T * 6, -1)
        prior = np.concatenate([np.full(n, 4.0), np.repeat(1 / variance[k], m)])
        x = np.linalg.solve(M.T @ M / 0.01 + np.diag(prior), M.T @ data.values[k].ravel() / 0.01)
        np.testing.assert_allclose(found[k], x[n:].reshape(T, m), atol=1e-9)


def test_oracle_that_knows_the_events_does_better() -> None:
    scores = oracle_scores(_linear(0, 0.1), noise=0.1, start=0.5)
    assert 0.5 < scores["white"] < scores["events"] < 1


def test_scales_have_a_learning_rate_of_their_own() -> None:
    values = np.random.default_rng(0).normal(size=(3, 5, 2))
    model = _model("linear", 2, latents=2, inputs=2)
    loop = LoopConfig(steps=1, batch=3, chunk=5, kl_warmup=1, posterior="laplace")
    trials = TrialBatches(model, observed_of(model, values), 0)
    run = start(model, trials, loop, scale_rate=10.0)
    run.condition = ("observations",)
    run.rate = lambda step: 1e-3
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradient_step(run, loop)
    for name, p in model.named_parameters():
        # Adam's first step has the learning rate's size
        size = float((p.detach() - before[name]).abs().max())
        scale = name.endswith(("log_scale", "raw_nu"))
        assert size == pytest.approx(0.0 if not p.requires_grad else 1e-2 if scale else 1e-3, 0.01)
