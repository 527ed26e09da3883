"""Bound addresses, and the connections that come by them."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from ilqr_service.transport.zmtp import Incoming, Peer


@dataclass(slots=True, kw_only=True)
class Door:
    """A bound address.

    Attributes:
        name: the setting that gives the address.
        listening: the socket.
        kind, accepts: ZeroMQ socket types, the service's and its peers'.
        message_bytes: a larger message is refused.
        backlog_bytes, backlog: what may wait for a peer that does not read, in bytes and messages.
        message: what to do with a message; without it ``Connections.poll`` returns it.
        gone: what to do when a connection has ended.
        address: as it is bound.
        connections: how many are open.
        open: whether it is listening.
    """

    name: str
    listening: socket.socket
    kind: bytes
    accepts: frozenset[bytes]
    message_bytes: int
    backlog_bytes: int
    backlog: int
    message: Callable[[Connection, Incoming], None] | None
    gone: Callable[[Connection], None] | None
    address: str
    connections: int = 0
    open: bool = True


@dataclass(slots=True, eq=False)
class Connection:
    """One peer.

    Attributes:
        id: never used again by another; the owner of what it opens.
        heard, pinged: seconds by the monotonic clock.
        waiting: what it has not been sent yet; the first ``written`` bytes are gone already.
        kept: bytes that a door's owner keeps for it.
    """

    id: bytes
    door: Door
    socket: socket.socket
    peer: Peer
    opened: float
    heard: float
    pinged: float
    waiting: deque[bytes] = field(default_factory=lambda: deque[bytes]())
    waiting_bytes: int = 0
    written: int = 0
    kept: int = 0
    blocked: bool = False

    @property
    def key(self) -> bytes:
        """The peer's public key; empty without keys."""
        return self.peer.curve.client if self.peer.curve is not None else b""

    @property
    def full(self) -> bool:
        """Nothing more may wait for it."""
        return (
            self.waiting_bytes >= self.door.backlog_bytes or len(self.waiting) >= self.door.backlog
        )

    @property
    def held(self) -> int:
        """Bytes that wait for it, and from it, or are kept for it."""
        return self.waiting_bytes + self.peer.held + self.kept


def bound(host: str, port: int) -> socket.socket:
    """A listening socket. Raises OSError."""
    name = host.strip("[]")
    family, kind, protocol, _, address = socket.getaddrinfo(
        None if name == "*" else name,
        port,
        socket.AF_INET if name == "*" else socket.AF_UNSPEC,
        socket.SOCK_STREAM,
        flags=socket.AI_PASSIVE,
    )[0]
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(128)
        listening.setblocking(False)
    except OSError:
        listening.close()
        raise
    return listening
