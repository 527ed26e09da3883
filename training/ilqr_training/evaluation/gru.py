"""Baseline networks: causal maps from spike counts to kinematics.

    x_t = (counts_t - mean) / std,   h_t = net(x_t, x_{t-1}, ...),   y_t = W h_t + b

The net is a GRU, an LSTM, or a transformer whose layers attend to the last ``_ATTENDED_S`` seconds
with a learned linear bias against older bins. All are causal. They are fitted on random crops of
the training part, with dropout on inputs and outputs and a cosine learning rate. Size and dropout
(``GRID`` for the GRU) and the number of steps are chosen on the validation part, and the choice is
refitted on both, as for the other decoders. Missing counts must be replaced, since a network takes
no mask. The state restarts with each segment.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ilqr_training.readout.restarts import reaching
from ilqr_vae.errors import ShapeError
from ilqr_vae.progress import SILENT, Progress
from ilqr_vae.recordings import Recording, SplitSpec
from ilqr_vae.recordings.split import varies
from ilqr_vae.scoring.metrics import r2
from ilqr_vae.scoring.online import GRUWeights

Array = NDArray[np.float64]

_BATCH = 64
_TIMED = 50
_CROP_S, _CROP_BINS = 3.0, (60, 200)
"""Length of a crop, and its fewest and most bins; the error counts after its first sixth."""


@dataclass(frozen=True)
class GRUConfig:
    """A candidate.

    Attributes:
        kind: kind of network.
        hidden: hidden units, or the width of a transformer.
        dropout: dropout of inputs and outputs.
        steps: largest number of gradient steps.
        schedule: length of the cosine schedule in steps.
        rate: highest learning rate of Adam.
        decay: weight decay.
    """

    kind: Literal["gru", "lstm", "transformer"] = "gru"
    hidden: int = 128
    dropout: float = 0.4
    steps: int = 1200
    schedule: int = 1200
    rate: float = 3e-3
    decay: float = 1e-3


GRID: tuple[GRUConfig, ...] = tuple(
    GRUConfig(hidden=hidden, dropout=dropout) for hidden in (64, 128) for dropout in (0.3, 0.45)
)


LSTM_GRID = tuple(replace(c, kind="lstm") for c in GRID)
TRANSFORMER_GRID = tuple(
    GRUConfig("transformer", hidden, dropout, rate=1e-3)
    for hidden in (64, 128)
    for dropout in (0.2, 0.4)
)

_ATTENDED_S, _ATTENDED_BINS = 1.0, (10, 40)
"""How far back a transformer layer attends, and its fewest and most bins."""
_LAYERS, _HEADS = 2, 4
_BLOCK = 512
"""Number of bins that a transformer decodes at once."""


class _Net(nn.Module):
    """Attributes: context, number of earlier bins that a decode reads; 0 with a recurrent state."""

    def __init__(self, units: int, channels: int, config: GRUConfig, attended: int) -> None:
        super().__init__()
        self.drop = nn.Dropout(config.dropout)
        self.context = 0
        if config.kind == "gru":
            self.gru = nn.GRU(units, config.hidden, batch_first=True)
        elif config.kind == "lstm":
            self.lstm = nn.LSTM(units, config.hidden, batch_first=True)
        else:
            self.transformer = _Transformer(units, config, attended)
            self.context = _LAYERS * (attended - 1)
        self.kind = config.kind
        self.out = nn.Linear(config.hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(x)
        if self.kind == "transformer":
            return self.out(self.drop(self.transformer(x)))
        layer = self.gru if self.kind == "gru" else self.lstm
        return self.out(self.drop(layer(x)[0]))


class _Block(nn.Module):
    """Attention and a feedforward layer, each with a residual connection.

    Torch's own layer is not used: without gradients it treats a float mask as a boolean one.
    """

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.each = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * width, width)
        )
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = self.qkv(self.before(x)).unflatten(-1, (3, _HEADS, -1)).permute(2, 0, 3, 1, 4)
        read = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        x = x + self.drop(self.out(read.transpose(1, 2).flatten(2)))
        return x + self.drop(self.each(self.between(x)))


class _Transformer(nn.Module):
    def __init__(self, units: int, config: GRUConfig, attended: int) -> None:
        super().__init__()
        width, self.attended = config.hidden, attended
        self.inputs = nn.Linear(units, width)
        self.slope = nn.Parameter(torch.tensor(2.0 / attended))
        self.blocks = nn.ModuleList(_Block(width, config.dropout) for _ in range(_LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        back = torch.arange(x.shape[1]).unsqueeze(1) - torch.arange(x.shape[1])
        seen = (back >= 0) & (back < self.attended)
        bias = torch.where(seen, -self.slope * back, torch.full((), -torch.inf))
        x = self.inputs(x)
        for block in self.blocks:
            x = block(x, bias)
        return x


@dataclass(frozen=True)
class GRUDecoder:
    """A fitted network.

    Attributes:
        config: the chosen candidate, with the chosen number of steps.
        validation_r2: its mean R2 on the validation part, before it was refitted on both.
        candidate: the chosen candidate as in the grid.
    """

    config: GRUConfig
    validation_r2: float
    _net: _Net
    _x: tuple[Array, Array]
    _y: tuple[Array, Array]
    candidate: GRUConfig = GRUConfig()

    @staticmethod
    def fit(
        recording: Recording,
        split: SplitSpec,
        *,
        seed: int = 0,
        grid: tuple[GRUConfig, ...] = GRID,
        progress: Progress = SILENT,
    ) -> GRUDecoder:
        """Fit all candidates, and refit the best on the validation part on both parts.

        Args:
            recording: the whole recording, with kinematics.

        Raises:
            ShapeError: there are no kinematics, or a part has no bin to score.
        """
        train, validation = split.span("train", recording), split.span("validation", recording)
        table = _Table.of(recording, train)
        total, made = sum(c.steps for c in grid) + max(c.steps for c in grid), []

        def say(done: int) -> Callable[[int], None]:
            return lambda step: progress(grid[0].kind, done + step, total)

        for i, config in enumerate(grid):
            before = sum(c.steps for c in grid[:i])
            made.append(_fit(table, config, seed, train, validation, say(before)))
        chosen = max(made, key=lambda d: d.validation_r2)
        both = (min(train[0], validation[0]), max(train[1], validation[1]))
        again = _fit(table, chosen.config, seed, both, None, say(sum(c.steps for c in grid)))
        candidate = grid[made.index(chosen)]
        return replace(again, validation_r2=chosen.validation_r2, candidate=candidate)

    def trained_on(
        self, recording: Recording, bins: tuple[int, int], *, steps: int = 200, seed: int = 0
    ) -> GRUDecoder:
        """Return the network after further training on other bins, with units in the same order.

        Args:
            recording: with kinematics.
            steps: gradient steps, at a third of the first learning rate.

        Raises:
            ShapeError: there are no kinematics, or no bin to learn from.
        """
        scales = self._x, self._y
        table = _Table.of(recording, bins, scales)
        config = replace(self.config, steps=steps, schedule=steps, rate=self.config.rate / 3)
        return _fit(table, config, seed, bins, None, lambda step: None, self._net.state_dict())

    @torch.no_grad()
    def answer_seconds(self) -> float:
        """Measure the time to decode one more bin, as the median of several runs.

        A transformer decodes it from all bins in its context.
        """
        units = len(self._x[0])
        x, took = torch.zeros(1, 1 + self._net.context, units), list[float]()
        self._net.eval()
        for _ in range(_TIMED):
            began = time.perf_counter()
            self._net(x)
            took.append(time.perf_counter() - began)
        return float(np.median(took))

    def weights(self) -> GRUWeights:
        """Return the weights for decoding without torch."""
        net = {name: t.double().numpy() for name, t in self._net.state_dict().items()}
        return GRUWeights(
            inputs=net["gru.weight_ih_l0"],
            recurrent=net["gru.weight_hh_l0"],
            input_bias=net["gru.bias_ih_l0"],
            recurrent_bias=net["gru.bias_hh_l0"],
            out=net["out.weight"],
            out_bias=net["out.bias"],
            x_mean=self._x[0],
            x_std=self._x[1],
            y_mean=self._y[0],
            y_std=self._y[1],
        )

    def decode(self, recording: Recording, counts: Array, bins: tuple[int, int]) -> Array:
        """Return causal decodes (stop - start, D) of bins [start, stop), run from segment starts.

        Args:
            recording: the whole recording, for its segments.
            counts: (T, N) counts, with missing values replaced.
        """
        x = torch.as_tensor((counts - self._x[0]) / self._x[1], dtype=torch.float32)
        y = _run(self._net, x, recording.segments(), bins)
        return y.double().numpy() * self._y[1] + self._y[0]


@torch.no_grad()
def _run(net: _Net, x: Tensor, segments: list[tuple[int, int]], bins: tuple[int, int]) -> Tensor:
    """Return decodes (stop - start, D) of bins [start, stop), each segment from its start."""
    net.eval()
    parts: list[Tensor] = []
    for a, b in reaching(segments, bins):
        if not net.context:
            parts.append(net(x[a:b].unsqueeze(0))[0][max(bins[0] - a, 0) :])
            continue
        for start in range(max(a, bins[0]), b, _BLOCK):
            first = max(a, start - net.context)
            parts.append(net(x[first : min(b, start + _BLOCK)].unsqueeze(0))[0][start - first :])
    return torch.cat(parts)


@dataclass(frozen=True)
class _Table:
    """Standardised counts and kinematics, and which bins are valid."""

    x: Tensor
    y: Tensor
    truth: Array
    scored: NDArray[np.bool_]
    segments: list[tuple[int, int]]
    bin_width: float
    x_scale: tuple[Array, Array]
    y_scale: tuple[Array, Array]

    @staticmethod
    def of(
        recording: Recording,
        train: tuple[int, int],
        scales: tuple[tuple[Array, Array], tuple[Array, Array]] | None = None,
    ) -> _Table:
        if recording.kinematics is None:
            raise ShapeError("recording.kinematics", expected="a behaviour to decode", got="none")
        rows = np.arange(*train)[recording.scored[slice(*train)]]
        if not len(rows):
            raise ShapeError("train", expected="at least one valid bin", got="none")
        counts = recording.counts * recording.mask().astype(np.float64)
        truth = np.nan_to_num(recording.kinematics)
        mean, std = counts[rows].mean(0), np.sqrt(counts[rows].var(0) + 1e-2)
        part = truth[rows]
        centre, spread = part.mean(0), np.where(varies(part), part.std(0) + 1e-12, 1.0)
        if scales is not None:
            (mean, std), (centre, spread) = scales
        return _Table(
            torch.as_tensor((counts - mean) / std, dtype=torch.float32),
            torch.as_tensor((truth - centre) / spread, dtype=torch.float32),
            truth,
            recording.scored,
            recording.segments(),
            recording.bin_width,
            (mean, std),
            (centre, spread),
        )

    def crops(self, part: tuple[int, int]) -> tuple[Tensor, int]:
        """Return the first bins of all crops within the segments of a part, and their length."""
        inside = [(max(a, part[0]), min(b, part[1])) for a, b in self.segments]
        inside = [(a, b) for a, b in inside if b > a]
        wished = int(np.clip(round(_CROP_S / self.bin_width), *_CROP_BINS))
        length = min(wished, int(np.median([b - a for a, b in inside])))
        long = [(a, b) for a, b in inside if b - a >= length]
        return torch.cat([torch.arange(a, b - length + 1) for a, b in long]), length


def _fit(
    table: _Table,
    config: GRUConfig,
    seed: int,
    train: tuple[int, int],
    validation: tuple[int, int] | None,
    say: Callable[[int], None],
    begin: dict[str, Tensor] | None = None,
) -> GRUDecoder:
    """Train a candidate, from ``begin`` if given; without ``validation`` for all its steps."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        attended = int(np.clip(round(_ATTENDED_S / table.bin_width), *_ATTENDED_BINS))
        net = _Net(table.x.shape[1], table.y.shape[1], config, attended)
        if begin is not None:
            net.load_state_dict(begin)
        optimiser = torch.optim.AdamW(net.parameters(), lr=config.rate, weight_decay=config.decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, config.schedule)
        starts, length = table.crops(train)
        run_in = length // 6
        weight = torch.as_tensor(table.scored, dtype=torch.float32)
        best, kept, steps = float("nan"), net.state_dict(), config.steps
        every = max(1, config.steps // 30)
        for step in range(1, config.steps + 1):
            net.train()
            first = starts[torch.randint(len(starts), (_BATCH,))]
            index = first.unsqueeze(1) + torch.arange(length)
            scored = weight[index][:, run_in:].unsqueeze(-1)
            error = (net(table.x[index])[:, run_in:] - table.y[index][:, run_in:]) ** 2
            loss = (error * scored).sum() / scored.sum().clamp(min=1.0)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            if validation is not None and (step % every == 0 or step == config.steps):
                found = _score(table, net, validation)
                if not found <= best:
                    best, kept, steps = found, copy.deepcopy(net.state_dict()), step
            if step % every == 0:
                say(step)
        net.load_state_dict(kept)
        return GRUDecoder(replace(config, steps=steps), best, net, table.x_scale, table.y_scale)


def _score(table: _Table, net: _Net, part: tuple[int, int]) -> float:
    scored = table.scored[slice(*part)]
    if not scored.any():
        raise ShapeError("validation", expected="at least one valid bin", got="none")
    y = _run(net, table.x, table.segments, part).double().numpy()[scored]
    return r2(table.truth[slice(*part)][scored], y * table.y_scale[1] + table.y_scale[0])
