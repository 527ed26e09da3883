"""Bin numbers for samples that have a time stamp and no counter. Pure: no sockets, no clock."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

Kind = Literal["next", "gap", "late", "repeated", "step"]

_SLACK_S = 1.0
_REMEMBERED = 256
_FOLLOW = 0.1


@dataclass(frozen=True, slots=True)
class Placed:
    """Where a sample belongs.

    Attributes:
        index: its bin.
        kind: ``next`` after the newest, ``gap`` further on, ``late`` before it, ``repeated``: it
            has come; ``step``: the clock of the stamps was set.
        skipped: bins between the newest and this one.
    """

    index: int
    kind: Kind
    skipped: int = 0


class StampIndex:
    """Numbers samples by their stamps: on a grid of the bin width whose phase follows the stamps,
    so that jitter up to half a bin width and clocks that drift cost nothing.

    A stamp that gains a second more than twice the time that passed, or falls by more than a
    second, shows that the clock was set. The numbers then go on by the time that passed.

    Args:
        width_s: the bin width.
        first: number of the first sample.
    """

    def __init__(self, width_s: float, first: int = 0) -> None:
        self._width, self._newest = width_s, first - 1
        self._anchor: tuple[int, float] | None = None
        self._last = (0.0, 0.0)
        self._seen: OrderedDict[float, int] = OrderedDict()

    def place(self, stamp_s: float, arrived_s: float) -> Placed:
        """Number the sample of a stamp that arrived now; both in seconds, on any two clocks."""
        if self._anchor is None:
            return self._keep(stamp_s, arrived_s, self._newest + 1, "next")
        if stamp_s in self._seen:
            return Placed(self._seen[stamp_s], "repeated")
        gained, passed = stamp_s - self._last[0], max(0.0, arrived_s - self._last[1])
        if gained < -_SLACK_S or gained > _SLACK_S + 2 * passed:
            self._seen.clear()
            self._anchor = None
            ahead = max(1, round(passed / self._width))
            return self._keep(stamp_s, arrived_s, self._newest + ahead, "step")
        at, phase = self._anchor
        index = at + round((stamp_s - phase) / self._width)
        if gained < 0:
            self._remember(stamp_s, index)
            return Placed(index, "late")
        if index <= self._newest:  # stamps jitter by more than half a bin width
            index = self._newest + 1
        return self._keep(stamp_s, arrived_s, index, "gap" if index > self._newest + 1 else "next")

    def _keep(self, stamp_s: float, arrived_s: float, index: int, kind: Kind) -> Placed:
        skipped = index - self._newest - 1
        phase = stamp_s
        if self._anchor is not None:
            at, before = self._anchor
            expected = before + (index - at) * self._width
            phase = expected + _FOLLOW * (stamp_s - expected)
        self._anchor, self._newest = (index, phase), index
        self._last = (stamp_s, arrived_s)
        self._remember(stamp_s, index)
        return Placed(index, kind, skipped)

    def _remember(self, stamp_s: float, index: int) -> None:
        self._seen[stamp_s] = index
        if len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)
