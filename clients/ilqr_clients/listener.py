"""Results and notices of a session, for its feeder and for other listeners."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import zmq

from ilqr_clients.answer import Answer
from ilqr_clients.connection import Closing, available, connect, reachable
from ilqr_clients.exact import finite
from ilqr_vae.errors import ServiceUnreachableError, SessionEnd, SessionEndedError
from ilqr_vae.protocol import messages
from ilqr_vae.protocol.clock import Clock, MonotonicClock
from ilqr_vae.protocol.keys import ClientKey

PATIENCE_S = 15.0
"""Default time that a client waits for an answer that is due."""

REMEMBERED = 4096
"""Largest number of bins whose revisions are kept."""

_ASK_S = 2.0
_TURN_S = 0.25


class Topic:
    """A subscription to the results and notices of a session.

    Args:
        context: ZeroMQ context.
        address: results address of the service.
        session: name of the session.
        key: key for a service that requires keys.
        timer: clock of the arrival times.
        events, details: subscribe to the session's events and details too.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        address: str,
        session: str,
        key: ClientKey | None,
        timer: Clock,
        *,
        events: bool = False,
        details: bool = False,
    ) -> None:
        self.socket = connect(context, zmq.SUB, address, key)
        self.socket.setsockopt(zmq.SUBSCRIBE, messages.topic(session))
        if events:
            self.socket.setsockopt(zmq.SUBSCRIBE, messages.event_topic(session))
        if details:
            self.socket.setsockopt(zmq.SUBSCRIBE, messages.detail_topic(session))
        self._timer, self._addresses = timer, {address}
        self._revisions: dict[int, int] = {}

    def connect(self, address: str) -> None:
        """Also listen at another address."""
        if address not in self._addresses:
            self._addresses.add(address)
            self.socket.connect(address)

    def move(self, address: str) -> None:
        """Listen at another address instead."""
        for left in self._addresses - {address}:
            self.socket.disconnect(left)
        self._addresses &= {address}
        self.connect(address)

    def take(self) -> Iterator[tuple[messages.Published | None, int]]:
        """Return available messages, None for unknown types, with the times when they were read."""
        for frames in available(self.socket):
            arrived = self._timer.now_ns()
            yield messages.decode_published(frames[-1]), arrived

    def is_new(self, index: int, revision: int, *, known: int = -1) -> bool:
        """Return whether a result is new, and record it.

        Args:
            known: the revision that the caller has, if none was recorded.
        """
        if revision <= self._revisions.get(index, known):
            return False
        self._revisions[index] = revision
        if len(self._revisions) > REMEMBERED:
            del self._revisions[next(iter(self._revisions))]
        return True

    def forget(self) -> None:
        """Forget all results, as for another run of the session."""
        self._revisions.clear()


