"""A queueing model of one server on one core, calibrated on streams at other loads.

One core does everything, one thing after the other: it reads a bin, solves a step of k bins, and
publishes k answers (``Times``). Bins that arrive meanwhile are read at once, which lengthens the
step. Which bins a step takes is decided by the service's own policy
(``ilqr_service.solving.policy``): as many as fit into an eighth of the bin width, earliest deadline
first, longer steps when bins are overdue.

The times are fitted to the time stamps of answers, at loads that are not the predicted ones. How
much longer or shorter a step takes is drawn from the steps that began after a similar time without
work, since an idle core is slow at first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.models import BIN_S
from ilqr_clients.load import Stamps
from ilqr_service.solving.policy import CATCH_UP, Cost, Policy
from ilqr_service.solving.stepper import STREAMS
from ilqr_service.work import Solve

Array = NDArray[np.float64]
_LONGER, _NEAR, _STALL_S = 2.0, 60, 0.005


class Sends(NamedTuple):
    """When bins were sent, in seconds from the first intended send, ascending; the stream of each;
    and the seconds until its answer came."""

    sent: Array
    streams: NDArray[np.int64]
    measured: Array

    @classmethod
    def of(cls, stamps: Sequence[Stamps]) -> Sends:
        """Take them from the stamps of a load, whose streams have phases of their own."""
        ordered = np.array(sorted(stamps, key=lambda s: s.sent), dtype=np.int64)
        intended, sent, arrived = ordered[:, 0], ordered[:, 1], ordered[:, -1]
        origin = intended.min()
        # schedules are whole nanoseconds: phases of one stream differ by one
        phases = np.round((intended - origin) % round(BIN_S * 1e9) / 1e3)
        _, streams = np.unique(phases, return_inverse=True)
        return cls((sent - origin) / 1e9, streams, (arrived - sent) / 1e9)


class Interruption(NamedTuple):
    """The core was taken away: when, and for how many seconds."""

    at: float
    seconds: float


class Parts(NamedTuple):
    """What a step consists of, in seconds, or as ratios to the fit: from the first bin's arrival
    to the solve, the solve, from its end to the next solve if bins wait, and to the last answer."""

    wake: Array
    solve: Array
    gap: Array
    told: Array


class _Steps:
    """The steps of one measured load, in order of time."""

    def __init__(self, stamps: Sequence[Stamps]) -> None:
        table = np.array(stamps, dtype=np.int64).reshape(-1, len(Stamps._fields)).T
        # client and service read the clock of one machine
        _, sent, received, start, end, published, arrived = (table - int(table[0].min())) / 1e9
        self.starts, inverse, counts = np.unique(start, return_inverse=True, return_counts=True)
        self.bins = counts.astype(np.float64)
        first, ends, told = (np.full(counts.size, v) for v in (np.inf, -np.inf, -np.inf))
        np.minimum.at(first, inverse, received)
        np.maximum.at(ends, inverse, end)
        np.maximum.at(told, inverse, published)
        self.ends, self._reads = ends, np.sort(received)
        before = np.concatenate([[-np.inf], ends[:-1]])
        after = np.append(self.starts[1:], np.inf)
        self.busy = first <= before
        self.idle = np.where(self.busy, 0.0, first - before)
        self.followed = np.append(self.busy[1:], False)
        nan = np.nan
        self.spent = Parts(
            wake=np.where(self.busy, nan, self.starts - first),
            solve=ends - self.starts,
            gap=np.where(self.followed, after - ends, nan),
            told=told - ends,
        )
        self.read = Parts(
            wake=self.reads(first, self.starts),
            solve=self.reads(self.starts, ends),
            gap=np.where(self.followed, self.reads(ends, np.where(self.followed, after, ends)), 0),
            told=np.zeros_like(ends),
        )
        alone = np.isin(received, first[~self.busy])
        self.way_in, self.way_out = (received - sent)[alone], arrived - published

    def reads(self, begin: Array, end: Array) -> Array:
        """Return how many bins were read between two times."""
        at = np.searchsorted(self._reads, np.stack([begin, end]))
        return (at[1] - at[0]).astype(np.float64)


def _fitted(spent: Array, *columns: Array) -> Array:
    """Return a constant and a coefficient per column, not below 0, of least absolute deviation."""
    known = np.isfinite(spent)
    table = np.stack([np.ones(spent.size), *columns], 1)[known]
    weights = np.ones(table.shape[0])
    found = np.zeros(table.shape[1])
    for _ in range(20):
        scaled = table * weights[:, None]
        found = np.linalg.lstsq(scaled, spent[known] * weights, rcond=None)[0]
        weights = 1 / np.sqrt(np.maximum(np.abs(spent[known] - table @ found), 1e-5))
    return np.maximum(found, 0.0)


class Times(NamedTuple):
    """Times of one server, in seconds.

    Attributes:
        read: to read a bin, whatever else is going on.
        wake: to begin with a solve after the first bin that comes to an idle server.
        solve, each: to solve a step, and each bin of it.
        gap, telling: from a solve to the next one if bins wait, and for each bin of the step.
        told, answer: from a solve to its first answer, and for each answer.
    """

    read: float
    wake: float
    solve: float
    each: float
    gap: float
    telling: float
    told: float
    answer: float

    def parts(self, bins: Array, read: Parts) -> Parts:
        """Return the times of steps of so many bins, with so many read meanwhile."""
        return Parts(
            self.wake + self.read * read.wake,
            self.solve + self.each * bins + self.read * read.solve,
            self.gap + self.telling * bins + self.read * read.gap,
            self.told + self.answer * bins,
        )

    @classmethod
    def fitted(cls, steps: _Steps) -> Times:
        """Fit the times to the steps of a load."""
        spent, meanwhile, bins = steps.spent, steps.read, steps.bins
        wake, read = _fitted(spent.wake, meanwhile.wake)
        solve, each = np.maximum(_fitted(spent.solve - read * meanwhile.solve, bins), 1e-6)
        told, answer = _fitted(spent.told, bins)
        gap, telling = told + wake, answer
        if steps.followed.sum() >= _NEAR:
            gap, telling = _fitted(spent.gap - read * meanwhile.gap, bins)
        return cls(*map(float, (read, wake, solve, each, gap, telling, told, answer)))


@dataclass(frozen=True)
class Core:
    """The fitted times of one server, and draws of how they vary.

    Attributes:
        times: the fit.
        way_in, way_out: seconds of single bins between client and server.
        idle, ratios: of measured steps, in order of the time without work before them: that time,
            and what they took, divided by the fit.
    """

    times: Times
    way_in: Array
    way_out: Array
    idle: Array
    ratios: Parts

    @classmethod
    def fitted(cls, loads: Sequence[Sequence[Stamps]]) -> Core:
        """Calibrate on the stamps of loads, the last of which is the busiest."""
        steps = [_Steps(stamps) for stamps in loads]
        times = Times.fitted(steps[-1])
        ratios = [
            [
                a / np.maximum(b, 1e-6)
                for a, b in zip(s.spent, times.parts(s.bins, s.read), strict=True)
            ]
            for s in steps
        ]
        idle = np.concatenate([s.idle for s in steps])
        order = np.argsort(idle, kind="stable")
        return cls(
            times,
            steps[-1].way_in,
            steps[-1].way_out,
            idle[order],
            Parts(*(np.concatenate(column)[order] for column in zip(*ratios, strict=True))),
        )

    def cost(self, bin_s: float) -> Cost:
        """Return the policy's cost model, as it is measured while a server warms up."""
        start, each = 1e9 * self.times.solve, 1e9 * self.times.each
        return Cost(round(bin_s * 1e9), 1, STREAMS, start, each)

    def most_streams(self, bin_s: float) -> float:
        """Return the streams at which the core is busy all the time, in the steps of the policy."""
        t, bins = self.times, self.cost(bin_s).batch
        return bins * bin_s / (t.solve + t.gap + bins * (t.each + t.telling + t.read))


