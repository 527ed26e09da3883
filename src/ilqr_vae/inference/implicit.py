"""Gradient through the optimum: one more LQR solve instead of unrolled iterations.

At x* = (z_0*, u*) the gradient of J vanishes, g(x*, theta) = 0, so for a loss L(theta, x*(theta))

    dL/dtheta = partial L/partial theta  -  (dL/dx*)' H^-1  dg/dtheta,     H = d2J/dx2.

The product with H^-1 is the same LQR problem with the incoming gradient as its linear cost; let
(dz, du) be its solution and mu its costates. With lam the costates of J at x*, the Lagrangian of
"directional derivative of J along (dz, du)" gives the remaining product without any recursion:

    d/dtheta  sum_k [ dz_k . l_z + du_k . l_u + lam_{k+1} . (A_k dz_k + B_k du_k)
                      + mu_{k+1} . f(z_k, u_k; theta) ]            at fixed z*, u*, dz, du, lam, mu

one autograd product, batched over trials and time. Memory does not depend on the iterations.

``exact=True`` puts the dynamics' curvature (lam . f'') into H, and the curvature of prior and
likelihoods that the solver's model drops to stay positive definite: the exact derivative. Without
it, H is the Gauss-Newton Hessian (as in the authors' code): biased, close in practice, cheaper.
A trial whose exact H is not positive definite falls back to Gauss-Newton.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ilqr_vae.inference.ilqr import quadratise, where_solved
from ilqr_vae.inference.problem import Problem, State
from ilqr_vae.lqr import LQRSolution, solve_lqr
from ilqr_vae.model.rollout import adjoint


@dataclass(frozen=True)
class _Site:
    """The point at which the implicit gradient is computed."""

    problem: Problem
    state: State
    exact: bool


def _solve_adjoint(site: _Site, gz0: Tensor, gu: Tensor) -> tuple[LQRSolution, Tensor]:
    """Return the LQR solution for the incoming gradient, and the costates lam of J."""
    p, s = site.problem, site.state
    at_optimum = quadratise(p, s.z, s.u)
    lam = adjoint(at_optimum.A, at_optimum.q)
    q = torch.zeros_like(at_optimum.q)
    q[:, 0] = gz0
    gauss_newton = replace(at_optimum, q=q, r=gu)
    if not site.exact:
        return solve_lqr(gauss_newton, free_initial=True), lam
    full = p.model.exact_hessian(p.w, gauss_newton, s.z, s.u, lam, p.observed)
    exact = solve_lqr(full, free_initial=True)
    if bool(exact.ok.all()):
        return exact, lam
    return where_solved(exact, solve_lqr(gauss_newton, free_initial=True)), lam


def _stationarity_product(site: _Site, sol: LQRSolution, lam: Tensor) -> Tensor:
    """Return a scalar whose parameter gradient is the implicit term (see the module)."""
    p, s = site.problem, site.state
    model, before = p.model, s.z[:, :-1]
    w = model.dynamics.weights()
    z_next, tangent = model.dynamics.tangent(w, before, s.u, sol.dz[:, :-1], sol.du)
    total = (lam[:, 1:] * tangent).sum() + (sol.costate[:, 1:] * z_next).sum()
    total = total + (sol.du * model.prior.quadratise(s.u)[0]).sum()
    for name, o in p.observed.items():
        total = total + model.group(name).slope_along(s.z[:, 1:], o, sol.dz[:, 1:])
    initial = model.initial.cost(s.z.shape[0])
    return total + (sol.dz[:, 0] * initial.gradient(s.z[:, 0])).sum()


class _Optimum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, site: _Site, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        ctx.site = site
        ctx.parameters = parameters
        return site.state.z[:, 0].clone(), site.state.u.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (torch passes grads in order)
        ctx: Any, gz0: Tensor, gu: Tensor
    ) -> tuple[Tensor | None, ...]:
        site: _Site = ctx.site
        with torch.no_grad():
            sol, lam = _solve_adjoint(site, gz0, gu)
        with torch.enable_grad():
            total = _stationarity_product(site, sol, lam)
            grads = torch.autograd.grad(total, ctx.parameters, allow_unused=True)
        return None, *grads


def attach_gradient(
    problem: Problem, state: State, *, exact: bool = False
) -> tuple[Float[Tensor, "B n"], Float[Tensor, "B T m"]]:
    """Return the optimum (z_0*, u*) as tensors with the implicit gradient to the parameters.

    Args:
        problem: the solved problem; its initial cost must be the model's own prior, which is
            differentiated.
        state: the solved state (``ilqr.solve``).
        exact: whether to include the curvature of the dynamics; if false, Gauss-Newton.
    """
    parameters = [p for p in problem.model.parameters() if p.requires_grad]
    return _Optimum.apply(_Site(problem, state, exact), *parameters)  # pyright: ignore[reportReturnType]
