"""Load on a running service: many concurrent sessions, open loop, with deliberate faults.

Send times are fixed beforehand and latency counts from them, so a service (or this generator) that
falls behind shows it (no coordinated omission). ``load_schedule`` says what is sent and when.
"""

from __future__ import annotations

import select
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import zmq

from ilqr_clients.connection import Closing, available
from ilqr_clients.known_offset import KnownClock
from ilqr_clients.listener import PATIENCE_S
from ilqr_clients.load_schedule import Faults, LoadSize, completed, counts_of, schedule
from ilqr_clients.sdk import Model, ServiceClient, connect, model_of, reachable
from ilqr_vae.errors import ServiceError, ServiceUnreachableError
from ilqr_vae.protocol import messages
from ilqr_vae.protocol.clock import Clock, ClockTrack, MonotonicClock


class Stamps(NamedTuple):
    """Times of one bin, nanoseconds: ``intended``, ``sent`` and ``arrived`` by this client's clock,
    the others by the service's."""

    intended: int
    sent: int
    received: int
    solve_start: int
    solve_end: int
    published: int
    arrived: int


@dataclass(slots=True)
class LoadResult:
    """Results of a load.

    Attributes:
        sent: bins sent, without duplicates.
        first, revised: answers of revision 0, and later ones.
        repeated: answers received more than once.
        unanswered: sent bins without any answer.
        shed: first answers of bins that the service shed under overload.
        seconds: from the first send to the end of the last session.
        cpu_us: processor time of this process per bin sent, microseconds.
        stamps: of the bins after the warm-up whose first answer used their data.
        late_ms: delay of each send after the warm-up.
        clock: comparison of the two clocks, with the uncertainty of times across them.
        statuses: of the newest revision of each bin; ``first_statuses`` of the first.
        refused: number of refusals by field.
        notices: number of notices by their first word.
        results: session, then index, to the newest revision (with ``keep`` only).
        sends: session to the indices that were sent.
    """

    sent: int = 0
    first: int = 0
    revised: int = 0
    repeated: int = 0
    unanswered: int = 0
    shed: int = 0
    seconds: float = 0.0
    cpu_us: float = 0.0
    stamps: list[Stamps] = field(default_factory=list[Stamps])
    late_ms: list[float] = field(default_factory=list[float])
    clock: ClockTrack | None = None
    statuses: Counter[str] = field(default_factory=Counter[str])
    first_statuses: Counter[str] = field(default_factory=Counter[str])
    refused: Counter[str] = field(default_factory=Counter[str])
    notices: Counter[str] = field(default_factory=Counter[str])
    results: dict[str, dict[int, messages.Result]] = field(
        default_factory=dict[str, dict[int, messages.Result]]
    )
    sends: dict[str, set[int]] = field(default_factory=dict[str, set[int]])

    def latency_ms(self) -> dict[str, list[float]]:
        """Stages of each stamped bin, milliseconds.

        ``latency`` is from the intended send to the arrival of the answer. ``wire_in`` (sent to
        received), ``wire_out`` (published to arrived) and ``beside_solve`` (intended send to
        published, without the solve) cross from one clock to the other.
        """
        stamps = np.array(self.stamps, dtype=np.int64).reshape(-1, len(Stamps._fields)).T
        intended, sent, received, solve_start, solve_end, published, arrived = stamps
        solve = solve_end - solve_start
        stages = {
            "latency": arrived - intended,
            "queue": solve_start - received,
            "solve": solve,
            "publish": published - solve_end,
        }
        if self.clock is not None:
            there, back = self.clock.offset_ns(sent), self.clock.offset_ns(arrived)
            stages["wire_in"] = received - sent - there
            stages["wire_out"] = arrived + back - published
            stages["beside_solve"] = published - intended - there - solve
        return {name: (spent / 1e6).tolist() for name, spent in stages.items()}

    def to_json(self) -> dict[str, Any]:
        """Return the outcome ready for ``json.dumps``: counts, and quantiles of the times."""
        clock = self.clock
        bound = {} if clock is None else {"clock_uncertainty": clock.uncertainty_ns / 1e6}
        steps = len({s.solve_start for s in self.stamps})
        stages = {f"{name}_ms": quantiles(spent) for name, spent in self.latency_ms().items()}
        crossing = {"wire_in_ms", "wire_out_ms", "beside_solve_ms"}
        return {
            "sent": self.sent,
            "answered": self.first,
            "revised": self.revised,
            "repeated": self.repeated,
            "unanswered": self.unanswered,
            "shed": self.shed,
            "seconds": round(self.seconds, 3),
            "answers_per_second": round(self.first / self.seconds, 1) if self.seconds else 0.0,
            **{name: q | bound if name in crossing else q for name, q in stages.items()},
            "sent_late_ms": quantiles(self.late_ms),
            "bins_per_step": round(len(self.stamps) / steps, 2) if steps else 0.0,
            "generator_cpu_us": round(self.cpu_us, 1),
            "clock": None if clock is None else clock.to_json(),
            "statuses": dict(self.statuses),
            "first_statuses": dict(self.first_statuses),
            "refused": dict(self.refused),
            "notices": dict(self.notices),
        }


