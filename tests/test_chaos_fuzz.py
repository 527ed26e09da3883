"""Nonsense at the doors of a real service process that has keys: each message a counted error.

Random and mutated messages by hypothesis, at least 1e5 of them with CHAOS=full. Beside them a
session is fed as ever: its answers are, to the last bit, those of an undisturbed run.
"""

from __future__ import annotations

import os
import re
import socket
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from feeder import UNITS, WAIT_S, Feeder, bin_, numbers, open_, spikes
from ilqr_vae.errors import ProtocolError
from ilqr_vae.protocol import messages
from ilqr_vae.protocol.keys import ClientKey, add_client, read_client_key
from process import Served, offline, served
from rig import make_model

pytestmark = pytest.mark.chaos
FULL = os.environ.get("CHAOS") == "full"
BATCH = 40
BATCHES = 2_600 if FULL else 110
LIMIT = 2048
SETTINGS = f"""
max_message_bytes = {LIMIT}
control_rate = 1e9
gap_limit = 5
max_sessions = 1000
credits = 1000
"""
Frames = tuple[bytes, ...]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fuzz")
    add_client(path / "keys", "rig", ("feed", "read"))
    add_client(path / "keys", "fuzz", ("feed", "read", "control"))
    add_client(path / "keys", "reader", ("read",))
    (path / "s.toml").write_text(SETTINGS)
    make_model(path / "m.safetensors", n_units=7, names=UNITS)
    return path


@pytest.fixture(scope="module")
def service(folder: Path) -> Iterator[Served]:
    options = ("--config", str(folder / "s.toml"), "--keys", str(folder / "keys"))
    with served(folder / "m.safetensors", folder / "log", *options) as running:
        yield running
        assert running.stop() == 0
    log = (folder / "log").read_text()
    assert "Traceback" not in log
    assert "could not be handled" not in log


def key(folder: Path, name: str) -> ClientKey:
    return read_client_key(folder / "keys" / f"{name}.key")


def counted(service: Served) -> Counter[str]:
    """Refusals by reason, and ended connections, as /metrics has them."""
    with urllib.request.urlopen(f"http://{service.http}/metrics", timeout=WAIT_S) as page:
        text = page.read().decode()
    found = re.findall(r'^ilqr_refused_total\{reason="(\w+)"\} (\S+)$', text, re.MULTILINE)
    ended = re.findall(r"^ilqr_(disconnected)_total (\S+)$", text, re.MULTILINE)
    return Counter({name: int(float(n)) for name, n in [*found, *ended]})


# ---- what is sent ------------------------------------------------------------------------------

ROW = spikes(1)[0]
GOOD: tuple[messages.Message, ...] = (
    open_("fuzz"),
    bin_("fuzz", 0, ROW),
    bin_("fuzz", 1, ROW, mask=messages.pack(np.ones(7), "u1"), clock=messages.Offset(5, 6)),
    messages.Close(session="fuzz"),
    messages.Describe(),
    messages.Sessions(),
    messages.Models(),
    messages.Probe(client_ns=1),
    messages.Load(path="absent.safetensors"),
    messages.Swap(),
    messages.Rollback(),
)
ENCODED = tuple(messages.encode(m) for m in GOOD)
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.sampled_from([-1, 0, 1, 2**31, 2**53, 2**53 + 1, 2**63]),
    st.floats(),
    st.text(max_size=8),
    st.binary(max_size=16),
    st.lists(st.integers(0, 3), max_size=4),
    st.dictionaries(st.text(max_size=3), st.integers(0, 3), max_size=2),
)


@st.composite
def flipped(draw: st.DrawFn) -> Frames:
    frame = bytearray(draw(st.sampled_from(ENCODED)))
    for at, byte in draw(
        st.lists(st.tuples(st.integers(0, 4096), st.integers(0, 255)), min_size=1, max_size=4)
    ):
        frame[at % len(frame)] = byte
    return (bytes(frame),)


@st.composite
def truncated(draw: st.DrawFn) -> Frames:
    frame = draw(st.sampled_from(ENCODED))
    return (frame[: draw(st.integers(0, len(frame) - 1))],)


@st.composite
def another_field(draw: st.DrawFn) -> Frames:
    """A message with one field of another value or type, one too many, or one too few."""
    fields: dict[str, Any] = msgspec.msgpack.decode(draw(st.sampled_from(ENCODED)))
    name = draw(st.sampled_from([*fields, "new"]))
    if draw(st.integers(0, 4)):
        fields[name] = draw(VALUES)
    else:
        fields.pop(name, None)
    return (msgspec.msgpack.encode(fields),)


