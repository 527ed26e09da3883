"""Posteriors and the bound: exact where the truth is known, dense linear algebra elsewhere."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ilqr_vae.inference import elbo, ilqr
from ilqr_vae.inference.posterior import Draw, Kronecker, laplace_draw
from ilqr_vae.lqr import LQRProblem, LQRSolution, marginal_covariance, solve_lqr
from ilqr_vae.model.generative import Model
from ilqr_vae.model.likelihoods import Gaussian, Observed
from small import TIGHT, as_problem, draw_data, kalman, make_model, perturb, rest

B, T, N_LATENT, M = 3, 9, 4, 2


def solved(
    model: Model, observed: dict[str, Observed]
) -> tuple[ilqr.State, LQRProblem, LQRSolution]:
    """The optimum, and the LQR problem and solution there."""
    problem = as_problem(model, observed)
    with torch.no_grad():
        state, _ = ilqr.solve(problem, *rest(problem), TIGHT)
        at = model.lqr_problem(problem.w, state.z, state.u, problem.observed, problem.initial)
        return state, at, solve_lqr(at, free_initial=True)


def linear_gaussian(missing: float) -> tuple[Model, dict[str, Observed]]:
    model = make_model("linear", n=N_LATENT, m=M, spikes="gaussian").requires_grad_(False)
    return model, draw_data(model, B, T, missing=missing)


def still(draw: Draw) -> Draw:
    """The same moments, the sample at the mean."""
    values = dict(vars(draw))
    return Draw(**(values | {k: torch.zeros_like(values[k]) for k in ("dz0", "du")}))


def dense_covariance(at: LQRProblem, b: int) -> Tensor:
    """Covariance of (z_0, u_0, .., u_{T-1}): the inverse of J's Hessian, without a recursion."""
    _, steps, n, m = at.B.shape
    size = n + steps * m
    dz = torch.eye(n, size, dtype=at.A.dtype)
    hessian = dz.mT @ at.Q[b, 0] @ dz
    for k in range(steps):
        du = torch.zeros(m, size, dtype=at.A.dtype)
        du[:, n + k * m : n + (k + 1) * m] = torch.eye(m)
        hessian = hessian + du.mT @ at.R[b, k] @ du
        dz = at.A[b, k] @ dz + at.B[b, k] @ du
        hessian = hessian + dz.mT @ at.Q[b, k + 1] @ dz
    return torch.linalg.inv(hessian)


def entropy_of(covariance: Tensor) -> float:
    return float(0.5 * torch.logdet(2 * math.pi * math.e * covariance))


def joined(draw: Draw) -> Tensor:
    return torch.cat([draw.dz0, draw.du.flatten(1)], 1)


def assert_moments(samples: Tensor, covariance: Tensor) -> None:
    """Sample mean and covariance within five standard errors, entry by entry."""
    K, scale = len(samples), covariance.diagonal().sqrt()
    x = samples / scale
    assert float(x.mean(0).abs().max()) < 5 / math.sqrt(K)
    correlation = covariance / scale / scale.unsqueeze(-1)
    spread = ((1 + correlation**2) / K).sqrt()
    assert float(((x.mT @ x / K - correlation) / spread).abs().max()) < 5


@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_linear_gaussian_posterior_is_the_rts_smoother(missing: float) -> None:
    model, observed = linear_gaussian(missing)
    state, at, lqr = solved(model, observed)
    Sigma = marginal_covariance(at, lqr)
    for b in range(B):
        truth = kalman(model, observed["spikes"].values[b], observed["spikes"].mask[b])
        torch.testing.assert_close(state.z[b], truth.smoothed, rtol=0, atol=1e-8)
        torch.testing.assert_close(Sigma[b], truth.smoothed_cov, rtol=0, atol=1e-8)