def quantiles(values: list[float]) -> dict[str, float]:
    """Return n, p50, p90, p99, p99.9 and max; only n if ``values`` is empty."""
    if not values:
        return {"n": 0}
    ordered = np.sort(np.asarray(values))

    def at(q: float) -> float:
        return round(float(ordered[max(0, int(np.ceil(q * ordered.size)) - 1)]), 4)

    names = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999, "max": 1.0}
    return {"n": float(ordered.size)} | {name: at(q) for name, q in names.items()}


_ENDS = ("closed", "idle", "shutdown")


class Generator(Closing):
    """Opens sessions and runs a load on them.

    Args:
        endpoint: address of the service.
        load, faults: the schedule, see ``load_schedule``.
        prefix: prefix of the session names.
        keep: keep the newest answer of every bin in ``outcome.results``.
        timer: this client's clock; default the machine's.

    Raises:
        ServiceError: the service does not answer.
    """

    def __init__(
        self,
        endpoint: str,
        load: LoadSize,
        faults: Faults,
        *,
        prefix: str = "load",
        keep: bool = False,
        timer: Clock | None = None,
    ) -> None:
        self._timer: Clock = timer or MonotonicClock()
        self._endpoint = endpoint
        self.load, self.faults, self.keep = load, faults, keep
        self.outcome = LoadResult()
        self.names = [f"{prefix}-{k}" for k in range(load.sessions)]
        with ServiceClient(endpoint, timer=self._timer) as service:
            described = service.describe()
            self._before = service.clock()
        self._clock = KnownClock(self._timer, self._before)
        self.model: Model = model_of(described)
        self._completed = completed(load, faults, self.model.bin_width)
        units = len(self.model.counted)
        self._counts = [
            [messages.pack(row, "<u2") for row in counts_of(load, faults, k, units)]
            for k in range(load.sessions)
        ]
        self._context: zmq.Context[Any] = zmq.Context()
        self._sub = connect(self._context, zmq.SUB, reachable(described.results, endpoint))
        self._dealer = connect(self._context, zmq.DEALER, endpoint)
        self._descriptors = [int(s.getsockopt(zmq.FD)) for s in (self._sub, self._dealer)]
        self._source_start_ns: int | None = None
        self._sent: dict[tuple[str, int], tuple[int, int]] = {}  # intended, actual
        self._newest: dict[tuple[str, int], int] = {}
        self._status: dict[tuple[str, int], str] = {}
        self._opened: set[str] = set()
        self._seen: set[str] = set()
        self._closed: set[str] = set()
        self._ended: set[str] = set()
        self._silent_since: float | None = None

    def open(self) -> None:
        """Open all sessions and wait until all are open. Raises ServiceError."""
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

    def run(self, plan: Sequence[tuple[int, int, int]] | None = None) -> LoadResult:
        """Send every bin at its time, receive the answers, then close the sessions.

        Args:
            plan: (nanoseconds from now, session, index) in order of time; default ``schedule``.

        Raises:
            ServiceUnreachableError: the service stopped answering.
        """
        out, began, cpu = self.outcome, self._timer.now_ns(), time.process_time()
        self.send(plan or schedule(self.load, self.faults, self.model.bin_width))
        self._finish()
        out.seconds = (self._timer.now_ns() - began) / 1e9
        out.cpu_us = (time.process_time() - cpu) * 1e6 / max(1, out.sent)
        with ServiceClient(self._endpoint, timer=self._timer) as service:
            out.clock = ClockTrack(self._before, service.clock())
        out.unanswered = self._unanswered()
        out.statuses.update(self._status.values())
        return out

    def send(self, plan: Sequence[tuple[int, int, int]], *, settle: float = 0.0) -> None:
        """Send a plan's bins at their times, counted from now; see ``run``.

        Source times count from the first plan sent, by index.

        Args:
            settle: seconds to wait afterwards for the answers still due.

        Raises:
            ServiceUnreachableError: the service stopped answering.
        """
        now_ns = self._timer.now_ns
        began = now_ns() + 50_000_000
        if self._source_start_ns is None:
            self._source_start_ns = began
        for at, k, index in plan:
            intended = began + at
            if now_ns() >= intended:  # behind the schedule: receive all the same
                self._take(0.0)
            while (left := intended - now_ns()) > 0:
                self._take(left / 1e9)
            name = self.names[k]
            sent = now_ns()
            message = messages.Bin(
                session=name,
                index=index,
                source_ns=self._source_start_ns + int(self._completed[k, index]),
                counts=self._counts[k][index],
                clock=self._clock.stated(sent),
            )
            if (probe := self._clock.probe(sent)) is not None:
                self._dealer.send(messages.encode(probe))
            self._dealer.send(messages.encode(message))
            self._expect_answer()
            if (name, index) not in self._sent:
                self.outcome.sent += 1
                self._sent[name, index] = intended, sent
                self.outcome.sends.setdefault(name, set()).add(index)
            if index >= self.load.warm_up:
                self.outcome.late_ms.append((sent - intended) / 1e6)
        end = time.monotonic() + settle
        while settle and self._unanswered() and time.monotonic() < end:
            self._take(0.05)

    def _expect_answer(self) -> None:
        """Raise ServiceUnreachableError if bins have gone unanswered for too long."""
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
        return sum(key not in self._newest for key in self._sent)

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
        """Receive what has arrived, or wait up to ``wait`` seconds for something.

        It blocks instead of spinning, to leave the cores to the service under load."""
        # ZeroMQ's descriptors signal new messages only after all earlier ones were read.
        if not self._emptied() and wait > 0:
            select.select(self._descriptors, [], [], wait)
            self._emptied()

    def _emptied(self) -> bool:
        """Receive everything that has arrived; return whether there was anything."""
        # Each message is stamped as it leaves the socket, before any is decoded.
        came = [(self._timer.now_ns(), frames[-1]) for frames in available(self._sub)]
        for arrived, frame in came:
            self._published(messages.decode_published(frame), arrived)
        replies = list(available(self._dealer))
        for frames in replies:
            self._replied(messages.decode_downstream(frames[-1]))
        if came or replies:
            self._silent_since = None
        return bool(came or replies)

    def _replied(self, reply: messages.Downstream | None) -> None:
        match reply:
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

    def _published(self, message: messages.Published | None, arrived: int) -> None:
        if message is None or isinstance(message, messages.Event | messages.Detail):
            return
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
        out.shed += message.solver == "shed"
        if message.status != "missing" and key in self._sent and key[1] >= self.load.warm_up:
            stages = message.received_ns, message.solve_start_ns, message.solve_end_ns
            out.stamps.append(Stamps(*self._sent[key], *stages, message.published_ns, arrived))
