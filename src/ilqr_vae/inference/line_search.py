"""The line search of an iLQR iteration in torch: the step size along the LQR solution.

With (dz_0, K, k) the LQR solution around the trajectory (z, u) of cost J, a step of size alpha
rolls out from z_0 + alpha dz_0 under u + alpha k + K (z' - z). Both searches take, per problem, the
first alpha of 1, 1/2, 1/4, ... with

    J(alpha) <= J - armijo alpha (2 - alpha) decrease

where ``decrease`` is the prediction of the quadratic model for alpha = 1. ``backtrack`` reads the
costs and stops early; ``all_at_once`` tries every alpha in one batch without synchronisation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

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


class Step(NamedTuple):
    """The trajectory z, u after the search, its cost, and alpha (zero if none was accepted)."""

    z: Tensor
    u: Tensor
    cost: Tensor
    alpha: Tensor


class Search(NamedTuple):
    """A line search from ``state`` along ``lqr``, for the problems that are ``seeking``."""

    problem: Problem
    state: State
    lqr: LQRSolution
    seeking: Bool[Tensor, " B"]
    config: SolverConfig

    def highest(self, alpha: Tensor) -> Tensor:
        """Return the largest J that is accepted for a step of size alpha."""
        cost = self.state.cost
        # slack for the rounding error of J
        slack = 10 * torch.finfo(cost.dtype).eps * cost.abs()
        promised = alpha * (2 - alpha) * self.lqr.decrease
        return cost - self.config.armijo * promised + slack

    def backtrack(self) -> Step:
        """Halve alpha until J decreases enough."""
        problem, state, lqr, seeking, config = self
        alpha = seeking.to(state.cost.dtype)
        found = Step(state.z, state.u, state.cost, torch.zeros_like(alpha))
        for _ in range(config.backtracks + 1):
            z0 = state.z[:, 0] + alpha.unsqueeze(-1) * lqr.dz0
            law = (state.z, state.u, lqr.K, lqr.k, alpha)
            z, u = closed_loop(problem.model.dynamics, problem.w, z0, *law)
            tried = Step(z, u, problem.cost(z, u), alpha)
            accept = seeking & (tried.cost <= self.highest(alpha))
            found = Step(*(where(accept, new, old) for new, old in zip(tried, found, strict=True)))
            seeking = seeking & ~accept
            if not bool(seeking.any()):
                break
            alpha = torch.where(seeking, 0.5 * alpha, torch.zeros_like(alpha))
        return found

    def all_at_once(self) -> Step:
        """Try every alpha in one batch."""
        problem, state, lqr, seeking, config = self
        B, sizes = state.z.shape[0], config.backtracks + 1

        def each(x: Tensor) -> Tensor:
            return x.repeat(sizes, *[1] * (x.ndim - 1))

        steps = 0.5 ** torch.arange(sizes, dtype=state.cost.dtype, device=state.cost.device)
        alpha = steps.repeat_interleave(B)
        z0 = each(state.z[:, 0]) + alpha.unsqueeze(-1) * each(lqr.dz0)
        law = (state.z, state.u, lqr.K, lqr.k, alpha)
        trials = closed_loop(problem.model.dynamics, problem.w, z0, *law)
        initial = InitialCost(each(problem.initial.mean), each(problem.initial.precision))
        observed = {k: Observed(each(o.values), each(o.mask)) for k, o in problem.observed.items()}
        cost = problem.model.cost(*trials, observed, initial).view(sizes, B)
        accept = seeking & (cost <= self.highest(steps.unsqueeze(-1)))
        first = accept.to(torch.int64).argmax(0)
        row = torch.arange(B, device=first.device)
        some = accept.any(0)
        z, u = (x.view(sizes, B, *x.shape[1:])[first, row] for x in trials)
        return Step(
            where(some, z, state.z),
            where(some, u, state.u),
            torch.where(some, cost[first, row], state.cost),
            torch.where(some, steps[first], torch.zeros_like(state.cost)),
        )
