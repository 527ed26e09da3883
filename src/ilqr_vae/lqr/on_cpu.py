"""The LQR problem solved by compiled code on the CPU: torch tensors in, torch tensors out.

Contiguous tensors are read where they are, without a copy. A batch is shared out among threads
(``kernels.cpu.threads``) where there is enough work to pay for waking them; the compiled code holds
no GIL. A problem's bits do not depend on its neighbours, on the batch size, or on the number of
threads.

Where numba cannot be imported the reference solves instead, after one warning in the log.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from ilqr_vae.errors import ShapeError
from ilqr_vae.kernels.cpu import threads
from ilqr_vae.lqr.problem import (
    InputByState,
    InputJacobians,
    InputMatrices,
    LQRProblem,
    LQRSolution,
    StateJacobians,
    StateMatrices,
    StateMatrix,
    check_covariance,
    damping_per_problem,
)
from ilqr_vae.lqr.reference import marginal_covariance_reference, solve_reference

_log = logging.getLogger(__name__)


def solve_cpu(
    problem: LQRProblem, *, free_initial: bool, regularisation: Tensor | float = 0.0
) -> LQRSolution:
    """Solve a batch of LQR problems; the same contract as `solve_reference`, without gradients.

    Args:
        problem: the batch, float32 or float64 on the CPU.
        free_initial: whether dz_0 is optimised (else it is zero).
        regularisation: Levenberg damping, (B,) or a number.

    Returns:
        The solution, detached; problems that are not well posed have ``ok`` False and zeros.

    Raises:
        ShapeError: tensors that do not fit each other, on another device or of another dtype.
    """
    lqr = _kernels()
    if lqr is None:
        return solve_reference(problem, free_initial=free_initial, regularisation=regularisation)
    batch, steps, n, m = problem.sizes()
    A = problem.A
    _check_supported(A)
    given = _arrays((A, problem.B, problem.Q, problem.q, problem.R, problem.r))
    dtype = given[0].dtype
    if isinstance(regularisation, Tensor):
        damping = _array(damping_per_problem(regularisation, A, batch))
    else:
        damping = np.full(batch, regularisation, dtype)
    c = _nothing(dtype, 3) if problem.c is None else _array(problem.c)
    S = _nothing(dtype, 4) if problem.S is None else _array(problem.S)
    states, inputs = (batch, steps + 1, n), (batch, steps, m)
    # one by one: numpy makes small arrays in a fraction of the time that torch takes
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
    )
    _run(lqr, lqr.solve, (batch, steps * n * (n + m) ** 2), (n, m), arguments, dtype)
    tensor = torch.from_numpy
    return LQRSolution(
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
    """What stands for offsets or cross curvature that are not there."""
    return np.empty((1,) + (0,) * (dimensions - 1), dtype)


def marginal_covariance_cpu(
    A: StateJacobians,
    B: InputJacobians,
    K: InputByState,
    Quu_inv: InputMatrices,
    V0: StateMatrix,
) -> StateMatrices:
    """Covariance of each state; the contract of `marginal_covariance_reference`, no gradients.

    Raises:
        ShapeError: tensors that do not fit each other, on another device or of another dtype.
    """
    lqr = _kernels()
    if lqr is None:
        return marginal_covariance_reference(A, B, K, Quu_inv, V0)
    _check_supported(A)
    batch, steps, n, m = B.shape
    check_covariance(A, B, K, Quu_inv, V0)
    Sigma = A.new_empty(batch, steps + 1, n, n)
    ok = torch.empty(batch, dtype=torch.bool)
    arguments = (*_arrays((A, B, K, Quu_inv, V0)), Sigma.numpy(), ok.numpy())
    work = steps * n * n * (2 * n + 3 * m)
    _run(lqr, lqr.covariance, (batch, work), (n, m), arguments, arguments[0].dtype)
    if not bool(ok.all()):
        Sigma[~ok] = 0.0
    return Sigma


@cache
def _kernels() -> ModuleType | None:
    """The compiled functions, or None (said once in the log) where there is no compiler."""
    try:
        from ilqr_vae.kernels.cpu import lqr
    except ImportError as error:
        _log.warning("numba cannot be imported (%s): LQR problems are solved in torch", error)
        return None
    return lqr


def _check_supported(tensor: Tensor) -> None:
    if tensor.device.type != "cpu" or tensor.dtype not in (torch.float32, torch.float64):
        raise ShapeError(
            "A", expected="float32 or float64 on cpu", got=f"{tensor.dtype} on {tensor.device}"
        )


def _array(tensor: Tensor) -> NDArray[np.floating]:
    if tensor.requires_grad:
        tensor = tensor.detach()
    return tensor.contiguous().numpy()


def _arrays(tensors: tuple[Tensor, ...]) -> tuple[NDArray[np.floating], ...]:
    return tuple(_array(tensor) for tensor in tensors)


def _run(
    kernels: ModuleType,
    kernel: Callable[..., None],
    load: tuple[int, int],
    sizes: tuple[int, int],
    arguments: tuple[object, ...],
    dtype: DTypeLike,
) -> None:
    """Share a batch out; load is (problems, work of each), sizes (n, m)."""
    need = kernels.scratch_size(*sizes)
    threads.share_out(kernel, *load, arguments, dtype=dtype, scratch_size=need)
