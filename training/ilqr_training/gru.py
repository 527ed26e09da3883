"""The baseline a lab would train instead: a causal GRU from spike counts to kinematics.

    x_t = (counts_t - mean) / std,   h_t = GRU(x_t, h_{t-1}),   y_t = W h_t + b

One pass over time, so bin t knows nothing later. Fitted on random crops of the training part with
dropout on its inputs and its outputs, a cosine learning rate, and early stopping on the validation
part; size and dropout are chosen there too, over ``GRID``. Missing bins are given zeros or the last
bin that came: a GRU has no better way.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ilqr_vae.metrics import r2

Array = NDArray[np.float64]
Missing = Literal["zeros", "last"]

_CROP, _BATCH, _RUN_IN = 60, 64, 10


@dataclass(frozen=True)
class GRUConfig:
    """One candidate.

    Attributes:
        hidden: units.
        dropout: of inputs and outputs.
        steps: gradient steps at most.
        rate: highest learning rate of Adam.
        decay: weight decay.
    """

    hidden: int = 128
    dropout: float = 0.4
    steps: int = 1500
    rate: float = 3e-3
    decay: float = 1e-3


GRID: tuple[GRUConfig, ...] = tuple(
    GRUConfig(hidden=hidden, dropout=dropout) for hidden in (64, 128) for dropout in (0.3, 0.5)
)


class _Net(nn.Module):
    def __init__(self, units: int, channels: int, config: GRUConfig) -> None:
        super().__init__()
        self.drop = nn.Dropout(config.dropout)
        self.gru = nn.GRU(units, config.hidden, batch_first=True)
        self.out = nn.Linear(config.hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.drop(self.gru(self.drop(x))[0]))


@dataclass(frozen=True)
class GRUDecoder:
    """A fitted GRU.

    Attributes:
        config: the candidate chosen.
        validation_r2: its mean R2 on the validation part.
    """

    config: GRUConfig
    validation_r2: float
    _net: _Net
    _x: tuple[Array, Array]
    _y: tuple[Array, Array]

    @staticmethod
    def fit(
        counts: NDArray[np.float64],
        kinematics: Array,
        *,
        train: tuple[int, int],
        validation: tuple[int, int],
        valid: NDArray[np.bool_],
        seed: int = 0,
        grid: tuple[GRUConfig, ...] = GRID,
        progress: Callable[[int, int], None] | None = None,
    ) -> GRUDecoder:
        """Fit every candidate; keep the best on the validation part.

        Args:
            counts: (T, N); kinematics: (T, D); valid: (T,) bins that are there.
            train, validation: half-open ranges of bins.
            progress: called with (gradient steps done, of).
        """
        total, made = sum(c.steps for c in grid), []
        for i, config in enumerate(grid):
            done = sum(c.steps for c in grid[:i])

            def say(step: int, done: int = done) -> None:
                if progress is not None:
                    progress(done + step, total)

            made.append(_fit(counts, kinematics, train, validation, valid, seed, config, say))
        return max(made, key=lambda d: d.validation_r2)

    @torch.no_grad()
    def predict(
        self,
        counts: NDArray[np.float64],
        start: int = 0,
        stop: int | None = None,
        *,
        seen: NDArray[np.bool_] | None = None,
        missing: Missing = "zeros",
    ) -> Array:
        """Decodes (stop - start, D) of bins [start, stop), from bin 0 on, causally.

        Args:
            counts: (T, N).
            seen: (T,), False where a bin is missing; None means all are there.
            missing: what stands in for those.
        """
        stop = len(counts) if stop is None else stop
        x = (filled(counts, seen, missing) - self._x[0]) / self._x[1]
        self._net.eval()
        y = self._net(torch.as_tensor(x[:stop], dtype=torch.float32).unsqueeze(0))[0]
        return y[start:].double().numpy() * self._y[1] + self._y[0]


def filled(counts: Array, seen: NDArray[np.bool_] | None, missing: Missing) -> Array:
    """Counts (T, N) with something in place of the bins that are missing."""
    x = np.asarray(counts, dtype=np.float64).copy()
    if seen is None or bool(seen.all()):
        return x
    if missing == "zeros":
        x[~seen] = 0.0
        return x
    last = np.maximum.accumulate(np.where(seen, np.arange(len(x)), -1))
    x[last >= 0] = x[last[last >= 0]]
    x[last < 0] = 0.0
    return x


def _fit(
    counts: Array,
    kinematics: Array,
    train: tuple[int, int],
    validation: tuple[int, int],
    valid: NDArray[np.bool_],
    seed: int,
    config: GRUConfig,
    say: Callable[[int], None],
) -> GRUDecoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        a, b = train
        rows = np.flatnonzero(valid[a:b]) + a
        mean, std = counts[rows].mean(0), np.sqrt(counts[rows].var(0) + 1e-2)
        centre, spread = kinematics[rows].mean(0), kinematics[rows].std(0) + 1e-12
        x = torch.as_tensor((filled(counts, valid, "zeros") - mean) / std, dtype=torch.float32)
        y = torch.as_tensor((kinematics - centre) / spread, dtype=torch.float32)
        weight = torch.as_tensor(valid, dtype=torch.float32)
        net = _Net(x.shape[1], y.shape[1], config)
        optimiser = torch.optim.AdamW(net.parameters(), lr=config.rate, weight_decay=config.decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, config.steps)
        crop = min(_CROP, b - a)
        run_in = min(_RUN_IN, crop - 1)
        chosen = np.arange(*validation)[valid[slice(*validation)]]
        decoder = GRUDecoder(config, -np.inf, net, (mean, std), (centre, spread))
        best, state = -np.inf, copy.deepcopy(net.state_dict())
        every = max(1, config.steps // 30)
        for step in range(config.steps):
            net.train()
            first = torch.randint(a, b - crop + 1, (_BATCH,))
            index = first.unsqueeze(1) + torch.arange(crop)
            scored = weight[index][:, run_in:].unsqueeze(-1)
            error = (net(x[index])[:, run_in:] - y[index][:, run_in:]) ** 2
            loss = (error * scored).sum() / scored.sum().clamp(min=1.0)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            if (step + 1) % every == 0 or step + 1 == config.steps:
                decoded = decoder.predict(counts, 0, validation[1], seen=valid)
                found = r2(kinematics[chosen], decoded[chosen])
                if found > best:
                    best, state = found, copy.deepcopy(net.state_dict())
                say(step + 1)
        net.load_state_dict(state)
        return GRUDecoder(config, best, net, (mean, std), (centre, spread))
