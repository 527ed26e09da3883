"""What a running service is doing: its sessions, their latency, the newest decodes."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import zmq
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ilqr_clients.answer import Answer
from ilqr_clients.connection import Closing
from ilqr_clients.replay_view import status_text
from ilqr_clients.sdk import ServiceClient, connect, model_of, reachable
from ilqr_vae.protocol import messages
from ilqr_vae.protocol.clock import Clock, ClockOffset, ClockTrack
from ilqr_vae.report.data import plain
from ilqr_vae.report.table import number
from ilqr_vae.terminal import visible


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A service at one moment.

    Attributes:
        newest: the newest answer of each session that has one, by name.
        live: names of the sessions whose newest answer was published while the monitor listened.
            The others' was sent on subscription, so that its arrival says nothing of the way.
        names, units: of the kinematics.
        rates: bins answered per second since the snapshot before, by session.
        clock: the service's against this client's.
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
        """Ready for ``json.dumps``; times in milliseconds, None for what is not known."""
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
    """A latency from one clock to the other, and how far off it may be; milliseconds."""
    return None if took is None else {"ms": took[0] / 1e6, "uncertainty_ms": took[1] / 1e6}


class Monitor(Closing):
    """Asks a service for its sessions and listens to their results.

    Args:
        timer: this client's clock; default the machine's.

    Raises:
        ServiceError: the service does not answer within ``timeout`` seconds.
    """

    def __init__(self, endpoint: str, *, timeout: float = 3.0, timer: Clock | None = None) -> None:
        self._service = ServiceClient(endpoint, timeout=timeout, timer=timer)
        self._context: zmq.Context[Any] = zmq.Context()
        self._listened: dict[str, int] = {}  # since when, by the service's clock
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
        """Take results for ``seconds``; only the newest of each session is decoded."""
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

    def snapshot(self) -> Snapshot:
        """Ask now. Raises ServiceError where the service has gone away."""
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
        return Snapshot(
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
    """The newest answer's times to and from the service, each with its uncertainty."""
    parts: list[str] = []
    out = answer.wire_out_ns(clock) if live else None
    for name, way in (("in", answer.wire_in_ns()), ("out", out)):
        if way is not None:
            bound = f" ± {way[1] / 1e6:.2f}" if way[1] else ""
            parts.append(f"{name} {way[0] / 1e6:.2f}{bound} ms")
    return ", ".join(parts)


def view(snapshot: Snapshot) -> RenderableType:
    """A snapshot for the terminal."""
    head = Text.assemble(
        (visible(snapshot.endpoint), "bold"),
        ("  ready", "green") if snapshot.ready else ("  not ready", "yellow"),
        visible(f"  model {snapshot.model}  on {snapshot.device}  "),
        f"clocks: {ClockTrack(snapshot.clock, snapshot.clock)}",
    )
    if not snapshot.sessions:
        return Group(head, Text("no open sessions", style="dim"))
    table = Table(box=None, pad_edge=False, padding=(0, 2))
    numeric = ("bins", "bins/s", "p50 ms", "p99 ms", "bits/spike")
    for column in ("session", "bins", "bins/s", "statuses", "p50 ms", "p99 ms", "bits/spike"):
        table.add_column(column, justify="right" if column in numeric else "left")
    table.add_column("newest decode")
    more: list[Text] = []
    for info in sorted(snapshot.sessions, key=lambda s: s.session):
        answer = snapshot.newest.get(info.session)
        decode = "-"
        if answer is not None and answer.kinematics.size:
            triples = zip(snapshot.names, answer.kinematics, answer.kinematics_std, strict=False)
            decode = "  ".join(f"{n} {v:+.3f} ± {s:.3f}" for n, v, s in triples)
        rate = snapshot.rates.get(info.session)
        table.add_row(
            f"{info.session}" + (f" #{info.epoch}" if info.epoch else ""),
            str(info.bins),
            "-" if rate is None else f"{rate:.1f}",
            status_text(info.statuses),
            f"{info.solve_p50_ns / 1e6:.2f}",
            f"{info.solve_p99_ns / 1e6:.2f}",
            number(info.bits_per_spike),
            decode,
        )
        if answer is not None:
            ways = _ways(answer, snapshot.clock, live=info.session in snapshot.live)
            more.append(Text(visible(f"{info.session}: newest answer {ways}"), style="dim"))
        if info.flagged:
            masked = f"{info.session}: masked {', '.join(info.flagged)}"
            more.append(Text(visible(masked), style="yellow"))
    return Group(head, table, *more)
