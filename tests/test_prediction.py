"""Posteriors, bounds, samples, forecasts, long sequences, against exact linear-Gaussian ones."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ilqr_vae.artifact import GroupSpec, ModelSpec, build
from ilqr_vae.errors import ConfigError, ShapeError
from ilqr_vae.inference import elbo, ilqr, prediction
from ilqr_vae.inference.posterior import Kronecker
from ilqr_vae.model.generative import Model
from ilqr_vae.model.likelihoods import Observed, padded

DTYPE = torch.float64
TIGHT = ilqr.SolverConfig(iterations=50, tolerance=1e-14)


def make(
    dynamics: str = "linear",
    prior: str = "gaussian",
    likelihood: str = "gaussian",
    *,
    seed: int = 0,
) -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        spec = ModelSpec(
            dynamics=dynamics,
            prior=prior,
            latents=3,
            inputs=2,
            groups={
                "a": GroupSpec(family=likelihood, channels=3),
                "b": GroupSpec(family="gaussian", channels=2),
            },
        )
        model = build(spec).double()
        with torch.no_grad():
            model.initial.mean.normal_()
            for p in (model.initial.log_scale, model.prior.log_scale):
                p.add_(0.3 * torch.randn_like(p))
    return model


def data(model: Model, batch: int = 2, steps: int = 6, seed: int = 1) -> dict[str, Observed]:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        z, _, _ = model.sample(batch, steps, g)
        out = {}
        for name in model.groups:
            values = model.group(name).sample(z[:, 1:], g)
            mask = (torch.rand(values.shape, generator=g) > 0.2).to(DTYPE)
            out[name] = Observed(values * mask, mask)
    return out


def exact_log_likelihood(model: Model, observed: dict[str, Observed]) -> Tensor:
    """log p(o) of a linear-Gaussian model by a Kalman filter over what was observed."""
    A, B = (t.detach() for t in model.dynamics.weights())
    mean0, var0 = model.initial.mean.detach(), (2 * model.initial.log_scale.detach()).exp()
    Q = B @ torch.diag((2 * model.prior.log_scale.detach()).exp()) @ B.mT
    groups = [model.group(n) for n in observed]
    C = torch.cat([g.C.detach() for g in groups])
    b = torch.cat([g.b.detach() for g in groups])
    R = torch.cat([(2 * g.get_parameter("log_scale").detach()).exp() for g in groups])
    values = torch.cat([o.values for o in observed.values()], -1)
    mask = torch.cat([o.mask for o in observed.values()], -1)
    totals = []
    for y, seen in zip(values, mask > 0, strict=True):
        m, P, total = mean0, torch.diag(var0), 0.0
        for t in range(len(y)):
            m, P = A @ m, A @ P @ A.mT + Q
            k = seen[t]
            if not bool(k.any()):
                continue
            Ck = C[k]
            S = Ck @ P @ Ck.mT + torch.diag(R[k])
            e = y[t, k] - Ck @ m - b[k]
            total = total - 0.5 * (
                e @ torch.linalg.solve(S, e)
                + torch.logdet(S)
                + int(k.sum()) * math.log(2 * math.pi)
            )
            G = P @ Ck.mT @ torch.linalg.inv(S)
            m, P = m + G @ e, P - G @ Ck @ P
        totals.append(total)
    return torch.stack(totals)


def test_importance_weights_are_exact_on_a_linear_gaussian_model() -> None:
    """The Laplace posterior is then the true one, so every sample's weight is p(o)."""
    model = make()
    observed = data(model)
    exact = exact_log_likelihood(model, observed)
    q = prediction.infer(model, observed, solver=TIGHT)
    for samples in (1, 7):
        got = q.importance_weighted(observed, samples=samples, at_once=3)
        torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-9)
    many = q.bound(observed, samples=4000)  # unbiased, and tight
    torch.testing.assert_close(many, exact, rtol=0, atol=0.15)


def test_importance_weighting_tightens_the_bound() -> None:
    model = make("mgu2", "student", "poisson-softplus")
    observed = data(model, 4, 4)
    g = torch.Generator().manual_seed(0)
    kronecker = Kronecker(3, 2, 4, scale=0.5).double()
    q = prediction.infer(model, observed, solver=TIGHT, posterior=kronecker, generator=g)
    loose = float(q.bound(observed, samples=400).mean())
    some = float(q.importance_weighted(observed, samples=20).mean())
    tight = float(q.importance_weighted(observed, samples=4000, at_once=500).mean())
    assert loose < some < tight
    laplace = prediction.infer(model, observed, solver=TIGHT, generator=g)
    assert float(laplace.bound(observed, samples=400).mean()) > loose


