"""Times and bin indices of samples from their time stamps. Pure: no sockets, no clock."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Kind = Literal["next", "gap", "late", "repeated", "step"]

SLACK_S = 1.0
MOST = 2**62
"""No number of nanoseconds or samples that is meant, and fits into a message, is larger."""
_REMEMBERED = 256
_COUNTED = 4096
_FOLLOW = 0.1


@dataclass(frozen=True, slots=True)
class Placed:
    """The position of a sample.

    Attributes:
        index: index of its bin.
        kind: ``next`` after the newest; ``gap`` further ahead; ``late`` before it; ``repeated``,
            received before; ``step``, the clock of the stamps was set.
        skipped: number of bins between the newest and this one.
    """

    index: int
    kind: Kind
    skipped: int = 0


class StampIndex:
    """Numbers samples by their stamps, on a grid of the bin width whose phase follows the stamps.

    So jitter up to half a bin width and clock drift have no effect.

    A stamp that increases by a second more than twice the elapsed time, or decreases by more than a
    second, means that the clock was set. The numbers then continue by the elapsed time.

    Args:
        width_s: the bin width.
        first: number of the first sample.
    """

    def __init__(self, width_s: float, first: int = 0) -> None:
        self._width, self._newest = width_s, first - 1
        self._anchor: tuple[int, float] | None = None
        self._last = (0.0, 0.0)
        self._seen: OrderedDict[float, int] = OrderedDict()
        self._again = False

    def begin_again(self) -> None:
        """Prepare for another source; if its first stamp is not above the newest, its clock
        differs.
        """
        self._again = True

    def place(self, stamp_s: float, arrived_s: float) -> Placed:
        """Number a sample by its stamp and arrival, in seconds of any two clocks."""
        if self._anchor is None:
            return self._keep(stamp_s, arrived_s, self._newest + 1, "next")
        gained, passed = stamp_s - self._last[0], max(0.0, arrived_s - self._last[1])
        stepped = self._again and gained <= 0
        self._again = False
        if stamp_s in self._seen and not stepped:
            return Placed(self._seen[stamp_s], "repeated")
        if stepped or gained < -SLACK_S or gained > SLACK_S + 2 * passed:
            self._seen.clear()
            self._anchor = None
            ahead = max(1, round(passed / self._width))
            return self._keep(stamp_s, arrived_s, self._newest + ahead, "step")
        at, phase = self._anchor
        index = at + round((stamp_s - phase) / self._width)
        if gained < 0:
            self._remember(stamp_s, index)
            return Placed(index, "late")
        if index <= self._newest:  # jitter of more than half a bin width
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


class SourceClock:
    """A source's clock relative to this client's: a constant offset until one of them is set.

    The offset is that of the first stamp at its arrival. So bin edges stay fixed on the source's
    clock; if that is set, they continue by the elapsed time.
    """

    def __init__(self) -> None:
        self.offset_ns: int | None = None
        self._last = (0, 0)
        self._again = False

    def begin_again(self) -> None:
        """Prepare for another source, with any clock."""
        self._again = True

    def take(self, stamp_ns: int, arrived_ns: int) -> bool:
        """Add a stamp that arrived now. Return whether the source's clock was set."""
        if self.offset_ns is None:
            self.offset_ns, self._last = arrived_ns - stamp_ns, (stamp_ns, arrived_ns)
            return False
        gained, passed = stamp_ns - self._last[0], max(0, arrived_ns - self._last[1])
        slack_ns = round(SLACK_S * 1e9)
        stepped = self._again or gained < -slack_ns or gained > slack_ns + 2 * passed
        self._again = False
        if stepped:
            self.offset_ns = self.ours_ns(self._last[0]) + passed - stamp_ns
        if stepped or gained > 0:
            self._last = (stamp_ns, arrived_ns)
        return stepped

    def ours_ns(self, stamp_ns: int) -> int:
        """Convert a stamp to this client's clock. Requires an earlier ``take``."""
        assert self.offset_ns is not None
        return stamp_ns + self.offset_ns


class CountedIndex:
    """Numbers samples that the source counts.

    If the source restarts its count, its stamps say where to continue.

    Args:
        first_of: returns the bin of the first sample by its number.
    """

    def __init__(self, first_of: Callable[[int], int]) -> None:
        self._first_of, self._newest = first_of, -1
        self._first: int | None = None
        self._seen: OrderedDict[int, None] = OrderedDict()
        self._again = False

    def begin_again(self) -> None:
        """Prepare for another source, which may restart the count."""
        self._again = True

    def place(self, number: int, stamped: Placed) -> Placed:
        """Return the position of a sample by its number.

        Args:
            stamped: its position by its stamp.
        """
        if self._first is None:
            self._first = number - self._first_of(number)
        index, newest = number - self._first, self._newest
        if (stamped.kind == "step" or self._again) and index <= newest:
            index = max(stamped.index, newest + 1)
            self._first, self._again = number - index, False
            self._seen.clear()
        if index in self._seen:
            return Placed(index, "repeated")
        skipped = index - newest - 1 if self._seen else 0
        self._seen[index], self._newest = None, max(newest, index)
        if len(self._seen) > _COUNTED:
            self._seen.popitem(last=False)
        if index < newest:
            return Placed(index, "late")
        return Placed(index, "gap", skipped) if skipped > 0 else Placed(index, "next")


class Gather:
    """Sums ``parts`` numbered samples to a bin.

    A bin is returned when all its samples have arrived. A bin that lacks a sample is not returned.

    Attributes:
        repeated: number of samples received more than once.
    """

    def __init__(self, parts: int) -> None:
        self.parts, self.repeated = parts, 0
        self._done: OrderedDict[int, None] = OrderedDict()
        self._open: dict[int, dict[int, NDArray[np.float64]]] = {}

    def add(
        self, number: int, values: NDArray[np.float64]
    ) -> tuple[int, NDArray[np.float64]] | None:
        """Add a sample; return number and counts (C,) of a bin that it completes."""
        at, part = divmod(number, self.parts)
        if at in self._done or part in self._open.get(at, {}):
            self.repeated += 1
            return None
        held = self._open.setdefault(at, {})
        held[part] = values
        while len(self._open) > _REMEMBERED:
            del self._open[min(self._open)]
        if len(held) < self.parts or len({each.shape for each in held.values()}) > 1:
            return None
        del self._open[at]
        self._done[at] = None
        if len(self._done) > _REMEMBERED:
            self._done.popitem(last=False)
        return at, np.sum([held[k] for k in sorted(held)], axis=0)