class Listener(Closing):
    """Reads the results of a session without feeding it; created by ``ServiceClient.listen``.

    Iterate over it for each answer until the feeder closes the session:

    >>> with service.listen("rat-7") as results:                        # doctest: +SKIP
    ...     for answer in results:
    ...         print(answer.index, answer.kinematics)

    It follows the session when it is opened again by any feeder.

    Args:
        endpoint, results: the service's addresses.
        session: the session's name.
        timeout: seconds to wait for the first message from the service.
        patience: seconds without a message from the service after which ``receive`` raises.
        wait: whether to wait for a session that is not open yet; an earlier run is skipped.
        key: key for a service that requires keys.
        timer: this client's clock; default: the machine's.

    Attributes:
        newest: the newest answer, None before the first. The last one before the listener connected
            is available from the start, but its ``arrived_ns`` is not a transit time.
        epoch: epoch of the current run.
        notices: notices about the session, oldest first.

    Raises:
        ServiceUnreachableError: no answer within ``timeout``.
    """

    def __init__(
        self,
        endpoint: str,
        results: str,
        session: str,
        *,
        timeout: float = 3.0,
        patience: float = PATIENCE_S,
        wait: bool = False,
        key: ClientKey | None = None,
        timer: Clock | None = None,
    ) -> None:
        self.endpoint, self.session, self.patience = endpoint, session, patience
        self.newest: Answer | None = None
        self.epoch = 0
        self.notices: list[str] = []
        self._ended = ""
        self._ready: list[Answer] = []
        self._subscribed, self._wait = False, wait
        self._heard = time.monotonic()
        self._asked: float | None = None
        self._timer: Clock = timer or MonotonicClock()
        self._context: zmq.Context[Any] = zmq.Context()
        try:
            self._topic = Topic(self._context, results, session, key, self._timer)
            self._dealer = connect(self._context, zmq.DEALER, endpoint, key)
            self._poller = zmq.Poller()
            for socket in (self._topic.socket, self._dealer):
                self._poller.register(socket, zmq.POLLIN)
            end = time.monotonic() + timeout
            while not self._subscribed:
                if (left := end - time.monotonic()) <= 0:
                    raise ServiceUnreachableError(
                        f"service at {endpoint}",
                        expected=f"the session's results within {timeout:g} s",
                        got="none",
                    )
                self._take(left)
        except BaseException:
            self._context.destroy(linger=0)
            raise

    def close(self) -> None:
        """Close the sockets; the session continues."""
        self._context.destroy(linger=0)

    def receive(self, timeout: float = 0.0) -> list[Answer]:
        """Return available answers, waiting up to ``timeout`` seconds for the first.

        Answers are in order of arrival, without repetitions. One that was published before the
        listener connected is not included (see ``newest``).

        Raises:
            SessionEndedError: the session has ended, and all its answers were returned. Raised
                once: the next call waits for the session to be opened again.
            ServiceUnreachableError: no message from the service for ``patience`` seconds.
            ProtocolError: a message is invalid.
        """
        end = time.monotonic() + finite("timeout", timeout)
        while True:
            left = end - time.monotonic()
            self._take(0.0 if self._ready else min(left, _TURN_S))
            if self._ready:
                answers, self._ready = self._ready, []
                return answers
            if self._ended:
                reason, self._ended = self._ended, ""
                where = f"session {self.session!r} at {self.endpoint}"
                raise SessionEndedError(where, reason=reason)
            self._check_alive()
            if left <= 0:
                return []

    def __iter__(self) -> Iterator[Answer]:
        """Yield each answer until the feeder closes the session.

        Raises:
            As ``receive``, but for a session that is closed.
        """
        while True:
            try:
                yield from self.receive(_TURN_S)
            except SessionEndedError as ended:
                if ended.end is SessionEnd.CLOSED:
                    return
                raise

    def _check_alive(self) -> None:
        """Probe the service after a silence; raise if a probe was not answered."""
        now = time.monotonic()
        if self._asked is not None and now - self._asked > self.patience:
            self._asked = None  # a caller that continues has as much time again
            raise ServiceUnreachableError(
                f"service at {self.endpoint}",
                expected=f"a sign of life within {self.patience:g} s",
                got=f"none (last heard of it {now - self._heard:.1f} s ago)",
            )
        if self._asked is None and now - self._heard > _ASK_S:
            self._asked = now
            self._dealer.send(messages.encode(messages.Describe()))

    def _take(self, timeout: float) -> None:
        """Handle available messages, waiting up to ``timeout`` seconds for the first."""
        if not self._poller.poll(max(0, int(timeout * 1e3))):
            return
        self._heard, self._asked = time.monotonic(), None
        for message, arrived in self._topic.take():
            first, self._subscribed = not self._subscribed, True
            if isinstance(message, messages.Notice):
                self._notice(message, first=first)
            elif isinstance(message, messages.Result):
                self._result(message, arrived, first=first)
        while self._dealer.poll(0):
            reply = messages.decode_downstream(self._dealer.recv())
            if isinstance(
                reply, messages.Described
            ):  # after a restart the results address may differ
                self._topic.connect(reachable(reply.results, self.endpoint))

    def _notice(self, notice: messages.Notice, *, first: bool) -> None:
        if first or notice.what.startswith("opened") or notice.epoch > self.epoch:
            self._topic.forget()
            self.epoch, self._ended = notice.epoch, ""
        if notice.epoch != self.epoch:
            return
        self.notices.append(notice.what)
        end = SessionEnd.of(notice.what)
        if end not in (None, SessionEnd.TAKEN) and not (first and self._wait):
            self._ended = notice.what

    def _result(self, result: messages.Result, arrived: int, *, first: bool) -> None:
        if first or result.epoch > self.epoch:
            self._topic.forget()
            self.epoch = result.epoch
        if result.epoch != self.epoch or not self._topic.is_new(result.index, result.revision):
            return
        self.newest = Answer.of(result, arrived)
        if not first:
            self._ready.append(self.newest)
