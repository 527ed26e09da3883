"""The solver thread: takes the most urgent bins, solves them, hands the answers back.

Bins of different runs that wait are solved together, as many as fit (``Quota``); where only one
waits it is solved alone. The I/O thread calls ``submit``, ``forget`` and ``finished``; answers wait
in a deque, and the I/O thread is woken. Between a bin's arrival and its
solve there is one lock held for microseconds, and the choice of the next bins is made when the
engine is free for them.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from ilqr_service import logs
from ilqr_service.solving.engines import Fleet, Quota
from ilqr_service.solving.run import PackedRun, Resumed
from ilqr_service.solving.scheduler import Scheduler
from ilqr_service.work import Answer, Work
from ilqr_vae.errors import IlqrVaeError

_SHED_AT_ONCE = 128
"""Bins that go without a solve between two solves."""


class SolverThread:
    """Runs an engine in a thread of its own.

    Args:
        fleet: its engines are used by this thread alone once started.
        wake: wakes the I/O thread.
        resume: runs to take up before the first bin.
        snapshot_every: works of a run from one snapshot to the next; 0 is none.
        keep_warm_s: seconds without a bin after which a step is made that nobody sees; 0 is never.
        prepare: called in the thread before anything else.

    Attributes:
        ready: set once the engine is warm.
        failure: what ended the thread, if anything did.
    """

    def __init__(
        self,
        fleet: Fleet,
        wake: Callable[[], None],
        *,
        resume: list[Resumed] | None = None,
        snapshot_every: int = 0,
        keep_warm_s: float = 0.0,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        self.ready = threading.Event()
        self.failure: BaseException | None = None
        self._fleet = fleet
        self._wake = wake
        self._resume = resume or []
        self._snapshot_every = snapshot_every
        self._keep_warm_s = keep_warm_s
        self._prepare = prepare
        self._since: dict[int, int] = {}
        self._scheduler = Scheduler(fleet.first.facts.bin_width_ns)
        self._forgotten: list[int] = []
        self._stopping = self._told = False
        self._changed = threading.Condition()
        self._answers: deque[Answer | PackedRun] = deque()
        self._thread = threading.Thread(target=self._run, name="solver", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, works: list[Work]) -> None:
        """Queue bins."""
        with self._changed:
            for work in works:
                self._scheduler.push(work, self._fleet.spacing_ns(work))
            self._changed.notify()

    def overran(self, run: int) -> None:
        """What is queued of a run may be shed."""
        with self._changed:
            self._scheduler.overran(run)

    def forget(self, run: int) -> int:
        """Drop a run's queue and state; returns how many queued bins were dropped. A bin of it that
        is being solved is still answered."""
        with self._changed:
            dropped = self._scheduler.forget(run)
            self._forgotten.append(run)
            self._changed.notify()
        return dropped

    def finished(self) -> deque[Answer | PackedRun]:
        """The answers and snapshots not yet taken; the caller pops them from the left. What comes
        from here on wakes the I/O thread again."""
        self._told = False
        return self._answers

    def stop(self) -> None:
        """End after the bin being solved, and wait for that. What is queued is not solved."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _next(self) -> tuple[list[int], list[list[Work]]] | None:
        """Runs to forget, and rounds of bins of different runs; None is the end."""
        with self._changed:
            while not (self._stopping or self._forgotten or len(self._scheduler)):
                if not self._changed.wait(self._keep_warm_s or None):
                    return [], []
            if self._stopping:
                return None
            forgotten, self._forgotten = self._forgotten, []
            now = time.monotonic_ns()
            ready = self._fleet.ready(now)
            rounds = self._scheduler.shed(ready, _SHED_AT_ONCE)
            rounds.append(self._scheduler.take(self._fleet.batch, Quota(self._fleet, now)))
            return forgotten, rounds

    def _run(self) -> None:
        try:
            if self._prepare is not None:
                self._prepare()
            for warm in self._fleet.warm_up():
                logs.info(
                    "warm",
                    steps=warm.steps,
                    seconds=round(warm.seconds, 2),
                    first_ms=round(warm.first_ms, 2),
                    steady_ms=round(warm.steady_ms, 3),
                )
            for resumed in self._resume:
                self._take_up(resumed)
            self.ready.set()
            self._tell()
            while (task := self._next()) is not None:
                forgotten, rounds = task
                for run in forgotten:
                    self._fleet.forget(run)
                    self._since.pop(run, None)
                for works in rounds:
                    for part in self._fleet.parts(works):
                        self._answers.extend(self._fleet.solve(part))
                        self._tell()
                    self._fleet.between()
                    self._snapshots(works)
                if not (forgotten or rounds):
                    self._fleet.keep_warm()
        except BaseException as error:
            self.failure = error
            if not isinstance(error, IlqrVaeError):  # else the caller has one line for it
                logs.exception("the solver thread ended")
            self._tell()

    def _take_up(self, resumed: Resumed) -> None:
        """Solve again what a snapshot does not hold; answer what was not answered."""
        if resumed.packed is not None:
            self._fleet.restore(resumed.packed)
        for work in resumed.works:
            answers = self._fleet.solve([work])
            if work.serial > resumed.answered:
                self._answers.extend(answers)

    def _snapshots(self, works: list[Work]) -> None:
        if not self._snapshot_every:
            return
        for work in works:
            since = self._since[work.run] = self._since.get(work.run, 0) + 1
            # from a swap on the run needs the new model alone
            if work.swap or since >= self._snapshot_every:
                self._since[work.run] = 0
                packed = self._fleet.pack(work)
                if packed is not None:
                    self._answers.append(packed)

    def _tell(self) -> None:
        # Told already, the I/O thread has yet to look.
        if not self._told:
            self._told = True
            self._wake()
