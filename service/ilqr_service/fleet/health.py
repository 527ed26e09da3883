"""Detection of dead servers, by a probe every 0.3 s and by the state of its connection.

When a process is killed, its connections close and its address refuses new ones: this is detected
within a fraction of a second. A process that hangs, or whose machine lost power, is only silent:
this is detected after ``patience`` seconds of probes without a reply. Only time in which this
process itself ran counts, since what delays it may delay the servers. A server that has never
answered is given 60 s. While no server answers, a cause on this side is likelier than that all
hang: then both take three times as long.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
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
"""Attempts to reconnect after which a server is dead; the first is reported when the connection
breaks, so two have failed.
"""
_RAN_S = 0.1
"""Longest time between two looks that counts as silence."""
_FIRST_S = 60.0
"""Shortest time for the first reply: a server is warm before it is probed, but may be busy."""
_ALL_SILENT = 3.0
"""Factor on the patience while no server answers."""
_EVENTS = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CONNECT_RETRIED


class _Pulse:
    """Probes to one server. The caller passes the time in seconds of a monotonic clock."""

    def __init__(self, socket: zmq.Socket[bytes], server: Server, now: float) -> None:
        self.server = server
        self.heard = now
        self.silent_s, self.attempts = 0.0, 0
        self.ever = self.reported = False
        self._sent = now - _PROBE_S
        self._broken = False
        self._socket = socket
        self._monitor = socket.get_monitor_socket(_EVENTS)
        socket.connect(server.ingest)

    def look(self, now: float, ran: float) -> None:
        """Read replies, add ``ran`` seconds of silence if there are none, and send a probe."""
        while self._monitor.poll(0):
            event = recv_monitor_message(self._monitor)["event"]
            if event == zmq.EVENT_CONNECT_RETRIED:
                self.attempts += self._broken
            else:
                self._broken, self.attempts = event == zmq.EVENT_DISCONNECTED, 0
                self.heard = now
        self.silent_s += ran
        while self._socket.poll(0):
            self._socket.recv()
            self.heard, self.silent_s, self.ever = now, 0.0, True
        if now - self._sent < _PROBE_S:
            return
        self._sent = now
        with suppress(zmq.Again):
            self._socket.send(messages.encode(messages.Probe(client_ns=0)), zmq.NOBLOCK)

    def close(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close()
        self._socket.close()


class Health:
    """Watches servers. Only one thread may use it.

    Args:
        key: key of the fleet, if servers require keys.
        patience: seconds without a reply after which a server counts as dead.
        clock: monotonic, seconds.
    """

    def __init__(
        self,
        key: ClientKey | None,
        patience: float = PATIENCE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._key, self._clock = key, clock
        self._patience = max(2 * _PROBE_S, patience)
        self._looked = clock()
        self._context: zmq.Context[Any] = zmq.Context()
        self._pulses: dict[Server, _Pulse] = {}

    def look(self, servers: Iterable[Server]) -> dict[Server, float]:
        """Return the dead servers, and when each was last heard from (``time.monotonic``)."""
        now, wanted = self._clock(), set(servers)
        ran, self._looked = min(now - self._looked, _RAN_S), now
        for server in self._pulses.keys() - wanted:
            self._pulses.pop(server).close()
        for server in wanted - self._pulses.keys():
            self._pulses[server] = _Pulse(self._socket(), server, now)
        for pulse in self._pulses.values():
            pulse.look(now, ran)
            if not pulse.ever and pulse.silent_s >= self._patience and not pulse.reported:
                pulse.reported = True
                logs.warning("a server does not answer the fleet", address=pulse.server.ingest)
        pulses = self._pulses.values()
        answered = any(pulse.ever and pulse.silent_s < 2 * _PROBE_S for pulse in pulses)
        factor = 1.0 if answered else _ALL_SILENT
        known, first = self._patience * factor, max(_FIRST_S, self._patience) * factor
        return {
            pulse.server: pulse.heard
            for pulse in pulses
            if pulse.silent_s >= (known if pulse.ever else first)
            or (pulse.ever and pulse.attempts >= _REFUSED)
        }

    def answered(self, server: Server) -> bool:
        """Return whether a watched server has ever answered."""
        return self._pulses[server].ever

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
