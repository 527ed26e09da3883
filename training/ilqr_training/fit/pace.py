"""An estimate of the time until a training run has written its model file.

The remaining work follows from the settings: gradient steps, validations, and the final validation
with its passes over the recording and its readout fits. The cost of each is measured. Passes and
readout fits are timed on a few bins and steps before the first gradient step and at each
validation. Gradient steps, validations and the parts of the final validation are timed as they
run. The load of the machine varies, so steps are averaged over the newest half of them.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from msgspec.structs import replace
from numpy.typing import NDArray
from scipy import linalg

from ilqr_training.config import ReadoutConfig, TrainConfig
from ilqr_training.fit.crops import Prepared
from ilqr_training.fit.validate import estimator_of, planned_passes
from ilqr_training.readout.causal import causal_pass
from ilqr_training.readout.hidden import Maps, fit_hidden
from ilqr_training.readout.recurrent import CHECKPOINTS, Windows, fit_recurrent
from ilqr_vae.model.generative import Model
from ilqr_vae.progress import Progress, duration

_FEWEST = 50
"""Smallest number of gradient steps that are averaged; beyond twice as many, the newest half."""
_BINS, _STREAMS = 16, 16
_PROBED = 10
_BATCH = 256
_FORWARD = 0.4
"""Cost of a row that a layer only decodes, as a share of the cost of one it learns from."""

Clock = Callable[[], float]


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Times of the parts of a run, in seconds.

    Attributes:
        bin, stream: a bin of a causal pass takes ``bin``, and ``stream`` more for each stream.
        linear: fitting and choosing the linear map of the readout, twice.
        hidden, recurrent: a gradient step of each layer of the readout; 0 for none.
    """

    bin: float = 0.0
    stream: float = 0.0
    linear: float = 0.0
    hidden: float = 0.0
    recurrent: float = 0.0

    def of_pass(self, bins: int, streams: int) -> float:
        """Return the time of a causal pass of this many bins per stream."""
        return bins * (self.bin + self.stream * streams)


def _timed(do: Callable[[], object], clock: Clock) -> float:
    """Time the second call; the first one includes compilation and setup."""
    do()
    began = clock()
    do()
    return clock() - began


def measure(
    model: Model, data: Prepared, config: TrainConfig, clock: Clock, *, thorough: bool
) -> Costs:
    """Measure the cost of passes, and of a thorough validation's fits, on a few bins and steps.

    The state does not change, including that of random number generators.
    """
    with torch.random.fork_rng():
        return _measured(model, data, config, clock, thorough)


def _measured(
    model: Model, data: Prepared, config: TrainConfig, clock: Clock, thorough: bool
) -> Costs:
    estimator = estimator_of(model, data, config, thorough=thorough)
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
    fits = Costs()
    if thorough and data.recording.kinematics is not None:
        fits = _fits(model.n, data, config, clock)
    return dataclasses.replace(fits, bin=max(0.0, one - stream), stream=stream)


def _fits(n: int, data: Prepared, config: TrainConfig, clock: Clock) -> Costs:
    """Measure the cost of the readout fits on random rows; the costs of passes stay zero."""
    assert data.recording.kinematics is not None
    reads = config.readout.within(config.estimator.horizon)
    units, channels = data.recording.n_units, data.recording.kinematics.shape[1]
    rng = np.random.default_rng(0)
    rows, features = 1024, (reads.lags + 1) * n + reads.residuals * units
    y = rng.normal(size=(rows, channels))
    few = replace(reads, steps=_PROBED, recurrent_steps=_PROBED)
    hidden = recurrent = 0.0
    x = rng.normal(size=(rows, features))
    if reads.hidden:
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
    return Costs(linear=_linear(x, data, reads, clock), hidden=hidden, recurrent=recurrent)


def _linear(x: NDArray[np.float64], data: Prepared, reads: ReadoutConfig, clock: Clock) -> float:
    """Time the linear map: the Gram matrix of the training part, and a solve for each choice."""
    gram = x.T @ x + np.eye(x.shape[1])
    product = _timed(lambda: x.T @ x, clock) * (data.train[1] - data.train[0]) / len(x)
    solve = _timed(lambda: linalg.solve(gram, x[0], assume_a="pos"), clock)
    choices = len(reads.alphas) * (1 + len(reads.alphas) * bool(reads.residuals))
    return 2 * product + (choices + 1) * solve


@dataclass(frozen=True)
class _Part:
    """A part of a validation: its progress bar, the units of it, and the expected seconds.

    A part without a progress bar has no units.
    """

    what: str
    of: int
    seconds: float


