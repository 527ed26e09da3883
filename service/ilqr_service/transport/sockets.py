"""Binding and emptying ZeroMQ sockets."""

from __future__ import annotations

import time

import zmq

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


# zmq's own constants are enums, whose arithmetic is slow
_POLLIN, _NOBLOCK = int(zmq.POLLIN), int(zmq.NOBLOCK)


def _readable(socket: zmq.Socket[bytes]) -> bool:
    # cheaper than the exception of a receive in vain
    return bool(int(socket.getsockopt(zmq.EVENTS)) & _POLLIN)


def received(
    router: zmq.Socket[bytes], limit: int, *, users: bool
) -> list[tuple[bytes, str, list[bytes], int]]:
    """Up to ``limit`` messages that have come: sender, user, frames, and when each was taken off.

    Args:
        users: ask who the sender is, which takes copies that know; else "".
    """
    came: list[tuple[bytes, str, list[bytes], int]] = []
    while len(came) < limit and _readable(router):
        user = ""
        if not users:
            owner, frames = router.recv(_NOBLOCK), [router.recv(_NOBLOCK)]
            while router.getsockopt(zmq.RCVMORE):
                frames.append(router.recv(_NOBLOCK))
        else:
            first, *rest = router.recv_multipart(zmq.NOBLOCK, copy=False)
            owner, frames = first.bytes, [frame.bytes for frame in rest]
            user = str(rest[0].get("User-Id")) if rest else ""
        came.append((owner, user, frames, time.monotonic_ns()))
    return came


def patience_ms(due_ns: int | None, most: int) -> int:
    """How long to wait for a message where something is due then; at most so long."""
    if due_ns is None:
        return most
    return max(0, min(most, -((time.monotonic_ns() - due_ns) // 1_000_000)))


def empty(socket: zmq.Socket[bytes]) -> None:
    """Take off everything that has come."""
    while _readable(socket):
        socket.recv(zmq.NOBLOCK)
