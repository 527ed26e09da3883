"""The solver thread: takes the most urgent bins, solves them, hands the answers back.

The I/O thread calls ``submit``, ``forget`` and ``finished``; answers wait in a deque and a byte on
an inproc PAIR socket wakes the I/O thread. Between a bin's arrival and its solve there is one lock
held for microseconds, and the choice of the next bin is made when the engine is free for it.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from typing import Any

import zmq

from ilqr_service import logs
from ilqr_service.engine import Engine
from ilqr_service.scheduler import Scheduler
from ilqr_service.work import Answer, Work


class SolverThread:
    """Runs an engine in a thread of its own.

    Args:
        engine: used by this thread alone once started.
        context: for the wake-up socket.
        wake: inproc address that the I/O thread has bound.

    Attributes:
        ready: set once the engine is warm.
        failure: what ended the thread, if anything did.
    """

    def __init__(self, engine: Engine, context: zmq.Context[Any], wake: str) -> None:
        self.ready = threading.Event()
        self.failure: BaseException | None = None
        self._engine = engine
        self._context = context
        self._wake = wake
        self._scheduler = Scheduler(engine.facts.bin_width_ns)
        self._forgotten: list[int] = []
        self._stopping = False
        self._changed = threading.Condition()
        self._answers: deque[Answer] = deque()
        self._thread = threading.Thread(target=self._run, name="solver", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, works: list[Work]) -> None:
        """Queue bins."""
        with self._changed:
            for work in works:
                self._scheduler.push(work)
            self._changed.notify()

    def forget(self, run: int) -> int:
        """Drop a run's queue and state; returns how many queued bins were dropped. A bin of it that
        is being solved is still answered."""
        with self._changed:
            dropped = self._scheduler.forget(run)
            self._forgotten.append(run)
            self._changed.notify()
        return dropped

    def finished(self) -> deque[Answer]:
        """The answers not yet taken; the caller pops them from the left."""
        return self._answers

    def stop(self) -> None:
        """End after the bin being solved, and wait for that. What is queued is not solved."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _next(self) -> tuple[list[int], list[Work]] | None:
        with self._changed:
            while not (self._stopping or self._forgotten or len(self._scheduler)):
                self._changed.wait()
            if self._stopping:
                return None
            forgotten, self._forgotten = self._forgotten, []
            return forgotten, self._scheduler.take(self._engine.batch)

    def _run(self) -> None:
        wake: zmq.Socket[bytes] = self._context.socket(zmq.PAIR)
        wake.linger = 0
        wake.connect(self._wake)
        try:
            warm = self._engine.warm_up()
            logs.info(
                "warm",
                steps=warm.steps,
                seconds=round(warm.seconds, 2),
                first_ms=round(warm.first_ms, 2),
                steady_ms=round(warm.steady_ms, 3),
            )
            self.ready.set()
            self._tell(wake)
            while (task := self._next()) is not None:
                forgotten, works = task
                for run in forgotten:
                    self._engine.forget(run)
                if works:
                    self._answers.extend(self._engine.solve(works))
                    self._tell(wake)
        except BaseException as error:
            self.failure = error
            logs.exception("the solver thread ended")
            self._tell(wake)
        finally:
            wake.close()

    @staticmethod
    def _tell(wake: zmq.Socket[bytes]) -> None:
        # A full pipe holds wake-ups enough.
        with contextlib.suppress(zmq.Again):
            wake.send(b"", zmq.NOBLOCK)
