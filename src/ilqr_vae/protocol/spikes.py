"""Binning of spike times that arrive in any order.

A binner takes batches of spikes, numbered from 0, and determines which bins are complete. A bin is
complete when a batch has stated that all spikes before its end were sent, unless a batch that has
not arrived may contain spikes of that bin. So a silent bin is complete and zero, and a bin with
lost spikes is not complete. The state of a binner depends on the batches that have arrived, not on
their order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ilqr_vae.arrays import MAX_COUNT
from ilqr_vae.errors import ShapeError

Counts = NDArray[np.float64]

_MAX_GAPS = 256


class Update(NamedTuple):
    """The changes by a batch.

    Attributes:
        closed: bins for which no further spike is expected; not all need be complete.
        revised: earlier bins that have become complete, or whose counts changed; increasing.
        early: spikes before the origin, which are not used.
        lost: number of spikes of bins that are no longer kept, which are not used.
    """

    closed: range
    revised: tuple[int, ...]
    early: int = 0
    lost: int = 0


@dataclass(slots=True)
class _Gap:
    """Missing batches ``first`` to ``last``, with spikes in [after_ns, before_ns]."""

    first: int
    last: int
    after_ns: int
    before_ns: int


class SpikeBinner:
    """Counts spikes in bins [origin + k width, origin + (k + 1) width).

    Times are integers of nanoseconds of one clock.

    Args:
        n_units: N.
        width_ns: the bin width.
        origin_ns: start of bin 0.
        grace_ns: largest delay of a spike, if batches do not state it.
        keep: number of closed bins to keep for late spikes.
        reach: largest number of bins beyond the newest closed one for a spike.

    Attributes:
        next_bin: the first bin that is not closed.
    """

    def __init__(
        self,
        n_units: int,
        width_ns: int,
        origin_ns: int,
        *,
        grace_ns: int = 0,
        keep: int = 64,
        reach: int = 4096,
    ) -> None:
        self.next_bin = 0
        self._n_units, self._width, self._origin = n_units, width_ns, origin_ns
        self._grace, self._keep, self._reach = grace_ns, keep, reach
        self._counts: dict[int, Counts] = {}
        self._until_ns = origin_ns
        self._newest = -1
        self._gaps: list[_Gap] = []

    @property
    def next_batch(self) -> int:
        """The first batch that has not arrived."""
        return self._gaps[0].first if self._gaps else self._newest + 1

    def begin(self, batch: int) -> None:
        """Assume that all batches before ``batch`` have arrived."""
        self._newest = max(self._newest, batch - 1)

    def came(self, batch: int) -> bool:
        """Return whether a batch has arrived, or is too old to wait for."""
        return batch <= self._newest and self._gap(batch) is None

    def bin_of(self, time_ns: int) -> int:
        """Return the bin of a time."""
        return (time_ns - self._origin) // self._width

    def end_ns(self, index: int) -> int:
        """Return the end of a bin."""
        return self._origin + (index + 1) * self._width

    def counts(self, index: int) -> Counts:
        """Return the counts (N,) of a bin so far; zeros for a bin that is not kept."""
        held = self._counts.get(index)
        return np.zeros(self._n_units) if held is None else np.minimum(held, MAX_COUNT)

    def complete(self, index: int) -> bool:
        """Return whether a bin is closed and no missing batch can contain its spikes."""
        end = self.end_ns(index)
        begin = end - self._width
        return index < self.next_bin and not any(
            gap.after_ns < end and begin <= gap.before_ns for gap in self._gaps
        )

    def add(
        self,
        batch: int,
        source_ns: int,
        times_ns: ArrayLike,
        units: ArrayLike,
        until_ns: int | None = None,
    ) -> Update:
        """Add a batch.

        Args:
            batch: its number; a repeated one changes nothing.
            source_ns: when it was sent; no spike of it or an earlier batch is later.
            times_ns: (S,) integers.
            units: (S,) integers in [0, N).
            until_ns: all earlier spikes are in this batch or earlier ones; default: ``source_ns``
                minus the grace.

        Raises:
            ShapeError: there is not one time for each unit, a unit does not exist, or a spike is
                after ``source_ns`` or out of reach. Nothing of the batch is used.
        """
        times, which = self._checked(times_ns, units, source_ns)
        before = self.next_bin
        if self.came(batch):
            return Update(range(before, before), ())
        said = source_ns - self._grace if until_ns is None else min(until_ns, source_ns)
        after = max(before, self.bin_of(said))
        used = times >= self._origin
        early = len(times) - int(used.sum())
        bins, which = (times[used] - self._origin) // self._width, which[used]
        if bins.size and bins.max() >= after + self._reach:
            expected = f"at most {self._reach} bins after bin {after}"
            raise ShapeError("times_ns", expected=expected, got=f"bin {bins.max()}")
        filled = self._number(batch, source_ns, said)
        self._until_ns = max(self._until_ns, said)
        self.next_bin = after
        first = max(0, after - self._keep)
        lost = int((bins < first).sum())
        touched = self._count(bins[bins >= first], which[bins >= first])
        if after > before:
            self._counts = {k: v for k, v in self._counts.items() if k >= first}
        if filled is not None:
            low, high = max(first, self.bin_of(filled.after_ns)), self.bin_of(filled.before_ns)
            touched |= set(range(low, min(high + 1, before)))
        revised = sorted(k for k in touched if k < before and self.complete(k))
        return Update(range(before, after), tuple(revised), early, lost)

    def _checked(
        self, times_ns: ArrayLike, units: ArrayLike, source_ns: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        times, which = np.asarray(times_ns), np.asarray(units)
        if times.ndim != 1 or times.shape != which.shape:
            got = f"{times.shape} and {which.shape}"
            raise ShapeError("units", expected="one for each of the times, (S,)", got=got)
        if times.size and times.dtype.kind not in "iu":
            raise ShapeError("times_ns", expected="whole nanoseconds", got=str(times.dtype))
        if which.size and which.dtype.kind not in "iu":
            raise ShapeError("units", expected="whole numbers", got=str(which.dtype))
        wrong = which[(which < 0) | (which >= self._n_units)]
        if wrong.size:
            raise ShapeError("units", expected=f"0 to {self._n_units - 1}", got=str(wrong[0]))
        if times.size and times.max() > source_ns:
            raise ShapeError(
                "times_ns", expected=f"at most source_ns, {source_ns}", got=str(times.max())
            )
        return times.astype(np.int64), which.astype(np.int64)

    def _count(self, bins: NDArray[np.int64], units: NDArray[np.int64]) -> set[int]:
        """Count spikes; return their bins."""
        touched: set[int] = set()
        for index in np.unique(bins).tolist():
            held = self._counts.get(index)
            added = np.bincount(units[bins == index], minlength=self._n_units).astype(np.float64)
            self._counts[index] = added if held is None else held + added
            touched.add(index)
        return touched

    def _gap(self, batch: int) -> _Gap | None:
        return next((gap for gap in self._gaps if gap.first <= batch <= gap.last), None)

    def _number(self, batch: int, source_ns: int, said_ns: int) -> _Gap | None:
        """Track the batch numbers. Return the gap that the batch was in."""
        if batch > self._newest:
            if batch > self._newest + 1:
                gap = _Gap(self._newest + 1, batch - 1, self._until_ns, source_ns)
                self._gaps = [*self._gaps, gap][-_MAX_GAPS:]
            self._newest = batch
            return None
        found = self._gap(batch)
        if found is None:
            return None
        parts = (
            _Gap(found.first, batch - 1, found.after_ns, source_ns),
            _Gap(batch + 1, found.last, max(found.after_ns, said_ns), found.before_ns),
        )
        rest: list[_Gap] = []
        for gap in self._gaps:
            if gap is found:
                rest += [part for part in parts if part.first <= part.last]
                continue
            if gap.first > batch:
                gap.after_ns = max(gap.after_ns, said_ns)
            rest.append(gap)
        self._gaps = rest
        return found
