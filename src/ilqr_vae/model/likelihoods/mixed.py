"""Counts and continuous features of one group: N units first, then F features.

The parts are a family of counts and ``Gaussian``. A feature x is modelled in standard units,

    (x - centre) / scale = a + sigma e,      a = C z + b,      e ~ N(0, 1),

with the mean and standard deviation of the training part as ``centre`` and ``scale``. Values and
means of this family are in standard units throughout; ``Likelihood.standard`` and ``restored``
convert.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ilqr_vae.model.likelihoods.base import Likelihood, Observed
from ilqr_vae.model.likelihoods.counts import Counts
from ilqr_vae.model.likelihoods.gaussian import Gaussian


class CountsAndFeatures(Likelihood):
    """Both kinds side by side.

    Attributes:
        centre, scale: (F,), of the features.
    """

    family = "counts_and_features"
    centre: Tensor
    scale: Tensor

    def __init__(self, counts: Counts, features: Gaussian) -> None:
        nn.Module.__init__(self)  # C and b are the parts'
        self.counts, self.gaussian = counts, features
        self.features = len(features.log_scale)
        self.register_buffer("centre", torch.zeros(self.features))
        self.register_buffer("scale", torch.ones(self.features))

    @property
    def parts(self) -> tuple[Likelihood, ...]:
        return self.counts, self.gaussian

    @property
    def C(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        return torch.cat([part.C for part in self.parts])

    @property
    def b(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        return torch.cat([part.b for part in self.parts])

    @property
    def scaling(self) -> tuple[Tensor, Tensor]:
        units = self.counts.b.detach()
        centre, scale = torch.zeros_like(units), torch.ones_like(units)
        return torch.cat([centre, self.centre]), torch.cat([scale, self.scale])

    def _split(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.split([x.shape[-1] - self.features, self.features], -1)

    def _each(self, o: Observed) -> list[tuple[Likelihood, Observed]]:
        pairs = zip(self._split(o.values), self._split(o.mask), strict=True)
        return [(part, Observed(*pair)) for part, pair in zip(self.parts, pairs, strict=True)]

    def _beside(self, of: Callable[[Likelihood, tuple[Tensor, ...]], Tensor], *x: Tensor) -> Tensor:
        """What the parts make of their channels of ``x``, side by side."""
        each = zip(*(self._split(t) for t in x), strict=True)
        return torch.cat([of(p, given) for p, given in zip(self.parts, each, strict=True)], -1)

    def expected(self, a: Tensor) -> Tensor:
        return self._beside(lambda part, x: part.expected(*x), a)

    def log_prob(self, z: Tensor, o: Observed) -> Tensor:
        first, second = (part.log_prob(z, own) for part, own in self._each(o))
        return first + second

    def unnormalised(self, z: Tensor, o: Observed) -> Tensor:
        first, second = (part.unnormalised(z, own) for part, own in self._each(o))
        return first + second

    def score(self, z: Tensor, o: Observed) -> Tensor:
        first, second = (part.score(z, own) for part, own in self._each(o))
        return first + second

    def slope_along(self, z: Tensor, o: Observed, dz: Tensor) -> Tensor:
        first, second = (part.slope_along(z, own, dz) for part, own in self._each(o))
        return first + second

    def derivatives(self, a: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        given = zip(self._split(a), self._split(values), strict=True)
        each = [part.derivatives(*x) for part, x in zip(self.parts, given, strict=True)]
        slope, curvature = (torch.cat(both, -1) for both in zip(*each, strict=True))
        return slope, curvature

    def curvature(self, a: Tensor, values: Tensor) -> Tensor:
        return self._beside(lambda part, x: part.curvature(*x), a, values)

    def sample(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.cat([part.sample(z, generator) for part in self.parts], -1)

    def evidence(self, mean: Tensor, baseline: Tensor, values: Tensor) -> Tensor:
        return self._beside(lambda part, x: part.evidence(*x), mean, baseline, values)

    def start_at(self, mean: Tensor) -> None:
        for part, own in zip(self.parts, self._split(mean), strict=True):
            part.start_at(own)

    def check(self, o: Observed, field: str) -> None:
        if o.values.ndim != 3 or o.values.shape[-1] != len(self.b):
            super().check(o, field)
        for part, own in self._each(o):
            part.check(own, field)
