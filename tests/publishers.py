"""Sources that bridges read, on loopback: they send, go away, come back and set their clocks."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import zmq
from ezmsg.util.messages.axisarray import AxisArray

from ilqr_clients.bridges.core import Bridge
from ilqr_clients.bridges.ezmsg_unit import EzmsgBridge
from ilqr_clients.bridges.openephys import OpenEphysBridge
from ilqr_clients.bridges.synapse import SynapseBridge, frame_types
from ilqr_service.server import Service

WAIT_S = 30.0
UNITS, WIDTH_S, RATE = 5, 0.05, 20_000
NAMES = tuple(f"unit{k}" for k in range(UNITS))


class Published:
    """A publisher on loopback that can go away and come back at its address."""

    def __init__(self) -> None:
        self._context: zmq.Context[Any] = zmq.Context()
        self.number, self.address = 0, "tcp://127.0.0.1:*"
        self.beats: list[dict[str, Any]] = []
        self.start()

    def start(self) -> None:
        self._socket = self._context.socket(zmq.XPUB)
        self._socket.linger = 1000
        self._socket.sndhwm = 0
        self._socket.bind(self.address)
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def wait(self) -> None:
        """Until the bridge is subscribed."""
        assert self._socket.poll(WAIT_S * 1e3)
        assert self._socket.recv() == b"\x01"

    def stop(self) -> None:
        self._socket.close()

    def restart(self) -> None:
        self.number = 0
        end = time.monotonic() + WAIT_S
        while True:
            try:
                return self.start()
            except zmq.ZMQError:
                assert time.monotonic() < end

    def close(self) -> None:
        self._context.destroy(linger=0)

    def send(self, *frames: bytes) -> None:
        self._socket.send_multipart(frames)


class OpenEphys(Published):
    """As the plugin's page says: envelope, JSON header, data."""

    numbered = True

    def __init__(self) -> None:
        super().__init__()
        self.begin = 1000

    def message(self, kind: str, body: dict[str, Any], data: bytes) -> tuple[bytes, ...]:
        self.number += 1
        where = "spike" if kind == "spike" else "content"
        header = {"message_num": self.number, "type": kind, where: {"stream": "probe"} | body}
        envelope = {"data": b"DATA", "spike": b"EVENT", "event": b"EVENT"}[kind]
        return envelope + b"\0", json.dumps(header).encode(), data

    def bin(self, k: int, counts: Any, names: tuple[str, ...] = NAMES) -> list[tuple[bytes, ...]]:
        """Spikes within a bin, and the continuous data after it."""
        per_bin, made = round(RATE * WIDTH_S), []
        at = self.begin + k * per_bin
        for name, count in zip(names, counts, strict=True):
            for spike in range(int(count)):
                body = {"electrode": name, "sample_num": at + 7 + spike, "sorted_id": spike % 3}
                made.append(self.message("spike", body, b"waveform"))
        body = {"channel_num": 0, "num_samples": per_bin, "sample_rate": RATE}
        made.append(self.message("data", body | {"sample_num": at + per_bin}, b"\0" * 8))
        return made

    def odd(self) -> list[tuple[bytes, ...]]:
        """A channel that the model does not have, and a message that is none."""
        at = {"sample_num": self.begin + 12 * round(RATE * WIDTH_S)}
        bodies = ({"sample_num": 10**30}, at | {"sample_rate": "fast", "num_samples": "all"})
        return [
            *(self.message("data", body, b"") for body in bodies),
            *self.bin(12, [1] * (UNITS + 1), (*NAMES, "other")),
            (b"DATA", b"\xff\xfe{", b""),
            (b"DATA", b"[" * 100_000, b""),
        ]

    def first(self) -> None:
        body = {"channel_num": 0, "num_samples": 0, "sample_rate": RATE, "sample_num": self.begin}
        self.send(*self.message("data", body, b""))

    def bridge(self, service: Service, name: str, **options: Any) -> Bridge:
        return OpenEphysBridge(service.ingest, self.address, name, **options)


class Synapse(Published):
    """Frames of spike trains, each half a bin."""

    begin = 0

    def bin(self, k: int, counts: Any, names: tuple[str, ...] = NAMES) -> list[tuple[bytes, ...]]:
        made = []
        for half in range(2):
            part = np.asarray(counts) // 2 if half else np.asarray(counts) - np.asarray(counts) // 2
            frame = frame_types()[0](
                timestamp_ns=self.begin + (2 * k + half) * 25_000_000,
                sequence_number=self.number,
                bin_size_ms=25,
                spike_counts=part.tolist(),
                channel_ids=range(len(counts)),
            )
            self.number += 1
            made.append((frame.SerializeToString(),))
        return made

    def odd(self) -> list[tuple[bytes, ...]]:
        frame = {"bin_size_ms": 25, "spike_counts": [1] * UNITS, "sequence_number": self.number}
        late = frame_types()[0](timestamp_ns=2**64 - 1, **frame).SerializeToString()
        return [(late,), *self.bin(12, [1] * (UNITS + 1)), (b"DATA", b"\xff\xfe{", b"")]

    def first(self) -> None:
        pass

    def bridge(self, service: Service, name: str, **options: Any) -> Bridge:
        return SynapseBridge(service.ingest, self.address, name, **options)


class Ezmsg:
    """Arrays as an ezmsg unit gets them, a bin each."""

    begin = 7.0

    def array(self, k: int, rows: Any, names: tuple[str, ...] = (), gain: float = WIDTH_S) -> Any:
        """Rows (time, ch) from bin k on, their channels in another order if they have names."""
        axes: dict[str, Any] = {
            "time": AxisArray.LinearAxis(unit="s", gain=gain, offset=self.begin + k * WIDTH_S)
        }
        if names:
            axes["ch"] = AxisArray.CoordinateAxis(np.array(names[::-1]), dims=["ch"])
        rows = np.asarray(rows, dtype=float)[:, ::-1] if names else np.asarray(rows, dtype=float)
        return AxisArray(rows.T, dims=["ch", "time"], axes=axes)

    def bin(self, k: int, counts: Any) -> list[tuple[Any, ...]]:
        return [(self.array(k, [counts], NAMES),)]

    def odd(self) -> list[tuple[Any, ...]]:
        wide, text = self.array(12, np.ones((1, UNITS + 1))), self.array(12, np.ones((1, UNITS)))
        text.data = text.data.astype(str)
        never = self.array(12, np.ones((1, UNITS)))
        never.axes["time"].offset = np.nan
        return [(wide,), (AxisArray(np.ones(3), dims=["ch"], axes={}),), (text,), (never,)]

    def bridge(self, service: Service, name: str, **options: Any) -> Bridge:
        self._bridge = EzmsgBridge(service.ingest, name, lambda answer, at: None, **options)
        return self._bridge

    def send(self, array: Any) -> None:
        self._bridge.arrays.put(array)

    def nothing(self) -> None:
        """It is not connected, so there is nothing to do."""

    wait = first = stop = restart = close = nothing
