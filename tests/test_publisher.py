"""The results door by itself, over loopback: who is sent what."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import zmq

from feeder import WAIT_S
from ilqr_service.transport import connections as connections_module
from ilqr_service.transport.connections import Connections
from ilqr_service.transport.results import Publisher
from ilqr_vae.protocol import messages


class Hall:
    """A publisher, and whoever connects to it."""

    def __init__(self, queue: int = 100) -> None:
        self.connections = Connections(None)
        self.publisher = Publisher(self.connections, queue=queue, topics=10)
        self.address = self.publisher.listen("tcp://127.0.0.1:*").address
        self.context: zmq.Context[Any] = zmq.Context()
        self._there: list[zmq.Socket[bytes]] = []

    def comes(self, kind: int, *topics: str) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = self.context.socket(kind)
        self._there.append(socket)
        socket.connect(self.address)
        for topic in topics:
            socket.setsockopt(zmq.SUBSCRIBE, messages.topic(topic))
        return socket

    def says(self, session: str, what: str) -> None:
        self.publisher.publish(
            messages.topic(session),
            messages.encode(messages.Notice(session=session, epoch=0, what=what)),
        )

    def hears(self, socket: zmq.Socket[bytes], n: int) -> list[str]:
        """The next n messages of a subscriber, as session:what."""
        got: list[str] = []
        end = time.monotonic() + WAIT_S
        while len(got) < n:
            assert time.monotonic() < end, f"{got}: {len(got)} of {n}"
            self.connections.poll(0.01)
            while socket.poll(0):
                message = messages.decode_published(socket.recv_multipart()[1])
                assert isinstance(message, messages.Notice)
                got.append(f"{message.session}:{message.what}")
        return got


@pytest.fixture
def hall() -> Iterator[Hall]:
    hall = Hall()
    yield hall
    hall.context.destroy(linger=0)
    hall.connections.close()


def test_each_new_subscriber_gets_the_last_message_alone(hall: Hall) -> None:
    first = hall.comes(zmq.SUB, "a")
    assert hall.hears(first, 1) == ["a:subscribed"]
    hall.says("a", "one")
    assert hall.hears(first, 1) == ["a:one"]
    second = hall.comes(zmq.SUB, "a", "b")
    assert hall.hears(second, 2) == ["a:one", "b:subscribed"]
    hall.says("a", "two")
    assert hall.hears(second, 1) == ["a:two"]
    assert hall.hears(first, 1) == ["a:two"]
    first.setsockopt(zmq.UNSUBSCRIBE, messages.topic("a"))
    first.setsockopt(zmq.SUBSCRIBE, messages.topic("end"))
    assert hall.hears(first, 1) == ["end:subscribed"]
    hall.says("a", "three")
    hall.says("end", "four")
    assert (hall.hears(first, 1), hall.hears(second, 1)) == (["end:four"], ["a:three"])


def test_a_prefix_gets_every_topic_that_begins_with_it_once(hall: Hall) -> None:
    everything, some = hall.comes(zmq.SUB), hall.comes(zmq.SUB, "rat")
    for prefix in (b"", b"r", b"rat\0"):
        everything.setsockopt(zmq.SUBSCRIBE, prefix)
    hall.hears(everything, 3)
    hall.hears(some, 1)
    hall.says("rat", "one")
    hall.says("mouse", "two")
    hall.says("rat", "three")
    assert hall.hears(everything, 3) == ["rat:one", "mouse:two", "rat:three"]
    assert hall.hears(some, 2) == ["rat:one", "rat:three"]


@pytest.mark.parametrize("junk", [b"\x05nothing that a subscriber would say", b"", b"\x01" * 2000])
def test_a_message_that_is_no_subscription_costs_no_subscriber_anything(
    hall: Hall, junk: bytes
) -> None:
    old = hall.comes(zmq.SUB, "old")
    assert hall.hears(old, 1) == ["old:subscribed"]
    stranger = hall.comes(zmq.XSUB)
    for _ in range(3):
        stranger.send(junk)
    stranger.send(b"\x01" + messages.topic("heard"))
    assert hall.hears(stranger, 1) == ["heard:subscribed"]
    assert hall.publisher.strange() == {"refused:subscription": 3}
    hall.says("old", "news")
    assert hall.hears(old, 1) == ["old:news"]
    late = hall.comes(zmq.SUB, "old")
    assert hall.hears(late, 1) == ["old:news"]


def test_who_leaves_is_forgotten(hall: Hall) -> None:
    leaving, staying = hall.comes(zmq.SUB, "a"), hall.comes(zmq.SUB, "a")
    for socket in (leaving, staying):
        hall.hears(socket, 1)
    leaving.close()
    while not hall.connections.events()["disconnected"]:
        hall.connections.poll(0.05)
    hall.says("a", "news")
    assert hall.hears(staying, 1) == ["a:news"]


def test_topics_count_among_the_bytes_that_are_held_for_peers(
    hall: Hall, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections_module, "_HELD_BYTES", 100_000)
    modest, greedy = hall.comes(zmq.SUB, "s"), hall.comes(zmq.SUB)
    assert hall.hears(modest, 1) == ["s:subscribed"]
    for k in range(50):
        greedy.setsockopt(zmq.SUBSCRIBE, messages.topic(f"{k:03d}" + "x" * 500))
    hall.hears(greedy, 50)
    hall.connections.tidy()
    assert not hall.connections.events()
    for k in range(50):
        greedy.setsockopt(zmq.UNSUBSCRIBE, messages.topic(f"{k:03d}" + "x" * 500))
        greedy.setsockopt(zmq.SUBSCRIBE, messages.topic(f"{k:03d}" + "y" * 500))
    hall.hears(greedy, 50)
    hall.connections.tidy()  # what it unsubscribed from counts no more
    assert not hall.connections.events()
    for k in range(100):
        greedy.setsockopt(zmq.SUBSCRIBE, messages.topic(f"{k:03d}" + "z" * 500))
    hall.hears(greedy, 100)
    hall.connections.tidy()
    assert hall.connections.events() == {"disconnected": 1}
    hall.says("s", "still here")
    assert hall.hears(modest, 1) == ["s:still here"]
