"""The state of a running service: sessions, latency, newest decodes."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import zmq
from rich.text import Text

from ilqr_clients.answer import Answer
from ilqr_clients.connection import Closing
from ilqr_clients.replay_view import status_text
from ilqr_clients.sdk import ServiceClient, connect, model_of, reachable
from ilqr_vae.protocol import messages
from ilqr_vae.protocol.clock import Clock, ClockOffset, ClockTrack
from ilqr_vae.report.data import plain
from ilqr_vae.report.table import (
    WIDTH,
    Section,
    Table,
    lines_of,
    lines_of_table,
    milliseconds,
    named,
    number,
    wrapped,
)
from ilqr_vae.terminal import visible


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceState:
    """A snapshot of a service.

    Attributes:
        newest: newest answer of each session that has one, by name.
        live: names of sessions whose newest answer was published while the monitor listened. For
            others it was sent on subscription, so its arrival is not a transit time.
        names, units: names and units of the kinematics.
        rates: bins answered per second since the previous snapshot, by session.
        clock: offset of the service's clock from this client's.
    """

    endpoint: str
    model: str
    ready: bool
    device: str
    names: tuple[str, ...]
    units: tuple[str, ...]
    sessions: tuple[messages.SessionInfo, ...]
    newest: dict[str, Answer] = field(default_factory=dict[str, Answer])
    live: frozenset[str] = frozenset()
    rates: dict[str, float] = field(default_factory=dict[str, float])
    clock: ClockOffset

    def to_json(self) -> dict[str, Any]:
        """Return the state for ``json.dumps``; times in milliseconds, None if not known."""
        shown = {
            "endpoint": self.endpoint,
            "model": self.model,
            "ready": self.ready,
            "device": self.device,
            "clock": ClockTrack(self.clock, self.clock).to_json(),
            "sessions": [self._session(info) for info in self.sessions],
        }
        return plain(shown)

    def _session(self, info: messages.SessionInfo) -> dict[str, Any]:
        answer = self.newest.get(info.session)
        newest = None
        live = info.session in self.live
        if answer is not None:
            newest = {
                "index": answer.index,
                "status": answer.status,
                "wire_in": _crossing(answer.wire_in_ns()),
                "wire_out": _crossing(answer.wire_out_ns(self.clock)) if live else None,
                "kinematics": dict(zip(self.names, answer.kinematics.tolist(), strict=False)),
                "kinematics_std": dict(
                    zip(self.names, answer.kinematics_std.tolist(), strict=False)
                ),
            }
        return {
            "session": info.session,
            "epoch": info.epoch,
            "bins": info.bins,
            "next_index": info.next_index,
            "deadline_ms": info.deadline_ns / 1e6,
            "statuses": info.statuses,
            "solve_p50_ms": info.solve_p50_ns / 1e6,
            "solve_p99_ms": info.solve_p99_ns / 1e6,
            "bits_per_spike": info.bits_per_spike,
            "idle_ms": info.idle_ns / 1e6,
            "flagged": list(info.flagged),
            "newest": newest,
        }


def _crossing(took: tuple[int, int] | None) -> dict[str, float] | None:
    """Return a latency across the clocks, and its uncertainty, in milliseconds."""
    return None if took is None else {"ms": took[0] / 1e6, "uncertainty_ms": took[1] / 1e6}


class Monitor(Closing):
    """Requests the sessions of a service and listens to their results.

    Args:
        timer: this client's clock; default the machine's.

    Raises:
        ServiceError: the service does not answer within ``timeout`` seconds.
    """

    def __init__(self, endpoint: str, *, timeout: float = 3.0, timer: Clock | None = None) -> None:
        self._service = ServiceClient(endpoint, timeout=timeout, timer=timer)
        self._context: zmq.Context[Any] = zmq.Context()
        self._listened: dict[str, int] = {}  # start of the listening, by the service's clock
        self._live: set[str] = set()
        self._newest: dict[str, Answer] = {}
        self._bins: dict[str, int] = {}
        self._asked = time.monotonic()
        try:
            described = self._service.describe()
            self._model = model_of(described)
            self._sub = connect(
                self._context, zmq.SUB, reachable(described.results, self._service.endpoint)
            )
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the sockets."""
        self._service.close()
        self._context.destroy(linger=0)

    def listen(self, seconds: float) -> None:
        """Receive results for ``seconds``; only the newest of each session is decoded."""
        end = time.monotonic() + seconds
        latest: dict[bytes, tuple[bytes, int]] = {}
        while True:
            left = end - time.monotonic()
            if not self._sub.poll(max(0, int(left * 1e3))):
                break
            topic, frame = self._sub.recv_multipart()
            latest[topic] = (frame, self._service.timer.now_ns())
            if left <= 0:
                break
        for frame, arrived in latest.values():
            message = messages.decode_published(frame)
            if isinstance(message, messages.Result):
                self._newest[message.session] = Answer.of(message, arrived)
                if message.published_ns >= self._listened.get(message.session, 0):
                    self._live.add(message.session)

    def snapshot(self) -> ServiceState:
        """Request the state now. Raises ServiceError if the service has gone away."""
        described = self._service.describe()
        sessions = self._service.sessions()
        now = time.monotonic()
        passed, self._asked = max(1e-9, now - self._asked), now
        clock = self._service.clock(probes=5)
        names = {info.session for info in sessions}
        for name in names - self._listened.keys():
            self._listened[name] = self._service.timer.now_ns() + clock.offset_ns
            self._sub.setsockopt(zmq.SUBSCRIBE, messages.topic(name))
        for name in self._listened.keys() - names:
            self._sub.setsockopt(zmq.UNSUBSCRIBE, messages.topic(name))
            del self._listened[name]
            self._newest.pop(name, None)
            self._live.discard(name)
        rates = {
            info.session: max(0, info.bins - self._bins[info.session]) / passed
            for info in sessions
            if info.session in self._bins
        }
        self._bins = {info.session: info.bins for info in sessions}
        return ServiceState(
            endpoint=self._service.endpoint,
            model=described.model,
            ready=described.ready,
            device=described.device,
            names=self._model.kinematic_names,
            units=self._model.kinematic_units,
            sessions=sessions,
            newest=dict(self._newest),
            live=frozenset(self._live),
            rates=rates,
            clock=clock,
        )


