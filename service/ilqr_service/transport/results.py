"""The results door: one topic per session, and a first message for each new subscriber.

Each new subscription is answered at once, to that subscriber only: with the last message of the
topic if there is one, else with ``Notice("subscribed")``. So a subscriber knows that it is
subscribed before it triggers anything that it must not miss.
"""

from __future__ import annotations

from collections import Counter

from ilqr_service.transport.connections import Connections
from ilqr_service.transport.doors import Connection, Door
from ilqr_service.transport.zmtp import Incoming
from ilqr_vae.protocol import messages

_MAX_TOPIC = 1024
_MAX_TOPICS = 4096  # per subscriber
_TOPIC_BYTES = 500  # extra memory per topic
_BACKLOG_BYTES = 64 << 20


class Publisher:
    """Publishes session topics to subscribers.

    Args:
        connections: connections; all calls come from their thread.
        queue: number of messages kept for a subscriber that does not read; later ones are dropped.
        topics: number of topics whose last message is kept.
    """

    def __init__(self, connections: Connections, *, queue: int, topics: int) -> None:
        self._connections = connections
        self._queue, self._topics = queue, topics
        self._last: dict[bytes, bytes] = {}
        self._subscribers: dict[bytes, dict[Connection, None]] = {}
        self._lengths: Counter[int] = Counter()  # lengths of subscribed prefixes
        self._of: dict[Connection, set[bytes]] = {}
        self._strange = 0

    def listen(self, endpoint: str) -> Door:
        """Bind the results address. Raises ServiceError."""
        return self._connections.listen(
            "results",
            endpoint,
            b"XPUB",
            frozenset((b"SUB", b"XSUB")),
            message_bytes=_MAX_TOPIC + 1,
            backlog_bytes=_BACKLOG_BYTES,
            backlog=self._queue,
            message=self._message,
            gone=self._gone,
        )

    @property
    def wanted(self) -> set[bytes]:
        """Return all subscribed prefixes."""
        return set(self._subscribers)

    def publish(self, topic: bytes, frame: bytes, *, exact: bool = False) -> None:
        """Send a message to the subscribers of a topic, without blocking.

        If ``exact``, only to those that named the whole topic.
        """
        self.remember(topic, frame)
        told: set[Connection] = set()
        for length in (len(topic),) if exact else self._lengths:
            if length <= len(topic):
                told.update(self._subscribers.get(topic[:length], ()))
        for connection in told:
            self._connections.send(connection, frame, topic)

    def subscribed(self, topic: bytes) -> bool:
        """Return whether anyone has subscribed to exactly this topic."""
        return topic in self._subscribers

    def remember(self, topic: bytes, frame: bytes) -> None:
        """Store the last message of the topic."""
        self._last.pop(topic, None)  # keep the newest topics last
        self._last[topic] = frame
        if len(self._last) > self._topics:
            del self._last[next(iter(self._last))]

    def strange(self) -> Counter[str]:
        """Return the number of messages since the last call that were not (un)subscriptions."""
        strange, self._strange = self._strange, 0
        return Counter({"refused:subscription": strange} if strange else {})

    def _message(self, connection: Connection, message: Incoming) -> None:
        """Handle an (un)subscription: a command, or a message that begins with 1 or 0."""
        topic, kind = message.body, message.command
        if not kind and message.body[:1] in (b"\x00", b"\x01"):
            kind, topic = ("SUBSCRIBE" if topic[0] else "CANCEL"), topic[1:]
        mine = self._of.setdefault(connection, set())
        if (
            not kind
            or len(topic) > _MAX_TOPIC
            or (kind == "SUBSCRIBE" and len(mine) >= _MAX_TOPICS)
        ):
            self._strange += 1
        elif kind == "CANCEL":
            self._remove(connection, topic)
        elif topic not in mine:
            mine.add(topic)
            connection.kept += len(topic) + _TOPIC_BYTES
            there = self._subscribers.setdefault(topic, {})
            if not there:
                self._lengths[len(topic)] += 1
            there[connection] = None
            self._connections.send(connection, self._first(topic), topic)

    def _first(self, topic: bytes) -> bytes:
        """Return the first message for a new subscriber of a topic."""
        if topic in self._last:
            return self._last[topic]
        name = topic.rstrip(b"\x00\x01\x02").decode("utf-8", "replace")
        return messages.encode(messages.Notice(session=name, epoch=0, what="subscribed"))

    def _remove(self, connection: Connection, topic: bytes) -> None:
        there = self._subscribers.get(topic, {})
        if connection not in there:
            return
        del there[connection]
        self._of[connection].discard(topic)
        connection.kept -= len(topic) + _TOPIC_BYTES
        if not there:
            del self._subscribers[topic]
            self._lengths[len(topic)] -= 1
            self._lengths += Counter()  # drops zero entries

    def _gone(self, connection: Connection) -> None:
        for topic in list(self._of.get(connection, ())):
            self._remove(connection, topic)
        self._of.pop(connection, None)
