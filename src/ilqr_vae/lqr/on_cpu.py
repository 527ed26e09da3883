"""The LQR problem solved by compiled code on the CPU: torch tensors in, torch tensors out.

Contiguous tensors are read in place. A batch is divided among threads (``kernels.cpu.threads``) if
there is enough work to justify waking them; the compiled code releases the GIL. The result of a
problem is bit-identical in any batch and with any number of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ilqr_vae.errors import ShapeError
from ilqr_vae.kernels.cpu import lqr, threads
from ilqr_vae.lqr.problem import (
    Covariances,
    LQRProblem,
    LQRSolution,
    damping_per_problem,
)


def solve_cpu(
    problem: LQRProblem, *, free_initial: bool, regularisation: Tensor | float = 0.0
) -> LQRSolution:
    """`solve_reference` without gradients, for float32 or float64 on the CPU.

    Raises:
        ShapeError: tensors that do not fit each other, on another device or of another dtype.
    """
    solve, solution = prepared(problem, free_initial=free_initial, regularisation=regularisation)
    solve()
    return solution


def prepared(
    problem: LQRProblem, *, free_initial: bool, regularisation: Tensor | float = 0.0
) -> tuple[Callable[[], None], LQRSolution]:
    """Return a function that solves the problem with its current values, and its solution.

    Raises:
        ShapeError: see ``solve_cpu``.
    """
    batch, steps, n, m = problem.sizes()
    A = problem.A
    _check_supported(A)
    about = (A, problem.B, problem.Q, problem.q, problem.R, problem.r)
    given = tuple(array(tensor) for tensor in about)
    dtype = given[0].dtype
    if isinstance(regularisation, Tensor):
        damping = array(damping_per_problem(regularisation, A, batch))
    else:
        damping = np.full(batch, regularisation, dtype)
    c = _nothing(dtype, 3) if problem.c is None else array(problem.c)
    S = _nothing(dtype, 4) if problem.S is None else array(problem.S)
    states, inputs = (batch, steps + 1, n), (batch, steps, m)
    # numpy allocates small arrays in a fraction of the time that torch takes
    (V,) = threads.arrays(dtype, (*states, n))
    K, Quu_inv = np.empty((*inputs, n), dtype), np.empty((*inputs, m), dtype)
    dz, v, costate = np.empty(states, dtype), np.empty(states, dtype), np.empty(states, dtype)
    du, k, model = np.empty(inputs, dtype), np.empty(inputs, dtype), np.empty((batch, 2), dtype)
    ok = np.empty(batch, np.bool_)
    arguments = (
        (*given, c, S),
        problem.c is not None,
        problem.S is not None,
        damping,
        free_initial,
        (K, k, Quu_inv),
        (V, v),
        (dz, du, costate, model),
        ok,
        np.arange(batch),
    )
    work, need = steps * n * (n + m) ** 2, lqr.scratch_size(n, m)
    tensor = torch.from_numpy

    group = lqr.group(n, dtype.itemsize)

    def solve() -> None:
        threads.share_out(
            lqr.solve, batch, work, arguments, dtype=dtype, scratch_size=need, group=group
        )

    return solve, LQRSolution(
        dz=tensor(dz),
        du=tensor(du),
        K=tensor(K),
        k=tensor(k),
        dz0=tensor(dz[:, 0]),
        V=tensor(V),
        v=tensor(v),
        costate=tensor(costate),
        Quu_inv=tensor(Quu_inv),
        decrease=tensor(model[:, 0]),
        linear=tensor(model[:, 1]),
        ok=tensor(ok),
    )


@cache
def _nothing(dtype: np.dtype[Any], dimensions: int) -> NDArray[Any]:
    """Return a placeholder for missing offsets or cross curvature."""
    return np.empty((1,) + (0,) * (dimensions - 1), dtype)


def marginal_covariance_cpu(problem: LQRProblem, solution: LQRSolution) -> Covariances:
    """Covariance of each state; the contract of `marginal_covariance_reference`, no gradients.

    Raises:
        ShapeError: tensors that do not fit each other, on another device or of another dtype.
    """
    batch, steps, n, m = problem.sizes()
    _check_supported(problem.A)
    Sigma = problem.A.new_empty(batch, steps + 1, n, n)
    ok = np.empty(batch, np.bool_)
    about = (problem.A, problem.B, solution.K, solution.Quu_inv, solution.V[:, 0])
    arguments = (*(array(t) for t in about), Sigma.numpy(), ok)
    work = steps * n * n * (2 * n + 3 * m)
    need, dtype = lqr.scratch_size(n, m), arguments[0].dtype
    threads.share_out(lqr.covariance, batch, work, arguments, dtype=dtype, scratch_size=need)
    if not ok.all():
        Sigma[torch.from_numpy(~ok)] = 0.0
    return Sigma


def _check_supported(tensor: Tensor) -> None:
    if tensor.device.type != "cpu" or tensor.dtype not in (torch.float32, torch.float64):
        raise ShapeError(
            "A", expected="float32 or float64 on cpu", got=f"{tensor.dtype} on {tensor.device}"
        )


def array(tensor: Tensor) -> NDArray[Any]:
    """Return the memory of a tensor, C-contiguous."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    return tensor.contiguous().numpy()
