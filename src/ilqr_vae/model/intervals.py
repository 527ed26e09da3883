"""Intervals that are calibrated at every speed, by a scale that depends on the decoded speed.

With y the decode and v = |y / unit| its speed, the deviation of channel d is multiplied by f_d(v),
which is linear between knots and constant beyond the first and the last. The factors are fitted on
held-out errors (``ilqr_training.readout.intervals``).
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Numbers = TypeVar("Numbers", Tensor, NDArray[Any])


class SpeedScale(NamedTuple):
    """Factors by decoded speed.

    Attributes:
        unit: (D,) divisor of each channel.
        knots: (J,) speeds, strictly increasing, J at least 2.
        factors: (J, D), positive.
    """

    unit: Tensor
    knots: Tensor
    factors: Tensor

    def at(self, mean: Numbers) -> Numbers:
        """Return f (*, D) at decodes (*, D)."""
        if isinstance(mean, Tensor):
            unit, knots, factors = (t.to(mean) for t in self)
            speed = torch.linalg.vector_norm(mean / unit, dim=-1, keepdim=True)
            passed = ((speed - knots[:-1]) / knots.diff()).clip(0, 1)
            return factors[0] + passed @ factors.diff(dim=0)
        unit, knots, factors = (t.numpy().astype(mean.dtype, copy=False) for t in self)
        pace = np.sqrt(((mean / unit) ** 2).sum(-1, keepdims=True))
        share = ((pace - knots[:-1]) / np.diff(knots)).clip(0, 1)
        return factors[0] + (share[..., None] * np.diff(factors, axis=0)).sum(-2)


def stated(scale: SpeedScale | None, mean: Numbers, std: Numbers) -> Numbers:
    """Return the deviations (*, D) to state; without a scale they are unchanged."""
    return std if scale is None else std * scale.at(mean)