@pytest.mark.parametrize("time", ["full", "diagonal"])
@pytest.mark.parametrize("surrogate", [False, True])
def test_kronecker_samples_have_the_stated_moments(time: str, surrogate: bool) -> None:
    kind = "full" if time == "full" else "diagonal"
    q = Kronecker(4, 2, 3, scale=0.5, time=kind, surrogate=surrogate).double()
    with torch.no_grad():
        for p in q.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        draw = q.draw(60_000, torch.Generator().manual_seed(0))
    x = torch.cat([draw.dz0, draw.du.flatten(1)], 1)
    var = torch.cat([draw.z0_var, draw.u_var.flatten(1)], 1)[0]
    torch.testing.assert_close(x.var(0), var, rtol=0.05, atol=0)
    cov = torch.cov(x.T)
    entropy = 0.5 * torch.logdet(2 * math.pi * math.e * cov)
    assert float(entropy) == pytest.approx(float(draw.entropy[0]), abs=0.05)
    parts = draw.z0_entropy + draw.u_entropy.sum(-1)
    torch.testing.assert_close(parts, draw.entropy)
    # the log densities: that of a Gaussian with this covariance
    true = torch.distributions.MultivariateNormal(torch.zeros(len(cov), dtype=DTYPE), cov)
    log_q = draw.z0_log_q + draw.u_log_q.sum(-1)
    torch.testing.assert_close(log_q.mean(), true.log_prob(x).mean(), rtol=0, atol=0.05)
    across = cov[:4, 4:].abs().max()
    assert (float(across) > 0.02) == (surrogate and time == "full")


def test_kronecker_limits() -> None:
    with pytest.raises(ConfigError, match=r"posterior.surrogate: expected latents a multiple of 2"):
        Kronecker(3, 2, 5, surrogate=True)
    model = make()
    with pytest.raises(ShapeError, match="steps: expected at most the 5 bins"):
        prediction.infer(model, data(model), posterior=Kronecker(3, 2, 5).double()).sample(1)


@pytest.mark.parametrize("family", ["laplace", "kronecker"])
@pytest.mark.parametrize("prior", ["gaussian", "student"])
def test_a_padded_batch_equals_its_trials_one_by_one(family: str, prior: str) -> None:
    model = make("mgu2", prior)
    lengths = (5, 8, 3)
    whole = data(model, 3, 8)
    trials = [whole["a"].values[i, :k] for i, k in enumerate(lengths)]
    observed, live = padded(trials)
    q = Kronecker(3, 2, 8).double() if family == "kronecker" else None
    batch = prediction.infer(model, {"a": observed}, solver=TIGHT, posterior=q)
    assert live.sum(1).tolist() == list(lengths)
    for i, trial in enumerate(trials):
        ones = torch.ones_like(trial)
        alone = {"a": Observed(trial[None], ones[None])}
        one = prediction.infer(model, alone, solver=TIGHT, posterior=q)
        k = lengths[i]
        torch.testing.assert_close(batch.u[i, :k], one.u[0], rtol=0, atol=1e-6)
        if family == "kronecker":
            continue
        assert batch.laplace is not None
        assert one.laplace is not None
        torch.testing.assert_close(
            batch.laplace.z_cov[i, : k + 1], one.laplace.z_cov[0], rtol=0, atol=1e-7
        )
    if prior == "gaussian":
        # nothing beyond a trial's end enters the bound: change the padding, same value
        other = Observed(observed.values + 3.0 * (1 - observed.mask), observed.mask)
        values = []
        for o in (observed, other):
            torch.manual_seed(0)
            values.append(batch.bound({"a": o}, samples=2, live=live))
        torch.testing.assert_close(values[0], values[1])


