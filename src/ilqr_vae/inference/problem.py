"""Arguments and results of an iLQR solve; ``inference.ilqr`` states the problem.

B problems of T steps; z (B, T+1, n) states, u (B, T, m) inputs, J (B,) the cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from ilqr_vae.inference.compiled import PackedProblem, pack
from ilqr_vae.inference.on_gpu import Iteration, iteration
from ilqr_vae.lqr import LQRProblem, LQRSolution
from ilqr_vae.model.dynamics import Weights
from ilqr_vae.model.generative import Model
from ilqr_vae.model.likelihoods import Observations
from ilqr_vae.model.priors import InitialCost


class Status(IntEnum):
    """Why a solve ended; ``explain`` is a sentence."""

    RUNNING = 0
    CONVERGED = 1
    ITERATION_LIMIT = 2
    STALLED = 3
    NOT_FINITE = 4
    STOPPED = 5

    @property
    def explain(self) -> str:
        return {
            Status.RUNNING: "the solve has not ended",
            Status.CONVERGED: "the expected decrease fell below the tolerance",
            Status.ITERATION_LIMIT: "the maximum number of iterations was reached first",
            Status.STALLED: "no step lowered the cost, at any regularisation",
            Status.NOT_FINITE: "the cost or its model is not finite: NaN in the data, or dynamics "
            "that explode",
            Status.STOPPED: "the caller's deadline ended the solve early",
        }[self]


@dataclass(frozen=True)
class SolverConfig:
    """Settings of the solver.

    Attributes:
        iterations: largest number of iterations.
        tolerance: stop when the expected decrease is below tolerance * (1 + |J|).
        armijo: fraction of the expected decrease that a step must achieve.
        backtracks: halvings of alpha before a line search fails.
        regularisation_min, regularisation_max: first and last Levenberg term to try after failures.
        exact: use the Hessian with the curvature of the dynamics where it is positive definite
            (Newton: fewer but costlier iterations, which converge where Gauss-Newton is slow), else
            Gauss-Newton.
    """

    iterations: int = 20
    tolerance: float = 1e-6
    armijo: float = 1e-4
    backtracks: int = 8
    regularisation_min: float = 1e-3
    regularisation_max: float = 1e8
    exact: bool = False


@dataclass(frozen=True)
class State:
    """State of a batch of solves.

    Attributes:
        z, u: current trajectory.
        cost: J of the trajectory.
        regularisation: Levenberg term of the next LQR solve.
        status: ``Status`` per problem.
        iterations: number of iterations so far.
    """

    z: Float[Tensor, "B T1 n"]
    u: Float[Tensor, "B T m"]
    cost: Float[Tensor, " B"]
    regularisation: Float[Tensor, " B"]
    status: Int[Tensor, " B"]
    iterations: Int[Tensor, " B"]


@dataclass(frozen=True)
class Info:
    """An iteration: LQR problem around the initial trajectory, its solution, and the step size.

    The step size is zero if no step was accepted.
    """

    problem: LQRProblem
    lqr: LQRSolution
    alpha: Float[Tensor, " B"]


@dataclass(frozen=True)
class Problem:
    """A problem to solve: model, its effective weights, data, initial cost.

    None of them may change while it is used: kernels read copies.
    """

    model: Model
    w: Weights
    observed: Observations
    initial: InitialCost

    def cost(self, z: Tensor, u: Tensor) -> Tensor:
        return self.model.cost(z, u, self.observed, self.initial)

    def on_gpu(self) -> Iteration | None:
        """GPU kernels for this problem, or None; they record no gradients."""
        if torch.is_grad_enabled() and any(t.requires_grad for t in self.w):
            return None
        return self._on_gpu

    @cached_property
    def packed(self) -> PackedProblem:
        """The problem for the compiled solve, where that is ``compiled.usable``."""
        return pack(self.model, self.w, self.observed, self.initial)

    @cached_property
    def _on_gpu(self) -> Iteration | None:
        """The packed problem, which all iterations of a solve share."""
        return iteration(self.model, self.w, tuple(self.observed), self.initial.mean)


Stop = Callable[[], "bool | Sequence[bool] | NDArray[np.bool_] | Tensor"]


def where(mask: Bool[Tensor, " B"], new: Tensor, old: Tensor) -> Tensor:
    """Select ``new`` for the problems in ``mask``, ``old`` for the others."""
    return torch.where(mask.view(-1, *[1] * (new.ndim - 1)), new, old)
