"""Rollouts: compiled against the plain loop, their gradient against autograd through the loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ilqr_vae.model.dynamics import FAMILIES
from ilqr_vae.model.rollout import adjoint, closed_loop, closed_loop_reference, rollout
from small import loop_rollout, make_model

EVERY = sorted(FAMILIES)
DTYPES = [(torch.float64, 1e-12), (torch.float32, 2e-5)]


def normal(seed: int, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def policy(B: int, T: int, n: int, m: int, dtype: torch.dtype) -> list[Tensor]:
    """z0, z_ref, u_ref, K, k, alpha."""
    shapes = [(B, n), (B, T + 1, n), (B, T, m), (B, T, m, n), (B, T, m), (B,)]
    z0, z_ref, u_ref, K, k, alpha = normal(1, *shapes, dtype=dtype)
    return [z0, z_ref, u_ref, 0.1 * K, k, alpha.sigmoid()]


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES, ids=["float64", "float32"])
@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize(
    ("B", "T", "n", "m"), [(1, 1, 1, 1), (1, 9, 5, 3), (4, 7, 3, 6), (40, 30, 20, 8)]
)
def test_closed_loop_is_the_reference(
    family: str, B: int, T: int, n: int, m: int, dtype: torch.dtype, tolerance: float
) -> None:
    model = make_model(family, n=n, m=m).to(dtype)
    w = tuple(x.detach() for x in model.dynamics.weights())
    given = policy(B, T, n, m, dtype)
    z, u = closed_loop(model.dynamics, w, *given)
    z_, u_ = closed_loop_reference(model.dynamics, w, *given)
    assert z.dtype == u.dtype == dtype
    scale = 1 + float(z_.abs().max()) + float(u_.abs().max())
    torch.testing.assert_close(z, z_, rtol=0, atol=tolerance * scale)
    torch.testing.assert_close(u, u_, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("family", EVERY)
def test_tensors_that_are_not_contiguous(family: str) -> None:
    model = make_model(family, n=4, m=3)
    w = tuple(x.detach() for x in model.dynamics.weights())
    given = policy(5, 6, 4, 3, torch.float64)
    strided = [x.flip(0).contiguous().flip(0) for x in given[:-1]]
    strided = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in strided]
    assert not any(x.is_contiguous() for x in strided)
    z, _ = closed_loop(model.dynamics, w, *given)
    z_, _ = closed_loop(model.dynamics, w, *strided, given[-1])
    torch.testing.assert_close(z, z_, rtol=0, atol=1e-13)


@pytest.mark.parametrize("family", EVERY)
def test_a_batch_is_a_loop(family: str) -> None:
    model = make_model(family)
    w = tuple(x.detach() for x in model.dynamics.weights())
    z0, u = normal(2, (7, 4), (7, 12, 2))
    together = rollout(model.dynamics, w, z0, u)
    for b in range(7):
        alone = rollout(model.dynamics, w, z0[b : b + 1], u[b : b + 1])
        torch.testing.assert_close(together[b : b + 1], alone, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES, ids=["float64", "float32"])
@pytest.mark.parametrize("family", EVERY)
def test_the_gradient_is_autograds_through_the_loop(
    family: str, dtype: torch.dtype, tolerance: float
) -> None:
    model = make_model(family).to(dtype)
    parameters = [p for p in model.dynamics.parameters() if p.requires_grad]
    z0, u, weight = normal(3, (3, 4), (3, 8, 2), (3, 9, 4), dtype=dtype)
    z0.requires_grad_(True)
    u.requires_grad_(True)
    w = model.dynamics.weights()
    ours = (weight * rollout(model.dynamics, w, z0, u)).sum()
    theirs = (weight * loop_rollout(model, w, z0, u)).sum()
    leaves = (z0, u, *parameters)
    for a, b in zip(
        torch.autograd.grad(ours, leaves, retain_graph=True),
        torch.autograd.grad(theirs, leaves),
        strict=True,
    ):
        scale = 1 + float(b.abs().max())
        torch.testing.assert_close(a, b, rtol=0, atol=10 * tolerance * scale)


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    model = make_model("mgu2").requires_grad_(False)
    z0, u = normal(4, (2, 4), (2, 5, 2))
    u.requires_grad_(True)
    rollout(model.dynamics, model.dynamics.weights(), z0, u).sum().backward()
    assert u.grad is not None
    assert z0.grad is None
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES, ids=["float64", "float32"])
def test_the_adjoint_recursion(dtype: torch.dtype, tolerance: float) -> None:
    A, gz = normal(5, (3, 6, 4, 4), (3, 7, 4), dtype=dtype)
    A = 0.4 * A
    lam = adjoint(A, gz)
    torch.testing.assert_close(lam[:, -1], gz[:, -1], rtol=0, atol=0)
    for k in range(6):
        back = gz[:, k] + (A[:, k].mT @ lam[:, k + 1].unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(lam[:, k], back, rtol=0, atol=10 * tolerance)
    strided = adjoint(A.transpose(0, 1).contiguous().transpose(0, 1), gz)
    torch.testing.assert_close(strided, lam, rtol=0, atol=0)
