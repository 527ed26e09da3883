"""Binding, watching and emptying ZeroMQ sockets."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from ilqr_vae.errors import ServiceError


def bind(field: str, socket: zmq.Socket[bytes], address: str) -> str:
    """Bind with heartbeats; returns the address with its port. Raises ServiceError."""
    if address.startswith("tcp://["):
        socket.ipv6 = True
    socket.heartbeat_ivl = 2_000
    socket.heartbeat_timeout = 10_000
    socket.heartbeat_ttl = 10_000
    try:
        socket.bind(address)
    except zmq.ZMQError as error:
        raise ServiceError(
            field, expected="an address that can be bound", got=f"{address} ({error})"
        ) from error
    return socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\x00")


_COUNTED = {
    int(zmq.EVENT_DISCONNECTED): "disconnected",
    int(zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL): "refused:handshake",
    # whoever expects another handshake may hang up before it is told of its mistake
    int(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL): "refused:handshake",
}


class Connections:
    """What becomes of a socket's connections, as libzmq tells it: those that ended or were cut off
    (for a message beyond its limit, say), and those that never spoke as they should (no key, the
    wrong service's key, another protocol).

    Args:
        context: the socket's.
        socket: to be watched; before it is bound.
        name: unique in the context.
    """

    def __init__(self, context: zmq.Context[Any], socket: zmq.Socket[bytes], name: str) -> None:
        address = f"inproc://connections-{name}"
        socket.monitor(address, sum(_COUNTED))
        self._events: zmq.Socket[bytes] = context.socket(zmq.PAIR)
        self._events.rcvhwm = 0  # so that libzmq never waits for a reader
        self._events.connect(address)

    def events(self) -> Counter[str]:
        """Since the last call; to be called often."""
        counted: Counter[str] = Counter()
        while True:
            try:
                frames = self._events.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return counted
            kind = _COUNTED.get(int(parse_monitor_message(frames)["event"]))
            if kind is not None:
                counted[kind] += 1


def received(
    router: zmq.Socket[bytes], limit: int, *, users: bool
) -> list[tuple[bytes, str, list[bytes], int]]:
    """Up to ``limit`` messages that have come: sender, user, frames, and when each was taken off.

    Args:
        users: ask who the sender is, which takes copies that know; else "".
    """
    came: list[tuple[bytes, str, list[bytes], int]] = []
    while len(came) < limit:
        user = ""
        try:
            if not users:
                owner, *frames = router.recv_multipart(zmq.NOBLOCK)
            else:
                first, *rest = router.recv_multipart(zmq.NOBLOCK, copy=False)
                owner, frames = first.bytes, [frame.bytes for frame in rest]
                user = str(rest[0].get("User-Id")) if rest else ""
        except zmq.Again:
            break
        came.append((owner, user, frames, time.monotonic_ns()))
    return came


def empty(socket: zmq.Socket[bytes]) -> None:
    """Take off everything that has come."""
    while True:
        try:
            socket.recv(zmq.NOBLOCK)
        except zmq.Again:
            return
