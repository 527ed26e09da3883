"""The bound on log p(o) that training raises (Schimel et al. 2022, eq. 8).

    L = E_q [ sum_groups log p(o | z(z_0, u)) ]  -  KL( q(z_0, u) || p(z_0) p(u) )

q is a Gaussian around the iLQR optimum; the expectation is one reparameterised sample, the KL is in
closed form for Gaussian priors. Recognition may be conditioned on fewer groups than the expectation
scores: spikes alone at test time, kinematics too in the bound (section 3.4.2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ilqr_vae.dynamics import Weights
from ilqr_vae.likelihoods import Observations
from ilqr_vae.model import Model
from ilqr_vae.posterior import Draw
from ilqr_vae.priors import LOG_2PI, DiagonalGaussian


@dataclass(frozen=True)
class Bound:
    """The bound and its parts, nats per trial.

    Attributes:
        groups: expected log-likelihood of each observation group.
        kl: of q from the prior.
        z: the sampled trajectory.
    """

    groups: Mapping[str, Float[Tensor, " B"]]
    kl: Float[Tensor, " B"]
    z: Float[Tensor, "B T1 n"]

    def value(
        self, *, kl_weight: float = 1.0, group_weights: Mapping[str, float] | None = None
    ) -> Float[Tensor, " B"]:
        """Sum of the parts; all weights one is the bound itself."""
        weights = group_weights or {}
        total = -kl_weight * self.kl
        for name, value in self.groups.items():
            total = total + weights.get(name, 1.0) * value
        return total


def _cross_entropy(prior: DiagonalGaussian, mean: Tensor, var: Tensor) -> Tensor:
    """E over N(mean, var) of -log prior, summed over the last axis."""
    scaled = ((mean - prior.mean) ** 2 + var) * torch.exp(-2 * prior.log_scale)
    return (0.5 * scaled + prior.log_scale + 0.5 * LOG_2PI).sum(-1)


def bound(
    model: Model,
    w: Weights,
    z0: Float[Tensor, "B n"],
    u: Float[Tensor, "B T m"],
    draw: Draw,
    observed: Observations,
) -> Bound:
    """The bound for a batch of trials.

    Args:
        z0, u: the optimum, carrying its implicit gradient (``implicit.attach_gradient``).
        draw: the posterior's sample and moments.
        observed: every group to be scored.
    """
    z = model.rollout(w, z0 + draw.dz0, u + draw.du)
    groups = {k: v.sum(-1) for k, v in model.log_likelihood(z, observed).items()}
    cross = _cross_entropy(model.initial, z0, draw.z0_var)
    cross = cross + _cross_entropy(model.prior, u, draw.u_var).sum(-1)
    return Bound(groups=groups, kl=cross - draw.entropy, z=z)
