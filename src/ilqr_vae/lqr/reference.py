"""The LQR problem solved in plain torch: the definition the compiled backends are tested against.

A backward Riccati recursion computes the quadratic cost to go V_k, v_k and the feedback law; a
forward pass rolls out the optimal trajectory. Only time is looped over. Any floating dtype and
device, no host synchronisation, differentiable with respect to every tensor of the problem.

A problem that turns out to be ill posed (an indefinite Quu, a NaN) leaves the recursion: from then
on its matrices are replaced by harmless ones, its solution is zero and ``ok`` is False. Neither the
results of other problems nor their gradients are affected.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ilqr_vae.lqr.problem import (
    Covariances,
    FlagPerProblem,
    LQRProblem,
    LQRSolution,
    damping_per_problem,
)


def solve_reference(
    problem: LQRProblem, *, free_initial: bool, regularisation: Tensor | float = 0.0
) -> LQRSolution:
    """Solve a batch of LQR problems; see `ilqr_vae.lqr.problem` for signs and shapes.

    Args:
        problem: the batch.
        free_initial: whether dz_0 is optimised (else it is zero).
        regularisation: Levenberg damping, (B,) or a number.

    Returns:
        The solution; problems that are not well posed have ``ok`` False and zeros.

    Raises:
        ShapeError: tensors that do not fit each other.
    """
    batch, steps, n, m = problem.sizes()
    damping = damping_per_problem(regularisation, problem.A, batch)
    ok = torch.isfinite(damping)
    for value in problem.tensors().values():
        ok = ok & torch.isfinite(value).flatten(1).all(dim=1)
    A, B, Q, q, R, r = (
        _where(ok, value)
        for value in (problem.A, problem.B, problem.Q, problem.q, problem.R, problem.r)
    )
    S = A.new_zeros(batch, steps, m, n) if problem.S is None else _where(ok, problem.S)
    c = A.new_zeros(batch, steps, n) if problem.c is None else _where(ok, problem.c)
    damping = _where(ok, damping)
    damping_u = damping[:, None, None] * torch.eye(m, dtype=A.dtype, device=A.device)

    # Backward: the cost to go, from the last state to the first.
    V_t, v_t = _symmetric(Q[:, steps]), q[:, steps]
    Vs, vs = [V_t], [v_t]
    Ks: list[Tensor] = []
    ks: list[Tensor] = []
    inverses: list[Tensor] = []
    for t in reversed(range(steps)):
        A_t, B_t = A[:, t], B[:, t]
        VA, VB = V_t @ A_t, V_t @ B_t
        slope = v_t + _times(V_t, c[:, t])
        Quu = _symmetric(R[:, t] + B_t.mT @ VB) + damping_u
        Qux = S[:, t] + B_t.mT @ VA
        qu = r[:, t] + _times(B_t.mT, slope)
        factor, definite = _cholesky(Quu)
        ok = ok & definite
        K_t = -torch.cholesky_solve(Qux, factor)
        k_t = -torch.cholesky_solve(qu[..., None], factor)[..., 0]
        V_t = _where(ok, _symmetric(Q[:, t] + A_t.mT @ VA + Qux.mT @ K_t))
        v_t = _where(ok, q[:, t] + _times(A_t.mT, slope) + _times(Qux.mT, k_t))
        Vs.append(V_t)
        vs.append(v_t)
        Ks.append(K_t)
        ks.append(k_t)
        inverses.append(torch.cholesky_inverse(factor))

    # The initial state.
    if free_initial:
        V_t = V_t + damping[:, None, None] * torch.eye(n, dtype=A.dtype, device=A.device)
        Vs[-1] = V_t
        factor, definite = _cholesky(V_t)
        ok = ok & definite
        dz_t = -torch.cholesky_solve(v_t[..., None], factor)[..., 0]
    else:
        dz_t = torch.zeros_like(v_t)

    # Forward: the optimal trajectory.
    dzs = [dz_t]
    dus: list[Tensor] = []
    for t, (K_t, k_t) in enumerate(zip(reversed(Ks), reversed(ks), strict=True)):
        du_t = k_t + _times(K_t, dz_t)
        dz_t = _times(A[:, t], dz_t) + _times(B[:, t], du_t) + c[:, t]
        dus.append(du_t)
        dzs.append(dz_t)

    V, v = torch.stack(Vs[::-1], dim=1), torch.stack(vs[::-1], dim=1)
    dz, du = torch.stack(dzs, dim=1), torch.stack(dus, dim=1)
    linear = (q * dz).sum(dim=(1, 2)) + (r * du).sum(dim=(1, 2))
    quadratic = (
        (dz * _times(Q, dz)).sum(dim=(1, 2))
        + (du * _times(R, du)).sum(dim=(1, 2))
        + 2.0 * (du * _times(S, dz[:, :-1])).sum(dim=(1, 2))
    )
    solution = {
        "dz": dz,
        "du": du,
        "K": torch.stack(Ks[::-1], dim=1),
        "k": torch.stack(ks[::-1], dim=1),
        "dz0": dz[:, 0],
        "V": V,
        "v": v,
        "costate": _times(V, dz) + v,
        "Quu_inv": torch.stack(inverses[::-1], dim=1),
        "decrease": -linear - 0.5 * quadratic,
        "linear": linear,
    }
    for value in solution.values():
        ok = ok & torch.isfinite(value[:, None]).flatten(1).all(dim=1)
    return LQRSolution(**{name: _where(ok, value) for name, value in solution.items()}, ok=ok)


def marginal_covariance_reference(problem: LQRProblem, solution: LQRSolution) -> Covariances:
    """Return the covariance of each state under the Gaussian exp(-J), with a free initial state.

    It is the n x n diagonal block of the inverse of J's Hessian over whole trajectories, as from a
    Rauch-Tung-Striebel smoother on a linear-Gaussian model::

        Sigma_0 = V_0^{-1}
        Sigma_{k+1} = (A_k + B_k K_k) Sigma_k (A_k + B_k K_k)' + B_k Quu_inv_k B_k'

    Args:
        problem, solution: a problem and its solution with a free initial state.

    Returns:
        Sigma (B, T+1, n, n); zeros for a problem whose solution is not ok.
    """
    A, B, K, Quu_inv = problem.A, problem.B, solution.K, solution.Quu_inv
    factor, ok = _cholesky(_symmetric(solution.V[:, 0]))
    Sigma_t = torch.cholesky_inverse(factor)
    Sigmas = [Sigma_t]
    for t in range(A.shape[1]):
        closed = A[:, t] + B[:, t] @ K[:, t]
        Sigma_t = _symmetric(closed @ Sigma_t @ closed.mT + B[:, t] @ Quu_inv[:, t] @ B[:, t].mT)
        Sigmas.append(Sigma_t)
    return _where(ok, torch.stack(Sigmas, dim=1))


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[..., None])[..., 0]


def _symmetric(matrix: Tensor) -> Tensor:
    return 0.5 * (matrix + matrix.mT)


def _where(ok: FlagPerProblem, value: Tensor) -> Tensor:
    """Select ``value`` for problems that are ok, zeros for the others."""
    return torch.where(ok.reshape(-1, *(1,) * (value.dim() - 1)), value, value.new_zeros(()))


def _cholesky(matrix: Tensor) -> tuple[Tensor, FlagPerProblem]:
    """Return the lower Cholesky factor, and whether the matrix is numerically positive definite.

    It is if each squared pivot exceeds size * eps * the diagonal entry, below which it is rounding
    noise at any scale. Otherwise the factor is the identity.
    """
    with torch.no_grad():
        trial, info = torch.linalg.cholesky_ex(matrix)
        diagonal = matrix.diagonal(dim1=-2, dim2=-1)
        floor = matrix.shape[-1] * torch.finfo(matrix.dtype).eps * diagonal
        large_enough = (trial.diagonal(dim1=-2, dim2=-1).square() > floor).all(dim=-1)
        definite = (info == 0) & large_enough & torch.isfinite(trial).flatten(1).all(dim=1)
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    safe = torch.where(definite[:, None, None], matrix, eye)
    return torch.linalg.cholesky_ex(safe)[0], definite
