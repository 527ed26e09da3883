"""Which bin next: earliest due first, one reserved bin width apart within a session.

A session pays for its speed itself. Its queued bins rank as if each were due at least one bin width
after the one before (a constant-bandwidth server), so a stream fed in real time ranks by its plain
due times, and a replay at full speed, or the catching up after a gap, takes only what the streams
in real time leave over. When nothing of a session is queued its rank starts again from its due
time. Within a session bins keep their order.

Pure: no clock, no threads, no sockets.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from ilqr_service.work import Work


@dataclass(slots=True)
class _Queue:
    works: deque[tuple[int, Work]] = field(default_factory=deque[tuple[int, Work]])
    rank: int = 0


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
        queue.rank = rank
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
            # A head of a run that was forgotten meanwhile is stale.
            if queue is None or (queue.works[0][0], queue.works[0][1].index) != (rank, index):
                heapq.heappop(self._heads)
                continue
            if fits is not None and not fits(queue.works[0][1]) and taken:
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

    def waits(self, run: int) -> bool:
        """Whether more of a run is queued."""
        return run in self._queues

    def forget(self, run: int) -> int:
        """Drop what is queued of a run; returns how many bins that was."""
        queue = self._queues.pop(run, None)
        dropped = len(queue.works) if queue is not None else 0
        self._waiting -= dropped
        return dropped
