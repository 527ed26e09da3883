"""Every bridge: the same recording gives the same decodes, and whatever its source does is said,
counted, and costs nothing that came."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import ezmsg.core as ez
import numpy as np
import pylsl
import pytest
import zmq
from ezmsg.util.messages.axisarray import AxisArray

from ilqr_clients.answer import Answer
from ilqr_clients.bridges.core import Bridge
from ilqr_clients.bridges.ezmsg_unit import IlqrDecoder, IlqrSettings
from ilqr_clients.bridges.lsl import LslBridge
from ilqr_clients.bridges.synapse import SynapseBridge, frame_types
from ilqr_clients.sdk import ServiceClient
from ilqr_service.server import Service
from ilqr_vae.protocol import messages
from publishers import NAMES, RATE, UNITS, WAIT_S, WIDTH_S, Ezmsg, OpenEphys, Synapse
from rig import make_model, serving, through_sdk, until

pylsl.set_config_content("[multicast]\nResolveScope = machine\n")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("bridges")
    model = make_model(folder / "m.safetensors", n_units=UNITS, horizon=50, names=NAMES)
    with serving(model, gap_limit=1000) as running:
        yield running


@contextmanager
def bridging(bridge: Bridge) -> Iterator[Bridge]:
    stop = threading.Event()
    thread = threading.Thread(target=bridge.run, args=(stop,), daemon=True)
    thread.start()
    try:
        yield bridge
    finally:
        stop.set()
        thread.join(WAIT_S)
        bridge.close()


class Heard:
    """The newest revision of each answer of a session."""

    def __init__(self, service: Service, session: str) -> None:
        self.rows: dict[int, Answer] = {}
        self._client = ServiceClient(service.ingest)
        self._listener = self._client.listen(session, wait=True)

    def take(self) -> None:
        for answer in self._listener.receive(0.02):
            self.rows[answer.index] = answer

    def upto(self, last: int) -> None:
        until(f"bin {last} of {sorted(self.rows)[-3:]}", lambda: self.take() or last in self.rows)

    def close(self) -> None:
        self._listener.close()
        self._client.close()


def same(heard: dict[int, Answer], expected: dict[int, Answer]) -> None:
    for index, answer in expected.items():
        assert heard[index].status == answer.status, index
        for name in messages.VECTORS:
            assert np.array_equal(getattr(heard[index], name), getattr(answer, name)), (index, name)


OPTIONS: dict[str, Any] = {"clocked": False, "deadline": 60.0}


@pytest.mark.parametrize("again", [True, False], ids=["another clock", "from 0"])
@pytest.mark.parametrize("kind", [OpenEphys, Synapse, Ezmsg])
def test_a_bridge_survives_what_its_source_does(
    kind: type[Any], again: bool, service: Service
) -> None:
    counts = np.random.default_rng(1).poisson(1.0, (64, UNITS))
    said: list[str] = []
    name = f"odd-{kind.__name__}-{again:d}"
    came: dict[int, Any] = {}

    def send(k: int, index: int, *, twice: bool = False) -> None:
        for frames in source.bin(k, counts[index]):
            for _ in range(1 + twice):
                source.send(*frames)
        came[index] = counts[index]

    with (
        closing(kind()) as source,
        closing(Heard(service, name)) as heard,
        bridging(source.bridge(service, name, say=said.append, **OPTIONS)) as bridge,
    ):
        tally = bridge.tally
        source.wait()
        source.first()
        for k in range(5):
            send(k, k, twice=k in (2, 3))  # each message twice
        until("repeated", lambda: tally["repeated"] >= 2)
        # bin 6 comes before bin 5
        fifth, sixth = source.bin(5, counts[5]), source.bin(6, counts[6])
        for frames in (*sixth, *fifth):
            source.send(*frames)
        came |= {5: counts[5], 6: counts[6]}
        until("late", lambda: tally["late"] >= 1)
        send(7, 7)
        send(8, 8)
        heard.upto(7)
        # bin 9 is lost on the way
        source.bin(9, counts[9])
        send(10, 10)
        send(11, 11)
        until("gap", lambda: tally["gap"] + tally["lost"] > 0)
        lost = [line for line in said if "did not come" in line]
        assert lost
        assert not [line for line in lost if re.search(r"s (\d+) to \1 did", line)]
        heard.upto(10)
        assert heard.rows[9].status == "missing"
        # a channel that the model does not have, and messages that are none
        before = tally["unusable"]
        for frames in source.odd():
            source.send(*frames)
        until("unusable", lambda: tally["unusable"] >= before + 2)
        # the source goes away and comes back, counting anew, and its clock is another
        source.stop()
        until("gone", lambda: any("is gone" in line for line in said))
        gone = time.monotonic()
        until("some bins without the source", lambda: time.monotonic() > gone + 6 * WIDTH_S)
        if again:
            source.begin += {OpenEphys: 10**6, Synapse: 10**13, Ezmsg: 10**4}[kind]
        last = max(heard.rows)
        source.restart()
        source.wait()
        source.first()
        for k in range(20):
            for frames in source.bin(k, counts[20 + k]):
                source.send(*frames)
        for k in range(20, 23):  # silence
            for frames in source.bin(k, [0] * UNITS):
                source.send(*frames)
        until("back", lambda: tally["found"] == 2)
        most = int(sum(map(sum, [*came.values(), *counts[20:40]]))) + UNITS
        # the bins that the lost messages may have been of, and those of the restart, are not known
        least = most - int(counts[10].sum() + counts[20:22].sum()) - UNITS
        until(
            "all spikes",
            lambda: heard.take() or least <= sum(a.spikes for a in heard.rows.values()) <= most,
        )
        assert tally["steps"] == 1
        assert any("clock of the stream was set" in line for line in said)
        assert (tally["refused"], tally["sessions_lost"]) == (0, 0), said
        missing = [k for k, a in heard.rows.items() if k > last and a.status == "missing"]
        assert len(missing) >= 4, sorted(heard.rows)
    known = {k: came[k] for k in range(9)}
    same({k: heard.rows[k] for k in known}, through_sdk(service, f"{name}-sdk", known))


class Rows(ez.Settings):
    counts: Any
    got: Any


class Rig(ez.Unit):
    """Sends counts as arrays of three bins each, and keeps what comes back."""

    SETTINGS = Rows
    OUT = ez.OutputStream(AxisArray)
    IN = ez.InputStream(AxisArray)

    @ez.publisher(OUT)
    async def send(self) -> AsyncGenerator[Any]:
        counts: Any = self.SETTINGS.counts
        for first in range(0, len(counts), 3):
            yield self.OUT, Ezmsg().array(first, counts[first : first + 3], NAMES)

    @ez.subscriber(IN)
    async def take(self, message: AxisArray) -> None:
        got: Any = self.SETTINGS.got
        got[message.attrs["index"]] = message
        if len(got) == len(self.SETTINGS.counts):
            raise ez.NormalTermination


# ---- one recording by every way in -------------------------------------------------------------


def by_publisher(service: Service, source: Any, name: str, counts: Any) -> None:
    with closing(source), bridging(source.bridge(service, name, **OPTIONS)) as bridge:
        source.wait()
        source.first()
        for k, row in enumerate((*counts, counts[0])):  # a bin is closed by the data of the next
            for frames in source.bin(k, row):
                source.send(*frames)
        until("all bins", lambda: bridge.tally["answers"] >= len(counts))
        tally = bridge.tally
        assert tally["refused"] == tally["unusable"] == tally["gap"] == tally["repeated"] == 0


def by_lsl(service: Service, name: str, counts: Any) -> None:
    info = pylsl.StreamInfo(name, "Spikes", UNITS, 1 / WIDTH_S, pylsl.cf_float32, name)
    info.set_channel_labels(list(NAMES[::-1]))
    outlet = pylsl.StreamOutlet(info)
    with bridging(LslBridge(service.ingest, name, name, **OPTIONS)) as bridge:
        assert outlet.wait_for_consumers(WAIT_S)
        for k, row in enumerate(counts):
            outlet.push_sample(row[::-1].astype(float).tolist(), timestamp=1000 + k * WIDTH_S)
        until("all bins", lambda: bridge.tally["answers"] >= len(counts))


def by_events(service: Service, name: str, counts: Any) -> None:
    width, answered = round(WIDTH_S * 1e9), 0
    with ServiceClient(service.ingest) as client:
        options: dict[str, Any] = {"units": NAMES, "bin_width": WIDTH_S, "deadline": 60.0}
        with client.open_spikes(name, origin_ns=0, **options) as session:
            for k, row in enumerate(counts):
                while session.credits <= 0:
                    answered += len(session.receive(WAIT_S))
                units = np.repeat(np.arange(UNITS), row)
                end = (k + 1) * width
                session.send_spikes(k * width + np.arange(len(units)), units, source_ns=end)
            session.send_spikes([], [], source_ns=end, until_ns=end)
            while answered < len(counts):
                answered += len(session.receive(WAIT_S))


def by_ezmsg(service: Service, name: str, counts: Any) -> None:
    got: dict[int, AxisArray] = {}
    settings = IlqrSettings(endpoint=service.ingest, session=name, options=OPTIONS)
    rig, decoder = Rig(Rows(counts, got)), IlqrDecoder(settings)
    ez.run(
        components={"RIG": rig, "DECODER": decoder},
        connections=((rig.OUT, decoder.INPUT_SIGNAL), (decoder.OUTPUT_SIGNAL, rig.IN)),
        force_single_process=True,
    )
    for index, message in got.items():
        assert abs(message.axes["time"].offset - 7 - index * WIDTH_S) < 1e-9
        assert message.data.shape == (1, 2)
    assert list(got[0].axes["ch"].data) == ["vx", "vy"]


def test_one_recording_decodes_alike_by_every_way_in(service: Service) -> None:
    counts = np.random.default_rng(0).poisson(1.0, (60, UNITS))
    expected = through_sdk(service, "sdk", dict(enumerate(counts)))
    ways: dict[str, Callable[[Service, str, Any], None]] = {
        "events": by_events,
        "lsl": by_lsl,
        "ezmsg": by_ezmsg,
        "openephys": lambda *given: by_publisher(given[0], OpenEphys(), *given[1:]),
        "synapse": lambda *given: by_publisher(given[0], Synapse(), *given[1:]),
    }
    for name, way in ways.items():
        with closing(Heard(service, name)) as heard:
            way(service, name, counts)
            heard.upto(len(counts) - 1)
        same(heard.rows, expected)


def test_open_ephys_hears_heartbeats_and_its_ttl_events_become_events(service: Service) -> None:
    with closing(OpenEphys()) as source:
        host, _, port = source.address.rpartition(":")
        beats: zmq.Socket[bytes] = source._context.socket(zmq.REP)
        beats.bind(f"{host}:{int(port) + 1}")
        with (
            ServiceClient(service.ingest) as client,
            bridging(source.bridge(service, "ttl", **OPTIONS)) as bridge,
        ):
            assert beats.poll(WAIT_S * 1e3)
            assert json.loads(beats.recv())["type"] == "heartbeat"
            beats.send(b"heartbeat received")
            source.wait()
            source.first()
            until("open", lambda: any(s.session == "ttl" for s in client.sessions()))
            data = bytes([3, 1]) + (5).to_bytes(8, "little")
            body = {"type": 3, "sample_num": source.begin + 70, "source_node": 101}
            for line in (2**70, "\ud800"):  # no message of ours can hold them
                source.send(*source.message("event", body | {"event_channel": line}, b""))
            source.send(*source.message("event", body, data))
            until("the event", lambda: bridge.tally["markers"] == 1)
            assert bridge.tally["unusable"] == 2
            (session,) = [s for s in service._table if s.name == "ttl"]
        assert len(session.noted) == 1


def test_spikes_are_found_in_broadband_data(service: Service) -> None:
    rng = np.random.default_rng(2)
    samples = rng.normal(0, 10, (RATE * 3, UNITS)).round()
    at = np.sort(rng.choice(np.arange(RATE + 500, RATE * 3 - 500, 100), 60, replace=False))
    units = rng.integers(0, UNITS, 60)
    for sample, unit in zip(at.tolist(), units.tolist(), strict=True):
        samples[sample : sample + 8, unit] -= 300
    with (
        closing(Synapse()) as source,
        closing(Heard(service, "broadband")) as heard,
        bridging(
            SynapseBridge(service.ingest, source.address, "broadband", threshold=8, **OPTIONS)
        ),
    ):
        source.wait()
        kind = frame_types()[1]
        for k, row in enumerate(samples[:, :].astype(int).tolist()):
            stamp = 10**12 + k * 50_000
            frame = kind(timestamp_ns=stamp, sequence_number=k, frame_data=row, sample_rate_hz=RATE)
            source.send(frame.SerializeToString())
        heard.upto(58)
        expected = np.bincount(at // round(RATE * WIDTH_S), minlength=60)
        until(
            "all spikes",
            lambda: (
                heard.take() or [heard.rows[k].spikes for k in range(59)] == list(expected[:59])
            ),
        )
