"""Free credits: which feeders are to receive some, without a scan of all sessions."""

from __future__ import annotations

from ilqr_service.sessions.session import Limits, ServedSession
from ilqr_vae.protocol import messages


class Credits:
    """Free credits that were not sent yet.

    Args:
        limits: number of credits of a feeder.
    """

    def __init__(self, limits: Limits) -> None:
        # a feeder that is owed this many may soon run out
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
        """Forget a run that has ended."""
        self._owing.pop(run, None)
        self._owing_many.pop(run, None)

    def take(self, *, all_owed: bool) -> list[tuple[bytes, messages.Credit]]:
        """Return a message for each session that is owed many credits, or any."""
        due = self._owing if all_owed else self._owing_many
        if not due:
            return []
        sessions = list(due.values())
        for session in sessions:
            self.forget(session.run)
        return [(s.owner, s.credit()) for s in sessions if s.owed]
