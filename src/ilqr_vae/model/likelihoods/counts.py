"""Spike counts: Poisson observations with an exponential or a softplus link.

With a = C z + b, a count o of a channel has

    rate(a) = gain (link(a) + floor),   -log p(o | a) = rate - o log rate + log o!

The exponential link continues linearly above a rate limit, so that a poor iterate does not
overflow.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from ilqr_vae.errors import ShapeError
from ilqr_vae.kernels import backend
from ilqr_vae.model.likelihoods.base import Likelihood, Observed
from ilqr_vae.model.priors import softplus


class Counts(Likelihood):
    """Base of the Poisson families: rate = gain (link(a) + floor), in expected counts per bin.

    Args:
        gain: whether to learn a gain for each unit, exp(``log_gain``); if false it is one.
        floor: floor of the link, zero or more; keeps log p finite where link(a) vanishes.
    """

    def __init__(self, n: int, channels: int, *, gain: bool = False, floor: float = 0.0) -> None:
        super().__init__(n, channels)
        self.floor = floor
        self.log_gain: nn.Parameter | None = nn.Parameter(torch.zeros(channels)) if gain else None

    @property
    def plain(self) -> bool:
        """Whether the rate is link(a) itself."""
        return self.log_gain is None and self.floor == 0

    @abstractmethod
    def _link(self, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """link(a) and its first two derivatives."""

    @abstractmethod
    def _log_link(self, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log link(a) and its first two derivatives, exact where link(a) underflows."""

    @abstractmethod
    def _inverse(self, link: Tensor) -> Tensor:
        """a of link(a)."""

    def _gained(self, *x: Tensor) -> tuple[Tensor, ...]:
        return x if self.log_gain is None else tuple(self.log_gain.exp() * y for y in x)

    def _rate(self, a: Tensor) -> tuple[Tensor, ...]:
        """The rate and its first two derivatives in a."""
        link, slope, bend = self._link(a)
        return self._gained(link if self.floor == 0 else link + self.floor, slope, bend)

    def _log_rate(self, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The log rate and its first two derivatives in a."""
        if self.floor == 0:
            value, ratio, bend = self._log_link(a)
        else:
            link, slope, second = self._link(a)
            above = link + self.floor
            ratio = slope / above
            value, bend = above.log(), second / above - ratio * ratio
        return (value if self.log_gain is None else value + self.log_gain), ratio, bend

    def expected(self, a: Tensor) -> Tensor:
        return self._rate(a)[0]

    def evidence(self, mean: Tensor, baseline: Tensor, values: Tensor) -> Tensor:
        rate, other = mean.clamp(min=1e-9), baseline.clamp(min=1e-9)
        return values * (rate.log() - other.log()) - (rate - other)

    def log_prob(self, z: Tensor, o: Observed) -> Tensor:
        return self.unnormalised(z, o) - torch.lgamma(o.values * o.mask + 1).sum(-1)

    def unnormalised(self, z: Tensor, o: Observed) -> Tensor:
        """Return log p without the constant log y!, which does not affect the optimum."""
        # not a subclass's own, which may look at the values: vmap cannot
        return (Counts.log_p(self, self.affine(z), o.values) * o.mask).sum(-1)

    def log_p(self, a: Tensor, values: Tensor) -> Tensor:
        """Return log p of each count given its affine argument, without log y!."""
        return values * self._log_rate(a)[0] - self._rate(a)[0]

    def derivatives(self, a: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        ratio = self._log_rate(a)[1]
        return self._rate(a)[1] - values * ratio, self.curvature(a, values).clamp(min=0)

    def curvature(self, a: Tensor, values: Tensor) -> Tensor:
        return self._rate(a)[2] - values * self._log_rate(a)[2]

    def start_at(self, mean: Tensor) -> None:
        with torch.no_grad():
            (gain,) = self._gained(torch.ones_like(self.b))
            self.b.copy_(self._inverse((mean / gain - self.floor).clamp(min=1e-3)))

    def sample(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.poisson(self.mean(z), generator=generator)

    def check(self, o: Observed, field: str) -> None:
        """Check as ``Likelihood.check``; also refuse negative or fractional counts and silent
        units.

        Raises:
            ShapeError: naming ``field``.
        """
        super().check(o, field)
        bad = ((o.values < 0) | (o.values != o.values.round())) & (o.mask > 0)
        if bool(bad.any()):
            raise ShapeError(
                f"{field}.values",
                expected="whole numbers of spikes, zero or more",
                got=f"{float(o.values[bad][0]):g}",
            )
        silent = ((o.values * o.mask).sum((0, 1)) == 0) & (o.mask.sum((0, 1)) > 0)
        if bool(silent.any()):
            raise ShapeError(
                f"{field}.values",
                expected="at least one spike of every unit",
                got=f"unit {int(silent.nonzero()[0])} silent throughout",
            )


class _PoissonScore(torch.autograd.Function):
    """log p of a Poisson readout and its slope, in few passes over arrays of the observations'
    size.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, C: Tensor, b: Tensor, o: Observed, limit: float) -> Tensor:
        a = torch.addmm(b, z.reshape(-1, z.shape[-1]), C.mT).view(*z.shape[:-1], -1)
        y, mask = o
        if bool(a.amax() <= limit):
            rate = torch.exp(a)
            slope, found = rate - y, y * a - rate
        else:
            over = (a - limit).clamp(min=0)
            least = a - over
            rise, stretch = torch.exp(least), 1 + over
            slope = rise - y / stretch
            found = y * (least + torch.log1p(over)) - rise * stretch
        ctx.save_for_backward(z, C, slope.mul_(mask))
        # log y! is zero of most counts, which are 0 or 1
        seen = y * mask
        many = (seen > 1).nonzero(as_tuple=True)
        found[many] -= torch.lgamma(seen[many] + 1)
        return found.mul_(mask).sum(-1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (torch passes grads in order)
        ctx: Any, g: Tensor
    ) -> tuple[Tensor | None, ...]:
        z, C, slope = ctx.saved_tensors
        e = (slope * -g.unsqueeze(-1)).flatten(0, -2)
        gz = (e @ C).view(z.shape)
        return gz, e.mT @ z.flatten(0, -2), e.sum(0), None, None