class _Parts:
    """A progress that times the parts of a validation and forwards everything.

    Args:
        plan: the parts in their order.
        beyond: expected seconds after the last part; None if the time left of the whole run is not
            shown.
        tell: receives the seconds left of the whole run, once a second.

    Attributes:
        passes: seconds that the causal passes took.
    """

    def __init__(
        self,
        progress: Progress,
        clock: Clock,
        plan: list[_Part],
        beyond: float | None = None,
        tell: Callable[[float], object] = lambda _: None,
    ) -> None:
        self._progress, self._clock, self._plan = progress, clock, plan
        self._beyond, self._tell = beyond, tell
        self._at, self._first, self._told = 0, 0.0, -math.inf
        self.passes = 0.0

    def __call__(
        self, what: str, done: int, of: int, note: str = "", left: float = math.nan
    ) -> None:
        now = self._clock()
        if done == 1:
            self._first = now
        spent = now - self._first  # without the first unit, which includes setup
        at = self._at
        while at < len(self._plan) and self._plan[at].what != what:
            at += 1
        if at < len(self._plan):
            self._at = at + (done == of)
            part, later = self._plan[at], self._plan[at + 1 :]
            each = spent / (done - 1) if done > _PROBED else part.seconds / part.of
            if self._beyond is not None:
                left = (of - done) * each + sum(p.seconds for p in later) + self._beyond
                self._say(what, done, left, now)
        if done == of and what.startswith("latents"):
            self.passes += spent * of / max(of - 1, 1)
        self._progress(what, done, of, note, left)

    def _say(self, what: str, done: int, left: float, now: float) -> None:
        if done == 1 and what.startswith("readout"):
            self.log(f"{what}: about {duration(left)} left in all")
        if now - self._told >= 1:
            self._told = now
            self._tell(left)

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
        self._costs = measure(model, data, config, clock, thorough=True)
        self._quick = measure(model, data, config, clock, thorough=False)
        self._spent = [0.0]  # cumulative time of the gradient steps
        self._validations: list[float] = []
        self._slower = 1.0  # ratio of the time of passes to that first measured
        self._done = 0
        self._due = False  # whether the last step may be followed by a validation

    @contextmanager
    def step(self) -> Generator[None]:
        """Time a gradient step. The first one includes setup and is not counted."""
        began = self._clock()
        yield
        self._done += 1
        self._due = True
        if self._done > 1:
            self._spent.append(self._spent[-1] + self._clock() - began)

    @contextmanager
    def validation(self, progress: Progress) -> Generator[Progress]:
        """Time a validation, which reports to the progress given to it, then the readout fits."""
        plan = self._passes(thorough=False)
        parts, began = _Parts(progress, self._clock, plan), self._clock()
        yield parts
        took = self._clock() - began
        planned = sum(part.seconds for part in plan) / self._slower
        if planned > 0 and parts.passes > 0:
            self._slower = parts.passes / planned
        if self._data.recording.kinematics is not None:
            with torch.random.fork_rng():
                fits = _fits(self._model.n, self._data, self._config, self._clock)
            self._costs = dataclasses.replace(
                fits,
                bin=self._costs.bin,
                stream=self._costs.stream,
                linear=max(0.0, took - parts.passes),
            )
        self._validations.append(self._clock() - began)
        self._due = False

    def final(self, progress: Progress, tell: Callable[[float], object]) -> Progress:
        """Return a progress for the final validation; ``tell`` receives the seconds left."""
        plan = self._final()
        return _Parts(progress, self._clock, plan, self._beyond(plan), tell)

    def left(self, step: int) -> float:
        """Return the seconds left after this many gradient steps; NaN before any was timed."""
        loop, timed = self._config.training, len(self._spent) - 1
        if not timed:
            return float("nan")
        early = min(timed // 2, max(0, timed - _FEWEST))
        a_step = (self._spent[-1] - self._spent[early]) / (timed - early)
        every = loop.validate_every or loop.steps
        ahead = -(-loop.steps // every) - step // every
        if step == loop.steps and step % every:
            ahead -= 1  # the last validation comes early
        if self._due and (step == loop.steps or step % every == 0):
            ahead += 1
        plan = self._final()
        final = sum(part.seconds for part in plan) + self._beyond(plan)
        return (loop.steps - step) * a_step + ahead * self._validation() + final

    def _validation(self) -> float:
        """Return the expected time of a validation while training."""
        if self._validations:
            newest = self._validations[-2:]
            return sum(newest) / len(newest)
        return sum(part.seconds for part in self._passes(thorough=False)) + self._costs.linear

    def _passes(self, *, thorough: bool) -> list[_Part]:
        planned = planned_passes(self._data, self._config, thorough=thorough)
        costs = self._costs if thorough else self._quick
        return [
            _Part(what, bins, self._slower * costs.of_pass(bins, streams))
            for what, bins, streams in planned
        ]

    def _final(self) -> list[_Part]:
        """Return the parts of the thorough final validation, which fits the readout twice."""
        passes = self._passes(thorough=True)
        if self._data.recording.kinematics is None:
            return passes
        costs = self._costs
        reads = self._config.readout.within(self._config.estimator.horizon)
        a, b = self._data.validation
        looks = _FORWARD * CHECKPOINTS * (b - a) / _BATCH
        layers: list[_Part] = []
        if reads.hidden:
            layers.append(_Part("readout, hidden", reads.steps, costs.hidden * reads.steps))
        if reads.recurrent and reads.lags:
            steps = reads.recurrent_steps
            layers.append(_Part("readout, recurrent", steps, costs.recurrent * (steps + looks)))
        rows = 1 + len(
            reads.lost
        )  # those of a validation while training, and as many with bins lost
        linear = _Part("", 0, rows * costs.linear / 2)
        return [*passes, linear, *layers, linear, *layers]

    def _beyond(self, final: list[_Part]) -> float:
        """Return the time of the validations afterwards: one set of passes, fits for each."""
        if not self._afterwards:
            return 0.0
        passes = sum(part.seconds for part in final if part.what.startswith("latents"))
        return passes + self._afterwards * (sum(part.seconds for part in final) - passes)
