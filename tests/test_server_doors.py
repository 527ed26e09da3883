"""What comes to the service's doors that should not: nonsense, and what it says of itself."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feeder import UNITS, WAIT_S, Feeder, bin_, open_, spikes
from ilqr_service.server import Service
from ilqr_vae.protocol import messages

# ---- nonsense ----------------------------------------------------------------------------------

GOOD_BIN = messages.encode(bin_("steady", 0, spikes(1)[0]))


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (b"", "message"),
        (b"\xc1", "message"),
        (b"not messagepack", "message"),
        (GOOD_BIN[:-3], "message"),
        (GOOD_BIN + b"\x00", "message"),
        (GOOD_BIN.replace(b"source_ns", b"sauce__ns"), "message"),
        (GOOD_BIN.replace(b"<u2", b"|O8"), "message"),
        (b"\x91" * 100_000, "message"),
        (messages.encode(messages.Closed(session="s", epoch=0, bins=0)), "message"),
        (open_("s", protocol=messages.PROTOCOL + 1), "protocol"),
        (open_("s", protocol=1), "protocol"),
        (open_("s", units=UNITS[:-1]), "units"),
        (open_("s", units=UNITS[::-1]), "units[0]"),
        (open_("s", bin_width_ns=20_000_000), "bin_width_ns"),
        (bin_("nobody", 0, spikes(1)[0]), "session"),
        (bin_("steady", 3, np.ones(3)), "counts.shape"),
        (
            GOOD_BIN.replace(b"\xa5shape\x91\x07", b"\xa5shape\xdd\0\x0f\x42\x40" + b"\1" * 10**6),
            "message",
        ),
        (open_("s", units=("a",) * 100_000), "message"),
        (messages.Close(session="nobody"), "session"),
    ],
)
def test_a_wrong_message_is_refused_counted_and_disturbs_nothing(
    service: Service, feeder: Feeder, message: messages.Message | bytes, field: str
) -> None:
    counted = f"refused:{field.split('.')[0].split('[')[0]}"
    feeder.subscribe("steady")
    feeder.ask(open_("steady"), messages.Opened)
    before = service.telemetry.counts().get(counted, 0)
    feeder.send(bin_("steady", 0, spikes(1)[0]))
    refused = feeder.ask(message, messages.Refused)
    assert refused.field == field
    feeder.send(bin_("steady", 1, spikes(1)[0]))
    assert [(r.index, r.status) for r in feeder.results(2)] == [(0, "ok"), (1, "ok")]
    assert service.telemetry.counts()[counted] == before + 1
    feeder.ask(messages.Close(session="steady"), messages.Closed)


def test_several_frames_are_refused(feeder: Feeder) -> None:
    for frames in ([b"", b""], [b"", GOOD_BIN], [b"x"] * 50):
        feeder.dealer.send_multipart(frames)
        assert feeder.reply_of(messages.Refused).field == "frames"


def test_an_oversized_message_costs_its_sender_the_connection_only(
    service: Service, feeder: Feeder
) -> None:
    with Feeder(service.ingest, service.results) as big:
        big.ask(messages.Describe(), messages.Described)
        big.send(b"x" * (2 << 20))
        assert feeder.ask(messages.Describe(), messages.Described).ready


def test_what_a_peer_asks_that_reads_no_replies_is_not_even_computed(
    service: Service, feeder: Feeder, monkeypatch: pytest.MonkeyPatch
) -> None:
    described, made = service._described, 0

    def counted() -> messages.Described:
        nonlocal made
        made += 1
        return described()

    def dropped() -> int:
        return service.telemetry.counts().get("unreachable", 0)

    monkeypatch.setattr(service._control, "_described", counted)
    before, end = dropped(), time.monotonic() + WAIT_S
    with Feeder(service.ingest, service.results) as deaf:
        while dropped() == before:
            assert time.monotonic() < end
            deaf.send(*[messages.Describe()] * 100)
            feeder.ask(messages.Probe(client_ns=0), messages.Probed)
        made, before = 0, dropped()
        deaf.send(*[messages.Describe()] * 200)
        while dropped() < before + 100:
            assert time.monotonic() < end
        assert made == 0


def test_random_and_mutated_messages_are_each_refused_or_understood(
    service: Service, feeder: Feeder
) -> None:
    good = [
        *(messages.encode(m) for m in (open_("fuzz"), messages.Describe(), messages.Sessions())),
        messages.encode(messages.Close(session="fuzz")),
        GOOD_BIN,
    ]

    @st.composite
    def mutated(draw: st.DrawFn) -> bytes:
        frame = bytearray(draw(st.sampled_from(good)))
        for _ in range(draw(st.integers(1, 4))):
            frame[draw(st.integers(0, len(frame) - 1))] = draw(st.integers(0, 255))
        return bytes(frame[: draw(st.integers(0, len(frame)))])

    @settings(max_examples=300, deadline=None)
    @given(frame=st.binary(max_size=64) | mutated())
    def send(frame: bytes) -> None:
        feeder.send(frame)
        reply = feeder.reply()
        assert isinstance(
            reply,
            messages.Refused
            | messages.Opened
            | messages.Closed
            | messages.Described
            | messages.SessionList,
        )
        if isinstance(reply, messages.Opened):
            feeder.ask(messages.Close(session=reply.session, epoch=reply.epoch), messages.Closed)

    send()
    assert service.healthy
