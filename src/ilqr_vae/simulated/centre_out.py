"""The task of the simulated subject: centre-out reaching, as a state machine over time.

Units: metres, seconds. Only numpy is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

REACH = 0.10
"""Distance of targets from the centre in metres."""
FEWEST_SUCCESSES = 3
"""Fewest successful reaches for which median times and paths are shown."""


@dataclass(frozen=True, slots=True)
class Cue:
    """The display: ``target`` (2,) in metres, and ``go``, True once it may be reached."""

    target: Array
    go: bool


@dataclass(frozen=True, slots=True)
class TrialRecord:
    """An outward reach. Times are seconds of the task; ``acquired`` is NaN after a failure."""

    start: float
    target_index: int
    target: tuple[float, float]
    target_on: float
    go: float
    acquired: float
    stop: float
    success: bool


_Phase = Literal["to_centre", "hold_centre", "delay", "reach", "hold"]


class CentreOut:
    """Centre-out reaching to eight targets, with variable holds and delays.

    Move to the centre and hold, a target appears, the go cue, reach and hold: success. A reach that
    takes longer than ``timeout`` fails. Targets appear in shuffled blocks of eight.

    Attributes:
        time: seconds since the beginning.
        trials: finished trials.
        radius: radius of a target in metres.
    """

    def __init__(
        self,
        seed: int,
        *,
        radius: float = 0.02,
        delay: tuple[float, float] = (0.2, 0.8),
        hold: tuple[float, float] = (0.25, 0.5),
        timeout: float = 4.0,
    ) -> None:
        self.radius, self.time, self.trials = radius, 0.0, list[TrialRecord]()
        self._delay, self._hold, self._timeout = delay, hold, timeout
        self._rng = np.random.default_rng([seed, 11])
        self._block: list[int] = []
        self._index = 0
        self._start = self._target_on = self._go = 0.0
        self._phase: _Phase = "to_centre"
        self._since = 0.0
        self._wait = 0.0

    @property
    def target(self) -> Array:
        """The current target, (2,), in metres."""
        if self._phase in {"to_centre", "hold_centre"}:
            return np.zeros(2)
        return target_position(self._index)

    def step(self, cursor: Array, seconds: float) -> Cue:
        """Advance by ``seconds`` with the cursor (2,); return the display during them."""
        inside = bool(np.hypot(*(cursor - self.target)) <= self.radius)
        elapsed = self.time - self._since + 1e-9
        if self._phase == "to_centre" and (inside or elapsed >= self._timeout):
            self._enter("hold_centre", self._hold)
        elif self._phase == "hold_centre" and elapsed >= self._wait:
            if not self._block:
                self._block = [int(i) for i in self._rng.permutation(8)]
            self._index, self._start = self._block.pop(), self._since
            self._target_on = self.time
            self._enter("delay", self._delay)
        elif self._phase == "delay" and elapsed >= self._wait:
            self._go = self.time
            self._enter("reach", self._hold)
        elif self._phase == "reach" and inside:
            self._enter("hold", self._hold)
        elif self._phase == "hold" and not inside:
            self._phase = "reach"
        elif self._phase == "hold" and elapsed >= self._wait:
            self._finish(acquired=self._since)
        elif self._phase == "reach" and self.time - self._go >= self._timeout:
            self._finish(acquired=float("nan"))
        cue = Cue(self.target, self._phase != "delay")
        self.time += seconds
        return cue

    def _enter(self, phase: _Phase, wait: tuple[float, float]) -> None:
        self._phase, self._since = phase, self.time
        self._wait = float(self._rng.uniform(*wait))

    def _finish(self, acquired: float) -> None:
        x, y = target_position(self._index)
        self.trials.append(
            TrialRecord(
                start=self._start,
                target_index=self._index,
                target=(float(x), float(y)),
                target_on=self._target_on,
                go=self._go,
                acquired=acquired,
                stop=self.time,
                success=bool(np.isfinite(acquired)),
            )
        )
        self._enter("to_centre", self._hold)


def target_position(index: int) -> Array:
    """Return the position of target 0 to 7, (2,), in metres; 0 is right, then anticlockwise."""
    angle = 2 * np.pi * index / 8
    return REACH * np.array([np.cos(angle), np.sin(angle)])
