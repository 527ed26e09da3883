"""Answers to requests about the service itself: its description, its models, and changes of model.

No sockets: the results are ``Effects``, as for the session table.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from ilqr_service.journal.journal import Journal
from ilqr_service.sessions.effects import Effects
from ilqr_service.sessions.table import SessionTable
from ilqr_service.solving.slots import Slots
from ilqr_service.transport.security import RateLimit
from ilqr_vae.protocol import messages
from ilqr_vae.protocol.clock import this_clock

Request = (
    messages.Probe | messages.Sessions | messages.Models | messages.Describe | messages.Control
)


class Control:
    """Handles requests. Only the I/O thread may use it.

    Args:
        table, slots: sessions and models that requests refer to.
        journal: records requests that change something.
        rate: requests per second of one sender.
        described: description of the service.
    """

    def __init__(
        self,
        table: SessionTable,
        slots: Slots,
        journal: Journal,
        rate: float,
        described: Callable[[], messages.Described],
    ) -> None:
        self._table, self._slots, self._journal = table, slots, journal
        self._limit = RateLimit(rate)
        self._described = described

    def answer(
        self, owner: bytes, user: str, message: Request, frame: bytes, received: int
    ) -> Effects:
        """Carry out a request. Raises ProtocolError if there are too many or it is refused."""
        self._limit.check(owner, received)
        began_ns = time.thread_time_ns()
        try:
            return self._answer(owner, user, message, frame, received)
        finally:
            self._limit.charge(owner, time.thread_time_ns() - began_ns)

    def _answer(
        self, owner: bytes, user: str, message: Request, frame: bytes, received: int
    ) -> Effects:
        match message:
            case messages.Probe():
                at, name = message.client_ns, this_clock()
                probed = messages.Probed(client_ns=at, service_ns=received, clock=name)
                return Effects(replies=[(owner, probed)])
            case messages.Sessions():
                infos = messages.SessionList(sessions=self._table.infos(received))
                return Effects(replies=[(owner, infos)])
            case messages.Models():
                return Effects(replies=[(owner, self._slots.list())])
            case messages.Describe():
                return Effects(replies=[(owner, self._described())])
            case messages.Load():
                self._slots.load(owner, message)
                effects = Effects()
            case messages.Swap():
                effects = self._slots.swap(owner, message)
            case messages.Rollback():
                effects = self._slots.rollback(owner, message)
        self._journal.control(user, frame)  # only accepted requests
        return effects
