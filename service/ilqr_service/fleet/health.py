"""Which servers of a fleet answer: a probe each 0.3 s, and the connection it goes by.

A process that is killed closes its connections, and nobody listens at its address: that is known
within a fraction of a second. One that hangs, or whose machine lost its power, only stays silent:
that is known after ``patience`` seconds of probes without a reply.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

from ilqr_service import logs
from ilqr_service.fleet import PATIENCE_S
from ilqr_service.fleet.member import Server
from ilqr_vae.protocol import messages
from ilqr_vae.protocol.keys import ClientKey

_PROBE_S = 0.3
_RECONNECT_MS = 50
_REFUSED = 3
"""Attempts to connect again: the first is announced as the connection breaks, two have failed."""
_EVENTS = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CONNECT_RETRIED


class _Pulse:
    """Probes to one server. Time comes in: seconds of a monotonic clock."""

    def __init__(self, socket: zmq.Socket[bytes], server: Server, now: float) -> None:
        self.server = server
        self.heard = now
        self.misses = self.attempts = 0
        self.ever = False
        self._sent, self._due = now - _PROBE_S, False
        self._broken = False
        self._socket = socket
        self._monitor = socket.get_monitor_socket(_EVENTS)
        socket.connect(server.ingest)

    def look(self, now: float) -> None:
        """Take what came, count a probe without reply, and send the next.

        However long nobody looked, one probe is missed at most.
        """
        while self._monitor.poll(0):
            event = recv_monitor_message(self._monitor)["event"]
            if event == zmq.EVENT_CONNECT_RETRIED:
                self.attempts += self._broken
            else:
                self._broken, self.attempts = event == zmq.EVENT_DISCONNECTED, 0
                self.heard = now
        while self._socket.poll(0):
            self._socket.recv()
            self.heard, self.misses, self.ever, self._due = now, 0, True, False
        if now - self._sent < _PROBE_S:
            return
        self.misses += self._due
        self._sent, self._due = now, True
        with suppress(zmq.Again):
            self._socket.send(messages.encode(messages.Probe(client_ns=0)), zmq.NOBLOCK)

    def close(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close()
        self._socket.close()


class Health:
    """Watches servers. One thread uses it.

    Args:
        key: with which the fleet speaks to its servers, where they have keys.
        patience: seconds without a reply after which a server counts as dead.
    """

    def __init__(self, key: ClientKey | None, patience: float = PATIENCE_S) -> None:
        self._key = key
        self._misses = max(2, round(patience / _PROBE_S))
        self._context: zmq.Context[Any] = zmq.Context()
        self._pulses: dict[Server, _Pulse] = {}

    def look(self, servers: Iterable[Server]) -> dict[Server, float]:
        """The servers that are dead, and when each was last heard (``time.monotonic``).

        A server that never answered a probe is not among them: the way to it may be wrong.
        """
        now, wanted = time.monotonic(), set(servers)
        for server in self._pulses.keys() - wanted:
            self._pulses.pop(server).close()
        for server in wanted - self._pulses.keys():
            self._pulses[server] = _Pulse(self._socket(), server, now)
        dead: dict[Server, float] = {}
        for server, pulse in self._pulses.items():
            pulse.look(now)
            if pulse.ever and (pulse.attempts >= _REFUSED or pulse.misses >= self._misses):
                dead[server] = pulse.heard
            elif pulse.misses == self._misses and not pulse.ever:
                pulse.misses += 1  # said once
                logs.warning("a server does not answer the fleet", address=server.ingest)
        return dead

    def _socket(self) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        socket.linger = 0
        socket.reconnect_ivl = _RECONNECT_MS
        if self._key is not None:
            self._key.apply(socket)
        return socket

    def close(self) -> None:
        """Close all connections."""
        for pulse in self._pulses.values():
            pulse.close()
        self._context.destroy(linger=0)
