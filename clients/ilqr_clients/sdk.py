"""Client SDK: talk to a running service over ZeroMQ.

>>> with ServiceClient("tcp://127.0.0.1:5555") as service:          # doctest: +SKIP
...     described = service.describe()
...     with service.open("rat-7", units=names, bin_width=0.05) as session:
...         session.send(0, counts)
...         for answer in session.receive(timeout=1.0): print(answer.kinematics)

A ``ServiceClient`` asks about the service; a ``Session`` feeds bins and takes results. Neither is
to be shared between threads (a ZeroMQ socket belongs to one thread); make one in each. Every wait
ends: after ``timeout`` a ServiceError names the endpoint.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, TypeVar

import zmq
from numpy.typing import ArrayLike

from ilqr_clients.answer import Answer
from ilqr_clients.bins import counts_of, mask_of
from ilqr_clients.closing import Closing
from ilqr_clients.connection import Model, connect, model_of, reachable, refusal
from ilqr_clients.known_offset import KnownClock
from ilqr_vae.errors import ServiceError
from ilqr_vae.protocol import messages
from ilqr_vae.protocol.clock import Clock, ClockOffset, MonotonicClock, offset_of
from ilqr_vae.protocol.keys import ClientKey

__all__ = ["Model", "ServiceClient", "Session", "connect", "model_of", "reachable", "refusal"]

Reply = TypeVar(
    "Reply", messages.Described, messages.SessionList, messages.Probed, messages.ModelList
)


class ServiceClient(Closing):
    """Requests about a service.

    Args:
        endpoint: the service's address, e.g. ``tcp://127.0.0.1:5555``.
        timeout: seconds any one request may take.
        key: of a service that has keys; default what ``ILQR_VAE_KEY`` names.
        timer: this client's clock; default the machine's.

    Raises:
        ServiceError: the address is not one.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        timeout: float = 3.0,
        key: ClientKey | None = None,
        timer: Clock | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.timer: Clock = timer or MonotonicClock()
        self.timeout = timeout
        self.key = key
        self._context: zmq.Context[Any] = zmq.Context()
        try:
            self._socket = connect(self._context, zmq.DEALER, endpoint, key)
        except ServiceError:
            self._context.term()
            raise

    def close(self) -> None:
        """Close the socket. Sessions opened from here stay open."""
        self._context.destroy(linger=0)

    def _ask(
        self, request: messages.Message, kind: type[Reply], timeout: float | None = None
    ) -> Reply:
        self._socket.send(messages.encode(request))
        limit = self.timeout if timeout is None else timeout
        end = time.monotonic() + limit
        while (left := end - time.monotonic()) > 0:
            if not self._socket.poll(max(1, int(left * 1e3))):
                continue
            reply = messages.decode_downstream(self._socket.recv())
            if isinstance(reply, kind):
                return reply
            if isinstance(reply, messages.Refused):
                raise refusal(self.endpoint, reply)
        # A reply that still comes must not answer the next question.
        self._socket.close()
        self._socket = connect(self._context, zmq.DEALER, self.endpoint, self.key)
        raise ServiceError(
            f"service at {self.endpoint}",
            expected=f"an answer within {limit:g} s",
            got="none (is it running, and is this its address?)",
        )

    def describe(self) -> messages.Described:
        """What is served. Raises ServiceError (no answer, refused), ProtocolError."""
        return self._ask(messages.Describe(), messages.Described)

    def sessions(self) -> tuple[messages.SessionInfo, ...]:
        """The open sessions. Raises ServiceError (no answer, refused), ProtocolError."""
        return self._ask(messages.Sessions(), messages.SessionList).sessions

    def models(self) -> tuple[messages.ModelInfo, ...]:
        """What serves, and what runs beside it. Raises ServiceError, ProtocolError."""
        return self._ask(messages.Models(), messages.ModelList).models

    def load(
        self, path: str, *, slot: str = "", shadow: bool = False, timeout: float = 120.0
    ) -> tuple[messages.ModelInfo, ...]:
        """Load a model into a slot, as its shadow or to serve at once; the models after it.

        Raises:
            ServiceError: refused (what serves goes on serving), or no answer in ``timeout`` s.
        """
        request = messages.Load(path=path, slot=slot, shadow=shadow)
        return self._ask(request, messages.ModelList, timeout).models

    def swap(self, slot: str = "") -> tuple[messages.ModelInfo, ...]:
        """Serve a slot's shadow. Raises ServiceError (no answer, refused)."""
        return self._ask(messages.Swap(slot=slot), messages.ModelList).models

    def roll_back(self, slot: str = "") -> tuple[messages.ModelInfo, ...]:
        """Drop the shadow, else serve what served before. Raises ServiceError."""
        return self._ask(messages.Rollback(slot=slot), messages.ModelList).models

    def clock(self, probes: int = 15) -> ClockOffset:
        """The service's clock against this client's. Raises ServiceError (no answer)."""
        taken: list[tuple[int, int, int]] = []
        same = bool(self.timer.name)
        for _ in range(max(1, probes)):
            before = self.timer.now_ns()
            probed = self._ask(messages.Probe(client_ns=before), messages.Probed)
            taken.append((before, probed.service_ns, self.timer.now_ns()))
            same = same and probed.clock == self.timer.name
        return offset_of(taken, same=same)

    def open(
        self,
        session: str,
        *,
        units: Sequence[str],
        bin_width: float,
        deadline: float | None = None,
        epoch: int | None = None,
        anytime: bool = False,
        clocked: bool = False,
        grace: float = 0.0,
        watch_units: bool = False,
        resume: bool = False,
        answered: int = -1,
        model: str = "",
    ) -> Session:
        """Open a session and its results.

        Args:
            session: its name, 1-64 of [A-Za-z0-9._-].
            units: unit names in the order of the counts; the model's.
            bin_width: seconds; the model's.
            deadline: seconds from a bin's arrival to its answer; default the bin width.
            epoch: run number; default one more than the open session of that name, else 0.
            anytime: let the deadline cut a solve short.
            clocked: answer bins that do not come in time as missing, at once.
            grace: seconds after its time that a bin is waited for; 0 is half a bin width.
            watch_units: mask units that are dead, saturated or drifting.
            resume: go on with the open session of that name where it stands
                (``Session.opened.next_index``), else begin it.
            answered: newest index whose answer is held; later ones still kept come again.
            model: a slot's name or model id; default the service's first.

        Raises:
            ServiceError: no answer, or refused (the field says which).
        """
        results = reachable(self.describe().results, self.endpoint)
        if epoch is None:
            known = [s.epoch for s in self.sessions() if s.session == session]
            epoch = max((e if resume else e + 1 for e in known), default=0)
        request = messages.Open(
            protocol=messages.PROTOCOL,
            session=session,
            units=tuple(units),
            bin_width_ns=round(bin_width * 1e9),
            epoch=epoch,
            deadline_ns=round((bin_width if deadline is None else deadline) * 1e9),
            anytime=anytime,
            clocked=clocked,
            grace_ns=round(grace * 1e9),
            watch_units=watch_units,
            resume=resume,
            answered=answered,
            model=model,
        )
        return Session(
            self.endpoint,
            results,
            request,
            timeout=self.timeout,
            key=self.key,
            timer=self.timer,
            clock=self.clock(),
        )


