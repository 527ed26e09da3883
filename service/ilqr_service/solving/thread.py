"""The solver thread: takes the most urgent bins, solves them, returns the answers.

The policy chooses and groups the bins. The I/O thread calls ``submit``, ``forget`` and
``finished``; answers wait in a deque, and the I/O thread is woken. Between the arrival of a bin and
its solve there is one lock, held for microseconds. The next bins are chosen when the engine is free
for them.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from ilqr_service import logs
from ilqr_service.solving.engines import Engines
from ilqr_service.solving.policy import Policy
from ilqr_service.solving.run import PackedRun, Resumed
from ilqr_service.work import EngineAnswer, SwapModel, Work
from ilqr_vae.errors import IlqrVaeError

_UNREAD = 128
"""Answers that wait for the I/O thread, above which nothing is shed."""
_HELD_S = 0.005
"""Longest wait until the I/O thread reads them."""


class SolverThread:
    """Runs the engines in a thread.

    Args:
        engines: used only by this thread once started.
        wake: wakes the I/O thread.
        resume: runs to resume before the first bin.
        snapshot_every: works of a run between snapshots; 0 for none.
        keep_warm_s: seconds without a bin after which a hidden step is made; 0 for never.
        prepare: called in the thread before anything else.

    Attributes:
        ready: set once the engine is warm.
        failure: the error that ended the thread, if any.
    """

    def __init__(
        self,
        engines: Engines,
        wake: Callable[[], None],
        *,
        resume: list[Resumed] | None = None,
        snapshot_every: int = 0,
        keep_warm_s: float = 0.0,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        self.ready = threading.Event()
        self.failure: BaseException | None = None
        self._engines = engines
        self._wake = wake
        self._resume = resume or []
        self._snapshot_every = snapshot_every
        self._keep_warm_s = keep_warm_s
        self._prepare = prepare
        self._since: dict[int, int] = {}
        self._policy = Policy(engines.cost)
        self._forgotten: list[int] = []
        self._stopping = self._woken = self._held = False
        self._changed = threading.Condition()
        self._answers: deque[EngineAnswer | PackedRun] = deque()
        self._thread = threading.Thread(target=self._run, name="solver", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, works: list[Work]) -> None:
        """Queue bins."""
        with self._changed:
            for work in works:
                self._policy.push(work)
            self._changed.notify()

    def overran(self, run: int) -> None:
        """Allow queued bins of a run to be shed."""
        with self._changed:
            self._policy.overran(run)

    def forget(self, run: int) -> int:
        """Drop the queue and state of a run; return the number of dropped bins.

        A bin that is being solved is still answered.
        """
        with self._changed:
            dropped = self._policy.forget(run)
            self._forgotten.append(run)
            self._changed.notify()
        return dropped

    def finished(self) -> deque[EngineAnswer | PackedRun]:
        """Return the deque of answers and snapshots, from which the caller pops on the left.

        Later ones wake the I/O thread again.
        """
        self._woken = False
        if self._held:
            with self._changed:
                self._changed.notify()
        return self._answers

    def stop(self) -> None:
        """Stop after the current step, and wait for it. Queued bins are not solved."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _next(self) -> tuple[list[int], list[list[list[Work]]]] | None:
        """Wait for runs to forget and rounds of steps (see ``Policy.next``); None at the end.

        Nothing is shed while the I/O thread has many answers to read: an answer of another run
        would wait behind them.
        """
        with self._changed:
            while not (self._stopping or self._forgotten):
                shed = max(0, _UNREAD - len(self._answers))
                rounds = self._policy.next(time.monotonic_ns(), self._engines.batch, shed)
                if rounds:
                    self._held = False
                    return [], rounds
                self._held = len(self._policy) > 0
                if self._held and len(self._answers) < _UNREAD:
                    continue  # they have been read meanwhile
                # The I/O thread may have seen that nothing is held before this thread decided so.
                timeout = _HELD_S if self._held else self._keep_warm_s or None
                if not self._changed.wait(timeout) and not self._held:
                    return [], []
            if self._stopping:
                return None
            forgotten, self._forgotten = self._forgotten, []
            return forgotten, []

    def _run(self) -> None:
        try:
            if self._prepare is not None:
                self._prepare()
            for warm in self._engines.warm_up():
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
            self._wake_io()
            while (task := self._next()) is not None:
                forgotten, rounds = task
                for run in forgotten:
                    self._engines.forget(run)
                    self._since.pop(run, None)
                for steps in rounds:
                    for step in steps:
                        self._answers.extend(self._engines.solve(step))
                        self._wake_io()
                    self._engines.between()
                    for step in steps:
                        self._snapshots(step)
                if not (forgotten or rounds):
                    self._engines.keep_warm()
        except BaseException as error:
            self.failure = error
            if not isinstance(error, IlqrVaeError):  # otherwise the caller logs a line
                logs.exception("the solver thread ended")
            self._wake_io()

    def _take_up(self, resumed: Resumed) -> None:
        """Solve the works after a snapshot again; answer those not answered yet."""
        if resumed.packed is not None:
            self._engines.restore(resumed.packed)
        for work in resumed.works:
            answers = self._engines.solve([work])
            if work.serial > resumed.answered:
                self._answers.extend(answers)

    def _snapshots(self, works: list[Work]) -> None:
        if not self._snapshot_every:
            return
        for work in works:
            since = self._since[work.run] = self._since.get(work.run, 0) + 1
            if isinstance(work, SwapModel) or since >= self._snapshot_every:
                packed = self._engines.pack(work)
                if packed is not None:
                    self._since[work.run] = 0
                    self._answers.append(packed)

    def _wake_io(self) -> None:
        # The I/O thread was woken already, and has not looked yet.
        if not self._woken:
            self._woken = True
            self._wake()
