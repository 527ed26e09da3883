"""Disturbances of a recording before it reaches a decoder: drift, noise, lost units and bins.

``Disturber`` changes the counts of one bin at a time. The result depends only on the seed, the
index of the bin and the settings, so that a batch, any part of it and a stream give the same.
``Course`` returns the settings at a time, from a script of changes and from changes during the run.

>>> disturber = Disturber(units=100, bin_width=0.05, seed=1)
>>> counts, mask = disturber.bin(7, np.ones(100), None, Disturbance(silent=0.25))
>>> int(counts.sum())
75
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ilqr_vae.arrays import MAX_COUNT
from ilqr_vae.errors import ShapeError

Counts = NDArray[np.uint16]
Mask = NDArray[np.bool_]

Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Dropped = Annotated[float, msgspec.Meta(ge=0, le=0.95)]
Hertz = Annotated[float, msgspec.Meta(ge=0, le=1000)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e6)]

_ORDER, _PAIRS, _GAINS, _SHIFTS = range(4)
_DROP, _GAIN, _BASELINE, _NOISE = range(4)


class Disturbance(msgspec.Struct, frozen=True, kw_only=True):
    """The disturbances at a time.

    Attributes:
        silent: share of the units that are silent. A larger share includes a smaller one.
        swapped: share of the units that are exchanged in pairs, as after a restart of a spike
            sorter.
        dropped: share of the bins that are dropped; never the first one.
        gain: standard deviation over units of the log of the factor on their rates.
        baseline: standard deviation over units, in Hz, of what is added to their rates.
        noise: additional spikes per second of each unit.
        latency: delay of each bin in seconds.
    """

    silent: Share = 0.0
    swapped: Share = 0.0
    dropped: Dropped = 0.0
    gain: Annotated[float, msgspec.Meta(ge=0, le=3)] = 0.0
    baseline: Hertz = 0.0
    noise: Hertz = 0.0
    latency: Annotated[float, msgspec.Meta(ge=0, le=10)] = 0.0


class Change(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A change of some settings; the others stay.

    Attributes:
        at: seconds of the stream, including its warm-up but not its pauses.
        over: seconds until the values are reached, linearly; 0 is at once.
        pause: seconds without a bin.
        paused: whether to pause until it is false again; for steering by hand.
        seek: where to continue, in seconds from the start of the streamed span.
        loop: whether to restart at the end.
        decoder: which decoder steers, in a closed loop.
        others: as for ``Disturbance``.
    """

    at: Seconds = 0.0
    over: Seconds = 0.0
    silent: Share | None = None
    swapped: Share | None = None
    dropped: Dropped | None = None
    gain: Annotated[float, msgspec.Meta(ge=0, le=3)] | None = None
    baseline: Hertz | None = None
    noise: Hertz | None = None
    latency: Annotated[float, msgspec.Meta(ge=0, le=10)] | None = None
    pause: Seconds | None = None
    paused: bool | None = None
    seek: Seconds | None = None
    loop: bool | None = None
    decoder: str | None = None


