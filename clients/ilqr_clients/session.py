"""One stream of bins and their answers.

Every wait has an end. While an answer is due and none comes, the session asks the service for the
answers it has not received, and sends the bins that the service has not received again: so it
survives a connection that breaks, and a service that is restarted with its journal. After
``patience`` seconds without progress an exception says what is wrong.
"""

from __future__ import annotations

import operator
import secrets
import time
from typing import Any, SupportsIndex

import numpy as np
import zmq
from msgspec.structs import replace
from numpy.typing import ArrayLike

from ilqr_clients.answer import Answer
from ilqr_clients.connection import Closing, connect, reachable, refusal
from ilqr_clients.exact import exactly, whole
from ilqr_clients.known_offset import KnownClock
from ilqr_clients.outstanding import REMEMBERED, Outstanding
from ilqr_vae.errors import (
    AnswerTimeoutError,
    RequestRefusedError,
    ServiceUnreachableError,
    SessionEndedError,
)
from ilqr_vae.protocol import messages
from ilqr_vae.protocol.clock import Clock, ClockOffset, MonotonicClock
from ilqr_vae.protocol.keys import ClientKey
from ilqr_vae.protocol.messages import MAX_COUNT

PATIENCE_S = 15.0
"""How long a session waits for an answer that is due, unless it is told otherwise."""

_ENDS = ("closed", "idle", "shutdown", "restarted")