@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_the_bound_of_the_exact_posterior_is_the_log_likelihood(missing: float) -> None:
    """E_q log p is log p at the mean less half the trace of what the latent's variance adds."""
    model, observed = linear_gaussian(missing)
    state, at, lqr = solved(model, observed)
    draw = still(laplace_draw(at, lqr))
    parts = elbo.bound(model, model.dynamics.weights(), state.z[:, 0], state.u, draw, observed)
    spikes, mask = model.group("spikes"), observed["spikes"].mask
    assert isinstance(spikes, Gaussian)
    Sigma = marginal_covariance(at, lqr)[:, 1:]
    seen_var = ((spikes.C @ Sigma) * spikes.C).sum(-1)  # (B, T, N), of each channel's mean
    lost = 0.5 * (seen_var * torch.exp(-2 * spikes.log_scale) * mask).sum((1, 2))
    exact = torch.stack(
        [kalman(model, v, s).log_likelihood.sum() for v, s in zip(*observed["spikes"], strict=True)]
    )
    torch.testing.assert_close(parts.value() - lost, exact, rtol=0, atol=1e-8)
    assert bool((parts.kl > 0).all())


def test_the_sampled_bound_averages_to_the_log_likelihood() -> None:
    model, observed = linear_gaussian(0.2)
    K = 4000
    one = {k: Observed(o.values[:1], o.mask[:1]) for k, o in observed.items()}
    state, at, _ = solved(model, one)
    many = {k: Observed(*(x.expand(K, *x.shape[1:]) for x in o)) for k, o in one.items()}
    repeated = {
        k: None if v is None else v.expand(K, *v.shape[1:]).contiguous()
        for k, v in {f: getattr(at, f) for f in LQRProblem.__dataclass_fields__}.items()
    }
    tiled = LQRProblem(**repeated)
    draw = laplace_draw(
        tiled, solve_lqr(tiled, free_initial=True), torch.Generator().manual_seed(0)
    )
    value = elbo.bound(
        model,
        model.dynamics.weights(),
        state.z[:, 0].expand(K, -1),
        state.u.expand(K, -1, -1),
        draw,
        many,
    ).value()
    exact = float(kalman(model, *(x[0] for x in one["spikes"])).log_likelihood.sum())
    assert abs(float(value.mean()) - exact) < 5 * float(value.std()) / math.sqrt(K)


def test_any_other_posterior_is_below_the_log_likelihood() -> None:
    model, observed = linear_gaussian(0.0)
    state, _, _ = solved(model, observed)
    K = 400
    posterior = Kronecker(N_LATENT, M, T, scale=0.5).double().requires_grad_(False)
    exact = torch.stack(
        [kalman(model, v, s).log_likelihood.sum() for v, s in zip(*observed["spikes"], strict=True)]
    )
    generator, total = torch.Generator().manual_seed(0), torch.zeros(B, dtype=torch.float64)
    for _ in range(K):
        draw = posterior.draw(B, generator)
        w = model.dynamics.weights()
        total += elbo.bound(model, w, state.z[:, 0], state.u, draw, observed).value()
    assert bool((total / K < exact - 1).all())


@pytest.mark.parametrize(("dynamics", "missing"), [("mgu2", 0.0), ("mgu2", 0.3), ("linear", 0.3)])
def test_laplace_is_the_inverse_hessian(dynamics: str, missing: float) -> None:
    model = make_model(dynamics, n=N_LATENT, m=M).requires_grad_(False)
    _, at, lqr = solved(model, draw_data(model, B, T, missing=missing))
    draw = laplace_draw(at, lqr)
    for b in range(B):
        covariance = dense_covariance(at, b)
        variance = covariance.diagonal()
        n = N_LATENT
        torch.testing.assert_close(draw.z0_var[b], variance[:n], rtol=1e-9, atol=0)
        torch.testing.assert_close(draw.u_var[b].flatten(), variance[n:], rtol=1e-9, atol=0)
        assert float(draw.entropy[b]) == pytest.approx(entropy_of(covariance), abs=1e-8)


