"""Observation families: log p(o | z), with masks, and its quadratic model in z.

Notation: a = C z + b per channel; for Poisson, rate(a) in expected counts per bin. ``mask`` is one
    where a channel was observed in a bin, else zero: a missing bin or unit has no term.
    ``quadratise`` returns q = d(-log p)/dz and Q, a positive semi-definite curvature.

Several groups (spikes and kinematics, say) make a joint model: a dict of families. A group that is
absent from the observations is not conditioned on (Schimel et al. 2022, section 3.4.2).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ilqr_vae.errors import ShapeError


class Observed(NamedTuple):
    """Values of a group, and which of them were observed.

    Attributes:
        values: (B, T, N); where mask is zero, any finite number.
        mask: (B, T, N), ones and zeros, of the same dtype.
    """

    values: Float[Tensor, "*batch N"]
    mask: Float[Tensor, "*batch N"]


Observations = Mapping[str, Observed]


class Likelihood(nn.Module, ABC):
    """Base of the families: an affine readout a = C z + b and a density per channel.

    Attributes:
        features: how many of the channels, the last ones, are continuous beside counts.
    """

    family: str
    features: int = 0

    def __init__(self, n: int, channels: int) -> None:
        super().__init__()
        self.C = nn.Parameter(torch.randn(channels, n) / math.sqrt(n))
        self.b = nn.Parameter(torch.zeros(channels))

    @property
    def parts(self) -> tuple[Likelihood, ...]:
        """Families of one kind each, whose channels lie side by side; itself for one kind."""
        return (self,)

    @property
    def scaling(self) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]] | None:
        """Centre and scale of each channel; None where values are modelled as they are."""
        return None

    def standard(self, values: Float[Tensor, "*batch N"]) -> Float[Tensor, "*batch N"]:
        """Values as the family models them: less their centre, over their scale."""
        if (scaling := self.scaling) is None:
            return values
        centre, scale = scaling
        return (values - centre) / scale

    def restored(self, values: Float[Tensor, "*batch N"]) -> Float[Tensor, "*batch N"]:
        """The inverse of ``standard``."""
        if (scaling := self.scaling) is None:
            return values
        centre, scale = scaling
        return values * scale + centre

    def expected_values(self, a: Float[Tensor, "*batch N"]) -> Float[Tensor, "*batch N"]:
        """``expected``, in the units that values come in."""
        return self.restored(self.expected(a))

    def affine(self, z: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch N"]:
        return z @ self.C.mT + self.b

    @abstractmethod
    def expected(self, a: Float[Tensor, "*batch N"]) -> Float[Tensor, "*batch N"]:
        """Return E[o | a] per channel."""

    def mean(self, z: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch N"]:
        """E[o | z]."""
        return self.expected(self.affine(z))

    @abstractmethod
    def log_prob(self, z: Float[Tensor, "*batch n"], o: Observed) -> Float[Tensor, "*batch"]:
        """log p(o | z), summed over observed channels."""

    @abstractmethod
    def derivatives(
        self, a: Float[Tensor, "*batch N"], values: Float[Tensor, "*batch N"]
    ) -> tuple[Float[Tensor, "*batch N"], Float[Tensor, "*batch N"]]:
        """Return the first derivative and a non-negative curvature of -log p in a, per channel."""

    def unnormalised(self, z: Float[Tensor, "*batch n"], o: Observed) -> Float[Tensor, "*batch"]:
        """Return log p without constants that do not affect the optimum."""
        return self.log_prob(z, o)

    def score(self, z: Float[Tensor, "*batch n"], o: Observed) -> Float[Tensor, "*batch"]:
        """``log_prob``, differentiable once."""
        return self.log_prob(z, o)

    def slope_along(
        self, z: Float[Tensor, "*batch n"], o: Observed, dz: Float[Tensor, "*batch n"]
    ) -> Tensor:
        """Return a scalar whose parameter gradient is that of the slope of -log p along dz.

        The slope is summed over bins; z and dz are fixed. The scalar itself has no meaning.
        """
        d, _ = self.derivatives(self.affine(z), o.values)
        return (d * o.mask * (dz @ self.C.mT)).sum()

    def curvature(
        self, a: Float[Tensor, "*batch N"], values: Float[Tensor, "*batch N"]
    ) -> Float[Tensor, "*batch N"]:
        """Return the second derivative of -log p in a, per channel, without approximation."""
        return self.derivatives(a, values)[1]

    @abstractmethod
    def sample(
        self, z: Float[Tensor, "*batch n"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "*batch N"]:
        """Draw observations given z."""

    @abstractmethod
    def evidence(
        self,
        mean: Float[Tensor, "*batch N"],
        baseline: Float[Tensor, " N"],
        values: Float[Tensor, "*batch N"],
    ) -> Float[Tensor, "*batch N"]:
        """Return log p of values relative to a baseline, in nats per channel."""

    def start_at(self, mean: Float[Tensor, " N"]) -> None:
        """Set b so that E[o | z = 0] is ``mean``, expected counts per bin for spikes."""
        with torch.no_grad():
            self.b.copy_(mean)

    def check(self, o: Observed, field: str) -> None:
        """Refuse observations this family cannot score.

        Raises:
            ShapeError: shapes are wrong, there are no bins, an observed value is not finite (or an
                unobserved one NaN), or the mask has other values than zero and one.
        """
        N = self.b.shape[0]
        v, mask = o.values, o.mask
        if v.ndim != 3 or v.shape[-1] != N or 0 in v.shape:
            raise ShapeError(
                f"{field}.values",
                expected=f"(trials, bins, {N}), at least one of each",
                got=str(tuple(v.shape)),
            )
        if mask.shape != v.shape:
            raise ShapeError(
                f"{field}.mask", expected=f"the values' shape {tuple(v.shape)}", got=str(mask.shape)
            )
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ShapeError(f"{field}.mask", expected="zeros and ones", got="other numbers")
        if not bool(v.isfinite().all()):
            raise ShapeError(
                f"{field}.values",
                expected="finite numbers, those not observed masked",
                got=f"{int((~v.isfinite()).sum())} that are not",
            )

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


def padded(
    trials: Sequence[Float[Tensor, "_ N"]],
) -> tuple[Observed, Float[Tensor, "B T"]]:
    """Pad trials of different lengths to a batch, with zeros and a zero mask after their ends.

    Args:
        trials: (T_b, N) each, with the same dtype and device.

    Returns:
        the observations (B, max T_b, N), and ``live`` (B, max T_b): one for bins of a trial, zero
        after its end (``elbo.bound`` leaves the inputs there out of the bound).

    Raises:
        ShapeError: there are no trials, or numbers of channels differ.
    """
    if not trials or any(x.ndim != 2 or x.shape[1] != trials[0].shape[1] for x in trials):
        raise ShapeError(
            "trials",
            expected="at least one, (bins, channels) each, of the same channels",
            got=str([tuple(x.shape) for x in trials]),
        )
    T = max(len(x) for x in trials)
    values = trials[0].new_zeros(len(trials), T, trials[0].shape[1])
    live = trials[0].new_zeros(len(trials), T)
    for i, x in enumerate(trials):
        values[i, : len(x)], live[i, : len(x)] = x, 1.0
    return Observed(values, live.unsqueeze(-1).expand_as(values)), live
