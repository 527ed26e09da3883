"""Binding and emptying ZeroMQ sockets."""

from __future__ import annotations

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


def empty(socket: zmq.Socket[bytes]) -> None:
    """Take off everything that has come."""
    while True:
        try:
            socket.recv(zmq.NOBLOCK)
        except zmq.Again:
            return
