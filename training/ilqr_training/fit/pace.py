"""An estimate of the time until a training run has written its model file.

The remaining work follows from the settings: gradient steps, validations, and the final validation
with its passes over the recording and its readout fits. The cost of each is measured. Passes and
readout fits are timed on a few bins and steps before the first gradient step; gradient steps and
validations are timed as they run. The load of the machine varies, so the latest measurements count:
at each validation passes are timed again, and a few steps of the readout fits repeated.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from msgspec.structs import replace

from ilqr_training.config import TrainConfig
from ilqr_training.fit.crops import Prepared
from ilqr_training.fit.validate import estimator_of, planned_passes
from ilqr_training.readout.causal import causal_pass
from ilqr_training.readout.hidden import Maps, fit_hidden
from ilqr_training.readout.recurrent import CHECKPOINTS, Windows, fit_recurrent
from ilqr_vae.model.generative import Model
from ilqr_vae.progress import Progress

_RECENT = 50
_BINS, _STREAMS = 16, 16
_PROBED = 10
_FORWARD = 0.4
"""Cost of a row that a layer only decodes, as a share of the cost of one it learns from."""

Clock = Callable[[], float]


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Times of the parts of a run, in seconds.

    Attributes:
        bin, stream: a bin of a causal pass takes ``bin``, and ``stream`` more for each stream.
        hidden, recurrent: a gradient step of each layer of the readout; 0 for none.
    """

    bin: float
    stream: float
    hidden: float = 0.0
    recurrent: float = 0.0

    def passes(self, planned: list[tuple[int, int]]) -> float:
        """Return the time of causal passes, given as (bins per stream, streams)."""
        return sum(bins * (self.bin + self.stream * streams) for bins, streams in planned)


def _timed(do: Callable[[], object], clock: Clock) -> float:
    """Time the second call; the first one includes compilation and setup."""
    do()
    began = clock()
    do()
    return clock() - began


def measure(model: Model, data: Prepared, config: TrainConfig, clock: Clock) -> Costs:
    """Measure the cost of passes and readout fits on a few bins and steps.

    The state does not change, including that of random number generators.
    """
    with torch.random.fork_rng():
        return _measured(model, data, config, clock)


def _measured(model: Model, data: Prepared, config: TrainConfig, clock: Clock) -> Costs:
    estimator = estimator_of(model, data, config)
    start, stop = data.train

    def seconds(bins: int, streams: int) -> float:
        until = min(start + bins * streams, stop)
        return _timed(
            lambda: causal_pass(estimator, data.recording, start, until, streams=streams, run_in=0),
            clock,
        )

    def seconds_a_bin(streams: int) -> float:
        """Return the time per bin, without the fixed cost of a pass."""
        return max(0.0, seconds(3 * _BINS, streams) - seconds(_BINS, streams)) / (2 * _BINS)

    one, many = seconds_a_bin(1), seconds_a_bin(_STREAMS)
    stream = max(0.0, (many - one) / (_STREAMS - 1))
    costs = Costs(bin=max(0.0, one - stream), stream=stream)
    if data.recording.kinematics is None:
        return costs
    hidden, recurrent = _layers(model.n, data, config, clock)
    return Costs(bin=costs.bin, stream=costs.stream, hidden=hidden, recurrent=recurrent)


def _layers(n: int, data: Prepared, config: TrainConfig, clock: Clock) -> tuple[float, float]:
    """Time a gradient step of the hidden and of the recurrent layers on random rows."""
    assert data.recording.kinematics is not None
    reads = config.readout.within(config.estimator.horizon)
    units, channels = data.recording.n_units, data.recording.kinematics.shape[1]
    rng = np.random.default_rng(0)
    rows, features = 1024, (reads.lags + 1) * n + reads.residuals * units
    y = rng.normal(size=(rows, channels))
    few = replace(reads, steps=_PROBED, recurrent_steps=_PROBED)
    hidden = recurrent = 0.0
    if reads.hidden:
        x = rng.normal(size=(rows, features))
        linear = Maps.linear(np.zeros((channels, features)), np.zeros(channels))
        fit = _timed(lambda: fit_hidden(x, y, linear, few, 0, units=units), clock)
        hidden = fit / _PROBED
    if reads.recurrent and reads.lags:
        windows = Windows(
            rng.normal(size=(rows, n)),
            np.full(rows, reads.lags),
            rng.normal(size=(rows, reads.lags, units)).astype(np.float32),
        )
        fit = _timed(lambda: list(fit_recurrent(windows, y, few, 0)), clock)
        recurrent = fit / _PROBED
    return hidden, recurrent