class Script(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of changes: ``[[change]]`` tables in TOML."""

    change: tuple[Change, ...] = ()


class Course:
    """The settings over the course of a stream.

    Args:
        changes: changes known beforehand, in any order.
    """

    def __init__(self, changes: Iterable[Change] = ()) -> None:
        self._pending = sorted(changes, key=lambda change: change.at)
        self._lines: dict[str, tuple[float, float, float, float]] = {}

    def add(self, change: Change) -> None:
        """Add a change during the run; ``at`` is now or later."""
        self._pending.append(change)
        self._pending.sort(key=lambda one: one.at)

    def until(self, time: float) -> list[Change]:
        """Start the changes that are due, and return them; ``time`` must not decrease."""
        due = [change for change in self._pending if change.at <= time]
        self._pending = self._pending[len(due) :]
        for change in due:
            for name in Disturbance.__struct_fields__:
                if (value := getattr(change, name)) is not None:
                    self._lines[name] = (
                        change.at,
                        self._value(name, change.at),
                        value,
                        change.over,
                    )
        return due

    def at(self, time: float) -> Disturbance:
        """Return the settings at a time, from the changes that have started."""
        return Disturbance(**{name: self._value(name, time) for name in self._lines})

    def _value(self, name: str, time: float) -> float:
        begin, before, after, over = self._lines.get(name, (0.0, 0.0, 0.0, 0.0))
        reached = 1.0 if over <= 0 else min(1.0, max(0.0, (time - begin) / over))
        return before + reached * (after - before)


class Disturber:
    """Disturbs the counts of N units.

    Args:
        units: N.
        bin_width: seconds.
        seed: seed of the choice of units and bins, and of the noise.
    """

    def __init__(self, units: int, bin_width: float, seed: int = 0) -> None:
        self.units, self.bin_width, self.seed = units, bin_width, seed
        self._order = self._of_units(_ORDER).permutation(units)
        self._pairs = self._of_units(_PAIRS).permutation(units)
        self._gains = self._of_units(_GAINS).normal(size=units)
        self._shifts = self._of_units(_SHIFTS).normal(size=units)

    def _of_units(self, what: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, what])

    def _of_bin(self, index: int, what: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, what, 1, index])

    def silent(self, share: float) -> NDArray[np.int64]:
        """Return the silent units in ascending order."""
        return np.sort(self._order[: round(share * self.units)])

    def bin(
        self, index: int, counts: NDArray[Any], mask: Mask | None, what: Disturbance
    ) -> tuple[Counts, Mask | None] | None:
        """Disturb one bin.

        Args:
            index: index of the bin in the stream, 0 or more.
            counts: (N,), integers.
            mask: (N,), True where observed; None means all.
            what: is wrong.

        Returns:
            Counts and mask; None for a dropped bin.

        Raises:
            ShapeError: counts or mask of another shape.
        """
        for name, values in (("counts", counts), ("mask", mask)):
            if values is not None and values.shape != (self.units,):
                raise ShapeError(name, expected=f"({self.units},)", got=str(values.shape))
        if what.dropped and index and self._of_bin(index, _DROP).random() < what.dropped:
            return None
        out = counts.astype(np.int64)
        pairs = round(what.swapped * self.units / 2)
        if pairs:
            one, other = self._pairs[0 : 2 * pairs : 2], self._pairs[1 : 2 * pairs : 2]
            out[one], out[other] = out[other], out[one]
            if mask is not None:
                mask = mask.copy()
                mask[one], mask[other] = mask[other], mask[one]
        if what.gain:
            rng, factor = self._of_bin(index, _GAIN), np.exp(what.gain * self._gains)
            more = rng.poisson(np.maximum(factor - 1, 0) * out)
            out = rng.binomial(out, np.minimum(factor, 1)) + more
        if what.baseline:
            rng = self._of_bin(index, _BASELINE)
            shift = what.baseline * self.bin_width * self._shifts
            lost = rng.poisson(np.maximum(-shift, 0))
            out = np.maximum(out - lost, 0) + rng.poisson(np.maximum(shift, 0))
        if what.noise:
            out = out + self._of_bin(index, _NOISE).poisson(
                what.noise * self.bin_width, size=self.units
            )
        out[self.silent(what.silent)] = 0
        return np.minimum(out, MAX_COUNT).astype(np.uint16), mask

    def batch(
        self, counts: NDArray[Any], mask: Mask | None, what: Sequence[Disturbance], first: int = 0
    ) -> tuple[Counts, Mask, Mask]:
        """Disturb the bins ``first``, ``first`` + 1, ...

        Args:
            counts, mask: (T, N).
            what: of each bin.

        Returns:
            Counts and mask (T, N), and which bins are kept (T,); a dropped bin is fully masked.

        Raises:
            ShapeError: counts or mask of another shape.
        """
        made = np.zeros(counts.shape, dtype=np.uint16)
        seen, came = np.zeros(counts.shape, dtype=bool), np.zeros(len(counts), dtype=bool)
        for t, setting in enumerate(what):
            one = self.bin(first + t, counts[t], None if mask is None else mask[t], setting)
            if one is not None:
                made[t], came[t] = one[0], True
                seen[t] = True if one[1] is None else one[1]
        return made, seen, came
