"""The scheduling policy: which bins are solved next, in which batches, and which are shed.

Earliest deadline first, with one bin width reserved per bin of a session (a constant-bandwidth
server): queued bins of a session rank as if each were due at least one bin width after the previous
one. So a stream in real time ranks by its due times, and a replay at full speed, or a session that
catches up after a gap, uses only the capacity that real-time streams leave. When a session has
nothing queued, its rank restarts from its due time. Bins of a session keep their order.

Waiting bins of different sessions are solved together, as many as fit into a step: an eighth of the
bin width, and half of the time until the first of them is due. If the most urgent bin is overdue, a
step may take ``CATCH_UP`` times as long, since bins take less time each in larger batches. For the
same reason a bin that has waited long (``BACKLOG``) does not shorten the step: if steps became
shorter as bins approach their due times, a backlog would never be worked off.

Overload is shed: if the next bin of a session that sheds would be late while newer ones wait, all
but the newest are taken without a solve. So solves are spent on bins that can still be in time, and
the session is at its newest bin again at once.

Pure: no clock, no threads, no sockets.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from msgspec.structs import replace

from ilqr_service.work import NO_SOLVE, Solve, SwapModel, Work

SHARE = 8
"""A step takes at most a bin width divided by this, which bounds the wait of a new bin."""
CATCH_UP = 4
BACKLOG = 2
"""A bin is part of a backlog if it has waited for this many steps of the largest size."""
SHED_AT_ONCE = 128
"""Largest number of bins taken without a solve between two solves."""


class Cost:
    """The cost model of a model's steps.

    A step takes a fixed time and a time per bin. Both are measured while warming up, then scaled by
    the times of later steps.

    Args:
        bin_ns: bin width.
        horizon: bins in a window, all of which a late bin may require to solve again.
        most: largest number of bins in a step; 1 if each is solved alone.
        start, each: nanoseconds.
    """

    def __init__(
        self, bin_ns: int, horizon: int, most: int, start: float = 0.0, each: float = 1e6
    ) -> None:
        self.bin_ns, self.horizon, self.most = bin_ns, horizon, most
        self.start, self.each = start, each
        self._scale = 1.0

    def ns(self, bins: int) -> float:
        """Return the time of a step of ``bins`` bins; 0 for none."""
        return self._scale * (self.start + self.each * bins) if bins else 0.0

    @property
    def slice_ns(self) -> float:
        """Longest time that a step should take."""
        return self.bin_ns / SHARE

    @property
    def batch(self) -> int:
        """Return how many bins are solved in that time."""
        if self.most == 1:
            return 1
        more = (self.slice_ns - self.ns(1)) / (self.ns(2) - self.ns(1))
        return max(1, min(self.most, 1 + int(more)))

    def learn(self, bins: int, ns: float) -> None:
        """Update the scale by the time of a step."""
        ratio = ns / (self.start + self.each * bins)
        self._scale += (min(max(ratio, 0.25), 4.0) - self._scale) / 16

    def measured(self, one: float, many: float, bins: int) -> None:
        """Reset from the times of a step of one bin and of a step of ``bins``."""
        each = max((many - one) / (bins - 1), many / bins / 16, 1.0) if bins > 1 else max(one, 1.0)
        self.start, self.each, self._scale = max(one - each, 0.0), each, 1.0


Costs = Callable[[str], Cost]
"""Cost models by model id; "" is the first model."""


def steps(works: list[Work], costs: Costs) -> list[list[Work]]:
    """Group works of different runs into steps in the order that answers soonest.

    First the bins of each model together, those without a solve apart; then, one by one, works that
    need a whole window or cannot share a step.
    """
    together: dict[tuple[str, bool], list[list[Work]]] = {}
    alone: list[list[Work]] = []
    for work in works:
        cost = costs(work.model)
        if not isinstance(work, Solve) or cost.batch == 1:
            alone.append([work])
            continue
        filled = together.setdefault((work.model, work.budget == NO_SOLVE), [[]])
        if len(filled[-1]) == cost.most:
            filled.append([])
        filled[-1].append(work)
    return [step for filled in together.values() for step in filled] + alone


@dataclass(slots=True)
class _Queue:
    works: deque[tuple[int, Work]] = field(default_factory=deque[tuple[int, Work]])
    rank: int = 0
    sheds: bool = False


class Policy:
    """The queue of works.

    Args:
        costs: of the models.
    """

    def __init__(self, costs: Costs) -> None:
        self._costs = costs
        self._queues: dict[int, _Queue] = {}
        self._heads: list[tuple[int, int, int]] = []  # (rank, run, index)
        self._waiting = 0

    def __len__(self) -> int:
        return self._waiting

    def push(self, work: Work) -> None:
        """Queue a work behind those of its run."""
        queue = self._queues.setdefault(work.run, _Queue())
        rank = work.due_ns
        if queue.works:
            rank = max(rank, queue.rank + self._costs(work.model).bin_ns)
        queue.rank = rank
        queue.sheds = isinstance(work, Solve) and work.sheds
        queue.works.append((rank, work))
        self._waiting += 1
        if len(queue.works) == 1:
            heapq.heappush(self._heads, (rank, work.run, work.index))

    def next(self, now_ns: int, limit: int) -> list[list[list[Work]]]:
        """Return rounds of steps, each round with works of different runs.

        First shed bins, then at most ``limit`` of the most urgent works.
        """
        rounds = [*self.shed(now_ns, SHED_AT_ONCE), self.take(limit, now_ns)]
        return [steps(works, self._costs) for works in rounds]

    def take(self, limit: int, now_ns: int | None = None) -> list[Work]:
        """Up to ``limit`` works of as many different runs, most urgent first.

        Args:
            now_ns: the time, to take no more than fit into a step; the first is always taken.
        """
        quota = None if now_ns is None else Quota(self._costs, now_ns)
        taken: list[Work] = []
        while self._heads and len(taken) < limit:
            rank, run, index = self._heads[0]
            queue = self._queues.get(run)
            # The head of a run that was forgotten, shed or taken meanwhile is stale.
            first = queue.works[0] if queue and queue.works else None
            if queue is None or first is None or (first[0], first[1].index) != (rank, index):
                heapq.heappop(self._heads)
                continue
            if quota is not None and not quota.fits(first[1]) and taken:
                break
            heapq.heappop(self._heads)
            taken.append(queue.works.popleft()[1])
        self._waiting -= len(taken)
        for work in taken:
            queue = self._queues[work.run]
            if queue.works:
                rank, following = queue.works[0]
                heapq.heappush(self._heads, (rank, work.run, following.index))
            else:
                del self._queues[work.run]
        return taken

    def overran(self, run: int) -> None:
        """Allow queued bins of a run to be shed."""
        if run in self._queues:
            self._queues[run].sheds = True

    def shed(self, now_ns: int, limit: int) -> list[list[Work]]:
        """Return at most ``limit`` bins to take without a solve, as rounds of different runs.

        Bins of a run are in order. The newest bin of a run is never shed.
        """
        rounds: list[list[Work]] = []
        for run, queue in self._queues.items():
            works, place = queue.works, 0
            if len(works) == 1:
                continue
            first = works[0][1]
            behind = queue.sheds and first.due_ns <= now_ns + self._costs(first.model).ns(1)
            while len(works) > 1 and limit > 0:
                work = works[0][1]
                if not isinstance(work, Solve) or not (behind or work.budget == NO_SOLVE):
                    break
                works.popleft()
                rounds += [[]] if place == len(rounds) else []
                rounds[place].append(replace(work, budget=NO_SOLVE))
                place, limit = place + 1, limit - 1
            if place:
                self._waiting -= place
                if len(works) == 1:  # bins that were not solved cost nothing
                    queue.rank = works[0][1].due_ns
                    works[0] = (queue.rank, works[0][1])
                heapq.heappush(self._heads, (works[0][0], run, works[0][1].index))
        return rounds

    def forget(self, run: int) -> int:
        """Drop the queued works of a run; return their number."""
        queue = self._queues.pop(run, None)
        dropped = len(queue.works) if queue is not None else 0
        self._waiting -= dropped
        return dropped


class Quota:
    """Decides which works fit into the next step.

    Args:
        costs: of the models.
        now_ns: the time.
    """

    def __init__(self, costs: Costs, now_ns: int) -> None:
        self._costs, self._now = costs, now_ns
        self._longest = 0.0
        self._left = float("inf")
        self._spent = 0.0
        self._bins: dict[str, int] = {}

    def fits(self, work: Work) -> bool:
        """Return whether the step may take this work too, and if so count it."""
        cost = self._costs(work.model)
        overdue = work.due_ns <= self._now and not isinstance(work, SwapModel)
        if not self._longest:
            self._longest = cost.slice_ns * (CATCH_UP if overdue else 1)
        waited = self._now - work.received_ns
        if not overdue and work.due_ns and waited < BACKLOG * cost.slice_ns:
            self._left = min(self._left, work.due_ns - self._now)
        if isinstance(work, Solve):
            bins = self._bins.get(work.model, 0)
            self._bins[work.model] = bins + 1
            self._spent += cost.ns(bins + 1) - cost.ns(bins)
        else:
            self._spent += cost.horizon * cost.ns(1)
        return self._spent <= min(self._longest, self._left / 2)