MESSAGES: st.SearchStrategy[Frames] = st.one_of(
    st.binary(max_size=64).map(lambda b: (b,)),
    flipped(),
    truncated(),
    another_field(),
    st.tuples(st.sampled_from(ENCODED), st.binary(min_size=1, max_size=8)).map(
        lambda p: (p[0] + p[1],)
    ),
    st.integers(-(2**63), 2**63).map(lambda v: (messages.encode(open_("fuzz", protocol=v)),)),
    st.integers(LIMIT + 1, 4 * LIMIT - 64).map(lambda n: (b"\x81" * n,)),
    st.lists(st.binary(max_size=3), min_size=2, max_size=4).map(tuple),
)


def surely(frames: Frames) -> str:
    """What must be wrong with it by its form alone; "" where that is right."""
    if len(frames) != 1:
        return "frames"
    if len(frames[0]) > LIMIT:
        return "size"
    try:
        message = messages.decode_upstream(frames[0])
    except ProtocolError:
        return "message"
    wrong = isinstance(message, messages.Open) and message.protocol != messages.PROTOCOL
    return "protocol" if wrong and message.session == "fuzz" and not message.model else ""


# ---- the tests ---------------------------------------------------------------------------------


def test_every_random_or_mutated_message_is_a_counted_error_or_understood(
    service: Served, folder: Path
) -> None:
    counts = spikes(BATCHES, seed=3)
    fed, sent, refused_in_all = 0, 0, 0
    answers: list[messages.Result] = []
    addresses = (service.ingest, service.results)
    with (
        Feeder(*addresses, key=key(folder, "rig")) as steady,
        Feeder(*addresses, key=key(folder, "fuzz")) as feeder,
    ):
        steady.subscribe("steady")
        steady.ask(open_("steady"), messages.Opened)

        # one draw is a whole batch: large data, and sending it is no fault of the generator
        checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]

        @settings(max_examples=BATCHES, deadline=None, database=None, suppress_health_check=checks)
        @given(batch=st.lists(MESSAGES, min_size=BATCH, max_size=BATCH))
        def send(batch: list[Frames]) -> None:
            nonlocal fed, sent, refused_in_all
            before = counted(service)
            for frames in batch:
                feeder.dealer.send_multipart(frames)
            sent += len(batch)
            feeder.send(messages.Probe(client_ns=2**62))
            refused: Counter[str] = Counter()
            while True:
                reply = feeder.reply()
                if isinstance(reply, messages.Refused):
                    refused[reply.field.split(".")[0].split("[")[0]] += 1
                if isinstance(reply, messages.Probed) and reply.client_ns == 2**62:
                    break
            must = Counter(kind for frames in batch if (kind := surely(frames)))
            assert must <= refused
            assert all(must[kind] == refused[kind] for kind in ("frames", "size", "message"))
            assert sum(refused.values()) <= len(batch)
            grown = counted(service) - before
            assert grown == refused  # each of them counted, by the reason that was said
            refused_in_all += sum(refused.values())
            if fed < len(counts):
                steady.send(bin_("steady", fed, counts[fed]))
                answers.extend(steady.results(1))
                fed += 1
            for info in feeder.ask(messages.Sessions(), messages.SessionList).sessions:
                if info.session != "steady":
                    feeder.send(messages.Close(session=info.session, epoch=info.epoch))
            feeder.ask(messages.Models(), messages.ModelList)

        send()
        steady.ask(messages.Close(session="steady"), messages.Closed)
    assert sent >= (100_000 if FULL else 4_000)
    assert refused_in_all > 0.7 * sent
    assert [(r.index, r.revision, r.status) for r in answers] == [(i, 0, "ok") for i in range(fed)]
    whole = np.ones((fed, len(UNITS)), dtype=bool)
    undisturbed = offline(folder / "m.safetensors", counts[:fed], whole)
    for result, expected in zip(answers, undisturbed, strict=True):
        np.testing.assert_array_equal(numbers(result), expected)


@contextmanager
def connected(service: Served, key: ClientKey | None) -> Iterator[zmq.Socket[bytes]]:
    """A feeder's socket that does not come back once it is cut off."""
    context: zmq.Context[Any] = zmq.Context()
    try:
        dealer = context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.RECONNECT_IVL, -1)
        if key is not None:
            key.apply(dealer)
        dealer.connect(service.ingest)
        yield dealer
    finally:
        context.destroy(linger=0)


