"""Priors over inputs u_k and over the initial state z_0.

Input priors share ``log_prob(u)``; ``quadratise(u)``, gradient r and a positive definite curvature
R of -log p(u); ``hessian(u)``, the second derivative itself, which the exact gradient uses;
``cross_entropy``, which the bound uses; and ``draw``. ``InitialCost`` is
1/2 (z_0 - mean)' precision (z_0 - mean): the model's own initial prior, or the arrival cost of a
moving horizon; the solver does not distinguish.

Schimel et al. (2022, footnote 1) set z_0 by ceil(n/m) surrogate bins that write consecutive blocks
of z. With Gaussian inputs there this is exactly z_0 ~ N(0, diag sigma_0^2), as implemented here:
same optimum, same bound (tested against explicit bins). Two further properties of the paper's form
are optional: a zero mean of the prior (``InitialPrior(learn_mean=False)``), and a Kronecker
posterior over surrogate and ordinary bins (``posterior.Kronecker(surrogate=True)``).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import softplus as torch_softplus

LOG_2PI = math.log(2 * math.pi)


def softplus(a: Tensor) -> Tensor:
    """Return log(1 + e^a) to float64 precision; torch's version is linear from 20 on."""
    return torch_softplus(a, threshold=40.0)


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


class Prior(nn.Module, ABC):
    """Base of the families: a density over R^d with a ``mean`` and standard deviations
    exp(``log_scale``)."""

    def __init__(self, d: int, *, scale: float = 1.0, learn_mean: bool = False) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.full((d,), math.log(scale)))
        self.mean = nn.Parameter(torch.zeros(d), requires_grad=learn_mean)

    @abstractmethod
    def log_prob(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """log p(x)."""

    @abstractmethod
    def quadratise(
        self, x: Float[Tensor, "*batch d"]
    ) -> tuple[Float[Tensor, "*batch d"], Float[Tensor, "*batch d d"]]:
        """Return the gradient of -log p at x, and a positive definite curvature."""

    def stated_precision(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d d"]:
        """Return the curvature for posterior covariances."""
        return self.quadratise(x)[1]

    @abstractmethod
    def hessian(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d d"]:
        """Return the second derivative of -log p at x, which may be indefinite."""

    @abstractmethod
    def cross_entropy(
        self,
        mean: Float[Tensor, "*batch d"],
        var: Float[Tensor, "*batch d"],
        sample: Float[Tensor, "*batch d"],
    ) -> Float[Tensor, "*batch"]:
        """Return E_q[-log p] for q with these marginals, in closed form or from ``sample``."""

    @abstractmethod
    def draw(
        self, shape: tuple[int, ...], generator: torch.Generator | None = None
    ) -> Float[Tensor, "*shape d"]:
        """Draw samples (*shape, d)."""

    def _normal(self, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
        like = self.log_scale
        size = (*shape, like.shape[0])
        return torch.randn(size, generator=generator, dtype=like.dtype, device=like.device)


class DiagonalGaussian(Prior):
    """N(mean, diag(scale^2)) over R^d."""

    def log_prob(self, x: Tensor) -> Tensor:
        e = (x - self.mean) * torch.exp(-self.log_scale)
        return -0.5 * (e * e).sum(-1) - self.log_scale.sum() - 0.5 * x.shape[-1] * LOG_2PI

    def quadratise(self, x: Tensor) -> tuple[Tensor, Tensor]:
        precision = torch.exp(-2 * self.log_scale)
        r = (x - self.mean) * precision
        return r, torch.diag(precision).expand(*x.shape, x.shape[-1])

    def hessian(self, x: Tensor) -> Tensor:
        return self.quadratise(x)[1]

    def cross_entropy(self, mean: Tensor, var: Tensor, sample: Tensor) -> Tensor:
        scaled = ((mean - self.mean) ** 2 + var) * torch.exp(-2 * self.log_scale)
        return (0.5 * scaled + self.log_scale + 0.5 * LOG_2PI).sum(-1)

    def draw(self, shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
        return self.mean + self.log_scale.exp() * self._normal(shape, generator)


class InputPrior(Prior):
    """Base of the input priors p(u): centred, with a name for configs and model files."""

    family: str

    def __init__(self, m: int, *, scale: float = 1.0) -> None:
        super().__init__(m, scale=scale)


class GaussianPrior(InputPrior, DiagonalGaussian):
    """u_k ~ N(0, S^2), independent over time (Schimel et al. 2022, section 2)."""

    family = "gaussian"


class StudentPrior(InputPrior):
    """Multivariate Student: heavy tails, one scale shared by all channels of a bin (eq. 5).

    u = s . e sqrt(nu / c),  e ~ N(0, I),  c ~ chi^2 with nu degrees of freedom, one per bin. With
    L = diag(s^-2) and d = u' L u,

        -log p(u) = (nu + m)/2 log(1 + d / nu) + sum log s + m/2 log(nu pi)
                    + log Gamma(nu/2) - log Gamma((nu + m)/2)
        gradient    w L u,   w = (nu + m) / (nu + d)
        Hessian     w L - 2 w / (nu + d) L u u' L

    ``quadratise`` drops the negative rank-one term, so that R = w L is positive definite. This is
    for the solver: near u = 0 it implies (nu - 2) / (nu + m) of the prior's variance. Covariances
    use the smaller of it and the prior's own precision diag exp(-2 log_scale), so that an input
    without data has the prior's variance.

    nu > 2 is learned; s = exp(log_scale) sqrt((nu - 2) / nu), so that exp(log_scale) is the
    standard deviation for any nu, as for the Gaussian.

    Args:
        nu: initial degrees of freedom, above 2.
    """

    family = "student"

    def __init__(self, m: int, *, scale: float = 1.0, nu: float = 5.0) -> None:
        super().__init__(m, scale=scale)
        over = nu - 2.0
        self.raw_nu = nn.Parameter(torch.tensor(over + math.log(-math.expm1(-over))))

    @property
    def nu(self) -> Tensor:
        """Degrees of freedom, above 2."""
        return 2.0 + softplus(self.raw_nu)

    def _terms(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """nu, log s, L u, and nu + d."""
        nu = self.nu
        log_s = self.log_scale + 0.5 * torch.log((nu - 2.0) / nu)
        scaled = (u - self.mean) * torch.exp(-2 * log_s)
        return nu, log_s, scaled, nu + ((u - self.mean) * scaled).sum(-1)

    def log_prob(self, x: Tensor) -> Tensor:
        nu, log_s, _, total = self._terms(x)
        m = x.shape[-1]
        constant = torch.lgamma(0.5 * (nu + m)) - torch.lgamma(0.5 * nu)
        constant = constant - 0.5 * m * torch.log(math.pi * nu) - log_s.sum()
        return constant - 0.5 * (nu + m) * torch.log(total / nu)

    def quadratise(self, x: Tensor) -> tuple[Tensor, Tensor]:
        nu, log_s, scaled, total = self._terms(x)
        weight = ((nu + x.shape[-1]) / total).unsqueeze(-1)
        return weight * scaled, torch.diag_embed(weight * torch.exp(-2 * log_s))

    def stated_precision(self, x: Tensor) -> Tensor:
        own = torch.diag(torch.exp(-2 * self.log_scale))
        return torch.minimum(self.quadratise(x)[1], own)

    def hessian(self, x: Tensor) -> Tensor:
        nu, log_s, scaled, total = self._terms(x)
        weight = ((nu + x.shape[-1]) / total).unsqueeze(-1)
        outer = scaled.unsqueeze(-1) * scaled.unsqueeze(-2)
        falling = (2 * weight / total.unsqueeze(-1)).unsqueeze(-1) * outer
        return torch.diag_embed(weight * torch.exp(-2 * log_s)) - falling

    def cross_entropy(self, mean: Tensor, var: Tensor, sample: Tensor) -> Tensor:
        return -self.log_prob(sample)

    def draw(self, shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
        nu = self.nu
        normal = self._normal(shape, generator)
        seed = int(torch.randint(2**62, (), generator=generator, device=normal.device))
        chi2 = np.random.default_rng(seed).chisquare(float(nu.detach()), size=shape)
        mix = torch.as_tensor(np.asarray(chi2)).to(normal).unsqueeze(-1)
        s = self.log_scale.exp() * torch.sqrt((nu - 2.0) / nu)
        return self.mean + s * normal * torch.sqrt(nu / mix)


class InitialPrior(DiagonalGaussian):
    """z_0 ~ N(mu_0, diag sigma_0^2), both learned; ``learn_mean=False`` keeps mu_0 = 0."""

    def __init__(self, n: int, *, scale: float = 1.0, learn_mean: bool = True) -> None:
        super().__init__(n, scale=scale, learn_mean=learn_mean)

    def cost(self, batch: int) -> InitialCost:
        """Return the prior as an initial cost for a batch of problems."""
        n = self.mean.shape[0]
        precision = torch.diag(torch.exp(-2 * self.log_scale))
        return InitialCost(self.mean.expand(batch, n), precision.expand(batch, n, n))


INPUT_PRIORS: dict[str, type[InputPrior]] = {
    cls.family: cls for cls in (GaussianPrior, StudentPrior)
}
"""Every input prior by the name configs and model files use."""