class Simulation:
    """Simulates the server with bins that are sent at given times.

    Args:
        core: fitted times.
        bin_s: bin width in seconds, which is also the deadline.
        interruptions: in order of time.
        seed: of the draws.
    """

    def __init__(
        self,
        core: Core,
        bin_s: float,
        interruptions: Sequence[Interruption] = (),
        seed: int = 0,
    ) -> None:
        self._core, self._bin_s = core, bin_s
        self._rng = np.random.default_rng(seed)
        self._interruptions = list(interruptions)
        cost = core.cost(bin_s)
        self._cost, self._policy = cost, Policy(lambda _: cost)

    def run(self, sends: Sends) -> Array:
        """Return the seconds from each send to its answer."""
        sent, streams = sends.sent, sends.streams
        core, rng, size = self._core, self._rng, sent.size
        times = core.times
        came = sent + rng.choice(core.way_in, size)
        order = np.argsort(came, kind="stable")
        came, streams = came[order], streams[order]
        told, place, now = np.zeros(size), 0, -np.inf
        width = round(self._bin_s * 1e9)
        while place < size or len(self._policy):
            drawn = self._drawn(0.0 if len(self._policy) else max(0.0, came[place] - now))
            if not len(self._policy):
                now = max(now, came[place])
                now = self._until(now, came, times.wake, drawn[0])
            upto = int(np.searchsorted(came, now, side="right"))
            for i in range(place, upto):
                at = round(came[i] * 1e9)
                self._policy.push(
                    Solve(
                        run=int(streams[i]), index=i, counts=None, received_ns=at, due_ns=at + width
                    )
                )
            place = upto
            limit = CATCH_UP * self._cost.batch
            for steps in self._policy.next(round(now * 1e9), limit, 0):
                for step in steps:
                    k = len(step)
                    end = self._until(now, came, times.solve + k * times.each, drawn[1])
                    self._cost.learn(k, (end - now) * 1e9)
                    each = times.answer * drawn[3]
                    last = self._through(end, times.told * drawn[3] + k * each)
                    for j, work in enumerate(step):
                        told[work.index] = last - (k - 1 - j) * each
                    now = last
                    if len(self._policy) or (place < size and came[place] <= end):
                        now = self._until(end, came, times.gap + k * times.telling, drawn[2])
        found = np.empty(size)
        found[order] = told
        return found + rng.choice(core.way_out, size) - sent

    def _drawn(self, idle: float) -> list[float]:
        """Draw ratios of a step that begins after so many seconds without work."""
        core = self._core
        at = int(np.searchsorted(core.idle, idle))
        first = max(0, min(at - _NEAR // 2, core.idle.size - _NEAR))
        if idle == 0.0:
            first, last = 0, int(np.searchsorted(core.idle, 0.0, side="right"))
        else:
            last = min(first + _NEAR, core.idle.size)
        pick = int(self._rng.integers(first, max(last, first + 1)))
        ratios = [float(column[pick]) for column in core.ratios]
        return [min(r, _LONGER) if np.isfinite(r) else 1.0 for r in ratios]

    def _until(self, begin: float, came: Array, fixed: float, ratio: float) -> float:
        """Return when work ends that is lengthened by the bins that arrive meanwhile."""
        read = self._core.times.read
        first, end = int(np.searchsorted(came, begin)), begin + fixed * ratio
        for _ in range(20):
            bins = int(np.searchsorted(came, end)) - first
            longer = begin + (fixed + bins * read) * ratio
            if longer <= end:
                break
            end = longer
        return self._through(begin, end - begin)

    def _through(self, begin: float, seconds: float) -> float:
        """Return the end of work, with the interruptions that began since the last work."""
        end = begin + seconds
        while self._interruptions and self._interruptions[0].at < end:
            taken = self._interruptions.pop(0)
            end += max(0.0, taken.at + taken.seconds - max(begin, taken.at))
        return end


def interruptions(core: Core, stamps: Sequence[Stamps]) -> list[Interruption]:
    """Return when a measured step took far longer than the fit, and by how much.

    Times are in seconds from the first intended send.
    """
    steps = _Steps(stamps)
    fit = core.times.parts(steps.bins, steps.read)
    begins = (steps.starts - steps.spent.wake, steps.starts, steps.ends)
    found: list[Interruption] = []
    for at, spent, usual in zip(begins, steps.spent[:3], fit[:3], strict=True):
        longer = spent - _LONGER * usual
        where = np.isfinite(longer) & (longer > _STALL_S)
        found += [
            Interruption(*map(float, one)) for one in zip(at[where], longer[where], strict=True)
        ]
    return sorted(found)
