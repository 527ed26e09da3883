"""Answers to requests about the service itself: what it is, what it serves, and to serve another.

No sockets: what is asked for comes back as ``Effects``, like everything else the service does.
"""

from __future__ import annotations

from collections.abc import Callable

from ilqr_service.ledger import Ledger
from ilqr_service.security import RateLimit
from ilqr_service.session import Effects
from ilqr_service.sessions import SessionTable
from ilqr_service.slots import Slots
from ilqr_vae import wire
from ilqr_vae.clock import this_clock

Request = wire.Probe | wire.Sessions | wire.Models | wire.Describe | wire.Control


class Control:
    """Takes requests. Used by the I/O thread alone.

    Args:
        table, slots: what they are about.
        ledger: where a request that changes something is recorded.
        rate: requests a second of one sender.
        described: what the service says of itself.
    """

    def __init__(
        self,
        table: SessionTable,
        slots: Slots,
        ledger: Ledger,
        rate: float,
        described: Callable[[], wire.Described],
    ) -> None:
        self._table, self._slots, self._ledger = table, slots, ledger
        self._limit = RateLimit(rate)
        self._described = described

    def answer(
        self, owner: bytes, user: str, message: Request, frame: bytes, received: int
    ) -> Effects:
        """What a request asks for. Raises ProtocolError: too many, or one that cannot be met."""
        self._limit.check(owner, received)
        match message:
            case wire.Probe():
                at, name = message.client_ns, this_clock()
                probed = wire.Probed(client_ns=at, service_ns=received, clock=name)
                return Effects(replies=[(owner, probed)])
            case wire.Sessions():
                infos = wire.SessionList(sessions=self._table.infos(received))
                return Effects(replies=[(owner, infos)])
            case wire.Models():
                return Effects(replies=[(owner, self._slots.list())])
            case wire.Describe():
                return Effects(replies=[(owner, self._described())])
            case wire.Load():
                self._ledger.control(user, frame)
                self._slots.load(owner, message)
                return Effects()
            case wire.Swap():
                self._ledger.control(user, frame)
                return self._slots.swap(owner, message)
            case wire.Rollback():
                self._ledger.control(user, frame)
                return self._slots.rollback(owner, message)
