"""Connections of the service with one door, and the bytes of a ZMTP handshake."""

from __future__ import annotations

import socket
import struct
import time
from collections import Counter
from pathlib import Path
from typing import Any

import zmq

from feeder import WAIT_S
from ilqr_service.transport.connections import Connections, Received
from ilqr_service.transport.security import Gate
from ilqr_service.transport.zmtp import frame
from ilqr_vae.protocol.keys import ClientKey

LIMIT, BACKLOG = 10_000, 50_000
KINDS = frozenset((b"DEALER", b"REQ", b"ROUTER"))
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)


def ready(kind: bytes = b"DEALER", identity: bytes = b"", extra: bytes = b"") -> bytes:
    """A READY command with an identity of the peer's choice."""
    named = b"".join(
        bytes([len(name)]) + name + struct.pack(">I", len(value)) + value
        for name, value in ((b"Socket-Type", kind), (b"Identity", identity))
    )
    return frame(b"\x05READY" + named + extra, 4)


class Station:
    """Connections with one door, which answers each message by saying how it came."""

    def __init__(self, folder: Path | None = None) -> None:
        self.gate = None if folder is None else Gate(folder)
        self.connections = Connections(self.gate)
        door = self.connections.listen(
            "ingest",
            "tcp://127.0.0.1:*",
            b"ROUTER",
            KINDS,
            message_bytes=LIMIT,
            backlog_bytes=BACKLOG,
            backlog=1000,
        )
        self.address = door.address
        self.port = int(door.address.rpartition(":")[2])
        self.events: Counter[str] = Counter()
        self.context: zmq.Context[Any] = zmq.Context()
        self.raws: list[socket.socket] = []
        self._sockets: list[zmq.Socket[bytes]] = []

    def close(self) -> None:
        self.context.destroy(linger=0)
        for raw in self.raws:
            raw.close()
        self.connections.close()

    def raw(self, *data: bytes) -> socket.socket:
        """A TCP connection that has sent this."""
        raw = socket.create_connection(("127.0.0.1", self.port), timeout=WAIT_S)
        self.raws.append(raw)
        raw.sendall(b"".join(data))
        return raw

    def dealer(
        self,
        kind: int = zmq.DEALER,
        key: ClientKey | None = None,
        identity: bytes = b"",
        address: str = "",
    ) -> zmq.Socket[bytes]:
        """A socket of libzmq's, connected once."""
        dealer: zmq.Socket[bytes] = self.context.socket(kind)
        self._sockets.append(dealer)
        dealer.setsockopt(zmq.RECONNECT_IVL, -1)
        if identity:
            dealer.setsockopt(zmq.IDENTITY, identity)
        if key is not None:
            key.apply(dealer)
        dealer.connect(address or self.address)
        return dealer

    def turn(self, seconds: float = 0.01) -> list[Received]:
        came = self.connections.poll(seconds)
        self.events += self.connections.events()
        for received in came:
            message = received.message
            said = message.body if message.parts == 1 and message.size <= LIMIT else b"refused"
            self.connections.reply(received.owner, said)
        self.connections.flush()
        return came

    def until(self, reason: str, n: int = 1) -> None:
        """Turn until so many events of a kind have been counted."""
        end = time.monotonic() + WAIT_S
        while self.events[reason] < n:
            assert time.monotonic() < end, self.events
            self.turn()

    def comes(self, n: int = 1) -> list[Received]:
        """The next n messages."""
        end, got = time.monotonic() + WAIT_S, list[Received]()
        while len(got) < n:
            assert time.monotonic() < end, f"{len(got)} of {n}; {self.events}"
            got += self.turn()
        return got

    def echoes(self, dealer: zmq.Socket[bytes], body: bytes = b"echo") -> bytes:
        """What a well-behaved client gets back."""
        dealer.send(body)
        end = time.monotonic() + WAIT_S
        while not dealer.poll(0):
            assert time.monotonic() < end, self.events
            self.turn()
        return dealer.recv()
