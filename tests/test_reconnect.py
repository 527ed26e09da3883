"""Connections that break between a feeder and a real service: a TCP forwarder cuts them."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator

import pytest

from feeder import Feeder, bin_, open_, spikes
from ilqr_service.server import Service
from ilqr_vae.protocol import messages


class Forwarder:
    """Forwards TCP connections to an address until they are cut."""

    def __init__(self, to: str) -> None:
        host, port = to.removeprefix("tcp://").rsplit(":", 1)
        self._to = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._to)
            except OSError:
                return
            self._pairs.append((near, far))
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        """Reset every connection; new ones are accepted."""
        pairs, self._pairs = self._pairs, []
        assert pairs
        for one in (s for pair in pairs for s in pair):
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def close(self) -> None:
        self._listener.close()
        if self._pairs:
            self.cut()


@pytest.fixture
def forwarder(service: Service) -> Iterator[Forwarder]:
    one = Forwarder(service.ingest)
    yield one
    one.close()


def test_a_plain_feeder_that_reconnects_keeps_its_session(
    service: Service, forwarder: Forwarder
) -> None:
    counts = spikes(40)
    before = service.telemetry.counts().get("reconnected", 0)
    with Feeder(forwarder.address, service.results) as feeder:
        feeder.subscribe("blip")
        feeder.ask(open_("blip"), messages.Opened)
        feeder.send(*(bin_("blip", i, counts[i]) for i in range(20)))
        assert [r.index for r in feeder.results(20)] == list(range(20))
        forwarder.cut()
        feeder.send(bin_("blip", 20, counts[20]))
        opened = feeder.reply_of(messages.Opened)
        assert (opened.resumed, opened.next_index) == (True, 21)
        feeder.notice("reconnected: next bin 20")
        feeder.send(*(bin_("blip", i, counts[i]) for i in range(21, 40)))
        results = feeder.results(20)
        assert [(r.index, r.status) for r in results] == [(i, "ok") for i in range(20, 40)]
        feeder.ask(messages.Close(session="blip"), messages.Closed)
    assert service.telemetry.counts()["reconnected"] == before + 1


def test_another_feeder_gets_nothing_of_a_connected_ones_session(service: Service) -> None:
    with (
        Feeder(service.ingest, service.results) as feeder,
        Feeder(service.ingest, service.results) as other,
    ):
        feeder.subscribe("mine")
        feeder.ask(open_("mine"), messages.Opened)
        refused = other.ask(bin_("mine", 0, spikes(1)[0]), messages.Refused)
        assert (refused.field, refused.index) == ("session", 0)
        feeder.send(bin_("mine", 0, spikes(1)[0]))
        assert [r.index for r in feeder.results(1)] == [0]
        feeder.ask(messages.Close(session="mine"), messages.Closed)