def test_a_padded_bound_is_exact_where_exactness_is_known() -> None:
    model = make()
    whole = data(model, 3, 6)
    full = {"a": Observed(whole["a"].values, torch.ones_like(whole["a"].mask))}
    lengths = (6, 2, 4)
    trials = [full["a"].values[i, :k] for i, k in enumerate(lengths)]
    observed, live = padded(trials)
    q = prediction.infer(model, {"a": observed}, solver=TIGHT)
    got = q.importance_weighted({"a": observed}, samples=2, live=live)
    for i, trial in enumerate(trials):
        alone = {"a": Observed(trial[None], torch.ones_like(trial)[None])}
        torch.testing.assert_close(got[i : i + 1], exact_log_likelihood(model, alone))
    with pytest.raises(ShapeError, match="trials: expected at least one"):
        padded([])
    with pytest.raises(ShapeError, match="of the same channels"):
        padded([torch.zeros(3, 2), torch.zeros(3, 1)])


def test_samples_agree_with_the_posterior() -> None:
    model = make()
    observed = data(model)
    g = torch.Generator().manual_seed(0)
    q = prediction.infer(model, observed, solver=TIGHT, generator=g)
    s = q.sample(20_000, g)
    assert s.inputs.shape == (20_000, 2, 6, 2)
    assert s.states.shape == (20_000, 2, 7, 3)
    assert s.observations["a"].shape == (20_000, 2, 6, 3)
    assert q.laplace is not None
    torch.testing.assert_close(s.states.mean(0), q.z, rtol=0, atol=0.04)
    var = q.laplace.z_cov.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(s.states.var(0), var, rtol=0.06, atol=1e-4)
    noise = (2 * model.group("a").get_parameter("log_scale").detach()).exp()
    torch.testing.assert_close(
        s.observations["a"].var(0), s.rates["a"].var(0) + noise, rtol=0.08, atol=1e-3
    )
    torch.testing.assert_close(q.mean_rates(5000)["b"], q.rates()["b"].detach(), rtol=0, atol=0.08)


def test_an_absent_group_is_predicted_not_conditioned_on() -> None:
    model = make("mgu2")
    observed = data(model)
    alone = prediction.infer(model, {"a": observed["a"]}, solver=TIGHT)
    told = prediction.infer(model, observed, condition=("a",), solver=TIGHT)
    torch.testing.assert_close(alone.u, told.u)
    assert set(alone.rates()) == {"a", "b"}
    both = prediction.infer(model, observed, solver=TIGHT)
    assert float((both.u - alone.u).abs().max()) > 1e-3
    with pytest.raises(ShapeError, match="condition: expected at least one group"):
        prediction.infer(model, observed, condition=())


def test_forecasts_are_the_dynamics_without_inputs() -> None:
    model = make("mgu2")
    q = prediction.infer(model, data(model), solver=TIGHT)
    ahead = prediction.forecasts(model, q.z, 3, "b")
    assert ahead.shape == (2, 6, 3, 2)
    w, none = model.dynamics.weights(), torch.zeros(2, 2, dtype=DTYPE)
    z = q.z[:, 4]  # seen in bin 3
    for k in range(3):
        z = model.dynamics.step(w, z, none)
        torch.testing.assert_close(ahead[:, 3, k], model.group("b").mean(z).detach())
    for bad in ((torch.zeros(2, 4, dtype=DTYPE), 3), (q.z[:, 0], 0)):
        with pytest.raises(ShapeError, match="z: expected"):
            prediction.extrapolate(model, *bad)


@pytest.mark.parametrize("dynamics", ["linear", "mgu2"])
def test_long_inference_finds_the_optimum_of_the_whole(dynamics: str) -> None:
    model = make(dynamics)
    observed = data(model, 1, 60)
    direct = prediction.infer(model, observed, solver=TIGHT)
    long = prediction.infer_long(model, observed, chunk=13, solver=TIGHT)
    torch.testing.assert_close(long.z, direct.z, rtol=0, atol=1e-6)
    assert int(long.state.iterations) <= int(direct.state.iterations)
    with pytest.raises(ShapeError, match="chunk: expected at least 1 bin"):
        prediction.infer_long(model, observed, chunk=0)


def test_bound_through_elbo_equals_prediction() -> None:
    model = make("mgu2")
    observed = data(model)
    q = prediction.infer(model, observed, solver=TIGHT, generator=torch.Generator().manual_seed(5))
    got = q.bound(observed)
    again = prediction.infer(
        model, observed, solver=TIGHT, generator=torch.Generator().manual_seed(5)
    )
    parts = elbo.bound(model, again.w, again.z[:, 0], again.u, again.sampler(1), observed)
    torch.testing.assert_close(got, parts.value().detach())