def _ways(answer: Answer, clock: ClockOffset, *, live: bool) -> str:
    """Return the transit times of the newest answer, each with its uncertainty."""
    parts: list[str] = []
    out = answer.wire_out_ns(clock) if live else None
    for name, way in (("in", answer.wire_in_ns()), ("out", out)):
        if way is not None:
            bound = f" ± {milliseconds(way[1] / 1e6)}" if way[1] else ""
            parts.append(f"{name} {milliseconds(way[0] / 1e6)}{bound} ms")
    return ", ".join(parts)


def view(snapshot: ServiceState, width: int = WIDTH, height: int | None = None) -> Text:
    """Return a snapshot for a terminal; its height limits the number of sessions."""
    ready = ("ready", "green") if snapshot.ready else ("not ready", "yellow")
    where = visible(f"model {snapshot.model} on {snapshot.device}")
    lines = [Text.assemble((visible(snapshot.endpoint), "bold"), "  ", ready, f"  {where}")]
    lines += [Text(part) for part in wrapped(f"clocks: {_clocks(snapshot)}", width)]
    sessions = sorted(snapshot.sessions, key=lambda s: s.session)
    if not sessions:
        return Text("\n").join([*lines, Text("no open sessions", style="dim")])
    table = [Text(line) for line in lines_of_table(_table(snapshot, sessions), width)]
    details = [_details(snapshot, info, width) for info in sessions]
    room = len(details) if height is None else 0
    left = 0 if height is None else height - len(lines) - len(table) - 2
    while room < len(details) and len(details[room]) <= left:
        left -= len(details[room])
        room += 1
    more = len(details) - room
    lines += table
    lines += [line for each in details[:room] for line in each]
    if more:
        lines.append(Text(f"{more} more sessions have no room here", style="dim"))
    return Text("\n").join(lines[:height])


def _clocks(snapshot: ServiceState) -> str:
    return str(ClockTrack(snapshot.clock, snapshot.clock))


def _table(snapshot: ServiceState, sessions: list[messages.SessionInfo]) -> Table:
    rows = [
        (
            visible(f"{info.session}" + (f" #{info.epoch}" if info.epoch else "")),
            str(info.bins),
            number(snapshot.rates.get(info.session), 1),
            milliseconds(info.solve_p50_ns / 1e6),
            milliseconds(info.solve_p99_ns / 1e6),
            number(info.bits_per_spike),
        )
        for info in sessions
    ]
    columns = ("session", "bins", "bins/s", "p50 (ms)", "p99 (ms)", "bits/spike")
    return Table("Sessions", "", columns, tuple(rows))


def _details(snapshot: ServiceState, info: messages.SessionInfo, width: int) -> list[Text]:
    """Return further information on a session."""
    answer = snapshot.newest.get(info.session)
    rows: list[tuple[str, str, str]] = []
    if answer is not None and answer.kinematics.size:
        names = (named(n, u) for n, u in zip(snapshot.names, snapshot.units, strict=False))
        each = zip(names, answer.kinematics, answer.kinematics_std, strict=False)
        rows.append(("decodes", "; ".join(f"{n} {v:+.3f} ± {s:.3f}" for n, v, s in each), ""))
    if answer is not None:
        ways = _ways(answer, snapshot.clock, live=info.session in snapshot.live)
        if ways:
            rows.append(("newest answer", ways, "dim"))
    if info.flagged:
        rows.append(("masked", ", ".join(info.flagged), "yellow"))
    made = [Text(visible(info.session), style="bold")]
    made.append(Text("  statuses  ") + status_text(info.statuses))
    for name, text, style in rows:
        section = Section("", ((name, visible(text)),))
        made += [Text(line, style=style) for line in lines_of((section,), width)[1:]]
    return made
