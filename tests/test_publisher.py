"""The results socket by itself, over inproc pipes, where what has come has come."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import zmq

from ilqr_service.transport.results import Publisher
from ilqr_vae.protocol import messages


class Hall:
    """A publisher, and whoever connects to it."""

    def __init__(self) -> None:
        self.context: zmq.Context[Any] = zmq.Context()
        self.publisher = Publisher(self.context, queue=100, topics=10)
        self.publisher.socket.bind("inproc://results")
        self._there: list[zmq.Socket[bytes]] = []

    def comes(self, kind: int, *topics: str) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = self.context.socket(kind)
        self._there.append(socket)
        socket.connect("inproc://results")
        for topic in topics:
            socket.setsockopt(zmq.SUBSCRIBE, messages.topic(topic))
        return socket

    def says(self, session: str, what: str) -> None:
        self.publisher.publish(
            session, messages.encode(messages.Notice(session=session, epoch=0, what=what))
        )


@pytest.fixture
def hall() -> Iterator[Hall]:
    hall = Hall()
    yield hall
    hall.context.destroy(linger=0)


def heard(socket: zmq.Socket[bytes]) -> list[str]:
    """Everything that has come, as session:what."""
    got: list[str] = []
    while socket.poll(0):
        message = messages.decode_published(socket.recv_multipart()[1])
        assert isinstance(message, messages.Notice)
        got.append(f"{message.session}:{message.what}")
    return got


def test_each_new_subscriber_gets_the_last_message_alone(hall: Hall) -> None:
    first = hall.comes(zmq.SUB, "a")
    hall.publisher.welcome()
    hall.says("a", "one")
    assert heard(first) == ["a:subscribed", "a:one"]
    second = hall.comes(zmq.SUB, "a", "b")
    hall.publisher.welcome()
    hall.says("a", "two")
    assert heard(second) == ["a:one", "b:subscribed", "a:two"]
    assert heard(first) == ["a:two"]
    first.setsockopt(zmq.UNSUBSCRIBE, messages.topic("a"))
    hall.publisher.welcome()
    hall.says("a", "three")
    assert (heard(first), heard(second)) == ([], ["a:three"])


@pytest.mark.parametrize("junk", [1, 3])
@pytest.mark.parametrize("leaves", [False, True])
def test_a_message_that_is_no_subscription_costs_no_subscriber_anything(
    hall: Hall, junk: int, leaves: bool
) -> None:
    """Though libzmq takes the subscriptions that came with it for one another's."""
    old, leaving = hall.comes(zmq.SUB, "old"), hall.comes(zmq.SUB, "a")
    hall.publisher.welcome()
    assert (heard(old), heard(leaving)) == (["old:subscribed"], ["a:subscribed"])
    before = hall.comes(zmq.SUB, "before")
    stranger = hall.comes(zmq.XSUB)
    for _ in range(junk):
        stranger.send(b"\x05nothing that a subscriber would say")
    if leaves:
        leaving.setsockopt(zmq.UNSUBSCRIBE, messages.topic("a"))
    after = [hall.comes(zmq.SUB, name) for name in ("a", "b", "c")]
    hall.publisher.welcome()
    assert hall.publisher.strange() == {"refused:subscription": junk}
    for name in ("old", "before", "a", "b", "c"):
        hall.says(name, "news")
    assert heard(old) == ["old:news"]
    assert heard(before) == ["before:subscribed", "before:news"]
    for socket, name in zip(after, ("a", "b", "c"), strict=True):
        assert heard(socket) == [f"{name}:subscribed", f"{name}:news"]
    assert ("a:news" in heard(leaving)) is not leaves
    # and afterwards all is as it was
    late = hall.comes(zmq.SUB, "b")
    hall.publisher.welcome()
    assert heard(late) == ["b:news"]
    assert [heard(socket) for socket in after] == [[], [], []]
