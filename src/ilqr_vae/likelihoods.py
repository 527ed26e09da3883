"""Observation families: log p(o | z), with masks, and its quadratic model in z.

Notation: a = C z + b per channel; for Poisson, rate(a) in expected counts per bin. ``mask`` is one
where a channel was observed in a bin and zero where not: a missing bin or a missing unit simply has
no term. ``quadratise`` returns q = d(-log p)/dz and Q, a positive semi-definite curvature.

Several groups (spikes and kinematics, say) make a joint model: a dict of families. A group that is
absent from the observations is not conditioned on (Schimel et al. 2022, section 3.4.2).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ilqr_vae.priors import LOG_2PI


class Observed(NamedTuple):
    """Values of one group and which of them were observed.

    Attributes:
        values: (B, T, N); where mask is zero, any finite number.
        mask: (B, T, N), ones and zeros, of the same dtype.
    """

    values: Float[Tensor, "*batch N"]
    mask: Float[Tensor, "*batch N"]


Observations = Mapping[str, Observed]


class Likelihood(nn.Module, ABC):
    """Base of the families: an affine readout a = C z + b and a density per channel."""

    family: str

    def __init__(self, n: int, channels: int) -> None:
        super().__init__()
        self.C = nn.Parameter(torch.randn(channels, n) / math.sqrt(n))
        self.b = nn.Parameter(torch.zeros(channels))

    def affine(self, z: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch N"]:
        return z @ self.C.mT + self.b

    @abstractmethod
    def mean(self, z: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch N"]:
        """E[o | z]."""

    @abstractmethod
    def log_prob(self, z: Float[Tensor, "*batch n"], o: Observed) -> Float[Tensor, "*batch"]:
        """log p(o | z), summed over observed channels."""

    @abstractmethod
    def derivatives(
        self, a: Float[Tensor, "*batch N"], values: Float[Tensor, "*batch N"]
    ) -> tuple[Float[Tensor, "*batch N"], Float[Tensor, "*batch N"]]:
        """First derivative and non-negative curvature of -log p in a, per channel."""

    def quadratise(
        self, z: Float[Tensor, "*batch n"], o: Observed
    ) -> tuple[Float[Tensor, "*batch n"], Float[Tensor, "*batch n n"]]:
        """q = C' d and Q = C' diag(w) C with d, w the derivatives of -log p in a."""
        d, w = self.derivatives(self.affine(z), o.values)
        n = z.shape[-1]
        # one matrix product over (batch x time): w against the outer products of C's rows
        outer = (self.C.unsqueeze(-1) * self.C.unsqueeze(-2)).reshape(-1, n * n)
        Q = ((w * o.mask) @ outer).reshape(*z.shape, n)
        return (d * o.mask) @ self.C, Q


class Poisson(Likelihood):
    """Counts per bin, Poisson with rate exp(a), continued linearly above ``log_rate_max``.

    The continuation is once differentiable and keeps the cost convex and bounded below: clamping
    the rate alone would leave -y a unbounded. It starts where no real rate lies.
    """

    family = "poisson"

    def __init__(self, n: int, channels: int, *, log_rate_max: float = 6.0) -> None:
        super().__init__(n, channels)
        self.log_rate_max = log_rate_max

    def _rate(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """Rate and its slope in a."""
        slope = torch.exp(a.clamp(max=self.log_rate_max))
        return slope * (1 + (a - self.log_rate_max).clamp(min=0)), slope

    def mean(self, z: Tensor) -> Tensor:
        return self._rate(self.affine(z))[0]

    def _log_rate(self, a: Tensor) -> Tensor:
        over = (a - self.log_rate_max).clamp(min=0)
        return a - over + torch.log1p(over)

    def log_prob(self, z: Tensor, o: Observed) -> Tensor:
        return self.unnormalised(z, o) - (torch.lgamma(o.values + 1) * o.mask).sum(-1)

    def unnormalised(self, z: Tensor, o: Observed) -> Tensor:
        """log p without the constant log y!, which no optimum depends on."""
        a = self.affine(z)
        return ((o.values * self._log_rate(a) - self._rate(a)[0]) * o.mask).sum(-1)

    def derivatives(self, a: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        rate, slope = self._rate(a)
        # exact below log_rate_max (where slope = rate); Fisher information above
        return slope - values * (slope / rate), slope * (slope / rate)


class Gaussian(Likelihood):
    """o ~ N(a, diag sigma^2)."""

    family = "gaussian"

    def __init__(self, n: int, channels: int, *, scale: float = 1.0) -> None:
        super().__init__(n, channels)
        self.log_scale = nn.Parameter(torch.full((channels,), math.log(scale)))

    def mean(self, z: Tensor) -> Tensor:
        return self.affine(z)

    def log_prob(self, z: Tensor, o: Observed) -> Tensor:
        e = (o.values - self.affine(z)) * torch.exp(-self.log_scale)
        return ((-0.5 * e * e - self.log_scale - 0.5 * LOG_2PI) * o.mask).sum(-1)

    def derivatives(self, a: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        precision = torch.exp(-2 * self.log_scale)
        return (a - values) * precision, precision.expand_as(a)


LIKELIHOODS: dict[str, type[Likelihood]] = {cls.family: cls for cls in (Poisson, Gaussian)}
