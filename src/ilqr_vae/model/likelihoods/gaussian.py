"""Gaussian observations: o = a + sigma e with a = C z + b and e ~ N(0, I).

-log p(o | a) = 1/2 ((o - a) / sigma)^2 + log sigma + 1/2 log(2 pi)   per channel
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ilqr_vae.model.likelihoods.base import Likelihood, Observed
from ilqr_vae.model.priors import LOG_2PI


class Gaussian(Likelihood):
    """o ~ N(a, diag sigma^2)."""

    family = "gaussian"

    def __init__(self, n: int, channels: int, *, scale: float = 1.0) -> None:
        super().__init__(n, channels)
        self.log_scale = nn.Parameter(torch.full((channels,), math.log(scale)))

    def expected(self, a: Tensor) -> Tensor:
        return a

    def evidence(self, mean: Tensor, baseline: Tensor, values: Tensor) -> Tensor:
        precision = torch.exp(-2 * self.log_scale)
        return 0.5 * precision * ((values - baseline) ** 2 - (values - mean) ** 2)

    def log_prob(self, z: Tensor, o: Observed) -> Tensor:
        e = (o.values - self.affine(z)) * torch.exp(-self.log_scale)
        return ((-0.5 * e * e - self.log_scale - 0.5 * LOG_2PI) * o.mask).sum(-1)

    def derivatives(self, a: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        precision = torch.exp(-2 * self.log_scale)
        return (a - values) * precision, precision.expand_as(a)

    def sample(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        a = self.affine(z)
        e = torch.randn(a.shape, generator=generator, dtype=a.dtype, device=a.device)
        return a + e * torch.exp(self.log_scale)
