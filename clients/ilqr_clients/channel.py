"""The connection of a session to the service: opening, receiving, and recovery of losses.

All waits are bounded. While an answer is overdue, the session asks the service for the answers it
has not received, and sends bins again that the service has not received. So it survives a broken
connection, and a service that is restarted with its journal. After ``patience`` seconds without
progress an exception says what is wrong.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import Any

import zmq
from msgspec.structs import replace

from ilqr_clients.answer import Answer
from ilqr_clients.connection import Closing, Watched, available, connect, reachable, refusal
from ilqr_clients.exact import finite
from ilqr_clients.known_offset import KnownClock
from ilqr_clients.listener import PATIENCE_S, Topic
from ilqr_clients.outstanding import Outstanding
from ilqr_vae.errors import (
    AnswerTimeoutError,
    RequestRefusedError,
    ServiceError,
    ServiceUnreachableError,
    SessionEnd,
    SessionEndedError,
)
from ilqr_vae.protocol import messages
from ilqr_vae.protocol.clock import Clock, ClockOffset, MonotonicClock
from ilqr_vae.protocol.keys import ClientKey

NORMAL = ("credits", "late")
"""Fields of refusals that are normal in a stream."""

OnError = Callable[[ServiceError], None]
TURN_S = 0.25
"""Longest single wait; between waits a session checks for losses."""

_OPEN_AGAIN_S = 0.5
_LINGER_MS = 200


class Channel(Closing):
    """A session with the service, without the sending of data.

    Args:
        endpoint, results: the service's addresses.
        request: the message that opens the session.
        timeout: seconds to wait for the session to open.
        patience: seconds without progress, while answers are due and no bin is sent, after which
            ``send``, ``receive`` and ``step`` raise; twelve times as long while bins are sent.
        key: key for a service that requires keys.
        timer: this client's clock; default: the machine's.
        clock: offset of the service's clock from it.
        hear_events, hear_details: also subscribe to events and details of the session.
        on_error: called with errors of the service and each refused bin, instead of raising them in
            ``send`` and ``receive``, which then continue. Exceptions that it raises propagate.
            ``step`` always raises.

    Attributes:
        opened: reply of the service: model, latents, kinematic names and units, horizon.
        credits: number of bins that the service accepts now.
        notices: notices about the session, oldest first.
        refused: refusals of single messages, oldest first. Refusals of bins beyond the credits and
            of late bins are normal in a stream: ``send`` and ``receive`` do not raise them.
        events: events of the experiment, oldest first, if subscribed.
        details: details of the answers, oldest first, if subscribed; the caller empties it.

    Raises:
        ServiceUnreachableError: no answer within ``timeout``.
        RequestRefusedError: the service refuses the session; the field says why.
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
        self._not_ready: messages.Refused | None = None  # of a fleet
        self._open_next = 0.0
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
        """Subscribe, wait for the confirmation, open, and wait for replies on both sockets.

        The service confirms each subscription, so nothing published afterwards is missed.
        """
        end, before = time.monotonic() + self.timeout, -1
        begins = ("opened", "resumed")
        while self._opened is None or not any(n.startswith(begins) for n in self.notices[before:]):
            if self._moved:
                before, self._moved = -1, False
            if self._confirmed and before < 0:
                self.send_raw(messages.encode(self.request))
                before = len(self.notices)
            self._open_again(before >= 0)
            left = end - time.monotonic()
            if left <= 0:
                if self._not_ready is not None:
                    raise refusal(self.endpoint, self._not_ready)
                what = "opened" if self._confirmed else "the session's results"
                raise ServiceUnreachableError(
                    f"service at {self.endpoint}",
                    expected=f"{what} within {self.timeout:g} s",
                    got="none",
                )
            self._take(min(left, TURN_S))
            if self.refused:
                raise refusal(self.endpoint, self.refused[0])
        if self._opened.ignored:
            raise RequestRefusedError(
                f"open.{self._opened.ignored[0]}",
                expected="a service that knows this option",
                got="one that ignored it",
                endpoint=self.endpoint,
            )

    def _open_again(self, asked: bool) -> None:
        """Ask a fleet again where its session is to be: its server was not ready, or may have gone
        after the fleet had named it."""
        now = time.monotonic()
        if not (self.request.follow and asked):
            self._open_next = now + _OPEN_AGAIN_S
        elif now >= self._open_next:
            self._open_next = now + _OPEN_AGAIN_S
            if self._front is not None:
                self._front.send(messages.encode(self.request))
            if self._front is None or self._not_ready is not None:
                self.send_raw(messages.encode(self.request))

    @property
    def opened(self) -> messages.Opened:
        assert self._opened is not None
        return self._opened

    def send_raw(self, frame: bytes) -> None:
        """Send a frame unchanged."""
        self._dealer.send(frame)

    def receive(self, timeout: float = 0.0) -> list[Answer]:
        """Return available answers, waiting up to ``timeout`` seconds for the first.

        Answers are of this session's epoch, in order of arrival, without repetitions. Credits,
        notices and refusals are stored in the session.

        Raises:
            ProtocolError: a message is invalid.
            As ``send``, once all answers were taken.
        """
        end = time.monotonic() + finite("timeout", timeout)
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
        """Close the sockets and leave the session open, as if the feeder had died."""
        self._context.destroy(linger=0)

    def close(self) -> None:
        """Close the session, wait up to a second for the confirmation, and close the sockets.

        What was published before the session's end, such as events, is received.
        """
        if self._context.closed:
            return
        r, close = self.request, messages.Close
        try:
            self.send_raw(messages.encode(close(session=r.session, epoch=r.epoch, token=r.token)))
            end = time.monotonic() + min(1.0, self.timeout)
            while self._watched.connected and time.monotonic() < end:
                told = any(map(SessionEnd.of, self.notices)) or not self._confirmed
                if self.closed is not None and told:
                    break
                self._take(min(0.05, self.timeout))
        finally:
            self._context.destroy(linger=_LINGER_MS)

    # ---- what comes ----------------------------------------------------------------------------

    def _take(self, timeout: float) -> None:
        """Handle available messages, waiting up to ``timeout`` seconds for the first."""
        if not self._poller.poll(max(0, int(timeout * 1e3))):
            return
        self._outstanding.heard = time.monotonic()
        for message, arrived in self._topic.take():
            self._confirmed = True  # any message shows that the subscription is active
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
            if self._opened is not None and SessionEnd.of(message.what):
                self._ended = message.what
        for frames in available(self._dealer):
            self._reply(messages.decode_downstream(frames[-1]))
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
        """Send bins again that the service does not have."""
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
            case messages.Refused(field="service") if first and self.request.follow:
                self._not_ready = reply
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
            case messages.Described():  # after a restart the results address may differ
                self._topic.connect(reachable(reply.results, self.endpoint))
            case _:
                pass

    def _ask(self) -> None:
        """Ask the service for the state of the session, and a fleet for its server."""
        answered = self._outstanding.asked(time.monotonic())
        again = replace(self.request, resume=True, begin=False, answered=answered)
        self.send_raw(messages.encode(again))
        if self._front is None:
            self.send_raw(messages.encode(messages.Describe()))
        else:
            self._front.send(messages.encode(again))

    def _move(self, moved: messages.Moved) -> None:
        """Connect to the server of a fleet that has the session.

        The session is opened or resumed once the subscription is active.
        """
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
        """Raise the oldest unreported refusal, or pass all of them to ``on_error``."""
        while self._refusals:
            error = refusal(self.endpoint, self._refusals.pop(0))
            if self.on_error is None:
                raise error
            self.on_error(error)

    def _report(self, *, sending: bool = False) -> None:
        """Raise the error or pass it to ``on_error``; always raise when sending after the end."""
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
        """Raise if the session has ended or an answer is overdue; ask if answers may be lost."""
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
