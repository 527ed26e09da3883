"""Connections that break between a feeder and a real service: a TCP forwarder cuts them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from feeder import UNITS, WAIT_S, Feeder, bin_, open_, spikes
from forwarder import Forwarder
from ilqr_clients.sdk import ServiceClient, Session
from ilqr_service.server import Service
from ilqr_vae.errors import (
    RequestRefusedError,
    ServiceUnreachableError,
    SessionEnd,
    SessionEndedError,
    ShapeError,
)
from ilqr_vae.protocol import messages
from ilqr_vae.recordings.checks import MAX_COUNT
from rig import BIN_S, serving


@pytest.fixture
def forwarder(service: Service) -> Iterator[Forwarder]:
    one = Forwarder(service.ingest)
    yield one
    one.close()


def test_a_plain_feeder_that_reconnects_keeps_its_session(
    service: Service, forwarder: Forwarder
) -> None:
    counts = spikes(40)
    before = service.telemetry.counts().get("reconnected", 0)
    with Feeder(forwarder.address, service.results) as feeder:
        feeder.subscribe("blip")
        feeder.ask(open_("blip"), messages.Opened)
        feeder.send(*(bin_("blip", i, counts[i]) for i in range(20)))
        assert [r.index for r in feeder.results(20)] == list(range(20))
        assert forwarder.cut()
        feeder.send(bin_("blip", 20, counts[20]))
        opened = feeder.reply_of(messages.Opened)
        assert (opened.resumed, opened.next_index) == (True, 21)
        feeder.notice("reconnected: next bin 20")
        feeder.send(*(bin_("blip", i, counts[i]) for i in range(21, 40)))
        results = feeder.results(20)
        assert [(r.index, r.status) for r in results] == [(i, "ok") for i in range(20, 40)]
        feeder.ask(messages.Close(session="blip"), messages.Closed)
    assert service.telemetry.counts()["reconnected"] == before + 1


def test_another_feeder_gets_nothing_of_a_connected_ones_session(service: Service) -> None:
    with (
        Feeder(service.ingest, service.results) as feeder,
        Feeder(service.ingest, service.results) as other,
    ):
        feeder.subscribe("mine")
        feeder.ask(open_("mine"), messages.Opened)
        refused = other.ask(bin_("mine", 0, spikes(1)[0]), messages.Refused)
        assert (refused.field, refused.index) == ("session", 0)
        feeder.send(bin_("mine", 0, spikes(1)[0]))
        assert [r.index for r in feeder.results(1)] == [0]
        feeder.ask(messages.Close(session="mine"), messages.Closed)


# ---- the SDK -----------------------------------------------------------------------------------


@pytest.fixture
def cut_off(service: Service) -> Iterator[tuple[Forwarder, Forwarder]]:
    """Forwarders to the service's two addresses."""
    both = (Forwarder(service.ingest), Forwarder(service.results))
    yield both
    for one in both:
        one.close()


def session_over(
    service: Service, both: tuple[Forwarder, Forwarder], name: str, **options: Any
) -> Session:
    request = open_(name)
    return Session(both[0].address, both[1].address, request, timeout=WAIT_S, **options)


def wait(session: Session) -> None:
    """As a client does that waits for an answer; the session is to end it."""
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end:
        session.receive(1.0)


@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)], ids=["ingest", "results", "both"])
def test_each_step_is_answered_though_connections_break(
    service: Service, cut_off: tuple[Forwarder, Forwarder], which: tuple[int, ...]
) -> None:
    counts = spikes(30)
    with session_over(service, cut_off, f"steps-{len(which)}{which[0]}") as session:
        for index, row in enumerate(counts):
            if index in (10, 20):
                for k in which:
                    assert cut_off[k].cut()
            answer = session.step(np.int64(index), row, WAIT_S)
            assert (answer.index, answer.status) == (index, "ok")
        assert session.refused == []


def test_answers_lost_with_the_results_connection_come_again(
    service: Service, cut_off: tuple[Forwarder, Forwarder]
) -> None:
    counts = spikes(60)
    got: list[tuple[int, int]] = []
    with session_over(service, cut_off, "hole") as session:
        for index, row in enumerate(counts):
            if index == 20:
                assert cut_off[1].cut()
            session.send(index, row)
            if index in (19, 59):
                end = time.monotonic() + WAIT_S
                while len(got) <= index and time.monotonic() < end:
                    got += [(a.index, a.revision) for a in session.receive(0.5)]
    assert sorted(got) == [(i, 0) for i in range(60)]


def test_a_service_that_is_gone_ends_the_wait(
    service: Service, cut_off: tuple[Forwarder, Forwarder]
) -> None:
    session = session_over(service, cut_off, "gone", patience=1.5)
    session.step(0, spikes(1)[0])
    for one in cut_off:
        one.close()
    with pytest.raises(ServiceUnreachableError, match=r"none \(last heard of it \d+\.\d s ago\)"):
        session.step(1, spikes(1)[0], WAIT_S)
    session.send(2, spikes(1)[0])
    with pytest.raises(ServiceUnreachableError):
        wait(session)
    with pytest.raises(ServiceUnreachableError, match=r"bin 3 within 0.01 s, got no connection"):
        session.step(3, spikes(1)[0], 0.01)
    session.abandon()
    with Feeder(service.ingest, service.results) as feeder:  # it is free for its user again
        resumed = feeder.ask(open_("gone", resume=True), messages.Opened)
        assert (resumed.resumed, resumed.next_index) == (True, 1)
        feeder.ask(messages.Close(session="gone"), messages.Closed)


def test_the_end_of_a_session_is_an_exception_with_its_reason(
    service: Service, model_file: Path
) -> None:
    row = spikes(1)[0]
    with ServiceClient(service.ingest) as client:
        first = client.open("twice", units=UNITS, bin_width=BIN_S)
        first.send(0, row)
        with client.open("twice", units=UNITS, bin_width=BIN_S):
            with pytest.raises(SessionEndedError) as ended:
                wait(first)
            assert (ended.value.reason, ended.value.end) == ("restarted: epoch 1", SessionEnd.TAKEN)
            with pytest.raises(SessionEndedError):
                first.send(1, row)
            with pytest.raises(SessionEndedError):
                first.step(1, row)
        first.close()
    with (
        serving(model_file, idle_s=0.3) as short,
        ServiceClient(short.ingest) as client,
        client.open("quiet", units=UNITS, bin_width=BIN_S) as session,
    ):
        session.step(0, row)
        with pytest.raises(SessionEndedError, match=r"ended \(idle\)"):
            wait(session)
        last = client.open("last", units=UNITS, bin_width=BIN_S)
        last.step(0, row)
        short.stop()
        with pytest.raises(SessionEndedError, match=r"ended \(shutdown\)"):
            last.step(1, row)
        last.abandon()


def test_a_refused_bin_ends_its_step_and_no_other(service: Service) -> None:
    with (
        ServiceClient(service.ingest) as client,
        client.open("refused", units=UNITS, bin_width=BIN_S) as session,
    ):
        session.step(0, spikes(1)[0])
        with pytest.raises(RequestRefusedError, match="index"):
            session.step(0, spikes(1)[0])
        assert session.step(1, spikes(1)[0]).index == 1
        for wrong in (-1, 0.5, "1", None):
            with pytest.raises(ShapeError, match="index: expected a whole number"):
                session.step(wrong, spikes(1)[0])  # pyright: ignore[reportArgumentType]


def test_one_limit_of_counts() -> None:
    assert messages.MAX_COUNT == MAX_COUNT
