"""Plausible ranges: of the count of a unit in a bin, of latents and of decodes.

A count c of a unit is used up to

    limit = ceil(r + 8 sqrt(r + 1) + 8),      r = 2 h,

with h the unit's highest count in training: a Poisson count of twice that mean exceeds the limit
with a probability below 1e-12. A count above the limit is ignored, as if its unit had not been
observed in that bin. So is a feature that is farther from its centre than 2 h + 8 of its standard
deviations (``likelihoods.CountsAndFeatures``), with h the farthest in training. An answer is
*beyond* the training range if a unit's expected count is above its limit, if a latent or a
kinematic channel is farther from the middle of its range in training than three times half that
range, or if all units observed in the bin were ignored. A state a thousand times as far from the
middle of the latents, or one that is not finite, is *lost*: the stream restarts.

A model file without training ranges gets wider bounds: h = max(20 mean rate, 10), latents within a
hundred prior standard deviations (at least 1 each), kinematics within thirty standard deviations.
All bounds depend only on the model file, so that a replay ignores the same counts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from ilqr_vae.errors import ShapeError
from ilqr_vae.model.generative import Model
from ilqr_vae.model.likelihoods import Counts, Likelihood
from ilqr_vae.model.readout import KinematicReadout

_SURPRISE = 8.0
_LOST = 1e3


class TrainingRange(NamedTuple):
    """Ranges in the training part.

    Attributes:
        counts: highest count of each unit in a bin (``highest_counts``); of a feature how far it
            is from its centre, in standard deviations.
        latents: lowest and highest causal estimate of each latent.
        kinematics: lowest and highest of each channel; D = 0 without kinematics.
    """

    counts: Float[Tensor, " N"]
    latents: Float[Tensor, "2 n"]
    kinematics: Float[Tensor, "2 D"]


class PlausibleBounds(NamedTuple):
    """The plausible ranges of a model.

    Attributes:
        counts: (N,) largest count of each unit in a bin; of a feature the largest distance from its
            centre, in standard deviations.
        latent_centre, latent_reach, latent_lost: (n,) the middle of the range, and the distances
            from it at which an estimate is beyond the range and a state is lost.
        decode_centre, decode_reach: (D,) the same for the kinematics.
    """

    counts: Tensor
    latent_centre: Tensor
    latent_reach: Tensor
    latent_lost: Tensor
    decode_centre: Tensor
    decode_reach: Tensor

    def lost(
        self,
        mean: Float[Tensor, "S n"],
        z: Float[Tensor, "S H1 n"],
        u: Float[Tensor, "S H m"],
    ) -> Bool[Tensor, " S"]:
        """Return which states, given by arrival means and trajectories, are lost."""
        kept = ((z - self.latent_centre).abs() <= self.latent_lost).flatten(1).all(-1)
        kept = kept & ((mean - self.latent_centre).abs() <= self.latent_lost).all(-1)
        return ~(kept & u.isfinite().flatten(1).all(-1))

    def beyond(
        self,
        z: Float[Tensor, "S n"],
        rates: Float[Tensor, "S N"],
        kinematics: Float[Tensor, "S D"],
    ) -> Bool[Tensor, " S"]:
        """Return which answers are beyond the training range."""
        within = ((z - self.latent_centre).abs() <= self.latent_reach).all(-1)
        within = within & (rates.abs() <= self.counts).all(-1)
        return ~(within & ((kinematics - self.decode_centre).abs() <= self.decode_reach).all(-1))


def check_bin(family: Likelihood, counts: Float[Tensor, "S N"], mask: Float[Tensor, "S N"]) -> None:
    """Refuse a bin that is impossible under the observation family.

    Raises:
        ShapeError: an observed value is not finite, or a count is negative.
    """
    if family.features:
        parts = counts.shape[-1] - family.features, family.features
        pairs = zip(family.parts, counts.split(parts, -1), mask.split(parts, -1), strict=True)
        for part, values, seen in pairs:
            check_bin(part, values, seen)
        return
    whole = isinstance(family, Counts)
    if counts.device.type == "cpu":  # numpy is much faster than torch for so few numbers
        x = counts.numpy()
        if (((x >= 0) if whole else np.isfinite(x)) & (x < np.inf)).all():
            return
    usable = counts.isfinite() & (counts >= 0) if whole else counts.isfinite()
    if not bool(usable.all()) and not bool((usable | (mask == 0)).all()):
        expected = "counts of zero or more" if whole else "finite numbers"
        got = float(counts[~usable & (mask != 0)][0])
        raise ShapeError("counts", expected=f"{expected} where observed", got=f"{got:g}")


def highest_counts(counts: NDArray[Any], mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the highest count of each unit, robust to a few corrupted bins.

    It is the largest count, but at most 4 (c + 1), where one bin in a thousand exceeds c.

    Args:
        counts, mask: (T, N) of the training part; mask is true where observed.
    """
    seen = np.ascontiguousarray(np.where(mask, counts, 0).T)
    usual = np.partition(seen, at := int(0.999 * (seen.shape[1] - 1)))[:, at]
    return np.minimum(seen.max(1).astype(np.float64), 4.0 * (1.0 + usual))


def bounds_of(
    model: Model,
    readout: KinematicReadout | None,
    mean_rate: Float[Tensor, " N"],
    seen: TrainingRange | None,
) -> PlausibleBounds:
    """Return the bounds of a model, with the device and dtype of ``mean_rate``."""
    prior_mean, prior_std = model.initial.mean.detach(), model.initial.log_scale.detach().exp()
    none = mean_rate.new_zeros(0)
    spread = none if readout is None else readout.spread
    if seen is None:
        highest = (20.0 * mean_rate).clamp(min=10.0)
        centre, reach = prior_mean, 100.0 * prior_std.clamp(min=1.0)
        decode_centre, decode_reach = none if readout is None else readout.centre, 30.0 * spread
    else:
        highest = torch.maximum(seen.counts, mean_rate.to(seen.counts))
        (low, high), (decode_low, decode_high) = seen.latents, seen.kinematics
        centre, reach = (low + high) / 2, 3.0 * torch.maximum((high - low) / 2, prior_std.to(low))
        decode_centre = (decode_low + decode_high) / 2
        decode_reach = 3.0 * torch.maximum((decode_high - decode_low) / 2, spread.to(decode_low))
    rate = 2.0 * highest
    limit = (rate + _SURPRISE * (rate + 1.0).sqrt() + _SURPRISE).ceil()
    if features := model.group("spikes").features:
        limit[-features:] = rate[-features:] + _SURPRISE
    made = (limit.to(mean_rate), centre, reach, _LOST * reach, decode_centre, decode_reach)
    return PlausibleBounds(*(x.to(mean_rate).contiguous() for x in made))
