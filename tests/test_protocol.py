"""The protocol's page, its test vectors, and that it can grow: both ways, with real peers."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgpack
import numpy as np
import pytest
import zmq

import protocol_examples as examples
from ilqr_clients.sdk import ServiceClient, model_of
from ilqr_service.server import Service
from ilqr_vae.errors import ProtocolError, RequestRefusedError
from ilqr_vae.protocol import messages
from rig import make_model, serving

COUNTS = np.random.default_rng(3).poisson(1.0, (6, 5))


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    model = make_model(tmp_path_factory.mktemp("protocol") / "m.safetensors", n_units=5)
    with serving(model) as running:
        yield running


# ---- the page and the vectors ------------------------------------------------------------------


def page() -> dict[str, dict[str, list[str]]]:
    """The rows of the page's tables by message and field: type, default, since, meaning."""
    sections = re.split(r"^### ", examples.PAGE.read_text(), flags=re.MULTILINE)[1:]
    found: dict[str, dict[str, list[str]]] = {}
    for section in sections:
        name, _, body = section.partition("\n")
        rows = [
            line.strip("| ").split(" | ") for line in body.splitlines() if line.startswith("| `")
        ]
        found[name] = {row[0].strip("`"): row[1:] for row in rows}
    return found


def test_the_page_has_every_field_with_its_type_and_default() -> None:
    written = page()
    assert set(written) == {examples.title(kind) for kind in examples.kinds()}
    for kind in examples.kinds():
        stated = {field: tuple(row[:2]) for field, row in written[examples.title(kind)].items()}
        assert stated == examples.rows(kind), kind
    for row in (row for fields in written.values() for row in fields.values()):
        assert row[2] in ("2", "2.1")
        assert row[3]


def test_the_vectors_are_those_of_the_page_and_of_both_sides() -> None:
    vectors = json.loads(examples.VECTORS.read_text())
    assert vectors == examples.vectors(), "a message changed: its page, then protocol_examples.py"
    every = [*examples.UPSTREAM, *examples.DOWNSTREAM, *examples.PUBLISHED]
    sides = {
        "client": messages.decode_upstream,
        "service": messages.decode_downstream,
        "published": messages.decode_published,
    }
    for vector, message in zip(vectors, every, strict=True):
        frame = bytes.fromhex(vector["hex"])
        assert sides[vector["sent"]](frame) == message
        assert examples.decoded(msgpack.unpackb(frame)) == vector["json"]
    known = {
        *messages.Upstream.__args__,
        *messages.Downstream.__args__,
        *messages.Published.__args__,
    }
    assert {type(m) for m in every} == known
    fields = page()
    for vector in vectors:
        assert set(vector["json"]) - {"type"} <= set(fields[vector["type"]])


# ---- growing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("decode", [messages.decode_downstream, messages.decode_published])
def test_a_client_ignores_types_it_does_not_know_and_nothing_else(decode: Any) -> None:
    assert decode(msgpack.packb({"type": "novelty", "session": 3})) is None
    for bad in (b"", b"\xc1", msgpack.packb(7), msgpack.packb({"type": 7}), msgpack.packb({})):
        with pytest.raises(ProtocolError):
            decode(bad)


