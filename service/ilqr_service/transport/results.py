"""The results socket: XPUB, one topic a session, and something for every new subscriber.

Each new subscription gets exactly one message at once, and it alone gets it: the topic's last
message where there is one, else a ``Notice("subscribed")``. So a subscriber knows that it is
subscribed before it lets anything happen that it must not miss.

libzmq's XPUB_MANUAL does the addressing: what is (un)subscribed, and with XPUB_MANUAL_LAST_VALUE
the next message, is for whoever sent the (un)subscription that was last taken off the socket. Where
a subscriber has vanished by then, libzmq sends what was meant for it to everyone under that topic,
who may so see the last message twice: by index and revision the same.

A message that is no (un)subscription, which no SUB socket sends, makes libzmq (4.3.5) lose count:
to the end of what has come it takes each (un)subscription for the next one's. Those subscribers are
given every topic, of which their own sockets keep what they want, and their first message goes to
all under its topic.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any

import zmq

from ilqr_vae.protocol import messages

_MAX_TOPIC = 1024
_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)


class Publisher:
    """Publishes under session topics, from the thread that made it.

    Args:
        context: to make the socket in.
        queue: messages kept for a subscriber that does not read; then its newest are dropped.
        topics: how many topics' last messages are kept.
    """

    def __init__(self, context: zmq.Context[Any], *, queue: int, topics: int) -> None:
        self.socket: zmq.Socket[bytes] = context.socket(zmq.XPUB)
        self.socket.sndhwm = queue
        self.socket.maxmsgsize = _MAX_TOPIC
        self.socket.setsockopt(zmq.XPUB_MANUAL, 1)
        self._topics = topics
        self._last: dict[bytes, bytes] = {}
        self._strange = 0

    def publish(self, session: str, frame: bytes) -> None:
        """Send a message to the session's subscribers; never waits."""
        self._send(self.remember(session, frame), frame)

    def remember(self, session: str, frame: bytes) -> bytes:
        """Keep as the last message of the session's topic, which it returns."""
        topic = messages.topic(session)
        self._last.pop(topic, None)  # so that the newest topics are last
        self._last[topic] = frame
        if len(self._last) > self._topics:
            del self._last[next(iter(self._last))]
        return topic

    def welcome(self) -> None:
        """Take all (un)subscriptions off the socket and answer each subscription."""
        astray = False
        owed: list[bytes] = []
        while True:
            try:
                request = self.socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                break
            kind, topic = request[:1], request[1:]
            if kind not in (b"\x00", b"\x01"):
                self._strange += 1
                astray = True
            if astray:
                self.socket.setsockopt(zmq.SUBSCRIBE, b"")
                owed += [topic] if kind == b"\x01" else []
            elif kind == b"\x01":
                self.socket.setsockopt(zmq.SUBSCRIBE, topic)
                self._alone(topic)
            else:
                self.socket.setsockopt(zmq.UNSUBSCRIBE, topic)
        for topic in owed:
            self._send(topic, self._first(topic))

    def _first(self, topic: bytes) -> bytes:
        """What a new subscriber of a topic is sent."""
        if topic in self._last:
            return self._last[topic]
        name = topic.rstrip(b"\x00").decode("utf-8", "replace")
        return messages.encode(messages.Notice(session=name, epoch=0, what="subscribed"))

    def _alone(self, topic: bytes) -> None:
        """Send a topic's first message to the newest subscriber alone."""
        self.socket.setsockopt(zmq.XPUB_MANUAL_LAST_VALUE, 1)
        self._send(topic, self._first(topic))
        self.socket.setsockopt(zmq.XPUB_MANUAL_LAST_VALUE, 0)
        self.socket.setsockopt(zmq.XPUB_MANUAL, 1)

    def strange(self) -> Counter[str]:
        """Messages that were no (un)subscriptions, since the last call."""
        strange, self._strange = self._strange, 0
        return Counter({"refused:subscription": strange} if strange else {})

    def _send(self, topic: bytes, frame: bytes) -> None:
        with contextlib.suppress(zmq.Again):
            self.socket.send(topic, _MORE)
            self.socket.send(frame, zmq.NOBLOCK)