class Poisson(Counts):
    """Counts per bin, Poisson; the link is exp(a), continued linearly above ``log_rate_max``.

    The continuation is once differentiable and keeps the cost convex and bounded below: clamping
    only the rate would leave -y a unbounded. It starts beyond any realistic rate.
    """

    family = "poisson"

    def __init__(
        self,
        n: int,
        channels: int,
        *,
        log_rate_max: float = 6.0,
        gain: bool = False,
        floor: float = 0.0,
    ) -> None:
        super().__init__(n, channels, gain=gain, floor=floor)
        self.log_rate_max = log_rate_max

    def _over(self, a: Tensor) -> Tensor:
        return (a - self.log_rate_max).clamp(min=0)

    def _link(self, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        slope, over = torch.exp(a.clamp(max=self.log_rate_max)), self._over(a)
        return slope * (1 + over), slope, torch.where(over > 0, 0.0, slope)

    def _log_link(self, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        over = self._over(a)
        ratio = 1 / (1 + over)
        return a - over + torch.log1p(over), ratio, torch.where(over > 0, -ratio * ratio, 0.0)

    def _inverse(self, link: Tensor) -> Tensor:
        return link.log()

    def score(self, z: Tensor, o: Observed) -> Tensor:
        if not self.plain or z.device.type != "cpu" or backend.current() == "reference":
            return self.log_prob(z, o)
        found: Any = _PoissonScore.apply(z, self.C, self.b, o, self.log_rate_max)
        return found

    def slope_along(self, z: Tensor, o: Observed, dz: Tensor) -> Tensor:
        if not self.plain:
            return super().slope_along(z, o, dz)
        # linear in the parameters, with an explicit gradient: autograd would store arrays of the
        # observations' size and traverse them again
        with torch.no_grad():
            a = self.affine(z)
            weight = o.mask * (dz @ self.C.mT)
            if bool(a.amax() <= self.log_rate_max):
                rate = a.exp_()
                d, bend = rate - o.values, rate
            else:
                d, bend = self.derivatives(a, o.values)[0], self.curvature(a, o.values)
            d, bend = d.mul_(o.mask).flatten(0, -2), (bend * weight).flatten(0, -2)
            gC = bend.mT @ z.flatten(0, -2) + d.mT @ dz.flatten(0, -2)
            gb = bend.sum(0)
        return (gC * self.C).sum() + gb @ self.b

    def _exponential(self, a: Tensor) -> bool:
        """Whether all rates are exp(a)."""
        return self.plain and bool((a <= self.log_rate_max).all())

    def log_p(self, a: Tensor, values: Tensor) -> Tensor:
        return values * a - a.exp() if self._exponential(a) else super().log_p(a, values)

    def derivatives(self, a: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self._exponential(a):
            rate = a.exp()
            return rate - values, rate
        slope, ratio = self._rate(a)[1], self._log_rate(a)[1]
        # Fisher information; without a floor it is exact below log_rate_max, where ratio = 1
        return slope - values * ratio, slope * ratio


class SoftplusPoisson(Counts):
    """Counts per bin, Poisson; the link is log(1 + exp(a)), linear in a at high rates.

    Without a floor -log p is convex in a, so its exact second derivative serves as the curvature.
    """

    family = "poisson-softplus"

    def _link(self, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        slope = torch.sigmoid(a)
        return softplus(a), slope, slope * torch.exp(logsigmoid(-a))  # slope (1 - slope)

    def _log_link(self, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # log softplus(a) -> a as a -> -inf, where softplus itself underflows
        low = a < -15
        link = softplus(torch.where(low, torch.zeros_like(a), a))
        tail = torch.exp(torch.where(low, a, 0.0))
        value = torch.where(low, a - 0.5 * tail, link.log())
        ratio = torch.where(low, 1 - 0.5 * tail, torch.sigmoid(a) / link)
        return value, ratio, -ratio * (ratio - torch.sigmoid(-a)).clamp(min=0)

    def _inverse(self, link: Tensor) -> Tensor:
        return torch.log(torch.expm1(link))
