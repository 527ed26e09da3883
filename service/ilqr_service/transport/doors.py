"""Bound addresses (doors), and their connections."""

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
        name: name of the setting with the address.
        listening: the socket.
        kind, accepts: ZeroMQ socket types of the service and of its peers.
        message_bytes: a larger message is refused.
        backlog_bytes, backlog: limits of the output queued for a peer, in bytes and messages.
        message: called with each message; if None, ``Connections.poll`` returns them.
        gone: called when a connection has ended.
        address: the bound address.
        connections: number of open connections.
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
    """The connection of one peer.

    Attributes:
        id: unique id, the owner of the sessions that it opens.
        heard, pinged: times of the last input and heartbeat, by the monotonic clock in seconds.
        waiting: queued output; its first ``written`` bytes are sent already.
        kept: bytes that the owner of the door keeps for it.
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
        """Public key of the peer; empty without keys."""
        return self.peer.curve.client if self.peer.curve is not None else b""

    @property
    def full(self) -> bool:
        """Whether its output queue is full."""
        return (
            self.waiting_bytes >= self.door.backlog_bytes or len(self.waiting) >= self.door.backlog
        )

    @property
    def held(self) -> int:
        """Number of bytes queued in both directions, or kept for it."""
        return self.waiting_bytes + self.peer.held + self.kept


def bound(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises OSError."""
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