class _Passes:
    """A progress that times causal passes and forwards everything."""

    def __init__(self, progress: Progress, clock: Clock) -> None:
        self._progress, self._clock = progress, clock
        self._began: dict[str, float] = {}
        self.seconds = 0.0

    def __call__(
        self, what: str, done: int, of: int, note: str = "", left: float = math.nan
    ) -> None:
        if what.startswith("latents"):
            began = self._began.setdefault(what, self._clock())
            if done == of and of > 1:  # the first report comes after the first bin
                self.seconds += (self._clock() - began) * of / (of - 1)
                del self._began[what]
        self._progress(what, done, of, note, left)

    def log(self, line: str) -> None:
        self._progress.log(line)


class Pace:
    """Time until the model file is written.

    Args:
        model, data, config: of the run.
        afterwards: number of thorough validations after the run's own, each on a part of its bins.
        clock: returns seconds.
    """

    def __init__(
        self,
        model: Model,
        data: Prepared,
        config: TrainConfig,
        *,
        afterwards: int = 0,
        clock: Clock = time.monotonic,
    ) -> None:
        self._model, self._data, self._config, self._clock = model, data, config, clock
        self._afterwards = afterwards
        self._costs = measure(model, data, config, clock)
        self._steps: deque[float] = deque(maxlen=_RECENT)
        self._validation = self._passes(thorough=False)
        self._linear = 0.0  # share of the ridge regressions
        self._slower = 1.0  # ratio of the time of passes to that first measured
        self._done = 0

    @contextmanager
    def step(self) -> Generator[None]:
        """Time a gradient step. The first one includes setup and is not counted."""
        began = self._clock()
        yield
        self._done += 1
        if self._done > 1:
            self._steps.append(self._clock() - began)

    @contextmanager
    def validation(self, progress: Progress) -> Generator[Progress]:
        """Time a validation, which reports to the progress given to it, then the readout fits."""
        timed, began = _Passes(progress, self._clock), self._clock()
        yield timed
        self._validation = self._clock() - began
        self._linear = max(0.0, self._validation - timed.seconds)
        planned = self._costs.passes(self._planned(thorough=False))
        if planned > 0 and timed.seconds > 0:
            self._slower = timed.seconds / planned
        if self._data.recording.kinematics is not None:
            with torch.random.fork_rng():
                layers = _layers(self._model.n, self._data, self._config, self._clock)
            self._costs = dataclasses.replace(self._costs, hidden=layers[0], recurrent=layers[1])

    def left(self, step: int) -> float:
        """Return the seconds left after this many gradient steps; NaN before any was timed."""
        loop = self._config.training
        if not self._steps:
            return float("nan")
        a_step = sum(self._steps) / len(self._steps)
        every = loop.validate_every or loop.steps
        ahead = -(-loop.steps // every) - step // every
        return (loop.steps - step) * a_step + ahead * self._validation + self._final()

    def _planned(self, *, thorough: bool) -> list[tuple[int, int]]:
        return planned_passes(self._data, self._config, thorough=thorough)

    def _passes(self, *, thorough: bool) -> float:
        return self._costs.passes(self._planned(thorough=thorough))

    def _final(self) -> float:
        """Return the time of the thorough final validation, which fits the readout twice."""
        costs = self._costs
        passes = self._slower * self._passes(thorough=True)
        fits = 0.0
        if self._data.recording.kinematics is not None:
            reads, batch = self._config.readout, 256
            a, b = self._data.validation
            looks = _FORWARD * CHECKPOINTS * (b - a) / batch
            fits = 2 * costs.hidden * reads.steps
            fits += costs.recurrent * (2 * reads.recurrent_steps + looks)
            fits += 2 * self._linear
        return passes + fits + (passes + self._afterwards * fits if self._afterwards else 0.0)
