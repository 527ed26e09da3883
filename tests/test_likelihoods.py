"""Observation families: derivatives against autodiff, the exp link's continuation, masks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ilqr_vae.model.likelihoods import LIKELIHOODS, Gaussian, Likelihood, Observed, Poisson
from small import perturb

SEEDS = st.integers(0, 2**31)
grid = settings(max_examples=25, deadline=None, derandomize=True)
# with a "+": a gain for each unit, and a floor
FAMILIES = [*sorted(LIKELIHOODS), "poisson+", "poisson-softplus+"]


def make(family: str, n: int, channels: int, seed: int = 0) -> Likelihood:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        more: dict[str, Any] = {"gain": True, "floor": 0.05} if family.endswith("+") else {}
        likelihood = LIKELIHOODS[family.rstrip("+")](n, channels, **more).double()
    perturb(likelihood, 0.3, torch.Generator().manual_seed(seed))
    return likelihood.requires_grad_(False)


def per_channel(family: str, channels: int) -> Likelihood:
    """One whose z is a itself, channel by channel."""
    likelihood = make(family, channels, channels)
    likelihood.C.copy_(torch.eye(channels))
    likelihood.b.zero_()
    return likelihood


def values_for(family: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    noise = torch.rand(shape, generator=generator, dtype=torch.float64)
    return (6 * noise).floor() if family.startswith("poisson") else 4 * noise - 2


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spread", [1.0, 6.0], ids=["real rates", "beyond the continuation"])
def test_derivatives_are_autodiffs(family: str, spread: float) -> None:
    likelihood, generator = per_channel(family, 40), torch.Generator().manual_seed(1)
    a = spread * normal(generator, 30, 40)
    y = values_for(family, (30, 40), generator)
    seen = torch.ones_like(y)
    a.requires_grad_(True)
    loss = -likelihood.log_prob(a, Observed(y, seen)).sum()
    (first,) = torch.autograd.grad(loss, a, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), a)
    d, w = likelihood.derivatives(a.detach(), y)
    torch.testing.assert_close(d, first.detach(), rtol=1e-11, atol=1e-11)
    assert bool((w >= 0).all())
    exact = likelihood.curvature(a.detach(), y)
    torch.testing.assert_close(exact, second, rtol=1e-9, atol=1e-9)
    real = a.detach() < getattr(likelihood, "log_rate_max", math.inf)
    if not family.endswith("+"):
        torch.testing.assert_close(w[real], second[real], rtol=1e-10, atol=1e-10)
    if spread > 1 and family == "poisson":
        assert not bool(real.all())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spread", [0.3, 6.0], ids=["real rates", "beyond the continuation"])
def test_what_training_differentiates_has_autograds_gradients(family: str, spread: float) -> None:
    likelihood, generator = make(family, 3, 8), torch.Generator().manual_seed(1)
    z, dz = spread * normal(generator, 4, 6, 3), normal(generator, 4, 6, 3)
    mask = (torch.rand(4, 6, 8, generator=generator) < 0.7).double()
    # where nothing was observed any number may stand
    y = torch.where(mask > 0, values_for(family, (4, 6, 8), generator), -1.0)
    o, weight = Observed(y, mask), normal(generator, 4, 6)
    z.requires_grad_(True)
    parameters = list(likelihood.requires_grad_(True).parameters())

    scores = likelihood.score(z, o), likelihood.log_prob(z, o)
    torch.testing.assert_close(*scores, rtol=1e-12, atol=1e-12)
    found = [torch.autograd.grad((s * weight).sum(), [z, *parameters]) for s in scores]
    torch.testing.assert_close(found[0], found[1], rtol=1e-11, atol=1e-11)

    at = z.detach()
    d, _ = likelihood.derivatives(likelihood.affine(at), y)
    along = (d * mask * (dz @ likelihood.C.mT)).sum()
    pairs = [
        torch.autograd.grad(s, parameters, materialize_grads=True)
        for s in (likelihood.slope_along(at, o, dz), along)
    ]
    torch.testing.assert_close(pairs[0], pairs[1], rtol=1e-10, atol=1e-10)
    if spread > 1 and isinstance(likelihood, Poisson):
        assert bool((likelihood.affine(at) > likelihood.log_rate_max).any())


@given(y=st.integers(0, 2000), log_rate_max=st.floats(-1.0, 6.0))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_the_continuation_is_once_differentiable_convex_and_bounded_below(
    y: int, log_rate_max: float
) -> None:
    poisson = Poisson(1, 1, log_rate_max=log_rate_max).double().requires_grad_(False)
    poisson.C.fill_(1.0)
    count = torch.full((1, 1), float(y), dtype=torch.float64)

    def cost(a: Tensor) -> Tensor:
        o = Observed(count.expand(len(a), 1), torch.ones(len(a), 1, dtype=torch.float64))
        return -poisson.log_prob(a.unsqueeze(-1), o)

    eps = 1e-9
    around = torch.tensor([-eps, eps], dtype=torch.float64) + log_rate_max
    scale = 1 + y + math.exp(log_rate_max)
    value, slope = cost(around), poisson.derivatives(around, count[0].expand(2))[0]
    assert abs(float(value[1] - value[0])) < 1e-7 * scale
    assert abs(float(slope[1] - slope[0])) < 1e-7 * scale
    # convex: the slope never falls, far into the continuation
    grid_ = torch.cat(
        [torch.linspace(-20, 20, 401, dtype=torch.float64), torch.logspace(2, 8, 30).double()]
    )
    slopes = poisson.derivatives(grid_, count[0].expand(len(grid_)))[0]
    assert bool((slopes.diff() >= -1e-9 * scale).all())
    # bounded below by the best any rate can do: r - y log r >= y - y log y
    best = (y - y * math.log(y) if y else 0.0) + math.lgamma(y + 1)
    assert bool((cost(grid_) >= best - 1e-9 * scale).all())
    assert bool(cost(grid_).isfinite().all())


@pytest.mark.parametrize("family", FAMILIES)
@grid
@given(n=st.integers(1, 5), channels=st.integers(1, 8), seed=SEEDS)
def test_a_mask_is_dropping_channels(family: str, n: int, channels: int, seed: int) -> None:
    likelihood, generator = make(family, n, channels, seed), torch.Generator().manual_seed(seed)
    z, y = normal(generator, 1, n), values_for(family, (1, channels), generator)
    seen = torch.rand(channels, generator=generator) < 0.6
    fewer = make(family, n, channels, seed)
    for name, p in list(fewer.named_parameters()):
        setattr(fewer, name, torch.nn.Parameter(p[seen], requires_grad=False))
    hidden = Observed(y[:, seen], torch.ones_like(y[:, seen]))
    for junk in (0.0, -1.0, -7.5, 1e6):
        o = Observed(torch.where(seen, y, torch.tensor(junk)), seen.double().unsqueeze(0))
        for ours, theirs in zip(
            (likelihood.log_prob(z, o), *likelihood.quadratise(z, o)),
            (fewer.log_prob(z, hidden), *fewer.quadratise(z, hidden)),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
@grid
@given(n=st.integers(1, 5), channels=st.integers(1, 8), scale=st.floats(0.1, 8.0), seed=SEEDS)
def test_the_quadratic_model_has_the_gradient_and_a_psd_curvature(
    family: str, n: int, channels: int, scale: float, seed: int
) -> None:
    likelihood, generator = make(family, n, channels, seed), torch.Generator().manual_seed(seed)
    z = (scale * normal(generator, 2, 3, n)).requires_grad_(True)
    y = values_for(family, (2, 3, channels), generator)
    mask = (torch.rand(2, 3, channels, generator=generator) < 0.7).double()
    (gradient,) = torch.autograd.grad(-likelihood.log_prob(z, Observed(y, mask)).sum(), z)
    q, Q = likelihood.quadratise(z.detach(), Observed(y, mask))
    size = 1 + float(Q.abs().max())
    torch.testing.assert_close(q, gradient, rtol=1e-10, atol=1e-10 * size)
    torch.testing.assert_close(Q, Q.mT, rtol=1e-12, atol=1e-12 * size)
    assert float(torch.linalg.eigvalsh(Q).min()) > -1e-12 * size


def test_densities_are_densities() -> None:
    z, counts = torch.tensor([[0.3]], dtype=torch.float64), torch.arange(200.0).double()
    poisson = Poisson(1, 1).double().requires_grad_(False)
    o = Observed(counts.view(-1, 1), torch.ones(200, 1, dtype=torch.float64))
    p = poisson.log_prob(z.expand(200, 1), o).exp()
    assert float(p.sum()) == pytest.approx(1, abs=1e-12)
    assert float((p * counts).sum()) == pytest.approx(float(poisson.mean(z)), rel=1e-12)
    assert float(poisson.mean(z)) == pytest.approx(float(poisson.affine(z).exp()), rel=1e-14)
    gaussian = make("gaussian", 1, 1)
    assert isinstance(gaussian, Gaussian)
    y = torch.linspace(-40, 40, 80001, dtype=torch.float64).view(-1, 1)
    density = gaussian.log_prob(z.expand(len(y), 1), Observed(y, torch.ones_like(y))).exp()
    assert float(torch.trapezoid(density, y[:, 0])) == pytest.approx(1, abs=1e-9)
    mean = torch.trapezoid(density * y[:, 0], y[:, 0])
    assert float(mean) == pytest.approx(float(gaussian.mean(z)), abs=1e-9)


def test_the_optimum_does_not_need_log_factorials() -> None:
    poisson, generator = make("poisson", 3, 4), torch.Generator().manual_seed(0)
    assert isinstance(poisson, Poisson)
    o = Observed(torch.full((2, 4), 3.0).double(), torch.ones(2, 4).double())
    gaps = [
        poisson.unnormalised(z, o) - poisson.log_prob(z, o)
        for z in (normal(generator, 2, 3), normal(generator, 2, 3))
    ]
    torch.testing.assert_close(gaps[0], gaps[1], rtol=0, atol=1e-12)
    torch.testing.assert_close(gaps[0], torch.full((2,), 4 * math.lgamma(4.0)).double())
