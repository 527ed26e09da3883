"""Priors over inputs u_k and over the initial state z_0.

Input prior families share ``log_prob(u)`` and ``quadratise(u)``: gradient r and curvature R of
-log p(u), R positive definite. ``InitialCost`` is 1/2 (z_0 - mean)' precision (z_0 - mean): the
model's own initial prior, or the arrival cost of a moving horizon; the solver does not distinguish.

Schimel et al. (2022, footnote 1) set z_0 by n/m surrogate bins that write consecutive blocks of z;
with Gaussian inputs that is exactly z_0 ~ N(0, diag sigma_0^2), which is what is built here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True)
class InitialCost:
    """Quadratic cost on z_0; also a Gaussian N(mean, precision^-1).

    Attributes:
        mean: (B, n).
        precision: (B, n, n), positive definite.
    """

    mean: Float[Tensor, "B n"]
    precision: Float[Tensor, "B n n"]

    def value(self, z: Float[Tensor, "B n"]) -> Float[Tensor, " B"]:
        d = z - self.mean
        return 0.5 * (d * (self.precision @ d.unsqueeze(-1)).squeeze(-1)).sum(-1)

    def gradient(self, z: Float[Tensor, "B n"]) -> Float[Tensor, "B n"]:
        return (self.precision @ (z - self.mean).unsqueeze(-1)).squeeze(-1)


class DiagonalGaussian(nn.Module):
    """N(mean, diag(scale^2)) over R^d."""

    def __init__(self, d: int, *, scale: float = 1.0, learn_mean: bool = False) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.full((d,), math.log(scale)))
        self.mean = nn.Parameter(torch.zeros(d), requires_grad=learn_mean)

    def log_prob(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        e = (x - self.mean) * torch.exp(-self.log_scale)
        return -0.5 * (e * e).sum(-1) - self.log_scale.sum() - 0.5 * x.shape[-1] * LOG_2PI

    def quadratise(
        self, x: Float[Tensor, "*batch d"]
    ) -> tuple[Float[Tensor, "*batch d"], Float[Tensor, "*batch d d"]]:
        """Gradient and Hessian of -log p at x."""
        precision = torch.exp(-2 * self.log_scale)
        r = (x - self.mean) * precision
        return r, torch.diag(precision).expand(*x.shape, x.shape[-1])


class GaussianPrior(DiagonalGaussian):
    """u_k ~ N(0, S^2), independent over time (Schimel et al. 2022, section 2)."""

    family = "gaussian"

    def __init__(self, m: int, *, scale: float = 1.0) -> None:
        super().__init__(m, scale=scale)


class InitialPrior(DiagonalGaussian):
    """z_0 ~ N(mu_0, diag sigma_0^2), both learned."""

    def __init__(self, n: int, *, scale: float = 1.0) -> None:
        super().__init__(n, scale=scale, learn_mean=True)

    def cost(self, batch: int) -> InitialCost:
        """The same as an initial cost for a batch of problems."""
        n = self.mean.shape[0]
        precision = torch.diag(torch.exp(-2 * self.log_scale))
        return InitialCost(self.mean.expand(batch, n), precision.expand(batch, n, n))


INPUT_PRIORS: dict[str, type[GaussianPrior]] = {GaussianPrior.family: GaussianPrior}
