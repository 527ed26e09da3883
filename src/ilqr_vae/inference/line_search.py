"""The line search of an iLQR iteration, in torch: how far to go along the LQR solution.

Both searches take, per problem, the first of 1, 1/2, 1/4, ... that lowers J by a fraction of what
the quadratic model promised. One looks at its numbers and stops early; the other tries every step
size in one batch and never has to wait for the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import torch
from jaxtyping import Bool
from torch import Tensor

from ilqr_vae.inference.problem import where
from ilqr_vae.lqr import LQRSolution
from ilqr_vae.model.likelihoods import Observed
from ilqr_vae.model.priors import InitialCost
from ilqr_vae.model.rollout import closed_loop

if TYPE_CHECKING:
    from ilqr_vae.inference.problem import Problem, SolverConfig, State

Found: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]
"""z, u, cost, and the alpha taken (zero where none was)."""


def _target(state: State, lqr: LQRSolution, alpha: Tensor, config: SolverConfig) -> Tensor:
    """The largest J that a step of size alpha may lead to."""
    # the slack is what float rounding of J can hide
    slack = 10 * torch.finfo(state.cost.dtype).eps * state.cost.abs()
    promised = alpha * (2 - alpha) * lqr.decrease
    return state.cost - config.armijo * promised + slack


def backtrack(
    problem: Problem,
    state: State,
    lqr: LQRSolution,
    seeking: Bool[Tensor, " B"],
    config: SolverConfig,
) -> Found:
    """(z, u, cost, alpha taken): halve the step until J falls enough, for those that seek."""
    dynamics = problem.model.dynamics
    alpha = seeking.to(state.cost.dtype)
    taken = torch.zeros_like(alpha)
    z, u, cost = state.z, state.u, state.cost
    for _ in range(config.backtracks + 1):
        z0 = state.z[:, 0] + alpha.unsqueeze(-1) * lqr.dz0
        z_try, u_try = closed_loop(dynamics, problem.w, z0, state.z, state.u, lqr.K, lqr.k, alpha)
        cost_try = problem.cost(z_try, u_try)
        accept = seeking & (cost_try <= _target(state, lqr, alpha, config))
        z, u, cost = (
            where(accept, z_try, z),
            where(accept, u_try, u),
            where(accept, cost_try, cost),
        )
        taken = torch.where(accept, alpha, taken)
        seeking = seeking & ~accept
        if not bool(seeking.any()):
            break
        alpha = torch.where(seeking, 0.5 * alpha, torch.zeros_like(alpha))
    return z, u, cost, taken


def all_at_once(
    problem: Problem,
    state: State,
    lqr: LQRSolution,
    seeking: Bool[Tensor, " B"],
    config: SolverConfig,
) -> Found:
    """``backtrack`` without looking at its numbers: every step size in one batch."""
    B, sizes = state.z.shape[0], config.backtracks + 1

    def each(x: Tensor) -> Tensor:
        return x.repeat(sizes, *[1] * (x.ndim - 1))

    steps = 0.5 ** torch.arange(sizes, dtype=state.cost.dtype, device=state.cost.device)
    alpha = steps.repeat_interleave(B)
    z0 = each(state.z[:, 0]) + alpha.unsqueeze(-1) * each(lqr.dz0)
    trials = closed_loop(
        problem.model.dynamics, problem.w, z0, state.z, state.u, lqr.K, lqr.k, alpha
    )
    initial = InitialCost(each(problem.initial.mean), each(problem.initial.precision))
    observed = {k: Observed(each(o.values), each(o.mask)) for k, o in problem.observed.items()}
    cost = problem.model.cost(*trials, observed, initial).view(sizes, B)
    accept = seeking & (cost <= _target(state, lqr, steps.unsqueeze(-1), config))
    first = accept.to(torch.int64).argmax(0)
    row = torch.arange(B, device=first.device)
    some = accept.any(0)
    z, u = (x.view(sizes, B, *x.shape[1:])[first, row] for x in trials)
    return (
        where(some, z, state.z),
        where(some, u, state.u),
        torch.where(some, cost[first, row], state.cost),
        torch.where(some, steps[first], torch.zeros_like(state.cost)),
    )
