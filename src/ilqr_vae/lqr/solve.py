"""Selects the backend for an LQR problem: a table of backends, and the rule for "auto".

A backend is a pair of functions with the signatures of the reference. To add one, add it to
``BACKENDS`` and, if "auto" should use it, to ``FOR_DEVICE``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from ilqr_vae.errors import ShapeError
from ilqr_vae.kernels import backend as switch
from ilqr_vae.lqr.on_cpu import marginal_covariance_cpu, solve_cpu
from ilqr_vae.lqr.on_gpu import marginal_covariance_gpu, solve_gpu
from ilqr_vae.lqr.problem import Covariances, LQRProblem, LQRSolution
from ilqr_vae.lqr.reference import marginal_covariance_reference, solve_reference

BackendName: TypeAlias = Literal["auto", "reference", "cpu", "gpu"]


class _Solve(Protocol):
    def __call__(
        self, problem: LQRProblem, *, free_initial: bool, regularisation: Tensor | float
    ) -> LQRSolution: ...


class _Covariance(Protocol):
    def __call__(self, problem: LQRProblem, solution: LQRSolution) -> Covariances: ...


@dataclass(frozen=True, slots=True)
class Backend:
    """A backend.

    Attributes:
        solve: as `solve_reference`.
        covariance: as `marginal_covariance_reference`.
    """

    solve: _Solve
    covariance: _Covariance


BACKENDS: dict[str, Backend] = {
    "reference": Backend(solve_reference, marginal_covariance_reference),
    "cpu": Backend(solve_cpu, marginal_covariance_cpu),
    "gpu": Backend(solve_gpu, marginal_covariance_gpu),
}
#: The backend of "auto" by torch device type, for tensors without gradients of a listed dtype.
FOR_DEVICE: dict[str, str] = {"cpu": "cpu", "cuda": "gpu"}
_COMPILED_DTYPES = (torch.float32, torch.float64)


def solve_lqr(
    problem: LQRProblem,
    *,
    free_initial: bool,
    regularisation: Tensor | float = 0.0,
    backend: BackendName = "auto",
) -> LQRSolution:
    """Solve a batch of LQR problems; `ilqr_vae.lqr.problem` states problem, signs and shapes.

    Args:
        problem: the batch.
        free_initial: whether dz_0 is optimised, its cost inside Q_0 and q_0 (else dz_0 = 0).
        regularisation: Levenberg damping, (B,) or a number: added to the diagonal of every Quu, and
            of V_0 where dz_0 is free.
        backend: "auto" takes the compiled one of the tensors' device where there is one and no
            tensor requires a gradient, else "reference".

    Returns:
        The solution. A problem that is not well posed has ``ok`` False and zeros; it raises nothing
        and changes nothing for its neighbours.

    Raises:
        ShapeError: tensors that do not fit each other, or an unknown backend.
    """
    used = (*problem.tensors().values(), regularisation)
    return _pick(backend, used).solve(
        problem, free_initial=free_initial, regularisation=regularisation
    )


def marginal_covariance(
    problem: LQRProblem, solution: LQRSolution, *, backend: BackendName = "auto"
) -> Covariances:
    """Covariance of each state under exp(-J); see `marginal_covariance_reference`.

    Args:
        problem, solution: a problem and its solution with a free initial state.
        backend: as for `solve_lqr`.

    Returns:
        Sigma (B, T+1, n, n); zeros for a problem whose solution is not ok.

    Raises:
        ShapeError: an unknown backend.
    """
    used = (problem.A, problem.B, solution.K, solution.Quu_inv, solution.V)
    return _pick(backend, used).covariance(problem, solution)


def _pick(name: str, used: tuple[Tensor | float, ...]) -> Backend:
    if name == "auto":
        tensors = [value for value in used if isinstance(value, Tensor)]
        plain = (
            switch.current() != "reference"
            and tensors[0].dtype in _COMPILED_DTYPES
            and not (torch.is_grad_enabled() and any(value.requires_grad for value in tensors))
        )
        name = FOR_DEVICE.get(tensors[0].device.type, "reference") if plain else "reference"
    if name not in BACKENDS:
        known = ", ".join(("auto", *BACKENDS))
        raise ShapeError("backend", expected=f"one of {known}", got=repr(name))
    return BACKENDS[name]
