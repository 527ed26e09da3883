"""Steering of a running replay or closed loop, and events that only its feeder can publish.

A steerable run has a ``Steering``: the disturbances of its bins (from a script and from requests),
the decoders beside the service, and whether it is paused. A ``Conductor`` communicates for it in
its own thread, so that no bin waits: it receives changes on a ZeroMQ socket, and publishes the
session's events ``kinematics`` and ``steering`` (docs/protocol.md), which a live page draws.
``Remote`` is the other end of the socket.
"""

from __future__ import annotations

import hmac
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import msgspec
import numpy as np
import zmq
from numpy.typing import NDArray

from ilqr_clients.connection import Closing
from ilqr_clients.sdk import ServiceClient, Session
from ilqr_vae.errors import ConfigError, IlqrVaeError, ServiceError, ServiceUnreachableError
from ilqr_vae.files import to_struct
from ilqr_vae.scoring.online import OnlineDecoder
from ilqr_vae.simulated.disturbance import Change, Counts, Course, Disturbance, Disturber, Mask

Array = NDArray[np.float64]

OURS = "iLQR-VAE"
LOOPBACK = ("127.0.0.1", "[::1]", "localhost")

_TURN_MS = 50
_STATE_S = 1.0
_MOST_ROWS = 100
"""Largest number of entries in an event, and kept while none can be sent."""
_MOST_MARKS = 10_000
_MOST_BYTES = 1 << 16
_ADDRESS = "tcp://127.0.0.1:*"


class Steering:
    """The steering of a run. ``request`` and ``state`` are thread-safe; the rest is for the run.

    Args:
        units: N.
        bin_width: seconds.
        kind: kind of run.
        seed: seed of the disturbances.
        changes: changes of a script.
        decoders: decoders beside the service, by name.
        length: length of the replay in seconds; 0 if it has no end.
        loop: whether to restart at the end.

    Attributes:
        decoder: decoder that steers a closed loop.
        loop, paused: see ``Change``.
        applied: changes that have started, with their times.
    """

    def __init__(
        self,
        units: int,
        bin_width: float,
        *,
        kind: Literal["replay", "closed-loop"],
        seed: int = 0,
        changes: Iterable[Change] = (),
        decoders: Mapping[str, OnlineDecoder] | None = None,
        length: float = 0.0,
        loop: bool = False,
    ) -> None:
        self.bin_width, self.kind, self.loop = bin_width, kind, loop
        self.decoders = dict(decoders or {})
        self.decoder, self.paused = OURS, False
        self.applied: list[Change] = []
        self._length = length
        self._disturber = Disturber(units, bin_width, seed)
        scripted = tuple(changes)
        for change in scripted:
            self.check(change)
        self._course = Course(scripted)
        self._lock = threading.Lock()
        self._asked: deque[Change] = deque()
        self._now, self._position = Disturbance(), 0.0
        self.rows: deque[dict[str, Any]] = deque(maxlen=_MOST_ROWS)
        self.marks: deque[tuple[str, dict[str, Any], int]] = deque(maxlen=_MOST_MARKS)

    def request(self, change: Change) -> None:
        """Request a change from the next bin on. Raises ConfigError, see ``check``."""
        self.check(change)
        with self._lock:
            self._asked.append(change)

    def check(self, change: Change) -> None:
        """Raise ConfigError if the change does not apply to this run.

        The decoder must exist; a replay is not steered by a decoder, and a closed loop cannot
        seek.
        """
        if change.decoder is not None and (
            self.kind == "replay" or change.decoder not in (OURS, *self.decoders)
        ):
            known = () if self.kind == "replay" else (OURS, *self.decoders)
            raise ConfigError(
                "change.decoder",
                expected=f"one of {', '.join(known) or 'none'}",
                got=change.decoder,
            )
        if self.kind == "closed-loop" and (change.seek is not None or change.loop is not None):
            raise ConfigError("change.seek, change.loop", expected="a replay", got="a closed loop")

    def begin(self, index: int) -> list[Change]:
        """Apply the changes that start with bin ``index``, and return them."""
        when = index * self.bin_width
        with self._lock:
            asked, self._asked = list(self._asked), deque()
        for change in asked:
            self._course.add(msgspec.structs.replace(change, at=when))
        begun = self._course.until(when)
        for change in begun:
            self.applied.append(change)
            self.paused = self.paused if change.paused is None else change.paused
            self.loop = self.loop if change.loop is None else change.loop
            self.decoder = change.decoder or self.decoder
        with self._lock:
            self._now = self._course.at(when)
        return begun

    @property
    def settings(self) -> Disturbance:
        """Settings of the next bin."""
        return self._now

    def disturb(
        self, index: int, counts: NDArray[Any], mask: Mask | None
    ) -> tuple[Counts, Mask | None] | None:
        """Return the disturbed bin; None if it is not sent."""
        return self._disturber.bin(index, counts, mask, self._now)

    def decode(self, counts: NDArray[Any] | None, mask: Mask | None = None) -> dict[str, Array]:
        """Return the decode of a bin by each rival."""
        return {name: each.step(counts, mask) for name, each in self.decoders.items()}

    def tell(self, index: int, *, position: float = 0.0, **values: Any) -> None:
        """Publish the kinematics of a bin; None is omitted.

        Args:
            position: seconds from the start of the replayed span.
            values: see the event ``kinematics`` in docs/protocol.md.
        """
        row = {name: _plain(value) for name, value in values.items() if value is not None}
        self._position = position
        self.rows.append({"bin": index} | row)

    def mark(self, name: str, payload: dict[str, Any], at_ns: int) -> None:
        """Publish an event of the session at a time of this client's clock."""
        self.marks.append((name, payload, at_ns))

    def state(self) -> dict[str, Any]:
        """Return the state for display."""
        with self._lock:
            return {
                "kind": self.kind,
                "paused": self.paused,
                "loop": self.loop,
                "position": round(self._position, 3),
                "length": round(self._length, 3),
                "decoder": self.decoder,
                "decoders": [OURS, *self.decoders],
                "disturbance": msgspec.to_builtins(self._now),
            }


