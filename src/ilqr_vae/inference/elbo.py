"""The bound on log p(o) that training maximises (Schimel et al. 2022, eq. 7), and a tighter one.

    L = E_q [ sum_groups log p(o | z(z_0, u)) ]  -  KL( q(z_0, u) || p(z_0) p(u) )

q is a Gaussian around the iLQR optimum; the expectation is estimated by one reparameterised sample.
The KL is in closed form for Gaussian priors; for the Student, E_q[-log p(u)] is estimated by the
same sample. Inference may be conditioned on fewer groups than the expectation scores: e.g. on
spikes only, while the bound includes kinematics (section 3.4.2).

The importance-weighted bound with K samples (Burda et al. 2016) lies between L and log p(o):

    L_K = E [ log 1/K sum_i p(o, z_0^i, u^i) / q(z_0^i, u^i) ]
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ilqr_vae.inference.posterior import Draw, Sampler
from ilqr_vae.model.dynamics import Weights
from ilqr_vae.model.generative import Model
from ilqr_vae.model.likelihoods import Observations, Observed


@dataclass(frozen=True)
class Bound:
    """The bound and its parts, nats per trial.

    Attributes:
        groups: expected log-likelihood of each observation group.
        kl: divergence of q from the prior.
        z: the sampled trajectory.
    """

    groups: Mapping[str, Float[Tensor, " B"]]
    kl: Float[Tensor, " B"]
    z: Float[Tensor, "B T1 n"]

    def value(
        self, *, kl_weight: float = 1.0, group_weights: Mapping[str, float] | None = None
    ) -> Float[Tensor, " B"]:
        """Return the weighted sum of the parts; with all weights one it is the bound."""
        weights = group_weights or {}
        total = -kl_weight * self.kl
        for name, value in self.groups.items():
            total = total + weights.get(name, 1.0) * value
        return total


def bound(
    model: Model,
    w: Weights,
    z0: Float[Tensor, "B n"],
    u: Float[Tensor, "B T m"],
    draw: Draw,
    observed: Observations,
    *,
    live: Float[Tensor, "B T"] | None = None,
) -> Bound:
    """Compute the bound of a batch of trials.

    Args:
        z0, u: the optimum with its implicit gradient (``implicit.attach_gradient``).
        draw: sample and moments of the posterior.
        observed: all groups to score.
        live: for trials of different lengths (``likelihoods.padded``): one up to the end of a
            trial, zero after it. Inputs after the end do not contribute.
    """
    z0_sample, sample = z0 + draw.dz0, u + draw.du
    z = model.rollout(w, z0_sample, sample)
    groups = {k: v.sum(-1) for k, v in model.log_likelihood(z, observed).items()}
    cross = model.initial.cross_entropy(z0, draw.z0_var, z0_sample)
    per_bin = model.prior.cross_entropy(u, draw.u_var, sample)
    if live is None:
        kl = cross + per_bin.sum(-1) - draw.entropy
    else:
        kl = cross - draw.z0_entropy + ((per_bin - draw.u_entropy) * live).sum(-1)
    return Bound(groups=groups, kl=kl, z=z)


@torch.no_grad()
def importance_weighted(
    model: Model,
    w: Weights,
    z0: Float[Tensor, "B n"],
    u: Float[Tensor, "B T m"],
    sampler: Sampler,
    observed: Observations,
    *,
    samples: int,
    at_once: int = 10,
    live: Float[Tensor, "B T"] | None = None,
) -> Float[Tensor, " B"]:
    """Compute the importance-weighted bound of each trial in nats; one sample estimates L.

    Args:
        z0, u: mean of the posterior.
        sampler: draws its deviations (``Kronecker.sampler``, ``Laplace.sampler``).
        samples: K.
        at_once: number of samples per trial held in memory at once.
        live: as for ``bound``.
    """
    batch, done = z0.shape[0], 0
    total = torch.full_like(z0[:, 0], -math.inf)
    while done < samples:
        k = min(at_once, samples - done)
        draw = sampler(k)
        z0_k, u_k = z0.repeat(k, 1) + draw.dz0, u.repeat(k, 1, 1) + draw.du
        z = model.rollout(w, z0_k, u_k)
        log_w = model.initial.log_prob(z0_k) - draw.z0_log_q
        steps = model.prior.log_prob(u_k) - draw.u_log_q
        if live is not None:
            steps = steps * live.repeat(k, 1)
        log_w = log_w + steps.sum(-1)
        tiled = {
            name: Observed(o.values.repeat(k, 1, 1), o.mask.repeat(k, 1, 1))
            for name, o in observed.items()
        }
        for score in model.log_likelihood(z, tiled).values():
            log_w = log_w + score.sum(-1)
        total = torch.logaddexp(total, log_w.view(k, batch).logsumexp(0))
        done += k
    return total - math.log(samples)
