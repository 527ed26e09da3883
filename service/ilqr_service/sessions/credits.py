"""Credits that came free: which feeders are to be sent some, without a look at every session."""

from __future__ import annotations

from ilqr_service.sessions.session import Limits, ServedSession
from ilqr_vae.protocol import messages


class Credits:
    """Credits that came free and were not sent yet.

    Args:
        limits: how many a feeder has.
    """

    def __init__(self, limits: Limits) -> None:
        # a feeder that is owed so many may soon be short of them
        self._many = max(1, limits.credits // 8)
        self._owing: dict[int, ServedSession] = {}
        self._owing_many: dict[int, ServedSession] = {}

    def owe(self, session: ServedSession) -> None:
        """Add one."""
        session.owed += 1
        self._owing[session.run] = session
        if session.owed >= self._many:
            self._owing_many[session.run] = session

    def forget(self, run: int) -> None:
        """A run has ended."""
        self._owing.pop(run, None)
        self._owing_many.pop(run, None)

    def take(self, *, all_owed: bool) -> list[tuple[bytes, messages.Credit]]:
        """One message for each session that is owed many credits, or any."""
        due = self._owing if all_owed else self._owing_many
        if not due:
            return []
        sessions = list(due.values())
        for session in sessions:
            self.forget(session.run)
        return [(s.owner, s.credit()) for s in sessions if s.owed]
