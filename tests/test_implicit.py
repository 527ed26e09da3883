"""The gradient through the optimum against finite differences of everything, solves included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gradients import KINDS, Setting, error, setting
from ilqr_vae.inference import ilqr, implicit
from ilqr_vae.model.dynamics import FAMILIES
from small import as_problem, rest

# central differences of fourth order: truncation and rounding both stay far below 1e-6
H = 2e-3
STENCIL = ((-2, 1 / 12), (-1, -2 / 3), (1, 2 / 3), (2, -1 / 12))


@torch.no_grad()
def finite_differences(s: Setting) -> dict[str, Tensor]:
    """dL/dtheta entry by entry, solving again each time."""
    found: dict[str, Tensor] = {}
    here = s.solved()  # the posterior's own parameters move no optimum
    for name, p in s.parameters().items():
        at = here if name.startswith("posterior") else None
        flat, grad = p.data.view(-1), torch.zeros(p.numel(), dtype=p.dtype)
        for i in range(p.numel()):
            kept = float(flat[i])
            for step, weight in STENCIL:
                flat[i] = kept + step * H
                grad[i] += weight / H * s.loss(at=at)
            flat[i] = kept
        found[name] = grad.view(p.shape)
    return found


@pytest.mark.parametrize(
    ("dynamics", "kinds"),
    [("mgu2", "poisson"), ("linear", "poisson"), ("mgu2", "joint"), ("linear", "gaussian")],
)
def test_exact_gradient_is_finite_differences_for_every_parameter(
    dynamics: str, kinds: str
) -> None:
    s = setting(dynamics, kinds, n=2, m=1)
    exact, truth = s.gradient(exact=True), finite_differences(s)
    assert exact.keys() == truth.keys()
    # the scale of the whole gradient's rounding, for entries that vanish
    floor = 1e-9 * max(float(g.abs().max()) for g in truth.values())
    for name, g in truth.items():
        error = float((exact[name] - g).norm())
        assert error < 1e-6 * float(g.norm()) + floor, f"{name}: {error} of {float(g.norm())}"


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_exact_gradient_along_random_directions(family: str) -> None:
    s = setting(family, "joint")
    exact, named = s.gradient(exact=True), s.parameters()
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        along = {
            k: torch.randn(p.shape, generator=generator, dtype=p.dtype) for k, p in named.items()
        }
        slope = 0.0
        with torch.no_grad():
            kept = {k: p.clone() for k, p in named.items()}
            for step, weight in STENCIL:
                for k, p in named.items():
                    p.copy_(kept[k] + step * H / 4 * along[k])
                slope += float(weight / (H / 4) * s.loss())
            for k, p in named.items():
                p.copy_(kept[k])
        ours = sum(float((exact[k] * along[k]).sum()) for k in named)
        assert ours == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize(
    # docs/method.md states their distributions over many models (tests/gradients.py)
    ("dynamics", "student", "stated"),
    [
        ("rnn", False, 1.6),
        ("mgu", False, 0.4),
        ("mgu2", False, 0.25),
        ("mlp", False, 0.05),
        ("linear", True, 0.6),
    ],
)
def test_gauss_newtons_error_is_no_more_than_stated(
    dynamics: str, student: bool, stated: float
) -> None:
    for seed in (0, 1):
        for kinds in KINDS:
            found, _ = error(setting(dynamics, kinds, seed=seed, student=student))
            # and is not the exact one by another name
            assert 1e-7 < found < stated, (seed, kinds)


def test_for_linear_dynamics_gauss_newton_is_exact() -> None:
    s = setting("linear", "poisson")
    exact, rough = s.gradient(exact=True), s.gradient(exact=False)
    for name, g in exact.items():
        torch.testing.assert_close(rough[name], g, rtol=1e-10, atol=1e-12, msg=name)


def test_the_optimum_itself_is_passed_through() -> None:
    s = setting("mgu2", "poisson")
    problem, state = s.solved()
    z0, u = implicit.attach_gradient(problem, state)
    torch.testing.assert_close(z0, state.z[:, 0], rtol=0, atol=0)
    torch.testing.assert_close(u, state.u, rtol=0, atol=0)
    assert z0.requires_grad
    assert u.requires_grad


def test_frozen_parameters_get_none() -> None:
    s = setting("mgu2", "poisson")
    s.model.initial.requires_grad_(False)
    assert not any(name.startswith("initial") for name in s.parameters())
    s.loss().backward()
    assert all(p.grad is None for p in s.model.initial.parameters())
    assert all(p.grad is not None for p in s.parameters().values())


def test_a_trial_whose_hessian_is_indefinite_falls_back_and_spreads_nothing() -> None:
    """Far from an optimum the exact Hessian need not be positive definite: still finite."""
    s = setting("mgu2", "poisson")
    problem = as_problem(s.model, s.observed)
    generator = torch.Generator().manual_seed(0)
    z0, u = rest(problem)
    z0 = z0 + torch.tensor([[0.0], [4.0]]) * torch.randn(z0.shape, generator=generator).double()
    u = u + torch.tensor([0.0, 6.0]).view(2, 1, 1) * torch.randn(u.shape, generator=generator)
    with torch.no_grad():
        state = ilqr.init(problem, z0, u)
    z0_, u_ = implicit.attach_gradient(problem, state, exact=True)
    (z0_.sum() + u_.sum()).backward()
    grads = [p.grad for p in s.model.parameters() if p.grad is not None]
    assert grads
    assert all(bool(g.isfinite().all()) for g in grads)


def test_what_the_gradient_keeps_does_not_depend_on_the_iterations() -> None:
    s = setting("mgu2", "poisson")

    def kept(iterations: int) -> int:
        """Bytes that autograd keeps for the backward pass, solve included."""
        total = 0

        def pack(x: Tensor) -> Tensor:
            nonlocal total
            total += x.numel() * x.element_size()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            problem = as_problem(s.model, s.observed, s.names)
            config = ilqr.SolverConfig(iterations=iterations, tolerance=0.0)
            state, _ = ilqr.solve(problem, *rest(problem), config)
            s.loss(at=(problem, state))
        return total

    assert kept(1) == kept(12) > 0
