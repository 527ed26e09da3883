"""Gaussian posteriors q(z_0, u | o) around the optimum (z_0*, u*).

Kronecker (Schimel et al. 2022, section 2.3): cov(u) = Sigma_s (x) Sigma_t, learned, the same for
every trial of one fixed length. Laplace: the inverse (Gauss-Newton) Hessian of J per trial, for any
length, straight from the Riccati recursion: u_k | z_k has covariance Quu_k^-1 and mean K_k dz_k, so

    dz_0 ~ N(0, V_0^-1),   du_k = K_k dz_k + chol(Quu_k^-1) e_k,   dz_{k+1} = A_k dz_k + B_k du_k

Both answer with a ``Draw``: one sample of the deviation, and what the closed-form KL needs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ilqr_vae.lqr import LQRProblem, LQRSolution, marginal_covariance
from ilqr_vae.priors import LOG_2PI


@dataclass(frozen=True)
class Draw:
    """A sample of the posterior's deviation from its mean, and its moments.

    Attributes:
        dz0, du: the sample.
        z0_var, u_var: marginal variances.
        entropy: of q over (z_0, u), nats.
    """

    dz0: Float[Tensor, "B n"]
    du: Float[Tensor, "B T m"]
    z0_var: Float[Tensor, "B n"]
    u_var: Float[Tensor, "B T m"]
    entropy: Float[Tensor, " B"]


class Kronecker(nn.Module):
    """q(u) = N(u*, Sigma_s (x) Sigma_t), q(z_0) = N(z_0*, diag); trials of ``steps`` bins."""

    family = "kronecker"

    def __init__(self, n: int, m: int, steps: int, *, scale: float = 0.3) -> None:
        super().__init__()
        self.space = nn.Parameter(torch.zeros(m, m))
        self.time = nn.Parameter(torch.zeros(steps, steps))
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.initial_log_scale = nn.Parameter(torch.full((n,), math.log(scale)))

    @staticmethod
    def _factor(raw: Tensor) -> Tensor:
        """Lower-triangular factor with a positive diagonal."""
        return raw.tril(-1) + torch.diag(raw.diagonal().exp())

    def draw(self, batch: int, generator: torch.Generator | None = None) -> Draw:
        m, T, n = self.space.shape[0], self.time.shape[0], self.initial_log_scale.shape[0]
        Ls, Lt = self._factor(self.space) * self.log_scale.exp(), self._factor(self.time)
        like = self.space
        e = torch.randn(batch, T, m, generator=generator, dtype=like.dtype, device=like.device)
        e0 = torch.randn(batch, n, generator=generator, dtype=like.dtype, device=like.device)
        z0_scale = self.initial_log_scale.exp()
        u_var = (Lt * Lt).sum(-1).unsqueeze(-1) * (Ls * Ls).sum(-1)
        logdet = (
            m * self.time.diagonal().sum()
            + T * (self.space.diagonal().sum() + m * self.log_scale)
            + self.initial_log_scale.sum()
        )
        entropy = logdet + 0.5 * (T * m + n) * (1 + LOG_2PI)
        return Draw(
            dz0=e0 * z0_scale,
            du=Lt @ e @ Ls.mT,
            z0_var=(z0_scale**2).expand(batch, n),
            u_var=u_var.expand(batch, T, m),
            entropy=entropy.expand(batch),
        )


def laplace_draw(
    problem: LQRProblem, lqr: LQRSolution, generator: torch.Generator | None = None
) -> Draw:
    """Sample the Laplace posterior of each trial.

    Args:
        problem, lqr: the LQR problem at the optimum and its solution (free initial state).
    """
    B, T, m, n = lqr.K.shape
    like = lqr.K
    e = torch.randn(B, T, m, generator=generator, dtype=like.dtype, device=like.device)
    e0 = torch.randn(B, n, generator=generator, dtype=like.dtype, device=like.device)
    L0 = torch.linalg.cholesky_ex(lqr.V[:, 0])[0]
    Lu = torch.linalg.cholesky_ex(lqr.Quu_inv)[0]
    noise = (Lu @ e.unsqueeze(-1)).squeeze(-1)
    dz0 = dz = torch.linalg.solve_triangular(L0.mT, e0.unsqueeze(-1), upper=True).squeeze(-1)
    dus: list[Tensor] = []
    for k in range(T):
        du = noise[:, k] + (lqr.K[:, k] @ dz.unsqueeze(-1)).squeeze(-1)
        dz = (problem.A[:, k] @ dz.unsqueeze(-1) + problem.B[:, k] @ du.unsqueeze(-1)).squeeze(-1)
        dus.append(du)
    Sigma = marginal_covariance(problem.A, problem.B, lqr.K, lqr.Quu_inv, lqr.V[:, 0])
    u_cov = lqr.K @ Sigma[:, :-1] @ lqr.K.mT + lqr.Quu_inv
    logdet = Lu.diagonal(dim1=-2, dim2=-1).log().sum((-1, -2)) - L0.diagonal(
        dim1=-2, dim2=-1
    ).log().sum(-1)
    return Draw(
        dz0=dz0,
        du=torch.stack(dus, 1),
        z0_var=Sigma[:, 0].diagonal(dim1=-2, dim2=-1),
        u_var=u_cov.diagonal(dim1=-2, dim2=-1),
        entropy=logdet + 0.5 * (T * m + n) * (1 + LOG_2PI),
    )
