"""A session's connection to the service: opening it, taking what comes, seeing to what is lost.

Every wait has an end. While an answer is due and none comes, the session asks the service for the
answers it has not received, and sends the bins that the service has not received again: so it
survives a connection that breaks, and a service that is restarted with its journal. After
``patience`` seconds without progress an exception says what is wrong.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import Any

import zmq
from msgspec.structs import replace

from ilqr_clients.answer import Answer
from ilqr_clients.connection import Closing, Watched, connect, reachable, refusal
from ilqr_clients.known_offset import KnownClock
from ilqr_clients.listener import ENDS, PATIENCE_S, Topic
from ilqr_clients.outstanding import Outstanding
from ilqr_vae.errors import (
    AnswerTimeoutError,
    RequestRefusedError,
    ServiceError,
    ServiceUnreachableError,
    SessionEndedError,
)
from ilqr_vae.protocol import messages
from ilqr_vae.protocol.clock import Clock, ClockOffset, MonotonicClock
from ilqr_vae.protocol.keys import ClientKey

NORMAL = ("credits", "late")
"""Fields of refusals that are part of a stream."""

OnError = Callable[[ServiceError], None]
TURN_S = 0.25
"""Longest single wait; between two of them a session looks after what is lost."""

_LINGER_MS = 200


class Channel(Closing):
    """A session with the service, without what it is fed with.

    Args:
        endpoint, results: the service's addresses.
        request: what to open.
        timeout: seconds that opening may take.
        patience: seconds without progress, while answers are due and no bin is sent, after which
            ``send``, ``receive`` and ``step`` raise; twelve times as long while bins are sent.
        key: of a service that has keys.
        timer: this client's clock; default the machine's.
        clock: the service's against it.
        hear_events, hear_details: subscribe to the session's events and details too.
        on_error: called with what ``send`` and ``receive`` would raise of the service, and with
            every refused bin, instead; they then go on. What it raises is raised. ``step`` raises.

    Attributes:
        opened: what the service said: model, latents, kinematic names and units, horizon.
        credits: bins the service would take now without falling behind.
        notices: what the service published about the session, oldest first.
        refused: refusals of single messages, oldest first. Those of bins beyond the credits and
            of bins too late are part of a stream: ``send`` and ``receive`` do not raise them.
        events: of the experiment, as published, oldest first; if they are heard.
        details: of the answers, oldest first; if they are heard. Whoever hears them empties it.

    Raises:
        ServiceUnreachableError: no answer within ``timeout``.
        RequestRefusedError: the service does not open the session; the field says why.
    """

    def __init__(
        self,
        endpoint: str,
        results: str,
        request: messages.Open,
        *,
        timeout: float = 3.0,
        patience: float = PATIENCE_S,
        key: ClientKey | None = None,
        timer: Clock | None = None,
        clock: ClockOffset | None = None,
        hear_events: bool = False,
        hear_details: bool = False,
        on_error: OnError | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.on_error = on_error
        self.request = replace(request, token=request.token or secrets.token_hex(16))
        self.timer: Clock = timer or MonotonicClock()
        self.clock = KnownClock(self.timer, clock)
        self.timeout, self.patience = timeout, patience
        self.credits = 0
        self.notices: list[str] = []
        self.refused: list[messages.Refused] = []
        self.events: list[messages.Event] = []
        self.details: list[messages.Detail] = []
        self.closed: messages.Closed | None = None
        self._opened: messages.Opened | None = None
        self._at, self._key = endpoint, key
        self._front: zmq.Socket[bytes] | None = None  # of a fleet
        self._moved = False
        self._confirmed = self._end_reported = False
        self._ended = ""
        self._refusals: list[messages.Refused] = []  # to be reported
        self._ready: list[Answer] = []
        self._outstanding = Outstanding(patience, request.answered, time.monotonic())
        self._context: zmq.Context[Any] = zmq.Context()
        try:
            self._topic = Topic(
                self._context,
                results,
                request.session,
                key,
                self.timer,
                events=hear_events,
                details=hear_details,
            )
            self._dealer = connect(self._context, zmq.DEALER, endpoint, key)
            self._watched = Watched(self._dealer)
            self._poller = zmq.Poller()
            for socket in (self._topic.socket, self._dealer):
                self._poller.register(socket, zmq.POLLIN)
            self._open()
        except BaseException:
            self._context.destroy(linger=0)
            raise

    def _open(self) -> None:
        """Wait until the service has seen the subscription (it answers each), then open, and wait
        for the answers on both sockets: nothing published from then on is missed."""
        end, before = time.monotonic() + self.timeout, -1
        begins = ("opened", "resumed")
        while self._opened is None or not any(n.startswith(begins) for n in self.notices[before:]):
            if self._moved:
                before, self._moved = -1, False
            if self._confirmed and before < 0:
                self.send_raw(messages.encode(self.request))
                before = len(self.notices)
            left = end - time.monotonic()
            if left <= 0:
                what = "opened" if self._confirmed else "the session's results"
                raise ServiceUnreachableError(
                    f"service at {self.endpoint}",
                    expected=f"{what} within {self.timeout:g} s",
                    got="none",
                )
            self._take(left)
            if self.refused:
                raise refusal(self.endpoint, self.refused[0])
        if self._opened.ignored:
            raise RequestRefusedError(
                f"open.{self._opened.ignored[0]}",
                expected="a service that knows this option",
                got="one that ignored it",
                endpoint=self.endpoint,
            )

    @property
    def opened(self) -> messages.Opened:
        assert self._opened is not None
        return self._opened

    def send_raw(self, frame: bytes) -> None:
        """Send one frame as it is."""
        self._dealer.send(frame)

    def receive(self, timeout: float = 0.0) -> list[Answer]:
        """Return all answers that have come, waiting up to ``timeout`` seconds for the first.

        Answers are of this session's epoch, in order of arrival, and none comes twice. Credits,
        notices and refusals are kept on the session.

        Raises:
            ProtocolError: a message that is not the protocol's.
            As ``send``, once all answers were taken.
        """
        end = time.monotonic() + timeout
        while True:
            left = end - time.monotonic()
            self._take(0.0 if self._ready else min(left, TURN_S))
            self._report_refusals()
            if self._ready:
                answers, self._ready = self._ready, []
                return answers
            self._report()
            if left <= 0:
                return []

    @property
    def _where(self) -> str:
        return f"session {self.request.session!r} at {self.endpoint}"

    def abandon(self) -> None:
        """Close the sockets and leave the session open, as a feeder that dies does."""
        self._context.destroy(linger=0)

    def close(self) -> None:
        """Tell the service, wait up to a second for its word, and close the sockets."""
        if self._context.closed:
            return
        r, close = self.request, messages.Close
        try:
            self.send_raw(messages.encode(close(session=r.session, epoch=r.epoch, token=r.token)))
            end = time.monotonic() + min(1.0, self.timeout)
            while self.closed is None and self._watched.connected and time.monotonic() < end:
                self._take(min(0.05, self.timeout))
        finally:
            self._context.destroy(linger=_LINGER_MS)

    # ---- what comes ----------------------------------------------------------------------------

    def _take(self, timeout: float) -> None:
        """Take everything that has come, waiting up to ``timeout`` seconds for the first."""
        if not self._poller.poll(max(0, int(timeout * 1e3))):
            return
        self._outstanding.heard = time.monotonic()
        for message, arrived in self._topic.take():
            self._confirmed = True  # whatever it is, the service has seen the subscription
            if message is None or message.epoch != self.request.epoch:
                continue
            if isinstance(message, messages.Event):
                self.events.append(message)
                continue
            if isinstance(message, messages.Detail):
                self.details.append(message)
                continue
            if isinstance(message, messages.Result):
                self._result(message, arrived)
                continue
            self.notices.append(message.what)
            if self._opened is not None and message.what.startswith(ENDS):
                self._ended = message.what
        while True:
            try:
                frame = self._dealer.recv(zmq.NOBLOCK)
            except zmq.Again:
                break
            self._reply(messages.decode_downstream(frame))
        if self._front is not None:
            while self._front.poll(0):
                reply = messages.decode_downstream(self._front.recv())
                if isinstance(reply, messages.Moved | messages.Refused):
                    self._reply(reply)
        if self._moved and self._opened is not None and self._confirmed:
            self._moved = False
            self._ask()

    def _result(self, result: messages.Result, arrived: int) -> None:
        index = result.index
        known = 0 if index <= self.request.answered else -1
        if not self._topic.is_new(index, result.revision, known=known):
            return  # published again
        self._ready.append(Answer.of(result, arrived))
        self._outstanding.answered(index)

    def _resend(self, opened: messages.Opened, frames: list[bytes]) -> None:
        """Send again what the service does not have."""
        for frame in frames:
            self.send_raw(frame)

    def _reply(self, reply: messages.Downstream | None) -> None:
        first = self._opened is None
        match reply:
            case messages.Opened():
                self._opened = reply
                self.credits, lost = self._outstanding.granted(reply)
                self._resend(reply, lost)
            case messages.Moved():
                self._move(reply)
            case messages.Credit():
                self.credits += reply.credits
            case messages.Closed():
                self.closed = reply
                self._ended = self._ended or reply.reason or "closed"
            case messages.Refused(field="follow") if first and not self.request.follow:
                self.request = replace(self.request, follow=True)
                self.send_raw(messages.encode(self.request))
            case messages.Refused():
                kind = "for good" if first else self._outstanding.refused(reply)
                if kind == "for good":
                    self.refused.append(reply)
                    if reply.index >= 0 and (self.on_error or reply.field not in NORMAL):
                        self._refusals.append(reply)
                elif kind == "unknown":
                    self._ended = self._ended or "unknown"
            case messages.Probed():
                self.clock.take(reply)
            case messages.Described():  # after a restart its results may be elsewhere
                self._topic.connect(reachable(reply.results, self.endpoint))
            case _:
                pass

    def _ask(self) -> None:
        """Ask the service what it has of the session, and a fleet where it lives."""
        answered = self._outstanding.asked(time.monotonic())
        again = replace(self.request, resume=True, begin=False, answered=answered)
        self.send_raw(messages.encode(again))
        if self._front is None:
            self.send_raw(messages.encode(messages.Describe()))
        else:
            self._front.send(messages.encode(again))

    def _move(self, moved: messages.Moved) -> None:
        """Go to the server of a fleet that has the session; it is opened or resumed there once it
        has seen the subscription."""
        address = reachable(moved.ingest, self.endpoint)
        if address == self._at:
            self._outstanding.not_yet()
            return
        self._at = address
        self._watched.close()
        if self._front is None:
            self._front = self._dealer
        else:
            self._poller.unregister(self._dealer)
            self._dealer.close()
        self._dealer = connect(self._context, zmq.DEALER, self._at, self._key)
        self._watched = Watched(self._dealer)
        self._poller.register(self._dealer, zmq.POLLIN)
        self._topic.move(reachable(moved.results, self.endpoint))
        self._confirmed, self._moved = False, True
        if moved.down_ns:
            self.notices.append(f"moved: {self._at}, down {moved.down_ns / 1e9:.2f} s")

    def _report_refusals(self) -> None:
        """Raise the oldest refusal that was not reported, or hand all of them to ``on_error``."""
        while self._refusals:
            error = refusal(self.endpoint, self._refusals.pop(0))
            if self.on_error is None:
                raise error
            self.on_error(error)

    def _report(self, *, sending: bool = False) -> None:
        """Raise what is wrong, or hand it to ``on_error``; sending after the end is wrong twice."""
        self._report_refusals()
        try:
            self._check()
        except ServiceError as error:
            if self.on_error is None or (sending and self._end_reported):
                raise
            if not self._end_reported:
                self._end_reported = isinstance(error, SessionEndedError)
                self.on_error(error)

    def _check(self, *, raise_ended: bool = False) -> None:
        """Raise if the session has ended or waits for too long; ask if answers may be lost."""
        if self._ended and (raise_ended or not self._ready):
            raise SessionEndedError(self._where, reason=self._ended)
        now, waiting = time.monotonic(), self._outstanding
        heard = f"last heard of it {now - waiting.heard:.1f} s ago"
        match waiting.check(now):
            case "ask":
                self._ask()
            case "unreachable":
                raise ServiceUnreachableError(
                    f"service at {self.endpoint}",
                    expected=f"an answer within {self.patience:g} s",
                    got=f"none ({heard})",
                )
            case "unanswered":
                last = f" (last refusal: {self.refused[-1]})" if self.refused else ""
                raise AnswerTimeoutError(
                    self._where,
                    expected=f"an answer for bin {waiting.first} within {self.patience:g} s",
                    got=f"none, though the service can be reached{last}",
                )
            case "wait":
                pass
