"""Load on a running service: many sessions at once, open-loop, with faults on purpose.

Send times are fixed beforehand and latency counts from them, so a service (or this generator) that
falls behind shows it (no coordinated omission). What is sent, and what goes wrong, is ``plan``'s.
"""

from __future__ import annotations

import select
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import zmq

from ilqr_clients.known_offset import KnownClock
from ilqr_clients.load_schedule import Faults, Load, counts_of, schedule, source_offset
from ilqr_clients.sdk import Model, ServiceClient, connect, model_of, reachable
from ilqr_clients.session import PATIENCE_S
from ilqr_vae.errors import ServiceError, ServiceUnreachableError
from ilqr_vae.protocol import messages
from ilqr_vae.protocol.clock import Clock, ClockTrack, MonotonicClock


@dataclass(slots=True)
class Outcome:
    """What came of it.

    Attributes:
        sent: bins sent, without repeats.
        first, revised: answers of revision 0, and later ones.
        repeated: answers that came twice under one index and revision.
        unanswered: sent bins without any answer.
        latency_ms: intended send to arrival here, of the bins that were answered first with data;
            by this clock alone.
        wire_in_ms, wire_out_ms: its parts that go from one clock to the other: sent to received,
            published to arrived.
        clock: how the two clocks were compared; the parts are no better known.
        statuses: of the newest revision of each bin; ``first_statuses`` of the first.
        refused: by field.
        notices: by first word.
        results: by session, index: the newest revision (kept where asked for).
    """

    sent: int = 0
    first: int = 0
    revised: int = 0
    repeated: int = 0
    unanswered: int = 0
    seconds: float = 0.0
    latency_ms: list[float] = field(default_factory=list[float])
    feeder_ms: list[float] = field(default_factory=list[float])
    wire_in_ms: list[float] = field(default_factory=list[float])
    wire_out_ms: list[float] = field(default_factory=list[float])
    clock: ClockTrack | None = None
    statuses: Counter[str] = field(default_factory=Counter[str])
    first_statuses: Counter[str] = field(default_factory=Counter[str])
    refused: Counter[str] = field(default_factory=Counter[str])
    notices: Counter[str] = field(default_factory=Counter[str])
    results: dict[str, dict[int, messages.Result]] = field(
        default_factory=dict[str, dict[int, messages.Result]]
    )
    sends: dict[str, set[int]] = field(default_factory=dict[str, set[int]])

    def to_json(self) -> dict[str, Any]:
        """Ready for ``json.dumps``."""
        clock = self.clock
        bound = {} if clock is None else {"clock_uncertainty": clock.uncertainty_ns / 1e6}
        return {
            "sent": self.sent,
            "answered": self.first,
            "revised": self.revised,
            "repeated": self.repeated,
            "unanswered": self.unanswered,
            "seconds": round(self.seconds, 3),
            "answers_per_second": round(self.first / self.seconds, 1) if self.seconds else 0.0,
            "latency_ms": quantiles(self.latency_ms),
            "feeder_ms": quantiles(self.feeder_ms),
            "wire_in_ms": quantiles(self.wire_in_ms) | bound,
            "wire_out_ms": quantiles(self.wire_out_ms) | bound,
            "clock": None if clock is None else clock.to_json(),
            "statuses": dict(self.statuses),
            "first_statuses": dict(self.first_statuses),
            "refused": dict(self.refused),
            "notices": dict(self.notices),
        }


def quantiles(values: list[float]) -> dict[str, float]:
    """n, p50, p90, p99, p99.9 and max; n alone where there is nothing."""
    if not values:
        return {"n": 0}
    held = np.sort(np.asarray(values))

    def at(q: float) -> float:
        return round(float(held[max(0, int(np.ceil(q * held.size)) - 1)]), 4)

    names = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999, "max": 1.0}
    return {"n": float(held.size)} | {name: at(q) for name, q in names.items()}


_ENDS = ("closed", "idle", "shutdown")


def _drained(socket: zmq.Socket[bytes]) -> Iterator[bytes]:
    """The last frames of all messages that have come."""
    while True:
        try:
            yield socket.recv_multipart(zmq.NOBLOCK)[-1]
        except zmq.Again:
            return


