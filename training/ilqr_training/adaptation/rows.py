"""The M-step: the observation row of each unit, by convex regression on draws of the latents.

Notation: unit i has the row w_i = (C_i, b_i), and x = (z, 1). Given draws z_k of the latents of T
bins from their posterior, each with weight 1 / K, the row is the maximum of

    sum_tk mask_ti / K log p(y_ti | w_i' x_tk) - 1/2 (w_i - v_i)' S_i (w_i - v_i)

with a Gaussian prior of mean v_i and precision S_i. It is found by Newton steps for all units at
once, with the gradient of all draws and, for many bins, the Hessian of the first ones; a step that
does not improve a unit is halved. The families are concave in their affine argument, so the maximum
is unique (Dempster, Laird & Rubin 1977 for EM; Smith & Brown 2003 for latent point processes).
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
_AT_ONCE = 2048  # number of draws whose outer products are held at once


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


@torch.no_grad()
def fit_rows(
    spikes: Counts,
    z: Float[Tensor, "K T n"],
    y: Float[Tensor, "T N"],
    mask: Float[Tensor, "T N"],
    prior: RowPrior,
    start: Float[Tensor, "N F"] | None = None,
) -> Float[Tensor, "N F"]:
    """Fit the rows (N, n + 1) of N units.

    Args:
        spikes: the observation family; its own rows are not used.
        z: K draws of the latents.
        y: counts.
        mask: one for observed counts, else zero.
        start: rows from which to iterate; default: the prior mean.

    Returns:
        (N, n + 1).
    """
    K, T, _ = z.shape
    x = torch.cat([z, torch.ones_like(z[..., :1])], -1)
    F, N = x.shape[-1], y.shape[1]
    pairs = torch.triu_indices(F, F)
    weight = mask / K
    curved = max(1, min(K, _AT_ONCE // T))  # draws of the Hessian

    def cost(w: Tensor) -> Tensor:
        found = (spikes.log_p(x @ w.mT, y.expand(K, T, N)) * weight).sum((0, 1))
        return prior.cost(w) - found

    w = prior.mean.clone() if start is None else start.clone()
    least = cost(w)
    for _ in range(_STEPS):
        slope, curve = spikes.derivatives(x @ w.mT, y.expand(K, T, N))
        apart = torch.einsum("nab,nb->na", prior.precision, w - prior.mean)
        gradient = (slope * weight).flatten(0, 1).mT @ x.flatten(0, 1) + apart
        upper = y.new_zeros(N, pairs.shape[1])
        bend, at = (curve[:curved] * mask / curved).flatten(0, 1), x[:curved].flatten(0, 1)
        for part in torch.arange(len(at)).split(_AT_ONCE):
            upper += bend[part].mT @ (at[part][:, pairs[0]] * at[part][:, pairs[1]])
        hessian = prior.precision.clone()
        hessian[:, pairs[0], pairs[1]] += upper
        hessian[:, pairs[1], pairs[0]] = hessian[:, pairs[0], pairs[1]]
        factor = torch.linalg.cholesky(hessian)
        step = torch.cholesky_solve(gradient.unsqueeze(-1), factor).squeeze(-1)
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
