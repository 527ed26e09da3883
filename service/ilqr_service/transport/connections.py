"""What libzmq does with connections by itself, counted."""

from __future__ import annotations

from collections import Counter
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

_COUNTED = {
    int(zmq.EVENT_DISCONNECTED): "disconnected",
    int(zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL): "refused:handshake",
    # whoever expects another handshake may hang up before it is told of its mistake
    int(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL): "refused:handshake",
}


class Connections:
    """What becomes of sockets' connections, as libzmq tells it: those that ended or were cut off
    (for a message beyond its limit, say), and those that never spoke as they should (no key, the
    wrong service's key, another protocol).

    Args:
        context: that of the sockets.
    """

    def __init__(self, context: zmq.Context[Any]) -> None:
        self._context = context
        self._watched: list[zmq.Socket[bytes]] = []

    def watch(self, socket: zmq.Socket[bytes]) -> None:
        """Follow a socket that is not bound yet."""
        address = f"inproc://connections-{len(self._watched)}"
        socket.monitor(address, sum(_COUNTED))
        events: zmq.Socket[bytes] = self._context.socket(zmq.PAIR)
        events.rcvhwm = 0  # so that libzmq never waits for a reader
        events.connect(address)
        self._watched.append(events)

    def events(self) -> Counter[str]:
        """Since the last call; to be called often."""
        counted: Counter[str] = Counter()
        for events in self._watched:
            while True:
                try:
                    frames = events.recv_multipart(zmq.NOBLOCK)
                except zmq.Again:
                    break
                kind = _COUNTED.get(int(parse_monitor_message(frames)["event"]))
                if kind is not None:
                    counted[kind] += 1
        return counted
