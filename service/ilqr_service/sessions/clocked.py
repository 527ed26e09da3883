"""What the table of sessions has to do next, without looking through all sessions: credits to tell
and clocked bins to answer."""

from __future__ import annotations

import heapq
from collections.abc import Mapping

from ilqr_service.sessions.session import Limits, Session
from ilqr_vae.protocol import messages


class Credits:
    """Credits that came free and were not told yet.

    Args:
        limits: how many a feeder has.
    """

    def __init__(self, limits: Limits) -> None:
        # where so many are owed their feeder may soon be short of them
        self._many = max(1, limits.credits // 8)
        self._owing: dict[int, Session] = {}
        self._owing_many: dict[int, Session] = {}

    def owe(self, session: Session) -> None:
        """One more."""
        session.owed += 1
        self._owing[session.run] = session
        if session.owed >= self._many:
            self._owing_many[session.run] = session

    def forget(self, run: int) -> None:
        """A run has ended."""
        self._owing.pop(run, None)
        self._owing_many.pop(run, None)

    def told(self, *, all_owed: bool) -> list[tuple[bytes, messages.Credit]]:
        """One message for each session that is owed many, or any."""
        due = self._owing if all_owed else self._owing_many
        if not due:
            return []
        sessions = list(due.values())
        for session in sessions:
            self.forget(session.run)
        return [(s.owner, s.credit()) for s in sessions if s.owed]


class TimeTable:
    """When the next bins of clocked sessions are to be answered without them.

    Args:
        runs: the sessions by run, kept up by the table.
        limits: see ``Session.overdue_ns``.
    """

    def __init__(self, runs: Mapping[int, Session], limits: Limits) -> None:
        self._runs, self._limits = runs, limits
        self._noted: list[tuple[int, int]] = []  # a heap of (time, run), most of them long past

    def note(self, session: Session) -> None:
        """Something about a session's next bin may have changed."""
        if session.request.clocked and (due := session.overdue_ns(self._limits)) is not None:
            heapq.heappush(self._noted, (due, session.run))

    def next(self) -> int | None:
        """The earliest, in nanoseconds; None where there is none."""
        while self._noted:
            due, run = self._noted[0]
            session = self._runs.get(run)
            if session is not None and session.overdue_ns(self._limits) == due:
                return due
            heapq.heappop(self._noted)  # its bin has come since, or it has ended
        return None