class Session(Closing):
    """One stream of bins and its results; made by ``ServiceClient.open``.

    Attributes:
        opened: what the service said: model, latents, kinematic names and units, horizon.
        credits: bins the service would take now without falling behind.
        clock: the service's against this client's.
        notices: what the service published about the session, oldest first.
        refused: refusals of single messages, oldest first.
    """

    def __init__(
        self,
        endpoint: str,
        results: str,
        request: messages.Open,
        *,
        timeout: float = 3.0,
        key: ClientKey | None = None,
        timer: Clock | None = None,
        clock: ClockOffset | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.request = request
        self.timer: Clock = timer or MonotonicClock()
        self.clock = KnownClock(self.timer, clock)
        self.timeout = timeout
        self.credits = 0
        self.notices: list[str] = []
        self.refused: list[messages.Refused] = []
        self.closed: messages.Closed | None = None
        self._opened: messages.Opened | None = None
        self._confirmed = False
        self._early: list[Answer] = []
        self._context: zmq.Context[Any] = zmq.Context()
        try:
            self._sub = connect(self._context, zmq.SUB, results, key)
            self._sub.setsockopt(zmq.SUBSCRIBE, messages.topic(request.session))
            self._dealer = connect(self._context, zmq.DEALER, endpoint, key)
            self._poller = zmq.Poller()
            self._poller.register(self._sub, zmq.POLLIN)
            self._poller.register(self._dealer, zmq.POLLIN)
            self._open()
        except BaseException:
            self._context.destroy(linger=0)
            raise

    def _open(self) -> None:
        """Wait until the service has seen the subscription (it answers each), then open, and wait
        for its word on both ways: nothing it publishes from then on, or again, is missed."""
        end = time.monotonic() + self.timeout
        before = -1
        while self._opened is None or not self._begun(before):
            if self._confirmed and before < 0:
                self._dealer.send(messages.encode(self.request))
                before = len(self.notices)
            left = end - time.monotonic()
            if left <= 0:
                what = "opened" if self._confirmed else "the session's results"
                raise ServiceError(
                    f"service at {self.endpoint}",
                    expected=f"{what} within {self.timeout:g} s",
                    got="none",
                )
            self._early = self.receive(left)  # with what was early already
            if self.refused:
                raise refusal(self.endpoint, self.refused[0])

    def _begun(self, before: int) -> bool:
        return any(what.startswith(("opened", "resumed")) for what in self.notices[before:])

    @property
    def opened(self) -> messages.Opened:
        assert self._opened is not None
        return self._opened

    def send(
        self,
        index: int,
        counts: ArrayLike,
        *,
        mask: ArrayLike | None = None,
        source_ns: int | None = None,
    ) -> int:
        """Send one bin; never waits.

        Args:
            index: the bin's index, rising from 0; an index left out is a missing bin.
            counts: (N,) spikes of each unit, whole numbers >= 0.
            mask: bool (N,), True where the unit was observed; None means all.
            source_ns: when the bin was complete, or was meant to be sent, by this client's clock;
                default now. It must not fall from one index to a higher one.

        Returns:
            When it was handed to the socket, ns of this client's clock.

        Raises:
            ShapeError: not one count (or mask) per unit, counts that are not whole numbers in
                [0, 65535], or a mask of others than True and False.
        """
        n_units = len(self.request.units)
        packed = counts_of(counts, n_units)
        observed = None if mask is None else mask_of(mask, n_units)
        now = self.timer.now_ns()
        message = messages.Bin(
            session=self.request.session,
            epoch=self.request.epoch,
            index=index,
            source_ns=now if source_ns is None else source_ns,
            counts=packed,
            mask=observed,
            clock=self.clock.stated(now),
        )
        if (probe := self.clock.probe(now)) is not None:
            self.send_raw(messages.encode(probe))
        self.send_raw(messages.encode(message))
        self.credits -= 1
        return now

    def send_raw(self, frame: bytes) -> None:
        """Send one frame as it is (for tests of what a service does with nonsense)."""
        self._dealer.send(frame)

    def receive(self, timeout: float = 0.0) -> list[Answer]:
        """Take everything that has come, waiting up to ``timeout`` seconds for the first.

        Returns:
            Results of this epoch in order of arrival; empty where none came. Credits, notices and
            refusals are kept on the session.

        Raises:
            ProtocolError: a message that is not the protocol's.
        """
        answers, self._early = self._early, []
        if answers and self._opened is not None and self._confirmed:
            timeout = 0.0
        if not self._poller.poll(max(0, int(timeout * 1e3))):
            return answers
        while True:
            try:
                frames = self._sub.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            arrived = self.timer.now_ns()
            message = messages.decode_published(frames[-1])
            self._confirmed = True  # whatever it is, the service has seen the subscription
            if message.epoch != self.request.epoch:
                continue
            if isinstance(message, messages.Result):
                answers.append(Answer.of(message, arrived))
            else:
                self.notices.append(message.what)
        while True:
            try:
                frame = self._dealer.recv(zmq.NOBLOCK)
            except zmq.Again:
                break
            self._reply(messages.decode_downstream(frame))
        return answers

    def _reply(self, reply: messages.Downstream) -> None:
        match reply:
            case messages.Opened():
                self._opened = reply
                self.credits += reply.credits
            case messages.Credit():
                self.credits += reply.credits
            case messages.Closed():
                self.closed = reply
            case messages.Refused():
                self.refused.append(reply)
            case messages.Probed():
                self.clock.take(reply)
            case _:
                pass

    def abandon(self) -> None:
        """Close the sockets and leave the session open, as a feeder that dies does."""
        self._context.destroy(linger=0)

    def close(self) -> None:
        """Tell the service, wait up to a second for its word, and close the sockets."""
        if self._context.closed:
            return
        try:
            self.send_raw(
                messages.encode(
                    messages.Close(session=self.request.session, epoch=self.request.epoch)
                )
            )
            end = time.monotonic() + min(1.0, self.timeout)
            while self.closed is None and (left := end - time.monotonic()) > 0:
                self.receive(left)
        finally:
            self._context.destroy(linger=0)