def test_laplace_samples_have_those_moments() -> None:
    model = make_model("mgu2", n=N_LATENT, m=M).requires_grad_(False)
    _, at, _ = solved(model, draw_data(model, 1, T))
    K = 20000
    fields = {f: getattr(at, f) for f in LQRProblem.__dataclass_fields__}
    tiled = LQRProblem(
        **{
            k: None if v is None else v.expand(K, *v.shape[1:]).contiguous()
            for k, v in fields.items()
        }
    )
    draw = laplace_draw(
        tiled, solve_lqr(tiled, free_initial=True), torch.Generator().manual_seed(1)
    )
    assert_moments(joined(draw), dense_covariance(at, 0))


@pytest.mark.parametrize("time", ["full", "diagonal"])
def test_kronecker_is_its_dense_product(time: str) -> None:
    steps = 5
    posterior = Kronecker(3, M, steps, time="full" if time == "full" else "diagonal").double()
    perturb(posterior, 0.4, torch.Generator().manual_seed(2))
    posterior.requires_grad_(False)
    space, raw = posterior.space, posterior.time
    Ls = (space.tril(-1) + torch.diag(space.diagonal().exp())) * posterior.log_scale.exp()
    Lt = raw.tril(-1) + torch.diag(raw.diagonal().exp()) if time == "full" else raw.exp().diag()
    inputs = torch.kron(Lt @ Lt.mT, Ls @ Ls.mT)
    covariance = torch.block_diag(torch.diag(torch.exp(2 * posterior.initial_log_scale)), inputs)
    draw = posterior.draw(20000, torch.Generator().manual_seed(3))
    torch.testing.assert_close(draw.u_var[0].flatten(), inputs.diagonal(), rtol=1e-12, atol=0)
    torch.testing.assert_close(draw.z0_var[0], covariance.diagonal()[:3], rtol=1e-12, atol=0)
    assert float(draw.entropy[0]) == pytest.approx(entropy_of(covariance), abs=1e-10)
    assert_moments(joined(draw), covariance)
    again = posterior.draw(20000, torch.Generator().manual_seed(3))
    torch.testing.assert_close(again.du, draw.du, rtol=0, atol=0)


def test_kronecker_draws_carry_gradients_to_every_parameter() -> None:
    posterior = Kronecker(3, M, 4).double()
    draw = posterior.draw(2, torch.Generator().manual_seed(0))
    (draw.du.square().sum() + draw.dz0.square().sum() - draw.entropy.sum()).backward()
    for name, p in posterior.named_parameters():
        assert p.grad is not None, name
        assert bool(p.grad.isfinite().all()), name


def test_the_kl_is_zero_only_at_the_prior() -> None:
    model = make_model("mgu2").requires_grad_(False)
    observed = draw_data(model, 2, 4)
    like = model.initial.mean
    z0, u = like.expand(2, 4).contiguous(), like.new_zeros(2, 4, 2)
    posterior = Kronecker(4, 2, 4).double().requires_grad_(False)
    posterior.log_scale.zero_()
    posterior.space.copy_(torch.diag(model.prior.log_scale))
    posterior.initial_log_scale.copy_(model.initial.log_scale)
    w = model.dynamics.weights()
    same = elbo.bound(model, w, z0, u, posterior.draw(2), observed)
    torch.testing.assert_close(same.kl, torch.zeros(2).double(), rtol=0, atol=1e-12)
    for moved in (
        elbo.bound(model, w, z0 + 0.1, u, posterior.draw(2), observed),
        elbo.bound(model, w, z0, u - 0.1, posterior.draw(2), observed),
    ):
        assert bool((moved.kl > 1e-3).all())
    weighted = same.value(kl_weight=0.5, group_weights={"spikes": 2.0})
    torch.testing.assert_close(weighted, 2 * same.groups["spikes"] - 0.5 * same.kl)
