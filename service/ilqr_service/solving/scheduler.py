"""Which bin next: earliest due first, one reserved bin width apart within a session.

A session pays for its speed itself. Its queued bins rank as if each were due at least one bin width
after the one before (a constant-bandwidth server), so a stream fed in real time ranks by its plain
due times, and a replay at full speed, or the catching up after a gap, takes only what the streams
in real time leave over. When nothing of a session is queued its rank starts again from its due
time. Within a session bins keep their order.

What cannot be kept up with is shed: where the next bin of a session that sheds would be late while
newer ones wait, all but the newest go without a solve. So its solves go to bins that can still be
in time, and it is with its newest bin again at once.

Pure: no clock, no threads, no sockets.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from msgspec.structs import replace

from ilqr_service.work import NO_SOLVE, Work


@dataclass(slots=True)
class _Queue:
    works: deque[tuple[int, Work]] = field(default_factory=deque[tuple[int, Work]])
    rank: int = 0
    sheds: bool = False


class Scheduler:
    """Bins waiting to be solved.

    Args:
        spacing_ns: nanoseconds by which queued bins of one session rank apart (the bin width).
    """

    def __init__(self, spacing_ns: int) -> None:
        self._spacing = spacing_ns
        self._queues: dict[int, _Queue] = {}
        self._heads: list[tuple[int, int, int]] = []  # (rank, run, index)
        self._waiting = 0

    def __len__(self) -> int:
        return self._waiting

    def push(self, work: Work, spacing_ns: int = 0) -> None:
        """Queue a bin behind those of its run; ``spacing_ns`` is the run's own, 0 the default."""
        queue = self._queues.setdefault(work.run, _Queue())
        rank = (
            max(work.due_ns, queue.rank + (spacing_ns or self._spacing))
            if queue.works
            else work.due_ns
        )
        queue.rank, queue.sheds = rank, work.sheds
        queue.works.append((rank, work))
        self._waiting += 1
        if len(queue.works) == 1:
            heapq.heappush(self._heads, (rank, work.run, work.index))

    def take(self, limit: int, fits: Callable[[Work], bool] | None = None) -> list[Work]:
        """Up to ``limit`` bins of as many different runs, most urgent first.

        Args:
            fits: asked of each, in order; the first that does not is left where it is, and all
                behind it. The very first is taken whatever is said of it.
        """
        taken: list[Work] = []
        while self._heads and len(taken) < limit:
            rank, run, index = self._heads[0]
            queue = self._queues.get(run)
            # A head of a run that was forgotten, shed or taken meanwhile is stale.
            first = queue.works[0] if queue and queue.works else None
            if queue is None or first is None or (first[0], first[1].index) != (rank, index):
                heapq.heappop(self._heads)
                continue
            if fits is not None and not fits(first[1]) and taken:
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
        """What is queued of a run may be shed too."""
        if run in self._queues:
            self._queues[run].sheds = True

    def shed(self, ready: Callable[[Work], float], limit: int) -> list[list[Work]]:
        """Bins that go without a solve, at most ``limit``: rounds of bins of different runs, each
        run's in their order. The newest bin of a run is never among them.

        Args:
            ready: when a bin would be solved, in nanoseconds.
        """
        rounds: list[list[Work]] = []
        for run, queue in self._queues.items():
            works, place = queue.works, 0
            if len(works) == 1:
                continue
            behind = queue.sheds and works[0][1].due_ns <= ready(works[0][1])
            while len(works) > 1 and limit > 0:
                work = works[0][1]
                if work.late or work.swap or not (behind or work.budget == NO_SOLVE):
                    break
                works.popleft()
                rounds += [[]] if place == len(rounds) else []
                rounds[place].append(replace(work, budget=NO_SOLVE))
                place, limit = place + 1, limit - 1
            if place:
                self._waiting -= place
                if len(works) == 1:  # what was not solved has cost nothing
                    queue.rank = works[0][1].due_ns
                    works[0] = (queue.rank, works[0][1])
                heapq.heappush(self._heads, (works[0][0], run, works[0][1].index))
        return rounds

    def forget(self, run: int) -> int:
        """Drop what is queued of a run; returns how many bins that was."""
        queue = self._queues.pop(run, None)
        dropped = len(queue.works) if queue is not None else 0
        self._waiting -= dropped
        return dropped