class Session(Closing):
    """One stream of bins and its answers; made by ``ServiceClient.open``.

    Args:
        endpoint, results: the service's addresses.
        request: what to open.
        timeout: seconds that opening may take.
        patience: seconds without progress, while answers are due and no bin is sent, after which
            ``send``, ``receive`` and ``step`` raise; twelve times as long while bins are sent.
        key: of a service that has keys.
        timer: this client's clock; default the machine's.
        clock: the service's against it.
        hear_events: subscribe to the session's events too.

    Attributes:
        opened: what the service said: model, latents, kinematic names and units, horizon.
        credits: bins the service would take now without falling behind.
        notices: what the service published about the session, oldest first.
        refused: refusals of single messages, oldest first.
        events: of the experiment, as published, oldest first; if they are heard.

    Raises:
        ServiceUnreachableError: no answer within ``timeout``.
        RequestRefusedError: the service does not open the session, or does not know an option; the
            field says which.
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
    ) -> None:
        self.endpoint = endpoint
        self.request = replace(request, token=request.token or secrets.token_hex(16))
        self.timer: Clock = timer or MonotonicClock()
        self.clock = KnownClock(self.timer, clock)
        self.timeout, self.patience = timeout, patience
        self.credits = 0
        self.notices: list[str] = []
        self.refused: list[messages.Refused] = []
        self.events: list[messages.Event] = []
        self.closed: messages.Closed | None = None
        self._opened: messages.Opened | None = None
        self._confirmed = False
        self._ended = ""
        self._results = {results}
        self._ready: list[Answer] = []
        self._revisions: dict[int, int] = {}
        self._outstanding = Outstanding(patience, request.answered, time.monotonic())
        self._context: zmq.Context[Any] = zmq.Context()
        try:
            self._sub = connect(self._context, zmq.SUB, results, key)
            self._sub.setsockopt(zmq.SUBSCRIBE, messages.topic(request.session))
            if hear_events:
                self._sub.setsockopt(zmq.SUBSCRIBE, messages.event_topic(request.session))
            self._dealer = connect(self._context, zmq.DEALER, endpoint, key)
            self._poller = zmq.Poller()
            for socket in (self._sub, self._dealer):
                self._poller.register(socket, zmq.POLLIN)
            self._open()
        except BaseException:
            self._context.destroy(linger=0)
            raise

    def _open(self) -> None:
        """Wait until the service has seen the subscription (it answers each), then open, and wait
        for the answers on both sockets: nothing published from then on is missed."""
        end = time.monotonic() + self.timeout
        before = -1
        while self._opened is None or not self._begun(before):
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
                expected=f"a service that knows this option, at {self.endpoint}",
                got="one that ignored it",
            )

    def _begun(self, before: int) -> bool:
        return any(what.startswith(("opened", "resumed")) for what in self.notices[before:])

    @property
    def opened(self) -> messages.Opened:
        assert self._opened is not None
        return self._opened

    def send(
        self,
        index: SupportsIndex,
        counts: ArrayLike,
        *,
        mask: ArrayLike | None = None,
        source_ns: int | None = None,
    ) -> int:
        """Send one bin; never waits.

        Args:
            index: the bin's index, rising from 0; an index left out is a missing bin.
            counts: (N,) spikes of each unit, whole numbers in [0, 65535].
            mask: bool (N,), True where the unit was observed; None means all.
            source_ns: when the bin was complete, or was meant to be sent, by this client's clock;
                default now. It must not fall from one index to a higher one.

        Returns:
            When it was handed to the socket, ns of this client's clock.

        Raises:
            ShapeError: an index or counts that are no whole numbers in their range, not one count
                (or mask) per unit, or a mask of others than True and False.
            SessionEndedError: the session is not open any more.
            ServiceUnreachableError, AnswerTimeoutError: answers are due, and none came for long.
        """
        n_units, number = len(self.request.units), whole("index", index)
        exact = exactly("counts", counts, n_units, "<u2", f"whole numbers in [0, {MAX_COUNT}]")
        observed = None
        if mask is not None:
            observed = exactly("mask", mask, n_units, np.bool_, "True or False")
        self._take(0.0)
        self._check()
        now = self.timer.now_ns()
        message = messages.Bin(
            session=self.request.session,
            epoch=self.request.epoch,
            index=number,
            source_ns=now if source_ns is None else operator.index(source_ns),
            counts=messages.pack(exact, "<u2"),
            mask=None if observed is None else messages.pack(observed, "u1"),
            clock=self.clock.stated(now),
            token=self.request.token,
        )
        if (probe := self.clock.probe(now)) is not None:
            self.send_raw(messages.encode(probe))
        frame = messages.encode(message)
        self.send_raw(frame)
        self._outstanding.sent(number, frame, time.monotonic())
        self.credits -= 1
        return now

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
            self._take(0.0 if self._ready else min(left, 0.25))
            if self._ready:
                answers, self._ready = self._ready, []
                return answers
            self._check()
            if left <= 0:
                return []

    def step(
        self,
        index: SupportsIndex,
        counts: ArrayLike,
        timeout: float | None = None,
        *,
        mask: ArrayLike | None = None,
        source_ns: int | None = None,
    ) -> Answer:
        """Send one bin and return its answer. Other answers are left for ``receive``.

        Args:
            index, counts, mask, source_ns: as for ``send``.
            timeout: seconds to wait; default the session's ``patience``.

        Raises:
            RequestRefusedError: the bin was refused; the field says why.
            AnswerTimeoutError: no answer within ``timeout``.
        """
        number = whole("index", index)
        limit = self.patience if timeout is None else timeout
        earlier = len(self.refused)
        self.send(number, counts, mask=mask, source_ns=source_ns)
        end = time.monotonic() + limit
        while True:
            for k, answer in enumerate(self._ready):
                if answer.index == number:
                    del self._ready[: max(0, k - REMEMBERED)]
                    return self._ready.pop(min(k, REMEMBERED))
            for refused in self.refused[earlier:]:
                if refused.index == number:
                    raise refusal(self.endpoint, refused)
            self._check(raise_ended=True)
            if (left := end - time.monotonic()) <= 0:
                raise AnswerTimeoutError(
                    f"session {self.request.session!r} at {self.endpoint}",
                    expected=f"an answer for bin {number} within {limit:g} s",
                    got="none",
                )
            self._take(min(left, 0.25))

    def abandon(self) -> None:
        """Close the sockets and leave the session open, as a feeder that dies does."""
        self._context.destroy(linger=0)

    def close(self) -> None:
        """Tell the service, wait up to a second for its word, and close the sockets."""
        if self._context.closed:
            return
        request = self.request
        close = messages.Close(session=request.session, epoch=request.epoch, token=request.token)
        try:
            self.send_raw(messages.encode(close))
            end = time.monotonic() + min(1.0, self.timeout)
            while self.closed is None and (left := end - time.monotonic()) > 0:
                self._take(left)
        finally:
            self._context.destroy(linger=0)

    # ---- what comes ----------------------------------------------------------------------------

    def _take(self, timeout: float) -> None:
        """Take everything that has come, waiting up to ``timeout`` seconds for the first."""
        if not self._poller.poll(max(0, int(timeout * 1e3))):
            return
        self._outstanding.heard = time.monotonic()
        while True:
            try:
                frames = self._sub.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            arrived = self.timer.now_ns()
            message = messages.decode_published(frames[-1])
            self._confirmed = True  # whatever it is, the service has seen the subscription
            if message is None or message.epoch != self.request.epoch:
                continue
            if isinstance(message, messages.Event):
                self.events.append(message)
                continue
            if isinstance(message, messages.Result):
                self._result(message, arrived)
                continue
            self.notices.append(message.what)
            if self._opened is not None and message.what.startswith(_ENDS):
                self._ended = message.what
        while True:
            try:
                frame = self._dealer.recv(zmq.NOBLOCK)
            except zmq.Again:
                break
            self._reply(messages.decode_downstream(frame))

    def _result(self, result: messages.Result, arrived: int) -> None:
        index = result.index
        known = self._revisions.get(index, 0 if index <= self.request.answered else -1)
        if result.revision <= known:
            return  # published again
        self._revisions[index] = result.revision
        if len(self._revisions) > REMEMBERED:
            del self._revisions[next(iter(self._revisions))]
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
            case messages.Credit():
                self.credits += reply.credits
            case messages.Closed():
                self.closed = reply
                self._ended = self._ended or reply.reason or "closed"
            case messages.Refused():
                kind = "for good" if first else self._outstanding.refused(reply)
                if kind == "for good":
                    self.refused.append(reply)
                elif kind == "unknown":
                    self._ended = self._ended or "unknown"
            case messages.Probed():
                self.clock.take(reply)
            case messages.Described():  # after a restart its results may be elsewhere
                address = reachable(reply.results, self.endpoint)
                if address not in self._results:
                    self._results.add(address)
                    self._sub.connect(address)
            case _:
                pass

    def _check(self, *, raise_ended: bool = False) -> None:
        """Raise if the session has ended or waits for too long; ask if answers may be lost."""
        where = f"session {self.request.session!r} at {self.endpoint}"
        if self._ended and (raise_ended or not self._ready):
            raise SessionEndedError(where, reason=self._ended)
        now, waiting = time.monotonic(), self._outstanding
        heard = f"last heard of it {now - waiting.heard:.1f} s ago"
        match waiting.check(now):
            case "ask":
                answered = waiting.asked(now)
                again = replace(self.request, resume=True, begin=False, answered=answered)
                self.send_raw(messages.encode(again))
                self.send_raw(messages.encode(messages.Describe()))
            case "unreachable":
                raise ServiceUnreachableError(
                    f"service at {self.endpoint}",
                    expected=f"an answer within {self.patience:g} s",
                    got=f"none ({heard})",
                )
            case "unanswered":
                last = f" (last refusal: {self.refused[-1]})" if self.refused else ""
                raise AnswerTimeoutError(
                    where,
                    expected=f"an answer for bin {waiting.first} within {self.patience:g} s",
                    got=f"none, though the service can be reached{last}",
                )
            case "wait":
                pass
