"""Continuous copies of journals on a second node, for machines without a shared folder.

A server sends each write of its journal to a store on another node, which writes the same files and
acknowledges. A copy begins with a new segment, which suffices to continue from. Once the store has
caught up, the copy is in step: from then on the server publishes nothing that the store has not
acknowledged, until the fleet names another store or none. So a server that takes over from the copy
has every answer that anyone has received. A server that was given up and wakes later publishes
nothing more, because its store acknowledges nothing more. Metrics show what is not acknowledged
yet, which would be lost with the node.
"""

from __future__ import annotations

import errno
import hmac
import math
import struct
import threading
import time
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import zmq
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ilqr_service import logs
from ilqr_service.journal.records import SUFFIX
from ilqr_service.metrics.histogram import Durations, Histogram
from ilqr_vae.protocol.keys import ServerKey

_PLACE = struct.Struct("<QQQ")  # position, segment, offset
_AGAIN_S = 1.0
_QUEUE = 10_000
_POLL_MS = 50
_ALL = 2**62


_EDGES_S = tuple(e / 1e3 for e in (0.2, 0.5, 1, 1.5, 2, 3, 5, 10, 20, 50, 100, 250, 1000, 4000))


class _Piece(NamedTuple):
    """What was sent and not acknowledged: its position, when, and the bytes written up to it."""

    position: int
    at_ns: int
    bytes: int


class Copier(Collector):
    """The side of the server. ``aim``, ``in_step`` and ``collect`` are thread-safe; the rest is for
    the writer.

    Args:
        name: name of the server.
        secret: secret of the fleet.
        key: key of the servers, if they have keys.
    """

    def __init__(self, name: str, secret: bytes, key: ServerKey | None) -> None:
        self._name, self._secret, self._key = name.encode(), secret, key
        self._wanted = self._aimed = ""
        self._begin = False
        self._in_step = False
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket: zmq.Socket[bytes] | None = None
        self._first = self._copied = self.position = 0
        self._heard = 0.0
        self._bytes = self._bytes_copied = 0
        self._pieces: deque[_Piece] = deque()
        self._took = Durations(_EDGES_S)
        self._histogram = Histogram(
            "ilqr_journal_copy_seconds",
            "from a write of the journal until the copy's node has it",
            {"": self._took},
        )

    def aim(self, address: str) -> None:
        """Copy to the store at this address from now on; "" for none."""
        self._wanted = address

    @property
    def in_step(self) -> str:
        """The store with a complete copy; "" if there is none yet."""
        return self._aimed if self._in_step else ""

    def renewed(self) -> bool:
        """Return whether a copy restarts, with another store or after a lost piece."""
        self.copied()
        if self._wanted != self._aimed:
            self._aimed, self._in_step, self._begin = self._wanted, False, bool(self._wanted)
            if not self._aimed:
                self._connect()
        late = self._copied < self.position and time.monotonic() - self._heard > _AGAIN_S
        if not self._aimed or not (self._begin or late):
            return False
        self._connect()
        self._begin, self._first, self._copied = False, self.position + 1, 0
        return True

    def write(self, segment: int, offset: int, data: bytes) -> None:
        """Send bytes that were written."""
        if self._copied >= self.position:
            self._heard = time.monotonic()  # from here on publishing waits for it
        self.position += 1
        if self._socket is None:
            return
        self._bytes += len(data)
        self._pieces.append(_Piece(self.position, time.monotonic_ns(), self._bytes))
        place = _PLACE.pack(self.position, segment, offset)
        with suppress(zmq.Again):  # it does not read: restart the copy
            parts = [self._secret, self._name, place, data]
            self._socket.send_multipart(parts, zmq.NOBLOCK)

    def copied(self) -> int:
        """Return the position up to which results may be published."""
        while self._socket is not None and self._socket.poll(0):
            (position,) = struct.unpack("<Q", self._socket.recv())
            if position >= self._first:
                self._copied, self._heard = position, time.monotonic()
                self._acknowledged(position)
            else:
                self._begin = True  # the store misses a piece
        reached = self._copied >= max(self._first, self.position)
        self._in_step = self._in_step or (self._socket is not None and reached)
        return self._copied if self._in_step else _ALL

    def _acknowledged(self, position: int) -> None:
        now = time.monotonic_ns()
        while self._pieces and self._pieces[0].position <= position:
            piece = self._pieces.popleft()
            self._bytes_copied = piece.bytes
            self._took.add(now - piece.at_ns)

    def describe(self) -> Iterable[Metric]:
        """The metrics without numbers."""
        return [*self._behind(math.nan, math.nan), *self._histogram.describe()]

    def collect(self) -> Iterable[Metric]:
        """How far the copy is behind: what would be lost with this node now. NaN without a copy."""
        if not self._in_step:
            return [*self._behind(math.nan, math.nan), *self._histogram.collect()]
        with suppress(IndexError):
            since = time.monotonic_ns() - self._pieces[0].at_ns
            behind = self._behind(float(self._bytes - self._bytes_copied), since / 1e9)
            return [*behind, *self._histogram.collect()]
        return [*self._behind(0.0, 0.0), *self._histogram.collect()]

    @staticmethod
    def _behind(size: float, seconds: float) -> list[Metric]:
        name = "ilqr_journal_copy_behind"
        return [
            GaugeMetricFamily(f"{name}_bytes", "of the journal that the copy lacks", size),
            GaugeMetricFamily(f"{name}_seconds", "age of the oldest that the copy lacks", seconds),
        ]

    def _connect(self) -> None:
        """Open a new connection, with an empty queue."""
        if self._socket is not None:
            self._socket.close()
        self._socket, self._heard = None, time.monotonic()
        if not self._aimed:
            self._pieces.clear()
            self._bytes_copied = self._bytes
            return
        made: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        made.linger, made.sndhwm = 0, _QUEUE
        if self._key is not None:
            made.curve_publickey, made.curve_secretkey = zmq.curve_keypair()
            made.curve_serverkey = self._key.public.encode()
        made.connect(self._aimed)
        self._socket = made

    def close(self) -> None:
        """Close the connection."""
        self._context.destroy(linger=0)


