"""The LQR problem solved by compiled code on the CPU: torch tensors in, torch tensors out.

Contiguous tensors are read where they are, without a copy. A batch is shared out among threads
(``ilqr_vae.threads``) where there is enough work to pay for waking them; the compiled code holds no
GIL. A problem's bits do not depend on its neighbours, on the batch size, or on the number of
threads.

Where numba cannot be imported the reference solves instead, after one warning in the log.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from types import ModuleType

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from ilqr_vae import threads
from ilqr_vae.errors import ShapeError
from ilqr_vae.lqr.reference import marginal_covariance_reference, solve_reference
from ilqr_vae.lqr.types import LQRProblem, LQRSolution, check_covariance, damping_per_problem
from ilqr_vae.shapes import (
    InputByState,
    InputJacobians,
    InputMatrices,
    StateJacobians,
    StateMatrices,
    StateMatrix,
)

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
    kernels = _kernels()
    if kernels is None:
        return solve_reference(problem, free_initial=free_initial, regularisation=regularisation)
    batch, steps, n, m = problem.sizes()
    A = problem.A
    _check_supported(A)
    damping = damping_per_problem(regularisation, A, batch)
    given = _arrays((A, problem.B, problem.Q, problem.q, problem.R, problem.r))
    dtype = given[0].dtype
    c = np.empty((1, 0, 0), dtype) if problem.c is None else _array(problem.c)
    S = np.empty((1, 0, 0, 0), dtype) if problem.S is None else _array(problem.S)
    # Made by numpy: its small arrays cost a fraction of torch's, and there are many per call.
    dz, v, costate = (np.empty((batch, steps + 1, n), dtype) for _ in range(3))
    du, k = (np.empty((batch, steps, m), dtype) for _ in range(2))
    K = np.empty((batch, steps, m, n), dtype)
    V = np.empty((batch, steps + 1, n, n), dtype)
    Quu_inv = np.empty((batch, steps, m, m), dtype)
    model = np.empty((batch, 2), dtype)
    ok = np.empty(batch, np.bool_)
    law, cost, step = (K, k, Quu_inv), (V, v), (dz, du, costate, model)
    written = (*law, *cost, *step)
    arguments = (
        (*given, c, S),
        problem.c is not None,
        problem.S is not None,
        _array(damping),
        free_initial,
        law,
        cost,
        step,
        tuple(value.reshape(batch, value.size // max(batch, 1)) for value in written),
        ok,
    )
    _run(kernels, kernels.solve, (batch, steps * n * (n + m) ** 2), (n, m), arguments, dtype)
    if not ok.all():
        for value in written:
            value[~ok] = 0.0
    states = torch.from_numpy(dz)
    both = torch.from_numpy(model)
    return LQRSolution(
        dz=states,
        du=torch.from_numpy(du),
        K=torch.from_numpy(K),
        k=torch.from_numpy(k),
        dz0=states[:, 0],
        V=torch.from_numpy(V),
        v=torch.from_numpy(v),
        costate=torch.from_numpy(costate),
        Quu_inv=torch.from_numpy(Quu_inv),
        decrease=both[:, 0],
        linear=both[:, 1],
        ok=torch.from_numpy(ok),
    )


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
    kernels = _kernels()
    if kernels is None:
        return marginal_covariance_reference(A, B, K, Quu_inv, V0)
    _check_supported(A)
    batch, steps, n, m = B.shape
    check_covariance(A, B, K, Quu_inv, V0)
    Sigma = A.new_empty(batch, steps + 1, n, n)
    ok = torch.empty(batch, dtype=torch.bool)
    arguments = (*_arrays((A, B, K, Quu_inv, V0)), Sigma.numpy(), ok.numpy())
    work = steps * n * n * (2 * n + 3 * m)
    _run(kernels, kernels.covariance, (batch, work), (n, m), arguments, arguments[0].dtype)
    if not bool(ok.all()):
        Sigma[~ok] = 0.0
    return Sigma


@cache
def _kernels() -> ModuleType | None:
    """The compiled functions, or None (said once in the log) where there is no compiler."""
    try:
        from ilqr_vae.lqr import kernels
    except ImportError as error:
        _log.warning("numba cannot be imported (%s): LQR problems are solved in torch", error)
        return None
    return kernels


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
