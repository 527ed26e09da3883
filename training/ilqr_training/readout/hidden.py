"""The readout's hidden layer: beside the linear map, y = W x + b + O relu(U x + c).

W and b come from the ridge regression and stay fixed; the layer learns the residual. It is trained
by AdamW on the squared error of standardised features and targets, with dropout on features and
hidden units, a one-cycle learning rate, and a fixed number of gradient steps for any length of
recording. W reads the dropped features too, so the layer also learns to compensate for missing
features. At times all bins of a unit are dropped together, as when it falls silent. Several members
with different initial weights are averaged, which is again one layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ilqr_training.config import ReadoutConfig
from ilqr_vae.progress import SILENT, Progress

Array = NDArray[np.float64]

_BATCH = 256
_RATE = 3e-3
_DECAY = 0.1


@dataclass(frozen=True)
class Maps:
    """W (D, F), b (D,), U (h, F), c (h,), O (D, h)."""

    W: Array
    b: Array
    U: Array
    c: Array
    O: Array  # noqa: E741 (the letter of the formula)

    @staticmethod
    def linear(W: Array, b: Array) -> Maps:
        """Return maps without a hidden layer."""
        return Maps(W, b, np.zeros((0, W.shape[1])), np.zeros(0), np.zeros((len(W), 0)))

    def __call__(self, x: Array) -> Array:
        """Map features (T, F) to targets (T, D)."""
        return x @ self.W.T + self.b + np.maximum(x @ self.U.T + self.c, 0) @ self.O.T

    def share(self, share: float) -> Maps:
        """Return maps with ``share`` of the hidden layer's contribution."""
        return Maps(self.W, self.b, self.U, self.c, share * self.O)

    def reading(self, columns: slice) -> Maps:
        """Return maps of some features only; the others must have no weight."""
        return Maps(self.W[:, columns], self.b, self.U[:, columns], self.c, self.O)


def dropped(values: Tensor, share: float, g: torch.Generator) -> Tensor:
    """Apply dropout: zero this share of the numbers and scale up the others."""
    kept = torch.rand(values.shape, generator=g) >= share
    return values * kept / (1 - share)


def fit_hidden(
    x: Array,
    y: Array,
    start: Maps,
    config: ReadoutConfig,
    seed: int,
    *,
    units: int = 0,
    progress: Progress = SILENT,
) -> Maps:
    """Add the mean of ``config.members`` hidden layers of ``config.hidden`` units to ``start``.

    Args:
        x: (T, F) standardised features; y: (T, D) standardised targets.
        start: the linear map.
        units: number of units whose residual spikes are the last ``config.residuals * units``
            features, bin by bin; zero if there are none.
        seed: seed of initial weights, order and dropout; the same seed gives the same layer.
        progress: receives the gradient steps.
    """
    xs, ys = torch.as_tensor(x, dtype=torch.float32), torch.as_tensor(y, dtype=torch.float32)
    W, b = (torch.as_tensor(t, dtype=torch.float32) for t in (start.W, start.b))
    g = torch.Generator().manual_seed(seed)
    (T, F), D, M, h = x.shape, y.shape[1], config.members, config.hidden
    U = (torch.randn(M, h, F, generator=g) / F**0.5).requires_grad_()
    c = torch.zeros(M, 1, h, requires_grad=True)
    O = torch.zeros(M, D, h, requires_grad=True)  # noqa: E741 (the letter of the formula)
    optimiser = torch.optim.AdamW([U, c, O], lr=_RATE, weight_decay=_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, _RATE, total_steps=config.steps)

    spikes = config.residuals * units

    def silence(values: Tensor) -> Tensor:
        # not scaled up: a unit missing from a stream reads as zero, the mean
        kept = torch.rand((*values.shape[:2], units), generator=g) >= config.dropout / 2
        silent = values[..., F - spikes :] * kept.repeat(1, 1, config.residuals)
        return torch.cat([values[..., : F - spikes], silent], -1)

    batches = _batches(T, M, g)
    for step in range(1, config.steps + 1):
        rows = next(batches)
        seen = dropped(silence(xs[rows]) if spikes else xs[rows], config.dropout / 2, g)
        active = dropped(torch.baddbmm(c, seen, U.mT).relu(), config.dropout, g)
        error = seen @ W.T + b + active @ O.mT - ys[rows]
        # the sum over members, which share no parameters
        loss = (error**2).mean((1, 2)).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        progress("readout, hidden", step, config.steps)
    made = [t.detach().double().numpy() for t in (U, c, O)]
    return Maps(
        W=start.W,
        b=start.b,
        U=made[0].reshape(M * h, F),
        c=made[1].reshape(M * h),
        O=made[2].transpose(1, 0, 2).reshape(D, M * h) / M,
    )


def _batches(T: int, members: int, g: torch.Generator) -> Iterator[Tensor]:
    """Yield rows (members, batch): epochs of all rows, without a remainder, for each member."""
    batch = min(_BATCH, T)
    while True:
        order = torch.stack([torch.randperm(T, generator=g) for _ in range(members)])
        yield from order[:, : T // batch * batch].split(batch, dim=1)