class Generator:
    """Opens the sessions, and runs a load on them.

    Args:
        endpoint: the service's.
        load, faults: how much, and what goes wrong.
        prefix: of the session names.
        keep: keep every answer.
        timer: this client's clock; default the machine's.

    Raises:
        ServiceError: no answer, or a session is refused.
    """

    def __init__(
        self,
        endpoint: str,
        load: Load,
        faults: Faults,
        *,
        prefix: str = "load",
        keep: bool = False,
        timer: Clock | None = None,
    ) -> None:
        self._timer: Clock = timer or MonotonicClock()
        self._endpoint = endpoint
        self.load, self.faults, self.keep = load, faults, keep
        self.outcome = Outcome()
        self.names = [f"{prefix}-{k}" for k in range(load.sessions)]
        with ServiceClient(endpoint, timer=self._timer) as service:
            described = service.describe()
            self._before = service.clock()
        self._clock = KnownClock(self._timer, self._before)
        self.model: Model = model_of(described)
        self._context: zmq.Context[Any] = zmq.Context()
        self._sub = connect(self._context, zmq.SUB, reachable(described.results, endpoint))
        self._dealer = connect(self._context, zmq.DEALER, endpoint)
        self._doors = [int(s.getsockopt(zmq.FD)) for s in (self._sub, self._dealer)]
        self._source_start_ns: int | None = None
        self._intended: dict[tuple[str, int], int] = {}
        self._sent: dict[tuple[str, int], int] = {}
        self._crossings: list[tuple[int, int, int, int]] = []
        self._newest: dict[tuple[str, int], int] = {}
        self._status: dict[tuple[str, int], str] = {}
        self._opened: set[str] = set()
        self._seen: set[str] = set()
        self._closed: set[str] = set()
        self._ended: set[str] = set()
        self._silent_since: float | None = None

    def open(self) -> None:
        """Open all sessions and wait for that. Raises ServiceError."""
        for name in self.names:
            self._sub.setsockopt(zmq.SUBSCRIBE, messages.topic(name))
        for name in self.names:
            request = messages.Open(
                protocol=messages.PROTOCOL,
                session=name,
                units=self.model.unit_names,
                bin_width_ns=round(self.model.bin_width * 1e9),
                deadline_ns=round((self.load.deadline or self.model.bin_width) * 1e9),
                clocked=self.load.clocked,
                anytime=self.load.anytime,
            )
            self._dealer.send(messages.encode(request))
        end = time.monotonic() + 10.0 + 0.1 * len(self.names)
        while not (len(self._opened) == len(self._seen) == len(self.names)):
            if time.monotonic() > end or self.outcome.refused:
                raise ServiceError(
                    "sessions",
                    expected=f"{len(self.names)} open",
                    got=f"{len(self._opened)}, refused: {dict(self.outcome.refused)}",
                )
            self._take(0.1)

    def run(self, plan: list[tuple[int, int, int]] | None = None) -> Outcome:
        """Send everything at its time, and take what comes; then close the sessions.

        Args:
            plan: as of ``schedule``, instead of the load's own.
        """
        began = self._timer.now_ns()
        self.send(plan or schedule(self.load, self.faults, self.model.bin_width))
        self._finish()
        self.outcome.seconds = (self._timer.now_ns() - began) / 1e9
        self._across()
        self.outcome.unanswered = self._unanswered()
        self.outcome.statuses.update(self._status.values())
        return self.outcome

    def send(self, plan: list[tuple[int, int, int]], *, settle: float = 0.0) -> None:
        """Send a plan's bins at their times, counted from now.

        The source times of all plans count from the first, by index.

        Args:
            settle: then wait until all that was sent is answered, or so many seconds are over.

        Raises:
            ServiceUnreachableError: nothing comes back any more.
        """
        now_ns = self._timer.now_ns
        began = now_ns() + 50_000_000
        if self._source_start_ns is None:
            self._source_start_ns = began
        source_start_ns = self._source_start_ns
        for at, k, index in plan:
            intended = began + at
            self._take(0.0)
            while (left := intended - now_ns()) > 0:
                self._take(left / 1e9)
            name = self.names[k]
            sent = now_ns()
            message = messages.Bin(
                session=name,
                index=index,
                source_ns=source_start_ns
                + source_offset(self.load, k, index, self.model.bin_width),
                counts=self._counts[k][index],
                clock=self._clock.stated(sent),
            )
            if (probe := self._clock.probe(sent)) is not None:
                self._dealer.send(messages.encode(probe))
            self._dealer.send(messages.encode(message))
            self._expect_answer()
            if (name, index) not in self._intended:
                self.outcome.sent += 1
                self._intended[name, index] = intended
                self._sent[name, index] = sent
                self.outcome.sends.setdefault(name, set()).add(index)
            self.outcome.feeder_ms.append((now_ns() - intended) / 1e6)
        end = time.monotonic() + settle
        while settle and self._unanswered() and time.monotonic() < end:
            self._take(0.05)

    def _expect_answer(self) -> None:
        """Raises ServiceUnreachableError if nothing has come since bins were sent long ago."""
        now = time.monotonic()
        if self._silent_since is None:
            self._silent_since = now
        elif now - self._silent_since > max(PATIENCE_S, self.load.patience):
            raise ServiceUnreachableError(
                f"service at {self._endpoint}",
                expected=f"an answer within {max(PATIENCE_S, self.load.patience):g} s",
                got="none",
            )

    def _unanswered(self) -> int:
        return sum(key not in self._newest for key in self._intended)

    @cached_property
    def _counts(self) -> list[list[messages.Array]]:
        """By session and index."""
        units = len(self.model.unit_names)
        return [
            [messages.pack(row, "<u2") for row in counts_of(self.load, self.faults, k, units)]
            for k in range(len(self.names))
        ]

    def _across(self) -> None:
        """What went from one clock to the other, by the offsets before and after."""
        with ServiceClient(self._endpoint, timer=self._timer) as service:
            clock = self.outcome.clock = ClockTrack(self._before, service.clock())
        sent, received, published, arrived = (
            np.array(self._crossings, dtype=np.int64).reshape(-1, 4).T
        )
        there, here = clock.offset_ns(sent), clock.offset_ns(arrived)
        self.outcome.wire_in_ms = ((received - sent - there) / 1e6).tolist()
        self.outcome.wire_out_ms = ((arrived + here - published) / 1e6).tolist()

    def _finish(self) -> None:
        for name in self.names:
            self._dealer.send(messages.encode(messages.Close(session=name)))
        end = time.monotonic() + self.load.patience
        # the notice comes after the last answer, on the same socket
        while min(len(self._closed), len(self._ended)) < len(self.names):
            if time.monotonic() > end:
                break
            self._take(0.05)

    def close(self) -> None:
        """Close the sockets."""
        self._context.destroy(linger=0)

    def _take(self, wait: float) -> None:
        """Take what has come; where nothing has, wait for it, in seconds. Idle, not spinning: what
        is loaded shall have the cores."""
        # When all was taken, and only then, more makes a door readable.
        if not self._emptied() and wait > 0:
            select.select(self._doors, [], [], wait)
            self._emptied()

    def _emptied(self) -> bool:
        """Whether anything was there to take."""
        # Each is stamped as it comes off the socket, before any is looked at.
        came = [(self._timer.now_ns(), frame) for frame in _drained(self._sub)]
        for arrived, frame in came:
            self._published(messages.decode_published(frame), arrived)
        replies = list(_drained(self._dealer))
        for frame in replies:
            match messages.decode_downstream(frame):
                case messages.Opened() as opened:
                    self._opened.add(opened.session)
                case messages.Refused() as refused:
                    self.outcome.refused[refused.field] += 1
                case messages.Closed() as closed:
                    self._closed.add(closed.session)
                case messages.Probed() as probed:
                    self._clock.take(probed)
                case _:
                    pass
        if came or replies:
            self._silent_since = None
        return bool(came or replies)

    def _published(self, message: messages.Published, arrived: int) -> None:
        out = self.outcome
        self._seen.add(message.session)
        if isinstance(message, messages.Notice):
            kind = message.what.split(":")[0].split()[0]
            out.notices[kind] += 1
            if kind in _ENDS:
                self._ended.add(message.session)
            return
        key = (message.session, message.index)
        before = self._newest.get(key, -1)
        if message.revision <= before:
            out.repeated += 1
            return
        self._newest[key] = message.revision
        self._status[key] = message.status
        if self.keep:
            out.results.setdefault(message.session, {})[message.index] = message
        if message.revision:
            out.revised += 1
            return
        out.first += 1
        out.first_statuses[message.status] += 1
        if message.status != "missing" and key in self._intended:
            out.latency_ms.append((arrived - self._intended[key]) / 1e6)
            self._crossings.append(
                (self._sent[key], message.received_ns, message.published_ns, arrived)
            )