def test_what_libzmq_cuts_off_or_lets_not_in_is_counted_too(service: Served, folder: Path) -> None:
    """Too large to be read at all; keys that are not known, not the owner's, not this service's;
    no key; no ZeroMQ. Each connects once."""
    rig, repeat = key(folder, "rig"), 40 if FULL else 4
    with Feeder(service.ingest, service.results, key=rig) as steady:
        steady.subscribe("held")
        steady.ask(open_("held"), messages.Opened)

        def settled(before: Counter[str], **wanted: int) -> None:
            """Counted, within as many questions as the service answers in that time."""
            for _ in range(4_000):
                grown = counted(service) - before
                if all(grown[kind] >= n for kind, n in wanted.items()):
                    break
                steady.ask(messages.Describe(), messages.Described)
            # somebody of before may have left only now, which counts as disconnected as well
            assert grown.pop("disconnected") >= wanted.pop("disconnected")
            assert {kind: grown[kind] for kind in wanted} == wanted

        def pair(**changes: str) -> ClientKey:
            return msgspec.structs.replace(rig, **changes)

        def fresh() -> tuple[str, str]:
            public, secret = zmq.curve_keypair()
            return public.decode(), secret.decode()

        describe = messages.encode(messages.Describe())
        for _ in range(repeat):
            (public, secret), (other, _unused) = fresh(), fresh()
            for made, message, reason in (
                (rig, b"x" * (5 * LIMIT), ""),
                (pair(public=public, secret=secret), describe, "key"),
                (pair(secret=secret), describe, "handshake"),  # another's name without its secret
                (pair(server=other), describe, "handshake"),
                (None, describe, "handshake"),
            ):
                before = counted(service)
                with connected(service, made) as dealer:
                    # whoever is not let in may know it by now, and has nobody to send to
                    with suppress(zmq.Again):
                        dealer.send(message, zmq.NOBLOCK)
                    settled(before, disconnected=1, **({reason: 1} if reason else {}))
        host, port = service.ingest.removeprefix("tcp://").split(":")
        rng = np.random.default_rng(0)
        for size in rng.integers(1, 2_000, 4 * repeat):
            before = counted(service)
            with socket.create_connection((host, int(port))) as raw:
                raw.sendall(rng.bytes(int(size)))
            settled(before, disconnected=1)
        steady.send(*(bin_("held", i, ROW) for i in range(5)))
        assert {r.status for r in steady.results(5)} == {"ok"}
        steady.ask(messages.Close(session="held"), messages.Closed)


def test_nonsense_at_the_results_socket_is_counted_and_disturbs_no_subscriber(
    service: Served, folder: Path
) -> None:
    """What is no (un)subscription is counted; topics of any bytes are just topics."""
    rig, rounds = key(folder, "rig"), 200 if FULL else 20
    with Feeder(service.ingest, service.results, key=rig) as steady:
        steady.subscribe("heard")
        steady.ask(open_("heard"), messages.Opened)
        context: zmq.Context[Any] = zmq.Context()
        try:
            stranger = context.socket(zmq.XSUB)
            stranger.setsockopt(zmq.RECONNECT_IVL, -1)
            rig.apply(stranger)
            stranger.connect(service.results)
            before, sent, fed = counted(service), 0, 0

            @settings(max_examples=rounds, deadline=None, database=None)
            @given(frames=st.lists(st.binary(min_size=1, max_size=80), min_size=10, max_size=10))
            def send(frames: list[bytes]) -> None:
                nonlocal sent, fed
                for frame in frames:
                    stranger.send(frame)
                sent += sum(frame[0] > 1 for frame in frames)
                steady.send(bin_("heard", fed, ROW))
                assert [r.index for r in steady.results(1)] == [fed]
                fed += 1

            send()
            for _ in range(4_000):
                if counted(service)["subscription"] - before["subscription"] >= sent:
                    break
                steady.ask(messages.Describe(), messages.Described)
            assert counted(service)["subscription"] - before["subscription"] == sent > 0
            before = counted(service)
            stranger.send(b"\x01" + b"t" * 5_000)  # a topic too long: cut off
            for _ in range(4_000):
                if counted(service)["disconnected"] > before["disconnected"]:
                    break
                steady.ask(messages.Describe(), messages.Described)
            assert counted(service)["disconnected"] > before["disconnected"]
        finally:
            context.destroy(linger=0)
        steady.ask(messages.Close(session="heard"), messages.Closed)


def test_a_reader_that_tries_to_feed_is_refused_and_counted(service: Served, folder: Path) -> None:
    addresses = (service.ingest, service.results)
    with (
        Feeder(*addresses, key=key(folder, "rig")) as steady,
        Feeder(*addresses, key=key(folder, "reader")) as reader,
    ):
        steady.subscribe("mine")
        reader.subscribe("mine")  # that it may
        steady.ask(open_("mine"), messages.Opened)
        before = counted(service)
        tried = (open_("mine", epoch=1), bin_("mine", 0, ROW), messages.Close(session="mine"))
        for message in (
            *tried,
            messages.Swap(),
            messages.Load(path="m.safetensors"),
            messages.Rollback(),
        ):
            assert reader.ask(message, messages.Refused).field == "role"
        assert counted(service) - before == Counter({"role": 6})
        steady.send(bin_("mine", 0, ROW))
        (mine,), (seen,) = steady.results(1), reader.results(1)
        assert mine == seen
        assert (mine.index, mine.epoch, mine.status) == (0, 0, "ok")
        steady.ask(messages.Close(session="mine"), messages.Closed)
