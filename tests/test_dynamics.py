"""Dynamics families: analytic derivatives against autodiff and finite differences; stability."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ilqr_vae.model.dynamics import FAMILIES, MGU2, Dynamics, DynamicsOptions, Linear, Weights
from small import perturb

SEEDS = st.integers(0, 2**31)
grid = settings(max_examples=25, deadline=None, derandomize=True)


def make(family: str, n: int, m: int, seed: int) -> tuple[Dynamics, Weights, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        dynamics = FAMILIES[family].from_options(n, m, DynamicsOptions()).double()
    perturb(dynamics, 0.3, generator)
    return dynamics, tuple(w.detach() for w in dynamics.weights()), generator


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@grid
@given(n=st.integers(1, 6), m=st.integers(1, 7), seed=SEEDS)
def test_jacobians_are_autodiffs(family: str, n: int, m: int, seed: int) -> None:
    dynamics, w, generator = make(family, n, m, seed)
    z, u = normal(generator, 5, n), normal(generator, 5, m)
    A, B = dynamics.jacobians(w, z, u)
    expected: tuple[Tensor, Tensor] = torch.func.vmap(
        torch.func.jacrev(lambda z, u: dynamics.step(w, z, u), argnums=(0, 1))
    )(z, u)
    torch.testing.assert_close(A, expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(B, expected[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_tangent_is_the_jacobians_and_autodiffs_in_the_weights(family: str) -> None:
    dynamics, w, generator = make(family, 4, 3, 2)
    z, dz, lam, mu = (normal(generator, 5, 4) for _ in range(4))
    u, du = normal(generator, 5, 3), normal(generator, 5, 3)
    leaves = tuple(t.requires_grad_() for t in w)
    after, change = dynamics.tangent(leaves, z, u, dz, du)
    A, B = dynamics.jacobians(leaves, z, u)
    expected = (A @ dz.unsqueeze(-1) + B @ du.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(after, dynamics.step(leaves, z, u), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(change, expected, rtol=1e-12, atol=1e-12)
    ours, theirs = (
        torch.autograd.grad((lam * x).sum() + (mu * y).sum(), leaves, materialize_grads=True)
        for x, y in ((change, after), (expected, dynamics.step(leaves, z, u)))
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@grid
@given(n=st.integers(1, 5), m=st.integers(1, 6), seed=SEEDS)
def test_curvature_is_the_slope_of_the_jacobians(family: str, n: int, m: int, seed: int) -> None:
    dynamics, w, generator = make(family, n, m, seed)
    z, u, costate = (normal(generator, 3, k) for k in (n, m, n))
    zz, uz, uu = dynamics.curvature(w, z, u, costate)
    assert zz.shape == (3, n, n)
    assert uz.shape == (3, m, n)
    assert uu.shape == (3, m, m)
    h = 1e-5

    def slope(dz: Tensor, du: Tensor) -> Tensor:
        """Central difference of costate' [A B] along one direction."""
        ahead = torch.cat(dynamics.jacobians(w, z + h * dz, u + h * du), -1)
        behind = torch.cat(dynamics.jacobians(w, z - h * dz, u - h * du), -1)
        return (costate.unsqueeze(1) @ (ahead - behind)).squeeze(1) / (2 * h)

    for i, e in enumerate(torch.eye(n, dtype=torch.float64)):
        along = slope(e, torch.zeros(m, dtype=torch.float64))
        torch.testing.assert_close(along[:, :n], zz[:, i], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(along[:, n:], uz[:, :, i], rtol=1e-6, atol=1e-7)
    for i, e in enumerate(torch.eye(m, dtype=torch.float64)):
        along = slope(torch.zeros(n, dtype=torch.float64), e)
        torch.testing.assert_close(along[:, :n], uz[:, i], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(along[:, n:], uu[:, i], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_leading_axes_are_a_loop(family: str) -> None:
    dynamics, w, generator = make(family, 4, 2, 0)
    z, u = normal(generator, 2, 3, 4), normal(generator, 2, 3, 2)
    whole = (dynamics.step(w, z, u), *dynamics.jacobians(w, z, u))
    for i in range(2):
        for j in range(3):
            one = (dynamics.step(w, z[i, j], u[i, j]), *dynamics.jacobians(w, z[i, j], u[i, j]))
            for a, b in zip(whole, one, strict=True):
                torch.testing.assert_close(a[i, j], b, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_weights_are_differentiable_in_every_parameter(family: str) -> None:
    dynamics, _, generator = make(family, 3, 2, 1)
    w = dynamics.weights()
    dynamics.step(w, normal(generator, 4, 3), normal(generator, 4, 2)).square().sum().backward()
    for name, p in dynamics.named_parameters():
        assert p.grad is not None, name
        assert bool(p.grad.isfinite().all()), name
        assert float(p.grad.abs().sum()) > 0, name


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 8),
    skew=st.floats(0, 30),
    gain=st.floats(-20, 20),
    seed=SEEDS,
)
def test_linear_is_stable_whatever_its_parameters(
    n: int, skew: float, gain: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    dynamics = Linear(n, 2).double()
    with torch.no_grad():
        dynamics.skew_left.copy_(skew * normal(generator, n, n))
        dynamics.skew_right.copy_(skew * normal(generator, n, n))
        dynamics.raw_gain.copy_(gain * torch.rand(n, generator=generator, dtype=torch.float64))
    A = dynamics.weights()[0].detach()
    assert float(torch.linalg.matrix_norm(A, 2)) < 1
    d = torch.sigmoid(dynamics.raw_gain.detach()).sort(descending=True).values
    # the singular values are the gains: nothing else shrinks or stretches
    torch.testing.assert_close(torch.linalg.svdvals(A), d, rtol=1e-9, atol=1e-12)


def test_mgu2_stays_in_its_box() -> None:
    """A convex combination of z and a tanh: a state in [-1, 1] never leaves it."""
    dynamics, w, generator = make("mgu2", 5, 2, 3)
    z = 2 * torch.rand(20, 5, generator=generator, dtype=torch.float64) - 1
    for _ in range(50):
        z = dynamics.step(w, z, 5 * normal(generator, 20, 2))
        assert float(z.abs().max()) <= 1


def test_a_low_forget_bias_makes_slow_units() -> None:
    torch.manual_seed(0)
    slow, fast = (MGU2(6, 2, forget_bias=b).double() for b in (-6.0, 6.0))
    z, u = 0.1 * torch.ones(1, 6, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)
    moved = [(d.step(d.weights(), z, u) - z).abs().max().item() for d in (slow, fast)]
    assert moved[0] < 0.01 < moved[1]
