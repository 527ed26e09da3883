"""The base of bridges to ZeroMQ publishers: presence and messages of the publisher."""

from __future__ import annotations

from typing import Any

import zmq

from ilqr_clients.bridges.core import Bridge, Say
from ilqr_clients.connection import Watched
from ilqr_vae.errors import ConfigError

_MOST = 4096


class ZmqBridge(Bridge):
    """Feeds a session from a publisher.

    Args:
        endpoint: the service's address.
        stream: address of the publisher, e.g. ``tcp://127.0.0.1:5556``.
        session: the session's name.
        say: receives a line for each event.
        options: options of ``ServiceClient.open``.

    Raises:
        ConfigError: ``stream`` is not an address with a port.
        ServiceError: the service is not reachable.
    """

    def __init__(
        self,
        endpoint: str,
        stream: str,
        session: str,
        *,
        say: Say = lambda _: None,
        **options: Any,
    ) -> None:
        _, _, port = stream.rpartition(":")
        if not stream.startswith("tcp://") or not port.isdecimal():
            expected = "an address such as tcp://127.0.0.1:5556"
            raise ConfigError("stream", expected=expected, got=repr(stream))
        super().__init__(endpoint, session, say=say, **options)
        self.stream = stream
        self.context: zmq.Context[Any] = zmq.Context()
        self._socket = self.context.socket(zmq.SUB)
        self._socket.rcvhwm = 0
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")
        self._watched = Watched(self._socket)
        self._socket.connect(stream)
        self._connection, self._heard = 0, False
        self._came: list[list[bytes]] = []

    def close(self) -> None:
        """End the session."""
        super().close()
        self.context.destroy(linger=0)

    def here(self, timeout: float) -> bool:
        self._take(0.0 if self._heard else timeout)
        self._notice()
        return self._heard

    def pull(self) -> list[list[bytes]]:
        self._take(self.model.bin_width / 4 if self._heard else 0.0)
        self._notice()
        came, self._came = self._came, []
        return came

    def _notice(self) -> None:
        """Detect whether the publisher is present, and whether it is another one."""
        connected = self._watched.connected
        if self._came:
            self._heard = True
        elif self._heard and not connected:
            self._heard = False
            self.say(f"{self.stream} is gone")
        if self._heard and self._watched.times != self._connection:
            self._connection = self._watched.times
            self.say(f"{self.stream} is there")
            self.began()

    def _take(self, timeout: float) -> None:
        if not self._came and not self._socket.poll(int(timeout * 1e3)):
            return
        while len(self._came) < _MOST:
            try:
                self._came.append(self._socket.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                return