def _talk(service: Service, *up: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """Send messages with msgpack alone; the replies, and what is published of six bins."""
    context: zmq.Context[Any] = zmq.Context()
    dealer, sub = context.socket(zmq.DEALER), context.socket(zmq.SUB)
    replies: list[Any] = []
    published: list[Any] = []
    try:
        sub.connect(service.results)
        sub.subscribe(b"plain\0")
        assert sub.poll(5000)
        sub.recv_multipart()
        dealer.connect(service.ingest)
        for message in up:
            dealer.send(msgpack.packb(message))
        while not replies or replies[-1]["type"] not in ("closed", "refused"):
            assert dealer.poll(5000), replies
            replies.append(msgpack.unpackb(dealer.recv()))
        while replies[-1]["type"] == "closed" and (
            not published or published[-1].get("what") != "closed"
        ):
            assert sub.poll(5000), published
            published.append(msgpack.unpackb(sub.recv_multipart()[1]))
    finally:
        context.destroy(linger=0)
    return replies, published


def _session(**more: Any) -> list[dict[str, Any]]:
    """A session of six bins as a client of protocol 2 sends it, with more in each message."""
    name = {"session": "plain", "epoch": 0}
    units = [f"unit{i}" for i in range(5)]
    request = {"protocol": 2, "units": units, "bin_width_ns": 50_000_000, "deadline_ns": 0}
    bins = [
        {"type": "bin", **name, "index": k, "source_ns": k * 50_000_000}
        | {"counts": messages_packed(row) | more, "clock": [0, 5, *more.values()]}
        for k, row in enumerate(COUNTS)
    ]
    up = [{"type": "open", **name, **request}, *bins, {"type": "close", **name}]
    others = ["describe", "sessions", "models"]
    return [message | more for message in [{"type": one} for one in others] + up]


def messages_packed(row: Any) -> dict[str, Any]:
    return {"dtype": "<u2", "shape": [len(row)], "data": row.astype("<u2").tobytes()}


def test_the_service_ignores_fields_it_does_not_know_and_names_those_of_an_open(
    service: Service,
) -> None:
    plain = _talk(service, *_session())
    novel = _talk(service, *_session(novelty=[{"x": 1}]))
    ((first,), (other,)) = (
        [r for r in replies if r["type"] == "opened"] for replies, _ in (plain, novel)
    )
    assert other.pop("ignored") == ["novelty"]
    assert first == other
    decodes = [
        [r["kinematics"] for r in published if r["type"] == "result"]
        for _, published in (plain, novel)
    ]
    assert len(decodes[0]) == len(COUNTS)
    assert decodes[0] == decodes[1]
    (refused,), _ = _talk(service, {"type": "novelty", "session": "plain"})
    assert refused["field"] == "message"


def test_what_is_sent_to_a_client_of_protocol_2_has_only_what_it_knows(service: Service) -> None:
    known = {
        kind: {field for field, row in fields.items() if row[2] == "2"}
        for kind, fields in page().items()
    }
    replies, published = _talk(service, *_session())
    seen = {message["type"] for message in (*replies, *published)}
    assert {"described", "sessionlist", "modellist", "opened", "closed", "result", "notice"} <= seen
    for message in (*replies, *published):
        assert set(message) - {"type"} <= known[message["type"]], message


class Newer:
    """A relay that makes a service look like a later version to its client, or the other way round:
    fields that nobody knows in every message, and messages of types that nobody knows."""

    def __init__(self, service: Service, to_service: tuple[str, ...]) -> None:
        self._to_service = to_service
        context: zmq.Context[Any] = zmq.Context()
        self._context = context
        self._front, self._back = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
        self._out, self._in = context.socket(zmq.XPUB), context.socket(zmq.XSUB)
        self.ingest = f"tcp://127.0.0.1:{self._front.bind_to_random_port('tcp://127.0.0.1')}"
        self.results = f"tcp://127.0.0.1:{self._out.bind_to_random_port('tcp://127.0.0.1')}"
        self._back.connect(service.ingest)
        self._in.connect(service.results)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    @contextmanager
    def running(self) -> Iterator[Newer]:
        self._thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            self._thread.join()
            self._context.destroy(linger=0)

    def _novel(self, frame: bytes) -> bytes:
        message = msgpack.unpackb(frame)
        if message["type"] == "described":
            message["results"] = self.results
        return msgpack.packb(
            {
                "novelty": {"of": 3},
                **{k: v | {"novelty": 1} if isinstance(v, dict) else v for k, v in message.items()},
            }
        )

    def _run(self) -> None:
        poller = zmq.Poller()
        for socket in (self._front, self._back, self._out, self._in):
            poller.register(socket, zmq.POLLIN)
        peer = b""
        unknown = msgpack.packb({"type": "novelty", "session": ["x"], "epoch": "none"})
        while not self._stop.is_set():
            ready = dict(poller.poll(50))
            if self._front in ready:
                peer, frame = self._front.recv_multipart()
                known = msgpack.unpackb(frame)["type"] not in self._to_service
                self._back.send(frame if known else self._novel(frame))
            if self._back in ready:
                for frame in (unknown, self._novel(self._back.recv())):
                    self._front.send_multipart([peer, frame])
            if self._out in ready:
                self._in.send(self._out.recv())
            if self._in in ready:
                topic, frame = self._in.recv_multipart()
                for one in (unknown, self._novel(frame)):
                    self._out.send_multipart([topic, one])


def _decode(client: ServiceClient, name: str) -> list[bytes]:
    model = model_of(client.describe())
    with client.open(name, units=model.unit_names, bin_width=model.bin_width) as session:
        answers = [session.step(k, row, timeout=10.0) for k, row in enumerate(COUNTS)]
        client.event(name, "cue", {"x": 1})
        assert session.refused == []
        assert client.sessions()[0].session == name
    return [answer.kinematics.tobytes() for answer in answers]


def test_the_sdk_works_with_a_later_service_and_a_later_client_with_this_one(
    service: Service,
) -> None:
    with ServiceClient(service.ingest) as client:
        expected = _decode(client, "as-it-is")
    later = ("bin", "describe", "sessions", "probe", "event", "close")
    with Newer(service, later).running() as relay, ServiceClient(relay.ingest) as client:
        assert _decode(client, "later") == expected


def test_the_sdk_says_that_a_service_does_not_know_an_option(service: Service) -> None:
    with Newer(service, ("open",)).running() as relay, ServiceClient(relay.ingest) as client:
        model = model_of(client.describe())
        with pytest.raises(RequestRefusedError, match=r"open\.novelty"):
            client.open("older", units=model.unit_names, bin_width=model.bin_width)
