"""Which units can be believed: counts against the model's own prediction, with hysteresis.

For each unit three things are followed and forgotten exponentially: how many spikes came and how
many the model had expected (over ``MEMORY`` bins), and in what share of bins the count was far
above what a Poisson count of that mean would be (over ``SHORT``). A unit is masked when it is

- dead: no spike while ``DEAD`` of them were expected since its last one;
- saturated: most bins far above expectation;
- drifting: its spikes and the expectation differ by a factor of ``DRIFT`` or more, beyond chance.

While masked its counts are not used but are still compared; it is let in again when all three are
well within their limits (half-way, on a log scale). At most a quarter of the units are masked: when
more go wrong it is the model or the recording that is, which bits per spike show.

Pure and deterministic: a journal's replay flags the same units at the same bins.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

MEMORY = 200
SHORT = 30
DEAD = 30.0
DRIFT = 3.0
SURE = 8.0
SURPRISE = 8.0
REASONS = ("", "dead", "saturated", "drifting")


@dataclass(frozen=True, slots=True)
class UnitWatch:
    """What is remembered of N units. Arrays are never changed in place.

    Attributes:
        seen, expected: (N,) forgotten sums of counts and of predictions.
        above: (N,) share of bins far above expectation.
        silent: (N,) spikes expected since the last one.
        reason: int8 (N,), index into ``REASONS``; 0 is believed.
        predicted: (N,) the newest prediction; NaN before the first.
    """

    seen: Vector
    expected: Vector
    above: Vector
    silent: Vector
    reason: NDArray[np.int8]
    predicted: Vector

    @staticmethod
    def fresh(n_units: int) -> UnitWatch:
        zeros = np.zeros(n_units)
        return UnitWatch(
            zeros, zeros, zeros, zeros, np.zeros(n_units, np.int8), np.full(n_units, np.nan)
        )

    @property
    def masked(self) -> NDArray[np.bool_]:
        """(N,) True where not to be believed."""
        return self.reason > 0

    def after(
        self, counts: Vector | None, observed: NDArray[np.bool_] | None, rates: Vector
    ) -> UnitWatch:
        """One bin later.

        Args:
            counts: (N,) as they came, or None where no bin did. Channels after the N units are not
                looked at, here and below.
            observed: (N,) by the feeder's mask; None means all.
            rates: (N,) the model's expectation after this bin, which is what the next one is
                compared with.
        """
        n = len(self.seen)
        counts = None if counts is None else counts[:n]
        observed, rates = None if observed is None else observed[:n], rates[:n]
        ok = np.isfinite(self.predicted)
        if counts is None or not ok.all():
            return UnitWatch(
                self.seen, self.expected, self.above, self.silent, self.reason, rates.copy()
            )
        use = ok if observed is None else ok & observed
        keep = np.where(use, 1 - 1 / MEMORY, 1.0)
        x, r = np.where(use, counts, 0.0), np.where(use, self.predicted, 0.0)
        most = r + SURPRISE * np.sqrt(r + 1.0)
        high = use & (x > most)
        # one wild bin says little about drift
        seen, expected = keep * self.seen + np.minimum(x, most), keep * self.expected + r
        above = np.where(use, self.above + (high - self.above) / SHORT, self.above)
        silent = np.where(use & (counts > 0), 0.0, self.silent + r)
        ratio = np.abs(np.log((seen + 1.0) / (expected + 1.0)))
        sure = np.abs(seen - expected) > SURE * np.sqrt(expected + seen + 1.0)
        limit = np.log(DRIFT)
        reason = np.select(
            [silent > DEAD, above > 0.5, sure & (ratio > limit)], [1, 2, 3], default=0
        ).astype(np.int8)
        settled = (silent < DEAD / 2) & (above < 0.1) & (ratio < limit / 2)
        before = self.reason
        now = np.where(before > 0, np.where(settled, 0, before), reason).astype(np.int8)
        room = len(now) // 4 - int((now[before > 0] > 0).sum())
        for unit in np.flatnonzero((now > 0) & (before == 0))[max(0, room) :]:
            now[unit] = 0
        return UnitWatch(seen, expected, above, silent, now, rates.copy())

    def changes(self, before: UnitWatch, names: tuple[str, ...]) -> tuple[str, ...]:
        """What changed since ``before``, for people: ``unit NAME masked: dead``."""
        said: list[str] = []
        for unit in np.flatnonzero(self.reason != before.reason):
            why = REASONS[int(self.reason[unit])]
            said.append(f"unit {names[unit]} " + (f"masked: {why}" if why else "used again"))
        return tuple(said)

    def flagged(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """``NAME:reason`` of the masked units."""
        return tuple(
            f"{names[u]}:{REASONS[int(self.reason[u])]}" for u in np.flatnonzero(self.reason)
        )
