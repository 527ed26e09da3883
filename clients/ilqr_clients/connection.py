"""Sockets to a service, and the parts of its model that a client needs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from ilqr_vae.errors import ProtocolError, RequestRefusedError, ServiceError
from ilqr_vae.protocol import messages
from ilqr_vae.protocol.keys import ClientKey, key_from_environment
from ilqr_vae.recordings import RecordingSpec


class Closing(ABC):
    """A context manager that calls ``close``."""

    @abstractmethod
    def close(self) -> None:
        """Release all resources."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """The part of a served model's manifest that a client needs; other fields are ignored."""

    model_id: str
    bin_width: float
    unit_names: tuple[str, ...]
    kinematic_names: tuple[str, ...] = ()
    kinematic_units: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    data: RecordingSpec = msgspec.field(default_factory=RecordingSpec)
    scores: dict[str, float] = msgspec.field(default_factory=dict[str, float])
    provenance: dict[str, str] = msgspec.field(default_factory=dict[str, str])
    history: tuple[tuple[int, float], ...] = ()

    @property
    def counted(self) -> tuple[str, ...]:
        """Names of the units that are counted: ``unit_names`` without the features."""
        return self.unit_names[: len(self.unit_names) - len(self.features)]

    def require_counts(self, what: str) -> None:
        """Raises ServiceError: the model has features, which ``what`` does not send."""
        if self.features:
            expected, got = f"one without features, which {what} does not send", self.features
            raise ServiceError("model", expected=expected, got=", ".join(got))

    @property
    def learning(self) -> dict[str, tuple[tuple[int, float], ...]]:
        """Learning curves (step, score) of the validations, by the name of the score."""
        name = "causal R2" if "r2" in self.scores else "bits per spike"
        return {f"{name}, validation": self.history} if self.history else {}


def model_of(described: messages.Described) -> Model:
    """Return the typed manifest. Raises ProtocolError if the description is invalid."""
    try:
        return msgspec.convert(described.manifest, Model)
    except msgspec.ValidationError as error:
        raise ProtocolError(
            "described.manifest", expected="a model manifest", got=str(error)
        ) from error


def connect(
    context: zmq.Context[Any],
    kind: int,
    endpoint: str,
    key: ClientKey | None = None,
    *,
    keep: int = 0,
) -> zmq.Socket[bytes]:
    """Return a connected socket without linger that queues all messages, or at most ``keep``.

    It uses ``key``, or the one that the environment variable ``ILQR_VAE_KEY`` names.

    Raises:
        ConfigError: the key cannot be read.
        ServiceError: ``endpoint`` is not an address.
    """
    socket: zmq.Socket[bytes] = context.socket(kind)
    socket.linger = 0
    socket.rcvhwm = keep
    socket.sndhwm = 0
    key = key or key_from_environment()
    if key is not None:
        key.apply(socket)
    if endpoint.startswith("tcp://["):
        socket.ipv6 = True
    try:
        socket.connect(endpoint)
    except zmq.ZMQError as error:
        socket.close()
        raise ServiceError(
            "endpoint",
            expected="an address such as tcp://127.0.0.1:5555",
            got=f"{endpoint!r} ({error})",
        ) from error
    return socket


def available(socket: zmq.Socket[bytes]) -> Iterator[list[bytes]]:
    """Yield the frames of each message that has arrived."""
    # asking first is cheaper than the exception at the end
    while int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
        yield socket.recv_multipart(zmq.NOBLOCK)


def reachable(results: str, endpoint: str) -> str:
    """Return the results address as seen from here: a wildcard becomes the host of ``endpoint``.

    >>> reachable("tcp://0.0.0.0:5556", "tcp://lab-pc:5555")
    'tcp://lab-pc:5556'
    """
    scheme, _, address = results.partition("://")
    host, _, port = address.rpartition(":")
    if scheme != "tcp" or host not in {"*", "0.0.0.0", "[::]"}:
        return results
    here, _, _ = endpoint.removeprefix("tcp://").rpartition(":")
    return f"tcp://{here}:{port}"


def refusal(endpoint: str, refused: messages.Refused) -> RequestRefusedError:
    """Return the exception for a refusal."""
    return RequestRefusedError(
        refused.field,
        expected=refused.expected,
        got=refused.got,
        endpoint=endpoint,
        index=refused.index,
    )


class Watched:
    """Watches whether a socket is still connected, as libzmq reports it.

    Args:
        socket: connected.

    Attributes:
        times: number of connections so far, when ``connected`` was last read.
    """

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        events = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
        self._socket = socket
        self._events = socket.get_monitor_socket(events)
        self._connected = True
        self.times = 0

    def close(self) -> None:
        """Stop watching."""
        self._socket.disable_monitor()
        self._events.close()

    @property
    def connected(self) -> bool:
        while self._events.poll(0):
            event = recv_monitor_message(self._events)["event"]
            self._connected = event == zmq.EVENT_HANDSHAKE_SUCCEEDED
            self.times += self._connected
        return self._connected
