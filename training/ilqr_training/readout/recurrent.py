"""Fitting the readout's recurrent layer (``ilqr_vae.model.readout``): y = C h + d.

Each row is a window: the initial state, and the counts of the bins to run over. The layer is
trained by AdamW on the squared error of standardised targets, with dropout on inputs and on h and a
cosine learning rate. For missing bins it reads the counts that the latents predict, so it is also
trained on passes in which bins were lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ilqr_training.config import ReadoutConfig
from ilqr_training.readout.hidden import dropped
from ilqr_vae.model.readout import Cell, run
from ilqr_vae.progress import SILENT, Progress

Array = NDArray[np.float64]

_BATCH = 256
_RATE = 3e-3
_DECAY = 1e-3
_CLIP = 1.0
CHECKPOINTS = 3
"""Number of equally spaced points of training at which the layer is returned."""


@dataclass(frozen=True)
class Windows:
    """The inputs of a recurrent layer, one row per bin.

    Attributes:
        z: (T, n) initial state.
        held: (T,) number of bins to run over.
        counts: (T, L, N) float32, newest first.
    """

    z: Array
    held: NDArray[np.int64]
    counts: NDArray[np.float32]

    @staticmethod
    def of(x: Array, recalled: NDArray[np.float32], lags: int, n: int) -> Windows:
        """Build from the features ``x`` (latents first) and ``Causal.recalled``."""
        T, L = len(x), lags
        counts = recalled[:, 1:].reshape(T, L, -1)
        return Windows(x[:, L * n : (L + 1) * n], recalled[:, 0].astype(np.int64), counts)


@dataclass(frozen=True)
class Recurrent:
    """A fitted layer. Attributes: its cell; C (D, g), d (D,), for standardised targets; float64."""

    cell: Cell
    C: Array
    d: Array

    def __call__(self, windows: Windows) -> Array:
        """Return decodes (T, D) in standardised units."""
        parts: list[Array] = []
        cell = Cell(*(t.float() for t in self.cell))
        for a in range(0, len(windows.z), 4096):
            rows = slice(a, a + 4096)
            z = torch.as_tensor(windows.z[rows], dtype=torch.float32)
            counts, held = (torch.as_tensor(t[rows]) for t in (windows.counts, windows.held))
            parts.append(run(cell, z, counts, held).double().numpy())
        return np.concatenate(parts) @ self.C.T + self.d


def fit_recurrent(
    windows: Windows,
    y: Array,
    config: ReadoutConfig,
    seed: int,
    *,
    progress: Progress = SILENT,
) -> Iterator[tuple[int, Recurrent]]:
    """Yield the layer at points of its training, with the number of gradient steps so far.

    Args:
        y: (T, D) standardised targets.
        seed: seed of initial weights, order and dropout; the same seed gives the same layers.
        progress: receives the gradient steps.
    """
    g = torch.Generator().manual_seed(seed)
    z, counts = torch.as_tensor(windows.z, dtype=torch.float32), torch.as_tensor(windows.counts)
    held, ys = torch.as_tensor(windows.held), torch.as_tensor(y, dtype=torch.float32)
    (T, n), N, units, D = z.shape, counts.shape[2], config.recurrent, y.shape[1]
    newest = windows.counts[:, 0].astype(np.float64)
    scale = _Scale(windows.z.mean(0), windows.z.std(0) + 1e-9, newest.mean(0), _spread(newest))
    z = (z - torch.as_tensor(scale.z_mean).float()) / torch.as_tensor(scale.z_scale).float()
    x_mean, x_scale = (torch.as_tensor(t).float() for t in (scale.x_mean, scale.x_scale))

    def start(*size: int, width: int) -> Tensor:
        return ((2 * torch.rand(size, generator=g) - 1) / width**0.5).requires_grad_()

    cell = Cell(
        A=start(units, n, width=n),
        a=start(units, width=n),
        P=start(3 * units, N, width=units),
        p=start(3 * units, width=units),
        G=start(3 * units, units, width=units),
        g=start(3 * units, width=units),
    )
    C, d = start(D, units, width=units), start(D, width=units)
    parameters = [*cell, C, d]
    optimiser = torch.optim.AdamW(parameters, lr=_RATE, weight_decay=_DECAY)
    steps = config.recurrent_steps
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)

    looks = {max(1, steps * (i + 1) // CHECKPOINTS) for i in range(CHECKPOINTS)}
    for step in range(1, steps + 1):
        rows = torch.randint(T, (min(_BATCH, T),), generator=g)
        seen = dropped((counts[rows] - x_mean) / x_scale, config.dropout, g)
        h = run(cell, z[rows], seen, held[rows])
        decoded = dropped(h, config.dropout, g) @ C.mT + d
        loss = ((decoded - ys[rows]) ** 2).mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, _CLIP)
        optimiser.step()
        schedule.step()
        progress("readout, recurrent", step, steps)
        if step in looks:
            made = [t.detach().double() for t in parameters]
            yield step, scale.undone(Cell(*made[:6]), made[6].numpy(), made[7].numpy())


@dataclass(frozen=True)
class _Scale:
    z_mean: Array
    z_scale: Array
    x_mean: Array
    x_scale: Array

    def undone(self, cell: Cell, C: Array, d: Array) -> Recurrent:
        """Convert the layer from standardised inputs to original ones."""
        A = cell.A / torch.as_tensor(self.z_scale)
        P = cell.P / torch.as_tensor(self.x_scale)
        a = cell.a - A @ torch.as_tensor(self.z_mean)
        p = cell.p - P @ torch.as_tensor(self.x_mean)
        return Recurrent(cell._replace(A=A, a=a, P=P, p=p), C, d)


def _spread(counts: Array) -> Array:
    # do not amplify a unit that hardly fires
    return np.sqrt(counts.var(0) + 1e-2)
