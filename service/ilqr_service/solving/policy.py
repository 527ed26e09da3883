"""The scheduling policy: which bins are solved next, in which batches, and which are shed.

Earliest deadline first, with one bin width reserved per bin of a session (a constant-bandwidth
server): queued bins of a session rank as if each were due at least one bin width after the previous
one. So a stream in real time ranks by its due times, and a replay at full speed, or a session that
catches up after a gap, uses only the capacity that real-time streams leave. A session that is ahead
of real time stays behind the others by its lead when its queue is empty again, but forgets a
sixteenth of it with each bin: otherwise one that sends fast, with short deadlines, would come first
always. Bins of a session keep their order.

Waiting bins of different sessions are solved together, as many as fit into a step: an eighth of the
bin width, and half of the time until the first of them is due. If the most urgent bin is overdue, a
step may take ``CATCH_UP`` times as long, since bins take less time each in larger batches. For the
same reason a bin that has waited long (``BACKLOG``) does not shorten the step: if steps became
shorter as bins approach their due times, a backlog would never be worked off.

Overload is shed: if the next bin of a session that sheds would be late while newer ones wait, all
but the newest are taken without a solve, in turn with those of other sessions. So solves are spent
on bins that can still be in time, and the session is at its newest bin again at once.

Pure: no clock, no threads, no sockets.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from msgspec.structs import replace

from ilqr_service.work import NO_SOLVE, Solve, SwapModel, Work

SHARE = 8
"""A step takes at most a bin width divided by this, which bounds the wait of a new bin."""
CATCH_UP = 4
BACKLOG = 2
"""A bin is part of a backlog if it has waited for this many steps of the largest size."""
LEAD_LOST = 16
"""One part in this many of a session's lead is forgotten with each bin."""
SHED_ROUNDS = 16
"""Bins of one session that are shed before what can be in time is looked for again."""


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
        """Update the scale by the time of a step; a single outlier changes it little."""
        scale, ratio = self._scale, ns / (self.start + self.each * bins)
        self._scale += (min(max(ratio, scale / 4), 4 * scale) - scale) / 16

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
    models = {work.model: costs(work.model) for work in works}
    most = {model: 1 if cost.batch == 1 else cost.most for model, cost in models.items()}
    for work in works:
        if not isinstance(work, Solve) or most[work.model] == 1:
            alone.append([work])
            continue
        filled = together.setdefault((work.model, work.budget == NO_SOLVE), [[]])
        if len(filled[-1]) == most[work.model]:
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
        self._solved: dict[int, int] = {}  # rank of the newest bin of each run that was taken
        self._heads: list[tuple[int, int, int]] = []  # (rank, run, index)
        self._waiting = 0

    def __len__(self) -> int:
        return self._waiting

    def push(self, work: Work) -> None:
        """Queue a work behind those of its run."""
        queue = self._queues.setdefault(work.run, _Queue())
        if queue.works:
            rank = max(work.due_ns, queue.rank + self._costs(work.model).bin_ns)
        else:
            rank = self._first(work)
        queue.rank = rank
        queue.sheds = isinstance(work, Solve) and work.sheds
        queue.works.append((rank, work))
        self._waiting += 1
        if len(queue.works) == 1:
            heapq.heappush(self._heads, (rank, work.run, work.index))

    def _first(self, work: Work) -> int:
        """Return the rank of a work that is the only one of its run."""
        due_ns = work.due_ns
        lead = self._solved.get(work.run, 0) + self._costs(work.model).bin_ns - due_ns
        return due_ns + max(0, lead - lead // LEAD_LOST)

    def _behind(self, queue: _Queue, now_ns: int) -> bool:
        """Return whether a queue's first work would be late if solved, and others may be shed."""
        first = queue.works[0][1]
        return queue.sheds and first.due_ns <= now_ns + self._costs(first.model).ns(1)

    def _late(self, queue: _Queue, now_ns: int) -> bool:
        """Return whether a queue's first work is to be shed, or may be, since it is late."""
        first = queue.works[0][1]
        late = queue.sheds and isinstance(first, Solve) and first.due_ns <= now_ns
        return late or self._sheds(queue, now_ns)

    def _sheds(self, queue: _Queue, now_ns: int) -> bool:
        """Return whether a queue's first work is to be taken without a solve."""
        return self._next_sheds(queue, behind=self._behind(queue, now_ns))

    @staticmethod
    def _next_sheds(queue: _Queue, *, behind: bool) -> bool:
        first = queue.works[0][1]
        newer = len(queue.works) > 1
        return newer and isinstance(first, Solve) and (behind or first.budget == NO_SOLVE)

    def next(self, now_ns: int, limit: int, shed: int) -> list[list[list[Work]]]:
        """Return rounds of steps, each round with works of different runs.

        First at most ``limit`` of the most urgent works, then at most ``shed`` bins without a
        solve.
        """
        rounds = [self.take(limit, now_ns), *self.shed(now_ns, shed)]
        return [steps(works, self._costs) for works in rounds if works]

    def take(self, limit: int, now_ns: int | None = None) -> list[Work]:
        """Up to ``limit`` works of as many different runs, most urgent first.

        Args:
            now_ns: the time, to take no more than fit into a step; the first is always taken. Bins
                to shed are left, and late bins of runs that shed come after those in time.
        """
        quota = None if now_ns is None else Quota(self._costs, now_ns)
        taken: list[Work] = []
        late: list[tuple[int, int, int]] = []
        while self._heads and len(taken) < limit:
            head = rank, run, index = heapq.heappop(self._heads)
            queue = self._queues.get(run)
            # The head of a run that was forgotten, shed or taken meanwhile is stale.
            first = queue.works[0] if queue and queue.works else None
            if queue is None or first is None or (first[0], first[1].index) != (rank, index):
                continue
            if now_ns is not None and self._late(queue, now_ns):
                late.append(head)
            elif quota is not None and not quota.fits(first[1]) and taken:
                heapq.heappush(self._heads, head)
                break
            else:
                taken.append(self._pop(run))
        for head in late:
            queue = self._queues[head[1]]
            full = len(taken) >= limit or (now_ns is not None and self._sheds(queue, now_ns))
            if full or (quota is not None and not quota.fits(queue.works[0][1]) and taken):
                heapq.heappush(self._heads, head)
            else:
                taken.append(self._pop(head[1]))
        for work in taken:
            queue = self._queues[work.run]
            if queue.works:
                rank, following = queue.works[0]
                heapq.heappush(self._heads, (rank, work.run, following.index))
            else:
                del self._queues[work.run]
        return taken

    def _pop(self, run: int) -> Work:
        """Remove the first work of a run."""
        self._waiting -= 1
        self._solved[run], work = self._queues[run].works.popleft()
        return work

    def overran(self, run: int) -> None:
        """Allow queued bins of a run to be shed."""
        if run in self._queues:
            self._queues[run].sheds = True

    def shed(self, now_ns: int, limit: int) -> list[list[Work]]:
        """Return at most ``limit`` bins to take without a solve, as rounds of different runs.

        Bins of a run are in order. The newest bin of a run is never shed.
        """
        rounds: list[list[Work]] = []
        shed = Counter[int]()
        queues = self._queues.items()
        behind = {run for run, queue in queues if self._behind(queue, now_ns)}
        runs = [run for run, queue in queues if self._next_sheds(queue, behind=run in behind)]
        while (runs := runs[:limit]) and len(rounds) < SHED_ROUNDS:
            limit -= len(runs)
            rounds.append([self._unsolved(run) for run in runs])
            shed.update(runs)
            runs = [r for r in runs if self._next_sheds(self._queues[r], behind=r in behind)]
        for run in sorted(shed, key=shed.__getitem__):  # next time those come first that had least
            queue = self._queues[run] = self._queues.pop(run)
            rank, first = queue.works[0]
            if len(queue.works) == 1:  # bins that were not solved cost nothing
                queue.rank = rank = self._first(first)
                queue.works[0] = (rank, first)
            heapq.heappush(self._heads, (rank, run, first.index))
        return rounds

    def _unsolved(self, run: int) -> Work:
        """Remove the first work of a run; return it as one to take without a solve."""
        self._waiting -= 1
        work = self._queues[run].works.popleft()[1]
        assert isinstance(work, Solve)
        return replace(work, budget=NO_SOLVE)

    def forget(self, run: int) -> int:
        """Drop the queued works of a run; return their number."""
        queue = self._queues.pop(run, None)
        self._solved.pop(run, None)
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
