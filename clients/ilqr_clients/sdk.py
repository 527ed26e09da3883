"""Client SDK: talk to a running service over ZeroMQ.

>>> with ServiceClient("tcp://127.0.0.1:5555") as service:          # doctest: +SKIP
...     described = service.describe()
...     with service.open("rat-7", units=names, bin_width=0.05) as session:
...         print(session.step(0, counts, timeout=1.0).kinematics)

All waits are bounded. Errors of a running service form one tree; their messages name the endpoint:

=========================  ========================================================================
``ServiceError``           base of those below; also: an address that is none
``ServiceUnreachableError``  no connection, or no word from the service for as long as was allowed
``AnswerTimeoutError``     the service is there, and a bin was not answered in time
``SessionEndedError``      the session is not open any more; ``reason``: closed, idle, shutdown,
                           restarted or unknown
``RequestRefusedError``    a request or a bin was refused; ``field``, ``expected`` and ``got``
=========================  ========================================================================

Errors of the caller, e.g. counts of a wrong shape, are ``ShapeError``. All derive from
``ilqr_vae.errors.IlqrVaeError``.

A ``ServiceClient`` makes requests, a ``Session`` sends bins and receives answers, and a
``Listener`` reads the answers of a session with another feeder. A ZeroMQ socket belongs to one
thread, so create these objects in the thread that uses them. ``ilqr_clients.aio`` has the same for
asyncio.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import zmq

from ilqr_clients.connection import Closing, Model, connect, model_of, reachable, refusal
from ilqr_clients.exact import finite, instance, mapping, names, switch, text, whole
from ilqr_clients.known_offset import KnownClock
from ilqr_clients.listener import PATIENCE_S, Listener
from ilqr_clients.session import OnError, Session
from ilqr_clients.spike_session import SpikeSession
from ilqr_vae.errors import ServiceError, ServiceUnreachableError, ShapeError
from ilqr_vae.protocol import messages
from ilqr_vae.protocol.clock import Clock, ClockOffset, MonotonicClock, offset_of
from ilqr_vae.protocol.keys import ClientKey

__all__ = [
    "Listener",
    "Model",
    "ServiceClient",
    "Session",
    "connect",
    "model_of",
    "reachable",
    "refusal",
]

Reply = TypeVar(
    "Reply",
    messages.Described,
    messages.SessionList,
    messages.Probed,
    messages.ModelList,
    messages.Noted,
)
_AGAIN_S = 0.5


class ServiceClient(Closing):
    """Requests about a service.

    Args:
        endpoint: the service's address, e.g. ``tcp://127.0.0.1:5555``.
        timeout: seconds to wait for a reply to a request.
        key: key for a service that requires keys; default: the one that ``ILQR_VAE_KEY`` names.
        timer: this client's clock; default: the machine's.

    Raises:
        ServiceError: the address is not one.
        ShapeError: an argument is of the wrong kind; so do all methods.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        timeout: float = 3.0,
        key: ClientKey | None = None,
        timer: Clock | None = None,
    ) -> None:
        self.endpoint = text("endpoint", endpoint)
        self.timer: Clock = timer or MonotonicClock()
        self.timeout = finite("timeout", timeout, 0.0)
        self.key = None if key is None else instance("key", key, ClientKey, "a ClientKey")
        self._source, self._events = secrets.token_hex(8), 0
        self._offset = KnownClock(self.timer, None)
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
        limit = self.timeout if timeout is None else finite("timeout", timeout, 0.0)
        self._socket.send(messages.encode(request))
        end = time.monotonic() + limit
        while (left := end - time.monotonic()) > 0:
            if not self._socket.poll(max(1, int(left * 1e3))):
                continue
            reply = messages.decode_downstream(self._socket.recv())
            if isinstance(reply, kind):
                return reply
            if isinstance(reply, messages.Refused):
                ready = (reply.field, reply.expected) != ("service", "ready")
                if ready or time.monotonic() + _AGAIN_S > end:
                    raise refusal(self.endpoint, reply)
                time.sleep(_AGAIN_S)  # a fleet whose servers are busy, or are being taken up
                self._socket.send(messages.encode(request))
        # A late reply must not be taken for the answer to the next request.
        self._socket.close()
        self._socket = connect(self._context, zmq.DEALER, self.endpoint, self.key)
        raise ServiceUnreachableError(
            f"service at {self.endpoint}",
            expected=f"an answer within {limit:g} s",
            got="none (is it running, and is this its address?)",
        )

    def describe(self) -> messages.Described:
        """Return a description of the service. Raises ServiceError, ProtocolError."""
        return self._ask(messages.Describe(), messages.Described)

    def sessions(self) -> tuple[messages.SessionInfo, ...]:
        """Return the open sessions. Raises ServiceError, ProtocolError."""
        return self._ask(messages.Sessions(), messages.SessionList).sessions

    def models(self) -> tuple[messages.ModelInfo, ...]:
        """Return the served models and their shadows. Raises ServiceError, ProtocolError."""
        return self._ask(messages.Models(), messages.ModelList).models

    def load(
        self, path: str, *, slot: str = "", shadow: bool = False, timeout: float = 120.0
    ) -> tuple[messages.ModelInfo, ...]:
        """Load a model into a slot, as its shadow or to serve at once; return the models.

        Raises:
            ServiceError: the request was refused (the served model does not change), or there was
                no reply in ``timeout`` seconds.
        """
        request = messages.Load(
            path=text("path", path), slot=text("slot", slot), shadow=switch("shadow", shadow)
        )
        return self._ask(request, messages.ModelList, timeout).models

    def swap(self, slot: str = "") -> tuple[messages.ModelInfo, ...]:
        """Serve the shadow of a slot. Raises ServiceError."""
        return self._ask(messages.Swap(slot=text("slot", slot)), messages.ModelList).models

    def roll_back(self, slot: str = "") -> tuple[messages.ModelInfo, ...]:
        """Drop the shadow, or serve the previous model. Raises ServiceError."""
        return self._ask(messages.Rollback(slot=text("slot", slot)), messages.ModelList).models

    def clock(self, probes: int = 15) -> ClockOffset:
        """Measure the offset of the service's clock from this client's. Raises ServiceError."""
        taken: list[tuple[int, int, int]] = []
        same = bool(self.timer.name)
        for _ in range(max(1, whole("probes", probes))):
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
        lag: int = 0,
        resume: bool = False,
        answered: int = -1,
        model: str = "",
        patience: float = PATIENCE_S,
        origin_ns: int | None = None,
        abstain: float = 0.0,
        hear_events: bool = False,
        hear_details: bool = False,
        on_error: OnError | None = None,
    ) -> Session:
        """Open a session and its results.

        Args:
            session: its name, 1-64 of [A-Za-z0-9._-].
            units: names of the model's units, in the order of the counts.
            bin_width: bin width of the model in seconds.
            deadline: seconds from the arrival of a bin to its answer; default: the bin width.
            epoch: run number; default: one more than that of the open session of this name, else 0.
            anytime: whether the deadline cuts a solve short.
            clocked: whether bins that do not arrive in time are answered as missing at once. If
                false, a missing bin is noticed only when a later one arrives.
            grace: seconds to wait for a bin beyond its expected time; 0 is half a bin width.
            watch_units: mask units that are dead, saturated or drifting.
            lag: answer each bin again, with a higher revision, after this many later bins, from
                which it is then also decoded; the model states the maximum.
            resume: continue an open session of this name (``Session.opened.next_index``), or else
                start it.
            answered: newest index whose answer the caller has; the service sends later ones again.
            model: name of a slot or id of a model; default: the first slot.
            patience: seconds to wait for a due answer; see ``Session``.
            origin_ns: for spikes; see ``open_spikes``.
            abstain: for a model with classes: an answer names no class (``Answer.class_name``) if
                the largest probability is lower.
            hear_events: keep the session's events in ``Session.events``.
            hear_details: keep the counts used and the inferred inputs in ``Session.details``.
            on_error: called with errors of the service instead of raising them in ``send`` and
                ``receive``; see ``Session``.

        Raises:
            ServiceUnreachableError: no answer.
            RequestRefusedError: the session was refused; the field says why.
            ShapeError: an option is not a number, or not in its range.
        """
        width, patience = finite("bin_width", bin_width, 0.0), finite("patience", patience, 0.0)
        session, units = text("session", session), names("units", units)
        options: dict[str, Any] = {
            "anytime": switch("anytime", anytime),
            "clocked": switch("clocked", clocked),
            "watch_units": switch("watch_units", watch_units),
            "resume": switch("resume", resume),
            "lag": whole("lag", lag),
            "answered": whole("answered", answered, -1),
            "model": text("model", model),
            "abstain": finite("abstain", abstain),
            "deadline_ns": round(finite("deadline", width if deadline is None else deadline) * 1e9),
            "grace_ns": round(finite("grace", grace) * 1e9),
            "origin_ns": None if origin_ns is None else whole("origin_ns", origin_ns, -(2**63)),
        }
        epoch = None if epoch is None else whole("epoch", epoch)
        heard = switch("hear_events", hear_events), switch("hear_details", hear_details)
        if not (on_error is None or callable(on_error)):
            expected = "something to call, or None"
            raise ShapeError("on_error", expected=expected, got=repr(on_error))
        results = reachable(self.describe().results, self.endpoint)
        if epoch is None:
            known = [s.epoch for s in self.sessions() if s.session == session]
            epoch = max((e if resume else e + 1 for e in known), default=0)
        request = messages.Open(
            protocol=messages.PROTOCOL,
            session=session,
            units=units,
            bin_width_ns=round(width * 1e9),
            epoch=epoch,
            **options,
        )
        kind = Session if origin_ns is None else SpikeSession
        return kind(
            self.endpoint,
            results,
            request,
            timeout=self.timeout,
            patience=patience,
            key=self.key,
            timer=self.timer,
            clock=self.clock(),
            hear_events=heard[0],
            hear_details=heard[1],
            on_error=on_error,
        )

    def listen(self, session: str, *, wait: bool = False, patience: float = PATIENCE_S) -> Listener:
        """Read the results of a session with another feeder.

        Args:
            session: its name.
            wait: whether to wait for a session that is not open yet.
            patience: seconds without a message from the service before an exception.

        Raises:
            ServiceUnreachableError: no answer.
            ServiceError: no session of that name is open.
        """
        patience, wait = finite("patience", patience, 0.0), switch("wait", wait)
        session = text("session", session)
        results = reachable(self.describe().results, self.endpoint)
        names = sorted(s.session for s in self.sessions())
        if not wait and session not in names:
            raise ServiceError(
                f"session at {self.endpoint}",
                expected=f"one that is open ({', '.join(names) or 'none is'})",
                got=repr(session),
            )
        return Listener(
            self.endpoint,
            results,
            session,
            timeout=self.timeout,
            patience=patience,
            wait=wait,
            key=self.key,
            timer=self.timer,
        )

    def open_spikes(self, session: str, *, origin_ns: int, **options: Any) -> SpikeSession:
        """Open a session that is fed with spikes, which the service bins.

        Args:
            session: its name.
            origin_ns: start of bin 0, by the clock of the spikes.
            options: as for ``open``. With ``clocked`` a bin is answered as missing if its feeder is
                silent for ``grace`` after the end of the bin.

        Raises:
            As ``open``.
        """
        opened = self.open(session, origin_ns=origin_ns, **options)
        assert isinstance(opened, SpikeSession)
        return opened

    def event(
        self,
        session: str,
        name: str,
        payload: Mapping[str, Any] | None = None,
        *,
        time_ns: int | None = None,
        token: str = "",
    ) -> messages.Noted:
        """Add an event of the experiment to an open session, and wait until it is taken.

        Args:
            session: name of the session.
            name: name of the event, 1-64 characters. ``trial_start`` and ``trial_stop`` become
                trials in an export, with the fields of their payloads as columns.
            payload: numbers, text, lists and maps, at most 64 KiB.
            time_ns: time of the event, by this client's clock; default: now.
            token: token of the session, if it belongs to another user.

        Returns:
            When the service accepted it, and the next bin at that moment.

        Raises:
            ServiceError: there was no reply, or the event was refused; the field says why.
        """
        session, name, token = text("session", session), text("name", name), text("token", token)
        fields = mapping("payload", payload)
        at = None if time_ns is None else whole("time_ns", time_ns, -(2**63))
        if self._offset.offset is None:
            self._offset.offset = self.clock()
        now = self.timer.now_ns()
        event = messages.Event(
            session=session,
            name=name,
            time_ns=now if at is None else at,
            payload=fields,
            source=self._source,
            index=self._events,
            clock=self._offset.stated(now),
            token=token,
        )
        self._events += 1
        try:
            return self._ask(event, messages.Noted)
        except ServiceUnreachableError:  # perhaps the reply was lost; an event is not added twice
            return self._ask(event, messages.Noted)
