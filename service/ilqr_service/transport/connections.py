"""TCP connections of feeders, clients and subscribers: accepted, read, written, limited.

One thread owns everything here except ``wake``. No peer can exceed its limits: connections, bytes
waiting in either direction, frames and handshakes per turn of the loop.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import time
from collections import Counter
from collections.abc import Callable
from itertools import zip_longest
from typing import NamedTuple

from ilqr_service.transport.doors import Connection, Door, bound
from ilqr_service.transport.security import Gate
from ilqr_service.transport.zmtp import Incoming, Peer, Violation
from ilqr_vae.errors import ServiceError
from ilqr_vae.machine import file_limits

_READ_BYTES = 1 << 16
_TURN_MESSAGES = 256
_TURN_FRAMES = 64  # per connection
# over all connections with input; of one, however many there are
_ROUND_FRAMES, _FEWEST_FRAMES = 512, 4
_TURN_ACCEPTED = 16
_TURN_HANDSHAKES = 4  # each may cost a tenth of a millisecond of cryptography
_HANDSHAKE_S = 10.0
_PING_S, _SILENT_S = 2.0, 12.0
_HELD_BYTES = 256 << 20
_DESCRIPTORS = 4096
_WRITES = 64


class Received(NamedTuple):
    """A message of a feeder or client: its connection, and when it was read."""

    owner: bytes
    message: Incoming
    at_ns: int


class Connections:
    """All connections of a service.

    Args:
        gate: access control; None admits everyone.
    """

    def __init__(self, gate: Gate | None) -> None:
        self._gate = gate
        self._selector = selectors.DefaultSelector()
        self._woken, self._waking = socket.socketpair()
        for end in (self._woken, self._waking):
            end.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ, None)
        self._doors: list[Door] = []
        self._open: dict[bytes, Connection] = {}
        self._pending: dict[Connection, None] = {}  # connections with unparsed input, oldest first
        self._dirty: dict[Connection, None] = {}
        self._events: Counter[str] = Counter()
        self._made = 0
        self._tidied = time.monotonic()
        self._most = _descriptors() // 4

    # ---- addresses -----------------------------------------------------------------------------

    def listen(
        self,
        name: str,
        endpoint: str,
        kind: bytes,
        accepts: frozenset[bytes],
        *,
        message_bytes: int,
        backlog_bytes: int,
        backlog: int,
        message: Callable[[Connection, Incoming], None] | None = None,
        gone: Callable[[Connection], None] | None = None,
    ) -> Door:
        """Bind ``tcp://HOST:PORT``; port ``*`` takes a free one. Raises ServiceError."""
        host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
        try:
            listening = bound(host, 0 if port == "*" else int(port))
        except OSError as error:
            raise ServiceError(
                name, expected="an address that can be bound", got=f"{endpoint} ({error})"
            ) from error
        host, port = listening.getsockname()[:2]
        door = Door(
            name=name,
            listening=listening,
            kind=kind,
            accepts=accepts,
            message_bytes=message_bytes,
            backlog_bytes=backlog_bytes,
            backlog=backlog,
            message=message,
            gone=gone,
            address=f"tcp://{f'[{host}]' if ':' in host else host}:{port}",
        )
        self._doors.append(door)
        self._selector.register(listening, selectors.EVENT_READ, door)
        return door

    def close(self, linger_s: float = 0.0) -> None:
        """Stop listening, write waiting output within a time limit, and close everything."""
        for door in self._doors:
            self._shut(door)
            door.listening.close()
        end = time.monotonic() + linger_s
        while any(c.waiting for c in self._open.values()) and time.monotonic() < end:
            self.flush()
            for key, mask in self._selector.select(0.01):
                if isinstance(key.data, Connection) and mask & selectors.EVENT_WRITE:
                    self._write(key.data)
        for connection in list(self._open.values()):
            connection.socket.close()
        self._open.clear()
        self._selector.close()
        self._woken.close()
        self._waking.close()

    # ---- from any thread -----------------------------------------------------------------------

    def wake(self) -> None:
        """Make ``poll`` return."""
        with contextlib.suppress(OSError):  # the pipe is full: it will return anyway
            self._waking.send(b"\x00")

    # ---- the loop ------------------------------------------------------------------------------

    def poll(self, timeout_s: float) -> list[Received]:
        """Wait for events, and handle one turn of them.

        Returns:
            Messages of doors that do not handle them themselves.
        """
        self.flush()
        for key, mask in self._selector.select(0.0 if self._pending else timeout_s):
            if key.data is None:
                with contextlib.suppress(OSError):
                    self._woken.recv(4096)  # what is left, if anything, ends the next wait
            elif isinstance(key.data, Door):
                self._accept(key.data)
            else:
                if mask & selectors.EVENT_WRITE:
                    self._write(key.data)
                if mask & selectors.EVENT_READ and key.data not in self._pending:
                    self._read(key.data)
        each: list[list[Received]] = []
        handshakes = taken = 0
        pending = list(self._pending)
        fair = max(_FEWEST_FRAMES, _ROUND_FRAMES // max(1, len(pending)))
        for connection in pending:
            if taken >= _TURN_MESSAGES:
                break
            if connection not in self._pending:
                continue  # disconnected meanwhile
            if not connection.peer.ready:
                handshakes += 1
                if handshakes > _TURN_HANDSHAKES:
                    continue
            each.append(came := [])
            taken += self._parse(connection, min(_TURN_FRAMES, fair), came)
        self.flush()
        # the first of each connection, then the second ones: one does not wait for another's many
        return [received for turn in zip_longest(*each) for received in turn if received]

    def send(self, connection: Connection, body: bytes, topic: bytes | None = None) -> bool:
        """Queue a message; return False if the peer is gone, or its queue is full."""
        if connection.id not in self._open or connection.full:
            return False
        self._put(connection, connection.peer.message(body, topic))
        return True

    def reply(self, owner: bytes, body: bytes) -> bool:
        """Send to the connection of this id, see ``send``."""
        connection = self._open.get(owner)
        return connection is not None and self.send(connection, body)

    def full(self, owner: bytes) -> bool:
        """Return whether a reply would be dropped."""
        connection = self._open.get(owner)
        return connection is None or connection.full

    def connected(self, owner: bytes) -> bool:
        """Return whether the connection of this id is open."""
        return owner in self._open

    def user(self, owner: bytes) -> str:
        """Return the connection's user by the current allow-list; "" if there is none."""
        connection = self._open.get(owner)
        if connection is None or self._gate is None:
            return ""
        return self._gate.user(connection.key)

    def flush(self) -> None:
        """Write waiting output, as far as peers take it."""
        while self._dirty:
            connection, _ = self._dirty.popitem()
            if not connection.blocked:
                self._write(connection)

    def tidy(self) -> None:
        """Handle heartbeats, time limits and memory; call about ten times a second."""
        now = time.monotonic()
        stopped, self._tidied = now - self._tidied > 1.0, now
        for connection in list(self._open.values()):
            if stopped:
                connection.heard = now  # this process itself was stopped
            if not connection.peer.ready:
                if now - connection.opened > _HANDSHAKE_S:
                    self._drop(connection)
            elif now - connection.heard > _SILENT_S:
                self._drop(connection)
            elif now - max(connection.heard, connection.pinged) > _PING_S:
                connection.pinged = now
                if not connection.full:
                    self._put(connection, connection.peer.ping())
        held = sum(c.held for c in self._open.values())
        while held > _HELD_BYTES:
            largest = max(self._open.values(), key=lambda c: c.held)
            held -= largest.held
            self._drop(largest)
        for door in self._doors:
            if not door.open:
                self._selector.register(door.listening, selectors.EVENT_READ, door)
                door.open = True

    def expel(self, door: str) -> None:
        """Disconnect peers that are no longer admitted at their door."""
        for connection in list(self._open.values()):
            here = connection.door.name == door and connection.peer.ready
            if here and self._gate is not None and not self._gate.admits(connection.key, door):
                self._drop(connection, "key")

    def events(self) -> Counter[str]:
        """Return the events of connections since the last call."""
        events, self._events = self._events, Counter()
        return events

    # ---- one connection ------------------------------------------------------------------------

    def _accept(self, door: Door) -> None:
        for _ in range(_TURN_ACCEPTED):
            try:
                accepted, _ = door.listening.accept()
            except BlockingIOError:
                return
            except OSError:
                # e.g. out of descriptors: do not retry at once
                self._shut(door)
                return
            if door.connections >= self._most:
                here = (c for c in self._open.values() if c.door is door)
                unready = next((c for c in here if not c.peer.ready), None)
                self._events["refused:connections"] += 1
                if unready is None:
                    accepted.close()
                    continue
                self._drop(unready)
            self._admit(door, accepted)

    def _admit(self, door: Door, accepted: socket.socket) -> None:
        accepted.setblocking(False)
        with contextlib.suppress(OSError):
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        now = time.monotonic()
        self._made += 1
        curve = None if self._gate is None else self._gate.curve(door.name)
        peer = Peer(door.kind, door.accepts, door.message_bytes, curve)
        connection = Connection(self._made.to_bytes(8), door, accepted, peer, now, now, now)
        self._open[connection.id] = connection
        door.connections += 1
        self._selector.register(accepted, selectors.EVENT_READ, connection)
        self._outgoing(connection)

    def _shut(self, door: Door) -> None:
        if door.open:
            self._selector.unregister(door.listening)
            door.open = False

    def _read(self, connection: Connection) -> None:
        try:
            data = connection.socket.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop(connection)
            return
        connection.heard = time.monotonic()
        connection.peer.feed(data)
        self._pending[connection] = None

    def _parse(self, connection: Connection, most: int, came: list[Received]) -> int:
        peer, door = connection.peer, connection.door
        ready, violation = peer.ready, None
        messages: list[Incoming] = []
        try:
            peer.parse(most, messages)
        except Violation as error:
            violation = error
        del self._pending[connection]
        if peer.pending and violation is None:
            self._pending[connection] = None  # queue it behind the others
        self._outgoing(connection)
        if peer.ready and not ready and self._crowded(connection):
            violation = Violation("connections")
            messages.clear()
        if door.message is None:
            at_ns = time.monotonic_ns()
            came.extend(Received(connection.id, message, at_ns) for message in messages)
        else:
            for message in messages:
                door.message(connection, message)
        if violation is not None:
            self._write(connection)
            self._drop(connection, violation.reason)
        return len(messages)

    def _crowded(self, connection: Connection) -> bool:
        """Return whether connections of one user would exclude those of others."""
        if not connection.key:
            return False
        same = (c for c in self._open.values() if c.door is connection.door)
        return sum(c.key == connection.key for c in same) > self._most // 4

    def _outgoing(self, connection: Connection) -> None:
        for data in connection.peer.outgoing:
            if not connection.full:
                self._put(connection, data)
        connection.peer.outgoing.clear()

    def _put(self, connection: Connection, data: bytes) -> None:
        connection.waiting.append(data)
        connection.waiting_bytes += len(data)
        self._dirty[connection] = None

    def _write(self, connection: Connection) -> None:
        waiting = connection.waiting
        try:
            while waiting and connection.id in self._open:
                parts = [memoryview(waiting[0])[connection.written :]]
                parts += [waiting[i] for i in range(1, min(len(waiting), _WRITES))]
                sent = connection.socket.sendmsg(parts)
                connection.waiting_bytes -= sent
                connection.written += sent
                while waiting and connection.written >= len(waiting[0]):
                    connection.written -= len(waiting.popleft())
        except BlockingIOError:
            self._block(connection, True)
        except OSError:
            self._drop(connection)
        else:
            self._block(connection, False)

    def _block(self, connection: Connection, blocked: bool) -> None:
        if blocked != connection.blocked and connection.id in self._open:
            connection.blocked = blocked
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if blocked else 0)
            self._selector.modify(connection.socket, events, connection)

    def _drop(self, connection: Connection, reason: str = "") -> None:
        if self._open.pop(connection.id, None) is None:
            return
        if not connection.peer.ready and not reason:
            reason = "handshake"
        connection.door.connections -= 1
        self._events["disconnected"] += 1
        if reason:
            self._events[f"refused:{reason}"] += 1
        self._pending.pop(connection, None)
        self._dirty.pop(connection, None)
        self._selector.unregister(connection.socket)
        connection.socket.close()
        if connection.door.gone is not None:
            connection.door.gone(connection)


def _descriptors() -> int:
    """Return the limit of open files, capped at what is useful here."""
    return int(min(file_limits()[0], _DESCRIPTORS))
