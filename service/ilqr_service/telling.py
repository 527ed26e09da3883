"""Delivery of results, notices and replies, once the journal permits it.

With a copy of the journal on another node, nothing is sent before the copy has everything written
so far. So a server that takes over from the copy knows every answer that anyone has received.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from ilqr_service import logs
from ilqr_service.journal.journal import Journal
from ilqr_service.metrics.telemetry import Telemetry
from ilqr_service.sessions.effects import Effects, counted
from ilqr_service.transport.results import Publisher
from ilqr_vae.protocol import messages

_LIFE = ("opened", "reconnected", "resumed", "restarted", "closed", "idle", "shutdown")


class Teller:
    """Delivers effects. Only the I/O thread may use it.

    Args:
        journal: reports what has been copied.
        publisher, reply: send to subscribers, and to one connection.
        telemetry: counters.
    """

    def __init__(
        self,
        journal: Journal,
        publisher: Publisher,
        reply: Callable[[bytes, messages.Message], bool],
        telemetry: Telemetry,
    ) -> None:
        self._journal, self._publisher = journal, publisher
        self._reply, self._telemetry = reply, telemetry
        self._held: deque[tuple[int, list[Effects]]] = deque()
        self._lives = logs.Paced()

    @property
    def holding(self) -> bool:
        """Whether anything waits for the copy."""
        return bool(self._held)

    def tell(self, steps: list[Effects]) -> None:
        """Deliver these effects, now or when the copy has them."""
        position = self._journal.position
        if self._journal.copied() >= position and not self._held:
            self._out(steps)
            return
        for effects in steps:
            # a probe asks whether the service is alive, which it is
            probed = [r for r in effects.replies if isinstance(r[1], messages.Probed)]
            for owner, reply in probed:
                self._reply(owner, reply)
            if probed:
                effects.replies = [r for r in effects.replies if r not in probed]
        self._held.append((position, steps))

    def go_on(self) -> None:
        """Deliver what was held and has been copied since."""
        if self._held:
            copied = self._journal.copied()
            while self._held and self._held[0][0] <= copied:
                self._out(self._held.popleft()[1])

    def _out(self, steps: list[Effects]) -> None:
        # count first: a recipient may read the counters
        self._telemetry.count(*counted(steps))
        publish = self._publisher.publish
        for effects in steps:
            for message in effects.again:
                publish(messages.topic_of(message), messages.encode(message))
            for session, revision, answer in effects.detailed:
                topic = messages.detail_topic(session.name)
                if self._publisher.subscribed(topic):
                    frame = messages.encode(session.detail(revision, answer))
                    publish(topic, frame, exact=True)
            for message, frame in zip(effects.published, effects.frames, strict=True):
                event = isinstance(message, messages.Event)
                publish(messages.topic_of(message), frame, exact=event)
                if isinstance(message, messages.Notice) and message.what.startswith(_LIFE):
                    self._lives.info(f"session {message.what}", session=message.session)
                if isinstance(message, messages.Result) and message.revision == 0:
                    self._telemetry.observe(message)
            for owner, reply in effects.replies:
                self._reply(owner, reply)
