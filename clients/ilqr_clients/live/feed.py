"""What a service publishes, kept for the last minutes for any number of viewers.

One thread listens as any listener does. It never blocks on a viewer: viewers read from the buffer,
at their own pace, and miss what has left it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import zmq

from ilqr_clients.answer import Answer
from ilqr_clients.connection import connect, model_of, reachable
from ilqr_clients.sdk import ServiceClient
from ilqr_vae.errors import IlqrVaeError
from ilqr_vae.protocol import messages
from ilqr_vae.report.data import plain

KEPT_BINS = 6000
"""Of each session: 5 minutes at 20 bins a second, 30 s at 200."""
KEPT_ALARMS = 200
_ASK_S, _TURN_S = 1.0, 0.05
_SHOWN_UNITS = 256
_MOST_AT_ONCE = 1000


def shown(answer: Answer) -> dict[str, Any]:
    """An answer as the page takes it: numbers rounded to what a screen shows, times in ms."""

    def few(values: Any) -> list[float | None]:
        return [float(f"{v:.4g}") if np.isfinite(v) else None for v in values]

    stages = (
        ("queue", answer.received_ns, answer.solve_start_ns),
        ("solve", answer.solve_start_ns, answer.solve_end_ns),
        ("publish", answer.solve_end_ns, answer.published_ns),
    )
    wire = answer.wire_in_ns()
    latency = {name: round((b - a) / 1e6, 3) for name, a, b in stages}
    if wire is not None:
        latency["wire_in"] = round(wire[0] / 1e6, 3)
    return {
        "i": answer.index,
        "revision": answer.revision,
        "status": answer.status,
        "y": few(answer.kinematics),
        "s": few(answer.kinematics_std),
        "z": few(answer.latent),
        "r": few(answer.rates[:_SHOWN_UNITS]),
        "bits": float(answer.bits) if np.isfinite(answer.bits) else None,
        "spikes": answer.spikes,
        "ms": latency,
        "total": round((answer.published_ns - answer.received_ns) / 1e6, 3),
    }


@dataclass
class Channel:
    """One session's buffer.

    Attributes:
        entries: the newest, at most ``KEPT_BINS``; written: how many there ever were.
        epoch: of the session; status: of its newest answer.
    """

    entries: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=KEPT_BINS))
    written: int = 0
    epoch: int = -1
    status: str = "ok"

    def add(self, entry: dict[str, Any]) -> None:
        self.entries.append(entry)
        self.written += 1

    def after(self, position: int) -> tuple[list[dict[str, Any]], int]:
        """The entries written after ``position``, and the position after them."""
        missing = min(len(self.entries), max(0, self.written - position))
        start = len(self.entries) - missing
        return [self.entries[i] for i in range(start, len(self.entries))], self.written


class LiveFeed:
    """Listens to a service in a thread; goes on when the service restarts.

    Args:
        endpoint: of the service.
        timeout: seconds that one request may take.

    Attributes:
        lock: held while the rest is read or written.
        state: what is served and which sessions there are, ready for JSON.
        channels: a buffer for each session, by name.
        alarms: what went wrong and what is news, oldest first.
    """

    def __init__(self, endpoint: str, *, timeout: float = 3.0) -> None:
        self.endpoint, self._timeout = endpoint, timeout
        self.lock = threading.Lock()
        self.state: dict[str, Any] = {"endpoint": endpoint, "reachable": False, "sessions": []}
        self.channels: dict[str, Channel] = {}
        self.alarms: deque[dict[str, Any]] = deque(maxlen=KEPT_ALARMS)
        self._numbered = time.time_ns()  # so that numbers grow over a restart of this process too
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="live-feed", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._ended.set()
        self._thread.join(self._timeout + 5.0)

    def _alarm(self, kind: str, what: str, session: str = "") -> None:
        with self.lock:
            self._numbered += 1
            self.alarms.append(
                {
                    "n": self._numbered,
                    "kind": kind,
                    "what": what,
                    "session": session,
                    "at": time.time(),
                }
            )

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                self._listen()
            except IlqrVaeError as error:
                with self.lock:
                    was = self.state["reachable"]
                    self.state = {**self.state, "reachable": False}
                if was:
                    self._alarm("error", str(error))
                self._ended.wait(_ASK_S)

    def _listen(self) -> None:
        """Until it is to end. Raises IlqrVaeError where the service goes away."""
        context: zmq.Context[Any] = zmq.Context()
        try:
            with ServiceClient(self.endpoint, timeout=self._timeout) as service:
                described = service.describe()
                socket = connect(context, zmq.SUB, reachable(described.results, self.endpoint))
                listened: set[str] = set()
                asked = 0.0
                while not self._ended.is_set():
                    if time.monotonic() - asked >= _ASK_S:
                        asked = time.monotonic()
                        self._ask(service, socket, listened)
                    if socket.poll(int(1e3 * _TURN_S)):
                        self._take(socket, service)
        finally:
            context.destroy(linger=0)

    def _ask(self, service: ServiceClient, socket: zmq.Socket[bytes], listened: set[str]) -> None:
        described, sessions, models = service.describe(), service.sessions(), service.models()
        model = model_of(described)
        names = {info.session for info in sessions}
        for name in names - listened:
            socket.setsockopt(zmq.SUBSCRIBE, messages.topic(name))
        for name in listened - names:
            socket.setsockopt(zmq.UNSUBSCRIBE, messages.topic(name))
        listened.clear()
        listened.update(names)
        state = {
            "endpoint": self.endpoint,
            "reachable": True,
            "ready": described.ready,
            "device": described.device,
            "model": described.model,
            "bin_width": model.bin_width,
            "names": list(model.kinematic_names),
            "units": list(model.kinematic_units),
            "unit_names": list(model.unit_names[:_SHOWN_UNITS]),
            "models": [
                {"slot": m.slot, "model": m.model, "role": m.role, "bits": m.bits_per_spike}
                for m in models
            ],
            "sessions": [
                {
                    "session": info.session,
                    "bins": info.bins,
                    "deadline_ms": info.deadline_ns / 1e6,
                    "statuses": info.statuses,
                    "bits_per_spike": info.bits_per_spike,
                    "flagged": list(info.flagged),
                }
                for info in sorted(sessions, key=lambda s: s.session)
            ],
        }
        with self.lock:
            self.state = plain(state)

    def _take(self, socket: zmq.Socket[bytes], service: ServiceClient) -> None:
        for _ in range(_MOST_AT_ONCE):
            try:
                frame = socket.recv_multipart(zmq.NOBLOCK)[-1]
            except zmq.Again:
                return
            message = messages.decode_published(frame)
            if isinstance(message, messages.Result):
                answer = Answer.of(message, service.timer.now_ns())
                entry = shown(answer)
                with self.lock:
                    channel = self.channels.setdefault(message.session, Channel())
                    if channel.epoch != message.epoch:
                        channel.entries.clear()
                        channel.epoch = message.epoch
                    before, channel.status = channel.status, answer.status
                    channel.add(entry)
                if answer.status not in ("ok", before):  # the first of a row of them
                    what = f"{answer.status} from bin {answer.index} on"
                    self._alarm("status", what, message.session)
            elif isinstance(message, messages.Notice) and message.what != "subscribed":
                self._alarm("notice", message.what, message.session)
