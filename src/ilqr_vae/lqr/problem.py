"""LQR problems and their solutions.

A batch of B independent problems, each over T steps with state dz in R^n and input du in R^m::

    minimise   sum_{k=0}^{T-1} [ 1/2 dz_k' Q_k dz_k + q_k' dz_k
                               + 1/2 du_k' R_k du_k + r_k' du_k + du_k' S_k dz_k ]
               + 1/2 dz_T' Q_T dz_T + q_T' dz_T                                        (= J)
    over du_0 .. du_{T-1}, and dz_0 if the initial state is free subject to dz_{k+1} = A_k dz_k +
    B_k du_k + c_k

A free dz_0 has its prior (or arrival) cost inside Q_0 and q_0; a fixed one is dz_0 = 0.

The Levenberg damping lambda adds 1/2 lambda |du_k|^2 for every k to what is minimised, and
1/2 lambda |dz_0|^2 where dz_0 is free. It shapes the step (all of ``dz, du, K, k, V, v, costate,
Quu_inv`` belong to the damped problem), but ``linear`` and ``decrease`` are measured on J itself.

Letters for dimensions, and the tensor aliases built from them.

The same letter means the same thing in every module, docstring and signature:

========  ==========================================================================
``B``     problems, trials or streams solved together
``T``     time steps; a trajectory has T inputs and T + 1 states
``n``     latent state
``m``     input
``N``     units (neurons)
``D``     kinematic channels
``S``     streams of a moving-horizon estimator (its batch)
``H``     bins in the window of a moving-horizon estimator
========  ==========================================================================

The aliases are jaxtyping's. They cost nothing at run time; a test run under jaxtyping's import hook
checks them. Functions compiled by numba are never annotated with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ilqr_vae.errors import ShapeError

#: One number per problem.
PerProblem: TypeAlias = Float[Tensor, " B"]
#: One boolean per problem.
FlagPerProblem: TypeAlias = Bool[Tensor, " B"]
#: One state per problem.
State: TypeAlias = Float[Tensor, "B n"]
#: A state, or a gradient with respect to it, at each of the T + 1 times.
States: TypeAlias = Float[Tensor, "B T+1 n"]
#: A state-sized vector for each of the T transitions.
Transitions: TypeAlias = Float[Tensor, "B T n"]
#: An input, or a gradient with respect to it, at each of the T steps.
Inputs: TypeAlias = Float[Tensor, "B T m"]
#: A symmetric n x n matrix (curvature, covariance) at each of the T + 1 times.
StateMatrices: TypeAlias = Float[Tensor, "B T+1 n n"]
#: A covariance of each of T1 = T + 1 states.
Covariances: TypeAlias = Float[Tensor, "B T1 n n"]
#: d z_{k+1} / d z_k.
StateJacobians: TypeAlias = Float[Tensor, "B T n n"]
#: d z_{k+1} / d u_k.
InputJacobians: TypeAlias = Float[Tensor, "B T n m"]
#: A symmetric m x m matrix (curvature, inverse curvature) at each of the T steps.
InputMatrices: TypeAlias = Float[Tensor, "B T m m"]
#: An m x n matrix at each of the T steps: feedback gains, or the cost's input-state cross term.
InputByState: TypeAlias = Float[Tensor, "B T m n"]


@dataclass(frozen=True, slots=True)
class LQRProblem:
    """A batch of time-varying LQR problems (defined in the module's docstring).

    Q and R must be symmetric. They need not be positive definite individually: the problem is well
    posed if every Quu (and V_0) of the recursion is.

    Attributes:
        A: (B, T, n, n), d z_{k+1} / d z_k.
        B: (B, T, n, m), d z_{k+1} / d u_k.
        Q: (B, T+1, n, n), curvature in the state; Q[:, 0] includes the prior of a free dz_0.
        q: (B, T+1, n), slope in the state.
        R: (B, T, m, m), curvature in the input.
        r: (B, T, m), slope in the input.
        c: (B, T, n), offsets (defects) of the dynamics; None means zero.
        S: (B, T, m, n), cross curvature, du' S dz; None means zero.
    """

    A: StateJacobians
    B: InputJacobians
    Q: StateMatrices
    q: States
    R: InputMatrices
    r: Inputs
    c: Transitions | None = None
    S: InputByState | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are not None, by name."""
        named = {
            "A": self.A,
            "B": self.B,
            "Q": self.Q,
            "q": self.q,
            "R": self.R,
            "r": self.r,
            "c": self.c,
            "S": self.S,
        }
        return {name: value for name, value in named.items() if value is not None}

    def sizes(self) -> tuple[int, int, int, int]:
        """(batch, T, n, m), after checking that every tensor agrees with them.

        Raises:
            ShapeError: a tensor has another shape, dtype or device than the rest.
        """
        A, B = self.A, self.B
        if B.dim() != 4:
            raise ShapeError("B", expected="4 dimensions (B, T, n, m)", got=f"{B.dim()}")
        batch, steps, n, m = B.shape
        dtype, device = A.dtype, A.device
        for name, value, expected in (
            ("A", A, (batch, steps, n, n)),
            ("B", B, (batch, steps, n, m)),
            ("Q", self.Q, (batch, steps + 1, n, n)),
            ("q", self.q, (batch, steps + 1, n)),
            ("R", self.R, (batch, steps, m, m)),
            ("r", self.r, (batch, steps, m)),
            ("c", self.c, (batch, steps, n)),
            ("S", self.S, (batch, steps, m, n)),
        ):
            if value is None:
                continue
            if value.shape != expected:
                raise ShapeError(name, expected=str(expected), got=str(tuple(value.shape)))
            if value.dtype != dtype or value.device != device:
                raise ShapeError(
                    name,
                    expected=f"{dtype} on {device}",
                    got=f"{value.dtype} on {value.device}",
                )
        if n < 1 or m < 1 or steps < 1:
            raise ShapeError("T, n, m", expected="1 or more each", got=f"{steps}, {n}, {m}")
        return batch, steps, n, m


@dataclass(frozen=True, slots=True)
class LQRSolution:
    """The optimum of each problem, and the results of the recursion.

    The optimal input is du_k = k_k + K_k dz_k; the cost to go from dz at time k, with optimal
    inputs, is 1/2 dz' V_k dz + v_k' dz + constant. If ``ok`` is False, all other numbers of that
    problem are exactly zero.

    Attributes:
        dz: (B, T+1, n), optimal states.
        du: (B, T, m), optimal inputs.
        K: (B, T, m, n), feedback gains.
        k: (B, T, m), feed-forward inputs.
        dz0: (B, n), optimal initial state (zero where it is fixed); equals dz[:, 0].
        V: (B, T+1, n, n), Hessian of the cost to go. V[:, 0] includes the damping where dz_0 is
            free, so that its inverse is the covariance of dz_0 under the damped problem.
        v: (B, T+1, n), gradient of the cost to go at dz = 0.
        costate: (B, T+1, n), V_k dz_k + v_k: the gradient of the cost to go along the solution, and
            the multiplier of the k-th transition, d J / d c_{k-1} = costate_k. They obey
            costate_k = Q_k dz_k + q_k + S_k' du_k + A_k' costate_{k+1} and
            R_k du_k + r_k + S_k dz_k + B_k' costate_{k+1} + lambda du_k = 0.
            costate_0 is zero (to rounding) where dz_0 is free.
        Quu_inv: (B, T, m, m), inverse of R + B' V B + lambda I: the conditional covariance of du_k
            given dz_k.
        decrease: (B,), J(0, 0) - J(dz, du) = -J(dz, du), without damping. Not negative where there
            are no offsets c, whatever the damping.
        linear: (B,), sum_k q_k' dz_k + sum_k r_k' du_k. Without offsets a fraction a of the step
            changes J by a linear - a^2 (linear + decrease).
        ok: (B,) bool, whether every Quu (and V_0 where dz_0 is free) was positive definite to
            working precision and every number finite.
    """

    dz: States
    du: Inputs
    K: InputByState
    k: Inputs
    dz0: State
    V: StateMatrices
    v: States
    costate: States
    Quu_inv: InputMatrices
    decrease: PerProblem
    linear: PerProblem
    ok: FlagPerProblem


def damping_per_problem(regularisation: Tensor | float, like: Tensor, batch: int) -> PerProblem:
    """Return the damping as one number per problem, (B,), with the dtype and device of ``like``.

    Raises:
        ShapeError: the tensor is neither a scalar nor (B,).
    """
    if not isinstance(regularisation, Tensor):
        return torch.full((batch,), float(regularisation), dtype=like.dtype, device=like.device)
    if regularisation.shape not in ((), (batch,)):
        raise ShapeError(
            "regularisation", expected=f"({batch},)", got=str(tuple(regularisation.shape))
        )
    return regularisation.to(dtype=like.dtype, device=like.device).expand(batch)
