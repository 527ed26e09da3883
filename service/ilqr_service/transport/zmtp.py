"""ZMTP 3 (RFC 23 and 37) with one peer, without a socket.

The service does not use libzmq for this: its ROUTER trusts the identity that a peer states, and
aborts the process if it later assigns the same one itself (``docs/security.md``). Here identities
are ignored; a peer is its connection.
"""

from __future__ import annotations

from typing import NamedTuple

from ilqr_service.transport.curve import OVERHEAD, Curve, CurveError, KeyRefused

_MORE, _LONG, _COMMAND = 1, 2, 4
_HANDSHAKE_BYTES = 4096
_GREETING = 64


class Violation(Exception):
    """The peer must be disconnected.

    Attributes:
        reason: name of the counter; "" for none.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Incoming(NamedTuple):
    """A message.

    Attributes:
        body: its content; empty if it has several frames, or too many bytes.
        parts: number of frames.
        size: number of bytes.
        command: "SUBSCRIBE" or "CANCEL", or "" for other messages.
    """

    body: bytes
    parts: int
    size: int
    command: str = ""


def frame(body: bytes, flags: int = 0) -> bytes:
    """Return a frame as sent."""
    if len(body) < 256:
        return bytes((flags, len(body))) + body
    return bytes((flags | _LONG,)) + len(body).to_bytes(8) + body


def properties(metadata: bytes) -> dict[bytes, bytes]:
    """Parse metadata by lower-case name. Raises Violation if it is malformed."""
    found: dict[bytes, bytes] = {}
    at = 0
    while at < len(metadata):
        name_end = at + 1 + metadata[at]
        value_at = name_end + 4
        value_end = value_at + int.from_bytes(metadata[name_end:value_at])
        name = metadata[at + 1 : name_end].lower()
        if not name or value_end > len(metadata) or value_at > len(metadata) or name in found:
            raise Violation("handshake")
        found[name] = metadata[value_at:value_end]
        at = value_end
    return found


class Peer:
    """The conversation with one peer: bytes in, messages and bytes out.

    Args:
        kind: socket type that the service states.
        accepts: socket types that may connect.
        limit: largest message in bytes; more than four times that is a violation.
        curve: handshake for CURVE; without it the mechanism is NULL.

    Attributes:
        ready: the handshake is complete.
        kind: socket type of the peer, once ``ready``.
        pending: whether there may be more input to ``parse``.
        outgoing: bytes to send, which the caller takes.
    """

    def __init__(
        self, kind: bytes, accepts: frozenset[bytes], limit: int, curve: Curve | None
    ) -> None:
        self.ready = self.pending = False
        self.kind = b""
        self.curve = curve
        self._mechanism = b"CURVE" if curve else b"NULL"
        self._metadata = b"\x0bSocket-Type" + len(kind).to_bytes(4) + kind
        self._accepts = accepts
        self._limit = limit
        self._buffer = bytearray()
        self._greeted = self._welcomed = False
        self._skip = self._parts = self._size = 0
        self._delimited = False
        self.outgoing = [
            b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f\x03\x01"
            + self._mechanism.ljust(20, b"\x00")
            + bytes((curve is not None,))
            + bytes(31)
        ]

    def feed(self, data: bytes) -> None:
        """Add received bytes."""
        self._buffer += data
        self.pending = True

    @property
    def held(self) -> int:
        """Number of bytes to be parsed."""
        return len(self._buffer)

    def message(self, body: bytes, topic: bytes | None = None) -> bytes:
        """Return a message to this peer as bytes to send."""
        if topic is not None:
            return self._sealed(topic, _MORE) + self._sealed(body, 0)
        delimiter = self._sealed(b"", _MORE) if self.kind == b"REQ" else b""
        return delimiter + self._sealed(body, 0)

    def ping(self) -> bytes:
        """Return a heartbeat, which the peer answers."""
        return self._sealed(b"\x04PING\x00\x64", _COMMAND)

    def _sealed(self, body: bytes, flags: int) -> bytes:
        if self.curve is None:
            return frame(body, flags)
        return frame(self.curve.seal(flags & _MORE | (flags & _COMMAND) >> 1, body))

    def parse(self, most: int, came: list[Incoming]) -> None:
        """Append the parsed messages, from at most this many frames. Raises Violation."""
        if not self._greeted and not self._greet():
            return
        at, held = 0, len(self._buffer)
        self.pending = False
        for _ in range(most):
            if self._skip:
                skipped = min(self._skip, held - at)
                at, self._skip = at + skipped, self._skip - skipped
                if self._skip or held - at < 2:
                    break
            elif held - at < 2:
                break
            flags = self._buffer[at]
            long = flags & _LONG
            head = 9 if long else 2
            if flags > 7 or flags & (_MORE | _COMMAND) == _MORE | _COMMAND:
                raise Violation("handshake" if not self.ready else "message")
            if held - at < head:
                break
            size = int.from_bytes(self._buffer[at + 1 : at + head])
            if size > self._kept:
                self._too_large(size, flags, came)
                self._skip = size
                at += head
                continue
            end = at + head + size
            if held < end:
                break
            body = bytes(self._buffer[at + head : end])
            at = end
            if self.ready:
                self._take(body, flags, came)
            else:
                self._shake(body, flags)
        else:
            self.pending = True
        del self._buffer[:at]

    @property
    def _kept(self) -> int:
        """Size of the largest frame whose content is kept."""
        if not self.ready:
            return _HANDSHAKE_BYTES
        return self._limit + (OVERHEAD if self.curve else 0)

    def _too_large(self, size: int, flags: int, came: list[Incoming]) -> None:
        if not self.ready:
            raise Violation("handshake")
        if size > 4 * self._limit:
            raise Violation("")
        if flags & _COMMAND:
            raise Violation("message")
        if self.curve is not None:
            size -= OVERHEAD
        self._part(b"", size, bool(flags & _MORE), came)

    # ---- handshake -----------------------------------------------------------------------------

    def _greet(self) -> bool:
        """Return whether the greeting is complete. Raises Violation if it is not ZMTP 3 or ours."""
        buffer = self._buffer
        if (
            not buffer.startswith(b"\xff"[: len(buffer)])
            or (len(buffer) > 9 and not buffer[9] & 1)
            or (len(buffer) > 10 and buffer[10] < 3)
        ):
            raise Violation("handshake")
        if len(buffer) < _GREETING:
            self.pending = False
            return False
        if bytes(buffer[12:32]).rstrip(b"\x00") != self._mechanism:
            raise Violation("handshake")
        del buffer[:_GREETING]
        self._greeted = True
        if self.curve is None:
            self.outgoing.append(frame(b"\x05READY" + self._metadata, _COMMAND))
        return True

    def _shake(self, body: bytes, flags: int) -> None:
        if not flags & _COMMAND:
            raise Violation("handshake")
        if self.curve is None:
            if not body.startswith(b"\x05READY"):
                raise Violation("handshake")
            self._admit(body[6:])
            return
        try:
            if not self._welcomed:
                self.outgoing.append(frame(self.curve.hello(body), _COMMAND))
                self._welcomed = True
                return
            self._admit(self.curve.initiate(body))
        except CurveError as error:
            raise Violation("handshake") from error
        except KeyRefused as error:
            # not ERROR 400: libzmq sockets would then give up for good, and their sends block for
            # ever
            raise Violation("key") from error
        self.outgoing.append(frame(self.curve.ready(self._metadata), _COMMAND))

    def _admit(self, metadata: bytes) -> None:
        self.kind = properties(metadata).get(b"socket-type", b"")
        if self.kind not in self._accepts:
            raise Violation("handshake")
        self.ready = True

    # ---- messages ------------------------------------------------------------------------------

    def _take(self, body: bytes, flags: int, came: list[Incoming]) -> None:
        more, command = bool(flags & _MORE), bool(flags & _COMMAND)
        if self.curve is not None:
            try:
                inner, body = self.curve.unseal(body)
            except CurveError as error:
                raise Violation("message") from error
            more, command = bool(inner & 1), bool(inner & 2)
        if command:
            self._command(body, came)
        else:
            self._part(body, len(body), more, came)

    def _part(self, body: bytes, size: int, more: bool, came: list[Incoming]) -> None:
        """Handle a frame of a message; all but the last are counted, not kept."""
        if self.kind == b"REQ" and not self._delimited:
            if size or not more:
                raise Violation("message")
            self._delimited = True
            return
        self._parts += 1
        self._size += size
        if self._size > 4 * self._limit:
            raise Violation("")
        if not more:
            came.append(Incoming(body if self._parts == 1 else b"", self._parts, self._size))
            self._parts = self._size = 0
            self._delimited = False

    def _command(self, body: bytes, came: list[Incoming]) -> None:
        name, rest = body[1 : 1 + body[0]] if body else b"", body[1 + body[0] :] if body else b""
        if name == b"PING":
            if not 2 <= len(rest) <= 18:
                raise Violation("message")
            self.outgoing.append(self._sealed(b"\x04PONG" + rest[2:], _COMMAND))
        elif name in (b"SUBSCRIBE", b"CANCEL"):
            came.append(Incoming(rest, 1, len(rest), name.decode()))
