"""The LQR problem solved by Triton kernels: one launch for the whole recursion of a batch.

The contract of `solve_reference`, without gradients and without synchronisation. n is at most 128
in float32 and 64 in float64 (limited by shared memory), m at most 32. Larger problems, or all if
Triton cannot be imported, are solved by the reference, which is logged once.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ilqr_vae.errors import ShapeError
from ilqr_vae.kernels.gpu import launch
from ilqr_vae.lqr.problem import (
    Covariances,
    LQRProblem,
    LQRSolution,
    damping_per_problem,
)
from ilqr_vae.lqr.reference import marginal_covariance_reference, solve_reference

_WHAT = "LQR problems are solved"


def _fitting(n: int, m: int, dtype: torch.dtype) -> ModuleType | None:
    if dtype not in launch.LARGEST_N:
        raise ShapeError("A", expected="float32 or float64", got=str(dtype))
    if not launch.fits(n, m, dtype, _WHAT):
        return None
    return launch.kernels("ilqr_vae.kernels.gpu.lqr", _WHAT)


def solve_gpu(
    problem: LQRProblem, *, free_initial: bool, regularisation: Tensor | float = 0.0
) -> LQRSolution:
    """`solve_reference` without gradients, for float32 or float64 on the problem's device.

    Raises:
        ShapeError: tensors that do not fit each other, or of another dtype.
    """
    batch, T, n, m = problem.sizes()
    A = problem.A.detach()
    kernels = _fitting(n, m, A.dtype)
    if kernels is None:
        return solve_reference(problem, free_initial=free_initial, regularisation=regularisation)
    damping = damping_per_problem(regularisation, A, batch).detach().contiguous()
    given = [t.detach().contiguous() for t in problem.tensors().values()]
    named = dict(zip(problem.tensors(), given, strict=True))
    dz, v, costate = (A.new_empty(batch, T + 1, n) for _ in range(3))
    du, k = (A.new_empty(batch, T, m) for _ in range(2))
    K, V = A.new_empty(batch, T, m, n), A.new_empty(batch, T + 1, n, n)
    Quu_inv, model = A.new_empty(batch, T, m, m), A.new_empty(batch, 2)
    ok = torch.empty(batch, dtype=torch.int8, device=A.device)
    limits = torch.finfo(A.dtype)
    if batch:
        kernels.solve[(batch,)](
            named["A"], named["B"], named["Q"], named["q"], named["R"], named["r"],
            named.get("c", A), named.get("S", A), damping,
            K, k, Quu_inv, V, v, dz, du, costate, model, ok,
            T, n, m, limits.eps, limits.max,
            HAS_C="c" in named, HAS_S="S" in named, FREE=free_initial,
            NP=launch.block(n), MP=launch.block(m),
            HOW=launch.products(n, A.dtype), **launch.options(n, 64),
        )  # fmt: skip
    return LQRSolution(
        dz=dz, du=du, K=K, k=k, dz0=dz[:, 0], V=V, v=v, costate=costate, Quu_inv=Quu_inv,
        decrease=model[:, 0], linear=model[:, 1], ok=ok.bool(),
    )  # fmt: skip


def marginal_covariance_gpu(problem: LQRProblem, solution: LQRSolution) -> Covariances:
    """Covariance of each state; the contract of `marginal_covariance_reference`, no gradients.

    Raises:
        ShapeError: tensors that do not fit each other, or of another dtype.
    """
    batch, T, n, m = problem.sizes()
    A = problem.A
    kernels = _fitting(n, m, A.dtype)
    if kernels is None:
        return marginal_covariance_reference(problem, solution)
    about = (A, problem.B, solution.K, solution.Quu_inv, solution.V[:, 0])
    Sigma = A.new_empty(batch, T + 1, n, n)
    if batch:
        kernels.covariance[(batch,)](
            *(t.detach().contiguous() for t in about), Sigma,
            T, n, m, torch.finfo(A.dtype).eps, NP=launch.block(n), MP=launch.block(m),
            HOW=launch.products(n, A.dtype), **launch.options(n, 64),
        )  # fmt: skip
    return Sigma