class Store:
    """The side of the member: writes the journals of servers on other nodes.

    Args:
        host: address to bind to.
        secret: secret of the fleet; messages without it are refused.
        key: of the servers, where they have keys.

    Attributes:
        address: bound address of the store.
        failing: servers whose last piece could not be written, on a full disk for example.
    """

    def __init__(self, host: str, secret: bytes, key: ServerKey | None) -> None:
        self._secret = secret
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        self._socket.linger = 0
        if key is not None:
            self._socket.curve_server = True
            self._socket.curve_publickey = key.public.encode()
            self._socket.curve_secretkey = key.secret.encode()
        port = self._socket.bind_to_random_port(f"tcp://{host}")
        self.address = f"tcp://{host}:{port}"
        self.failing: frozenset[str] = frozenset()
        self._folders: dict[str, Path] = {}
        self._files: dict[str, tuple[int, BinaryIO]] = {}
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="store", daemon=True)
        self._thread.start()

    def hold(self, name: str, folder: Path) -> None:
        """Write the journal of a server into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        with self._lock:
            self._folders[name] = folder

    def release(self, name: str) -> None:
        """Stop writing and acknowledging for a server."""
        with self._lock:
            self._folders.pop(name, None)
            self.failing -= {name}
            if (open_ := self._files.pop(name, None)) is not None:
                open_[1].close()

    def close(self) -> None:
        """Stop writing."""
        self._stop.set()
        self._thread.join()
        for name in list(self._files):
            self.release(name)
        self._context.destroy(linger=0)

    def _run(self) -> None:
        while not self._stop.is_set():
            if not self._socket.poll(_POLL_MS):
                continue
            sender, *parts = self._socket.recv_multipart()
            try:
                reply = self._taken(parts)
            except OSError as error:
                if (name := parts[1].decode()) not in self.failing:
                    self.failing |= {name}
                    logs.warning("a copy could not be written", server=name, error=str(error))
                reply = None
            except (ValueError, struct.error) as error:
                logs.warning("a piece of a copy is refused", error=str(error))
                reply = None
            if reply is not None:
                with suppress(zmq.Again):
                    self._socket.send_multipart([sender, struct.pack("<Q", reply)], zmq.NOBLOCK)

    def _taken(self, parts: list[bytes]) -> int | None:
        """Write a piece. Return its position; 0 if an earlier piece is missing."""
        secret, given, place, data = parts
        if not hmac.compare_digest(secret, self._secret):
            raise ValueError("a piece without the fleet's secret")
        position, segment, offset = _PLACE.unpack(place)
        name = given.decode()
        with self._lock:
            folder = self._folders.get(name)
            if folder is None:
                return None
            open_ = self._files.get(name)
            if offset == 0:
                if open_ is not None:
                    open_[1].close()
                file = (folder / f"{segment:08d}{SUFFIX}").open("wb", buffering=0)
                open_ = self._files[name] = (segment, file)
            if open_ is None or open_[0] != segment or open_[1].tell() != offset:
                return 0
            if open_[1].write(data) != len(data):
                raise OSError(errno.ENOSPC, "a piece was written in part", str(folder))
            self.failing -= {name}
        return int(position)
