"""The readout's hidden layer: beside the linear map, y = W x + b + O tanh(U x + c).

Adam on the squared error of standardised features and targets, dropout on both layers, weight
decay, a one-cycle learning rate, a fixed number of epochs; several members from different starts
are averaged, which is again one layer. It begins as the linear map it is given (O = 0).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ilqr_training.config import ReadoutConfig

Array = NDArray[np.float64]

_BATCH = 256
_RATE = 3e-3
_DECAY = 1e-3


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
        """Without a hidden layer."""
        return Maps(W, b, np.zeros((0, W.shape[1])), np.zeros(0), np.zeros((len(W), 0)))

    def __call__(self, x: Array) -> Array:
        """(T, F) -> (T, D)."""
        return x @ self.W.T + self.b + np.tanh(x @ self.U.T + self.c) @ self.O.T

    def reading(self, columns: slice) -> Maps:
        """Of some features alone; those left out must not be read."""
        return Maps(self.W[:, columns], self.b, self.U[:, columns], self.c, self.O)


def _member(x: Tensor, y: Tensor, start: Maps, config: ReadoutConfig, seed: int) -> Maps:
    g = torch.Generator().manual_seed(seed)
    T, F = x.shape
    h, D = config.hidden, y.shape[1]

    def parameter(values: Array | Tensor) -> Tensor:
        return torch.as_tensor(values, dtype=x.dtype).clone().requires_grad_()

    W, b = parameter(start.W), parameter(start.b)
    U, c = parameter(torch.randn(h, F, generator=g) / F**0.5), parameter(torch.zeros(h))
    O = parameter(torch.zeros(D, h))  # noqa: E741
    batch = min(_BATCH, T)
    steps = config.epochs * (T // batch)
    optimiser = torch.optim.AdamW([W, b, U, c, O], lr=_RATE, weight_decay=_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, _RATE, total_steps=steps)

    def drop(values: Tensor, share: float) -> Tensor:
        kept = torch.rand(values.shape, generator=g) >= share
        return values * kept / (1 - share)

    for _ in range(config.epochs):
        order = torch.randperm(T, generator=g)
        for k in range(T // batch):
            rows = order[k * batch : (k + 1) * batch]
            xs = drop(x[rows], config.dropout / 2)
            units = drop((xs @ U.T + c).tanh(), config.dropout)
            loss = ((xs @ W.T + b + units @ O.T - y[rows]) ** 2).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return Maps(*(t.detach().double().numpy() for t in (W, b, U, c, O)))


def fit_hidden(x: Array, y: Array, start: Maps, config: ReadoutConfig, seed: int) -> Maps:
    """``config.members`` hidden layers of ``config.hidden`` units, averaged.

    Args:
        x: (T, F) standardised features; y: (T, D) standardised targets.
        start: the linear map to begin from.
        seed: of starts, order and dropout; the same seed gives the same layer.
    """
    xs, ys = torch.as_tensor(x, dtype=torch.float32), torch.as_tensor(y, dtype=torch.float32)
    made = [_member(xs, ys, start, config, seed * 1000 + i) for i in range(config.members)]
    M = len(made)
    return Maps(
        W=np.mean([m.W for m in made], 0),
        b=np.mean([m.b for m in made], 0),
        U=np.concatenate([m.U for m in made]),
        c=np.concatenate([m.c for m in made]),
        O=np.concatenate([m.O for m in made], 1) / M,
    )
