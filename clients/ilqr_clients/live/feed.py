"""A buffer of the last minutes of a service's results, for any number of viewers.

One thread listens to the service. It never blocks on a viewer: viewers read from the buffer at
their own pace, and miss entries that have left it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Annotated, Any
from urllib.parse import urlsplit

import msgspec
import numpy as np
import zmq

from ilqr_clients.answer import Answer
from ilqr_clients.connection import connect, model_of, reachable
from ilqr_clients.live.buffer import KEPT, KEPT_BYTES, KEPT_S, SessionBuffer, SteeringEvent
from ilqr_clients.sdk import ServiceClient
from ilqr_clients.steering import LOOPBACK, Remote
from ilqr_vae.errors import ConfigError, IlqrVaeError
from ilqr_vae.protocol import messages
from ilqr_vae.report.data import plain

KEPT_SESSIONS = 32
KEPT_ALARMS = 200
_ASK_S, _TURN_S, _PACE_S = 1.0, 0.05, 0.02
SHOWN_UNITS = 1024
_MOST_AT_ONCE = 1000
_KEEP = 5000
"""Messages queued for this process; further ones are lost to it, but to no other listener."""

Numbers = Annotated[list[float | None], msgspec.Meta(max_length=64)]
Place = Annotated[list[float], msgspec.Meta(min_length=2, max_length=2)]


class KinematicsRow(msgspec.Struct, omit_defaults=True):
    """One row of the event ``kinematics`` (docs/protocol.md)."""

    bin: int
    truth: Numbers | None = None
    decoders: Annotated[dict[str, Numbers], msgspec.Meta(max_length=8)] | None = None
    cursor: Place | None = None
    target: Place | None = None
    radius: float | None = None
    go: bool | None = None


class _Rows(msgspec.Struct):
    rows: Annotated[list[KinematicsRow], msgspec.Meta(max_length=1000)]


def shown(answer: Answer) -> dict[str, Any]:
    """Return an answer for the page: numbers rounded for a screen, times in ms."""

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
        "r": few(answer.rates[:SHOWN_UNITS]),
        "bits": float(answer.bits) if np.isfinite(answer.bits) else None,
        "spikes": answer.spikes,
        "ms": latency,
        "total": round((answer.published_ns - answer.received_ns) / 1e6, 3),
    } | ({} if answer.classes is None else {"k": few(answer.classes), "kn": answer.class_name})


def detail_shown(detail: messages.Detail) -> dict[str, Any]:
    """Return a detail for the page: counts of shown units, unused units, and earlier inputs."""
    shown: dict[str, Any] = {"i": detail.index, "ui": detail.index - detail.input_delay}
    if detail.counts is not None:
        counts = messages.unpack(detail.counts, "counts")[:SHOWN_UNITS]
        shown["c"] = counts.astype(int).tolist()
    if detail.mask is not None:
        unused = messages.unpack(detail.mask, "mask")[:SHOWN_UNITS] == 0
        shown["x"] = np.flatnonzero(unused).tolist()
    if detail.inputs is not None:
        shown["u"] = [float(f"{v:.4g}") for v in messages.unpack(detail.inputs, "inputs")]
    return shown


def _topics(session: str) -> tuple[bytes, ...]:
    return (
        messages.topic(session),
        messages.event_topic(session),
        messages.detail_topic(session),
    )


class LiveFeed:
    """Listens to a service in a thread, across restarts of the service.

    Args:
        endpoint: address of the service.
        timeout: seconds to wait for a reply.
        what_if: whether viewers may steer runs on this machine.

    Attributes:
        lock: protects the other attributes.
        state: served models and sessions, ready for JSON.
        channels: buffer of each session, by name.
        alarms: alarms and news, oldest first.
    """

    def __init__(self, endpoint: str, *, timeout: float = 3.0, what_if: bool = False) -> None:
        self.endpoint, self._timeout, self.what_if = endpoint, timeout, what_if
        self.lock = threading.Lock()
        self.state: dict[str, Any] = {"endpoint": endpoint, "reachable": False, "sessions": []}
        self.channels: dict[str, SessionBuffer] = {}
        self.alarms: deque[dict[str, Any]] = deque(maxlen=KEPT_ALARMS)
        # numbers that increase even over restarts of this process, within JavaScript's integers
        self._numbered = time.time_ns() // 1_000_000
        self._kept = KEPT
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
        """Listen until closed. Raises IlqrVaeError if the service goes away."""
        context: zmq.Context[Any] = zmq.Context()
        try:
            with ServiceClient(self.endpoint, timeout=self._timeout) as service:
                described = service.describe()
                results = reachable(described.results, self.endpoint)
                socket = connect(context, zmq.SUB, results, keep=_KEEP)
                listened: set[str] = set()
                asked = 0.0
                while not self._ended.is_set():
                    if time.monotonic() - asked >= _ASK_S:
                        asked = time.monotonic()
                        self._ask(service, socket, listened)
                    if socket.poll(int(1e3 * _TURN_S)):
                        self._take(socket, service)
                        self._ended.wait(_PACE_S)  # so that messages are taken in batches
        finally:
            context.destroy(linger=0)

    def _ask(self, service: ServiceClient, socket: zmq.Socket[bytes], listened: set[str]) -> None:
        described, sessions, models = service.describe(), service.sessions(), service.models()
        model = model_of(described)
        self._kept = min(KEPT, round(3 * KEPT_S / model.bin_width))
        names = {info.session for info in sessions}
        for name in names - listened:
            for topic in _topics(name):
                socket.setsockopt(zmq.SUBSCRIBE, topic)
        for name in listened - names:
            for topic in _topics(name):
                socket.setsockopt(zmq.UNSUBSCRIBE, topic)
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
            "unit_names": list(model.counted[:SHOWN_UNITS]),
            "all_units": len(model.counted),
            "classes": list(model.classes),
            "models": [
                {
                    "slot": m.slot,
                    "model": m.model,
                    "role": m.role,
                    "bits": m.bits_per_spike if m.bins else None,
                }
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
                    "run": self._shown_run(info.session),
                }
                for info in sorted(sessions, key=lambda s: s.session)
            ],
        }
        with self.lock:
            self.state = plain(state)

    def _shown_run(self, session: str) -> dict[str, Any] | None:
        """Return how a session can be steered, without the secret."""
        channel = self.channels.get(session)
        run = None if channel is None else channel.steered()
        if run is None or not self.what_if:
            return None
        return {k: v for k, v in msgspec.to_builtins(run).items() if k not in ("address", "secret")}

    def steer(self, session: str, change: dict[str, Any]) -> dict[str, Any]:
        """Change a run, and return its state.

        Raises:
            ConfigError: the run cannot be steered from here, or the change is invalid.
            ServiceUnreachableError: the run does not answer.
        """
        with self.lock:
            channel = self.channels.get(session)
            run = None if channel is None or not self.what_if else channel.steered()
        if run is None:
            raise ConfigError("session", expected="one that can be steered", got=repr(session))
        address = urlsplit(run.address)
        if address.scheme != "tcp" or address.hostname not in LOOPBACK:
            raise ConfigError("session", expected="a run on this machine", got=run.address)
        with Remote(run.address, run.secret) as remote:
            return remote.change(**change)

    def _channel(self, session: str) -> SessionBuffer:
        """Return the session's buffer. Beyond ``KEPT_SESSIONS`` the oldest one is dropped."""
        channel = self.channels.get(session)
        if channel is None:
            while len(self.channels) >= KEPT_SESSIONS:
                del self.channels[next(iter(self.channels))]
            channel = self.channels[session] = SessionBuffer(kept=self._kept)
            for each in self.channels.values():
                each.most = KEPT_BYTES // len(self.channels)
        return channel

    def _event(self, event: messages.Event, channel: SessionBuffer) -> None:
        """Add an event. One with a reserved name but other fields is a plain event."""
        try:
            if event.name == "kinematics":
                for row in msgspec.convert(event.payload, _Rows).rows:
                    channel.add({"t": msgspec.to_builtins(row)})
                return
            if event.name == "steering":
                channel.run = msgspec.convert(event.payload, SteeringEvent), time.monotonic()
                return
        except msgspec.ValidationError:
            pass
        said = ", ".join(f"{k} {str(v)[:80]}" for k, v in list(event.payload.items())[:8])
        channel.add({"e": {"i": event.bin, "name": event.name, "said": said, "at": time.time()}})

    def _take(self, socket: zmq.Socket[bytes], service: ServiceClient) -> None:
        for _ in range(_MOST_AT_ONCE):
            try:
                frame = socket.recv_multipart(zmq.NOBLOCK)[-1]
            except zmq.Again:
                return
            message = messages.decode_published(frame)
            if message is None:
                continue
            if isinstance(message, messages.Notice):
                if message.what != "subscribed":
                    self._alarm("notice", message.what, message.session)
                continue
            with self.lock:
                channel = self._channel(message.session)
                channel.begin(message)
            if isinstance(message, messages.Result):
                answer = Answer.of(message, service.timer.now_ns())
                entry = shown(answer)
                with self.lock:
                    channel.shaped(answer)
                    before, channel.status = channel.status, answer.status
                    channel.add({"b": entry})
                if answer.status not in ("ok", before):  # the first of several in a row
                    what = f"{answer.status} from bin {answer.index} on"
                    self._alarm("status", what, message.session)
            elif isinstance(message, messages.Detail):
                with self.lock:
                    channel.add({"d": detail_shown(message)})
            else:
                with self.lock:
                    self._event(message, channel)
