"""The M-step: the observation row of each unit, by convex regression on draws of the latents.

Notation: unit i has the row w_i = (C_i, b_i), and x = (z, 1). Given draws z_k of the latents of T
bins from their posterior, each with weight 1 / K, the row is the maximum of

    sum_tk mask_ti / K log p(y_ti | w_i' x_tk) - 1/2 (w_i - v_i)' S_i (w_i - v_i)

with a Gaussian prior of mean v_i and precision S_i. It is found by Newton steps for all units at
once; a step that does not improve a unit is halved. The families are concave in their affine
argument, so the maximum is unique (Dempster, Laird & Rubin 1977 for EM; Smith & Brown 2003 for
latent point processes).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ilqr_vae.model.likelihoods import Counts

_STEPS = 25
_HALVINGS = 8
_CLOSE = 1e-10
_AT_ONCE = 4096  # number of draws whose outer products are held at once


@dataclass(frozen=True)
class RowPrior:
    """Gaussian priors of N rows of n + 1 weights, of which the last is the constant's.

    Attributes:
        mean: (N, n + 1).
        precision: (N, n + 1, n + 1).
    """

    mean: Float[Tensor, "N F"]
    precision: Float[Tensor, "N F F"]

    @staticmethod
    def of(mean: Float[Tensor, "N F"], loadings: Float[Tensor, "n n"], level: float) -> RowPrior:
        """Build priors with the same precision of C for all units, and a deviation of b."""
        N, F = mean.shape
        precision = mean.new_zeros(N, F, F)
        precision[:, :-1, :-1] = loadings
        precision[:, -1, -1] = 1 / level**2
        return RowPrior(mean, precision)

    def where(self, units: Bool[Tensor, " N"], other: RowPrior) -> RowPrior:
        """Return these priors for the chosen units, and those of ``other`` for the rest."""
        mean = torch.where(units.view(-1, 1), self.mean, other.mean)
        return RowPrior(mean, torch.where(units.view(-1, 1, 1), self.precision, other.precision))

    def of_units(self, units: Int[Tensor, " M"]) -> RowPrior:
        """Return the priors of some units."""
        return RowPrior(self.mean[units], self.precision[units])

    def cost(self, w: Float[Tensor, "N F"]) -> Float[Tensor, " N"]:
        """Return half the squared Mahalanobis distance of each row from its prior mean."""
        apart = w - self.mean
        return 0.5 * torch.einsum("na,nab,nb->n", apart, self.precision, apart)


def log_p(
    spikes: Counts, a: Float[Tensor, "*batch N"], y: Float[Tensor, "*batch N"]
) -> Float[Tensor, "*batch N"]:
    """Return log p of each count relative to that under an expected count of one, in nats."""
    return spikes.evidence(spikes.expected(a), torch.ones_like(a), y)


@torch.no_grad()
def fit_rows(
    spikes: Counts,
    z: Float[Tensor, "K T n"],
    y: Float[Tensor, "T N"],
    mask: Float[Tensor, "T N"],
    prior: RowPrior,
) -> Float[Tensor, "N F"]:
    """Fit the rows (N, n + 1) of N units, starting from the prior mean.

    Args:
        spikes: the observation family; its own rows are not used.
        z: K draws of the latents.
        y: counts.
        mask: one for observed counts, else zero.

    Returns:
        (N, n + 1).
    """
    K = len(z)
    x = torch.cat([z, torch.ones_like(z[..., :1])], -1).flatten(0, 1)
    y, weight = y.repeat(K, 1), mask.repeat(K, 1) / K
    F, N = x.shape[1], y.shape[1]

    def cost(w: Tensor) -> Tensor:
        return -(log_p(spikes, x @ w.mT, y) * weight).sum(0) + prior.cost(w)

    w = prior.mean.clone()
    least = cost(w)
    for _ in range(_STEPS):
        slope, curve = spikes.derivatives(x @ w.mT, y)
        apart = torch.einsum("nab,nb->na", prior.precision, w - prior.mean)
        gradient = (slope * weight).mT @ x + apart
        hessian = prior.precision.clone()
        for part in torch.arange(len(x)).split(_AT_ONCE):
            outer = (x[part].unsqueeze(2) * x[part].unsqueeze(1)).flatten(1)
            hessian += ((curve[part] * weight[part]).mT @ outer).view(N, F, F)
        step = torch.linalg.solve(hessian, gradient.unsqueeze(-1)).squeeze(-1)
        share, tried, found = torch.ones_like(least), w - step, cost(w - step)
        for _ in range(_HALVINGS):
            worse = ~(found <= least)
            if not bool(worse.any()):
                break
            share = torch.where(worse, share / 2, share)
            tried = w - share.unsqueeze(-1) * step
            found = cost(tried)
        better = found <= least
        w = torch.where(better.unsqueeze(-1), tried, w)
        gained = torch.where(better, least - found, 0.0)
        least = least - gained
        if bool((gained <= _CLOSE * (1 + least.abs())).all()):
            break
    return w