def _plain(value: Any) -> Any:
    """Return lists of numbers, rounded to five digits."""
    if isinstance(value, dict):
        return {str(name): _plain(v) for name, v in value.items()}
    if isinstance(value, np.ndarray):
        return [float(f"{v:.5g}") if np.isfinite(v) else None for v in value.tolist()]
    return value


class Conductor(Closing):
    """Publishes the events of a run and receives its changes, in a thread.

    Args:
        endpoint: address of the service.
        session: name of the session.
        token: token of the session.
        steering: steering of the run.
        control: address to receive changes at; None for none.
        timeout: seconds to wait for a reply of the service.

    Attributes:
        address, secret: of the control socket; "" if there is none.

    Raises:
        ConfigError: the address is invalid, or could not be bound.
    """

    def __init__(
        self,
        endpoint: str,
        session: str,
        token: str,
        steering: Steering,
        *,
        control: str | None = _ADDRESS,
        timeout: float = 2.0,
    ) -> None:
        self._endpoint, self._session, self._token = endpoint, session, token
        self._steering, self._timeout = steering, timeout
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket: zmq.Socket[bytes] | None = None
        self.address = self.secret = ""
        if control is not None:
            socket: zmq.Socket[bytes] = self._context.socket(zmq.REP)
            socket.setsockopt(zmq.MAXMSGSIZE, _MOST_BYTES)
            try:
                socket.bind(control)
            except zmq.ZMQError as error:
                self._context.destroy(linger=0)
                expected = f"an address that can be bound, e.g. {_ADDRESS}"
                raise ConfigError(
                    "--steer", expected=expected, got=f"{control} ({error})"
                ) from error
            self.address = socket.getsockopt_string(zmq.LAST_ENDPOINT)
            self._socket = socket
            self.secret = secrets.token_hex(16)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="conductor", daemon=True)
        self._thread.start()

    @classmethod
    def of(
        cls,
        session: Session,
        steering: Steering,
        *,
        control: str | None,
        say: Callable[[str], None],
    ) -> Conductor:
        """Create for an open session; ``say`` receives the control address, if there is one."""
        request = session.request
        made = cls(session.endpoint, request.session, request.token, steering, control=control)
        if made.address:
            say(f"it can be steered at {made.address}, secret {made.secret}")
        return made

    def close(self) -> None:
        """End the thread and free the address."""
        self._ended.set()
        self._thread.join(2 * self._timeout + 5.0)
        self._context.destroy(linger=0)

    def _run(self) -> None:
        told, last = 0.0, ""
        with ServiceClient(self._endpoint, timeout=self._timeout) as service:
            while not self._ended.is_set():
                if self._socket is None:
                    self._ended.wait(_TURN_MS / 1e3)
                elif self._socket.poll(_TURN_MS):
                    self._socket.send(msgspec.json.encode(self._answer(self._socket.recv())))
                self._tell(service)
                state = self._steering.state()
                key = repr({k: v for k, v in state.items() if k != "position"})
                if self._socket and (key != last or time.monotonic() - told > _STATE_S):
                    told, last = time.monotonic(), key
                    where = {"address": self.address, "secret": self.secret}
                    self._publish(service, "steering", state | where)
            self._tell(service)

    def _tell(self, service: ServiceClient) -> None:
        while self._steering.marks:
            name, payload, at_ns = self._steering.marks.popleft()
            self._publish(service, name, payload, at_ns)
        if rows := self._rows():
            self._publish(service, "kinematics", {"rows": rows})

    def _rows(self) -> list[dict[str, Any]]:
        queue = self._steering.rows
        return [queue.popleft() for _ in range(len(queue))]

    def _publish(
        self, service: ServiceClient, name: str, payload: dict[str, Any], at_ns: int | None = None
    ) -> None:
        try:
            service.event(self._session, name, payload, time_ns=at_ns, token=self._token)
        # closed, restarted, or an older service without events: the run itself reports that
        except ServiceError:
            return

    def _answer(self, frame: bytes) -> dict[str, Any]:
        try:
            asked = msgspec.json.decode(frame, type=dict[str, Any])
            if not hmac.compare_digest(str(asked.get("secret", "")), self.secret):
                raise ConfigError("secret", expected="the run's own", got="another")
            change = to_struct(asked.get("change", {}), Change, "change")
            if change != Change():
                self._steering.request(change)
        except IlqrVaeError as error:
            return {"error": [error.field, error.expected, error.got]}
        except (msgspec.MsgspecError, TypeError, UnicodeDecodeError) as error:
            return {"error": ["message", "JSON with secret and change", str(error)]}
        return {"state": self._steering.state()}


