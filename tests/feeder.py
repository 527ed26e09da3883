"""A bare feeder and subscriber for the service's tests: sockets and the wire, nothing clever."""

from __future__ import annotations

import time
from collections import deque
from typing import Any, TypeVar

import numpy as np
import zmq
from numpy.typing import NDArray

from ilqr_clients.connection import Closing
from ilqr_vae.protocol import messages as wire
from ilqr_vae.protocol.keys import ClientKey

WAIT_S = 20.0
UNITS = tuple(f"u{i}" for i in range(7))
BIN_NS = 50_000_000
_BEGAN_NS = time.monotonic_ns()
GENEROUS_NS = 60_000_000_000
T = TypeVar("T", bound=wire.Message)


class Feeder(Closing):
    """One DEALER and one SUB; every wait has a deadline and fails by name."""

    def __init__(
        self,
        ingest: str,
        results: str,
        *,
        identity: bytes | None = None,
        key: ClientKey | None = None,
    ) -> None:
        self._context: zmq.Context[Any] = zmq.Context()
        self.dealer: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        if identity is not None:
            self.dealer.setsockopt(zmq.IDENTITY, identity)
        self.sub: zmq.Socket[bytes] = self._context.socket(zmq.SUB)
        if key is not None:
            key.apply(self.dealer)
            key.apply(self.sub)
        self.dealer.connect(ingest)
        self.sub.rcvhwm = 0
        self._kept: deque[wire.Published] = deque()
        self.sub.connect(results)

    def close(self) -> None:
        self._context.destroy(linger=0)

    def send(self, *messages: wire.Message | bytes) -> None:
        for message in messages:
            self.dealer.send(message if isinstance(message, bytes) else wire.encode(message))

    def reply(self) -> wire.Downstream:
        assert self.dealer.poll(WAIT_S * 1e3), "no reply"
        return wire.decode_downstream(self.dealer.recv())

    def reply_of(self, kind: type[T]) -> T:
        """The next reply of that kind; others before it are passed over."""
        end = time.monotonic() + WAIT_S
        while time.monotonic() < end:
            reply = self.reply()
            if isinstance(reply, kind):
                return reply
        raise AssertionError(f"no {kind.__name__}")

    def ask(self, message: wire.Message | bytes, kind: type[T]) -> T:
        self.send(message)
        return self.reply_of(kind)

    def published(self) -> wire.Published:
        return self._kept.popleft() if self._kept else self._published()

    def _published(self) -> wire.Published:
        assert self.sub.poll(WAIT_S * 1e3), "nothing published"
        topic, frame = self.sub.recv_multipart()
        message = wire.decode_published(frame)
        assert topic in {wire.topic(message.session), b"\xff", b""}
        return message

    def subscribe(self, session: str) -> wire.Published:
        """Returns what a new subscriber is sent at once: from then on nothing is missed. What comes
        of other sessions meanwhile is kept."""
        self.sub.setsockopt(zmq.SUBSCRIBE, wire.topic(session))
        while (message := self._published()).session != session:
            self._kept.append(message)
        return message

    def results(self, n: int) -> list[wire.Result]:
        """The next ``n`` results; notices between them are passed over."""
        got: list[wire.Result] = []
        end = time.monotonic() + WAIT_S
        while len(got) < n:
            assert time.monotonic() < end, f"{len(got)} of {n} results"
            message = self.published()
            if isinstance(message, wire.Result):
                got.append(message)
        return got

    def notice(self, what: str) -> wire.Notice:
        """The next notice that begins so; everything before it is passed over."""
        end = time.monotonic() + WAIT_S
        while time.monotonic() < end:
            message = self.published()
            if isinstance(message, wire.Notice) and message.what.startswith(what):
                return message
        raise AssertionError(f"no notice {what!r}")


def numbers(result: wire.Result) -> NDArray[np.float64]:
    """Everything computed in a result, in one vector."""
    arrays = (
        result.latent,
        result.latent_std,
        result.rates,
        result.kinematics,
        result.kinematics_std,
    )
    values = [wire.unpack(a, "result") for a in arrays]
    return np.concatenate([*values, [result.bits, result.spikes, result.iterations]])


def open_(session: str, **changes: Any) -> wire.Open:
    fields: dict[str, Any] = {
        "protocol": wire.PROTOCOL,
        "session": session,
        "units": UNITS,
        "bin_width_ns": BIN_NS,
        "deadline_ns": GENEROUS_NS,
    }
    return wire.Open(**(fields | changes))


def bin_(session: str, index: int, counts: NDArray[Any], **changes: Any) -> wire.Bin:
    return wire.Bin(
        session=session,
        index=index,
        source_ns=_BEGAN_NS + index,  # rising with the index, whatever order bins are sent in
        counts=wire.pack(counts, "<u2"),
        **changes,
    )


def spikes(n_bins: int, seed: int = 0) -> NDArray[np.int64]:
    return np.random.default_rng(seed).poisson(1.0, (n_bins, len(UNITS)))