class Remote(Closing):
    """Steers a run from another process or thread.

    >>> with Remote("tcp://127.0.0.1:40123", secret) as run:            # doctest: +SKIP
    ...     run.change(silent=0.25, over=5.0)

    Args:
        address, secret: of the run: of its event ``steering``, and printed by it.
        timeout: seconds to wait for an answer.
    """

    def __init__(self, address: str, secret: str, *, timeout: float = 2.0) -> None:
        self.address, self._secret, self._timeout = address, secret, timeout
        self._context: zmq.Context[Any] = zmq.Context()

    def close(self) -> None:
        """Close the sockets."""
        self._context.destroy(linger=0)

    def state(self) -> dict[str, Any]:
        """Return ``Steering.state``. Raises as ``change``."""
        return self.change()

    def change(self, **fields: Any) -> dict[str, Any]:
        """Request a change by the fields of ``Change``; return the state before it.

        Raises:
            ConfigError: a change that cannot be made; the field says why.
            ServiceUnreachableError: the run does not answer.
        """
        socket: zmq.Socket[bytes] = self._context.socket(zmq.REQ)
        try:
            socket.linger = 0
            socket.connect(self.address)
            socket.send(msgspec.json.encode({"secret": self._secret, "change": fields}))
            if not socket.poll(int(1e3 * self._timeout)):
                raise ServiceUnreachableError(
                    f"run at {self.address}",
                    expected=f"an answer within {self._timeout:g} s",
                    got="none",
                )
            answer = msgspec.json.decode(socket.recv(), type=dict[str, Any])
        except zmq.ZMQError as error:
            raise ConfigError("address", expected="the run's", got=f"{self.address}") from error
        finally:
            socket.close()
        if "error" in answer:
            field, expected, got = answer["error"]
            raise ConfigError(field, expected=expected, got=got)
        return answer["state"]
