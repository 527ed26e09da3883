"""No call of the SDK waits in vain: what a service refuses, ends or leaves open is raised."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from feeder import UNITS, WAIT_S, spikes
from ilqr_clients import (
    Answer,
    AnswerTimeoutError,
    AsyncServiceClient,
    RequestRefusedError,
    ServiceClient,
    ServiceError,
    ServiceUnreachableError,
    Session,
    SessionEndedError,
)
from ilqr_service.server import Service
from ilqr_vae.errors import ShapeError
from process import served
from rig import BIN_S, serving

ROW = spikes(1)[0]


@pytest.fixture
def client(service: Service) -> Iterator[ServiceClient]:
    with ServiceClient(service.ingest, timeout=WAIT_S) as connected:
        yield connected


def receive(source: Session, n: int) -> list[Answer]:
    got: list[Answer] = []
    end = time.monotonic() + WAIT_S
    while len(got) < n and time.monotonic() < end:
        got += source.receive(0.5)
    return got


def test_a_killed_service_is_an_exception_within_the_timeout(
    model_file: Path, tmp_path: Path
) -> None:
    with (
        served(model_file, tmp_path / "log") as service,
        ServiceClient(service.ingest, timeout=WAIT_S) as client,
        client.listen("late", wait=True, patience=0.3) as listener,
        client.open("rat-7", units=UNITS, bin_width=BIN_S) as session,
    ):
        assert session.step(0, ROW, timeout=WAIT_S).index == 0
        service.kill()
        with pytest.raises(ServiceUnreachableError, match=f"{service.ingest}.*bin 1 within 0.5 s"):
            session.step(1, ROW, timeout=0.5)
        with pytest.raises(ServiceUnreachableError, match=r"a sign of life within 0\.3 s"):
            listener.receive(WAIT_S)


def test_a_refused_bin_is_raised_by_whichever_call_comes_next(client: ServiceClient) -> None:
    with client.open("refused-bin", units=UNITS, bin_width=BIN_S) as session:
        session.step(0, ROW)
        session.send(0, ROW)
        with pytest.raises(RequestRefusedError) as caught:
            session.receive(WAIT_S)
        error = caught.value
        assert (error.field, error.expected, error.got) == ("index", "1 or above", "0")
        assert (error.endpoint, error.index) == (client.endpoint, 0)
        assert str(error) == f"index (refused by {client.endpoint}): expected 1 or above, got 0"
        session.send(1, ROW)  # said once, and the session goes on
        assert [a.index for a in receive(session, 1)] == [1]
        with pytest.raises(RequestRefusedError, match=r"index.*2 or above, got 1"):
            session.step(1, ROW)
        assert session.receive() == []
        assert [r.index for r in session.refused] == [0, 1]


def test_refusals_go_to_a_callback_where_asked(service: Service, model_file: Path) -> None:
    heard: list[ServiceError] = []
    with (
        serving(model_file, credits=2, idle_s=0.3) as short,
        ServiceClient(short.ingest, timeout=WAIT_S) as client,
        client.open("told", units=UNITS, bin_width=BIN_S, on_error=heard.append) as session,
    ):
        session.step(0, ROW, WAIT_S)
        session.send(0, ROW)
        end = time.monotonic() + WAIT_S
        while len(heard) < 2 and time.monotonic() < end:
            assert session.receive(0.1) == []
        refused, ended = heard
        assert isinstance(refused, RequestRefusedError)
        assert (refused.field, refused.index) == ("index", 0)
        assert isinstance(ended, SessionEndedError)
        assert ended.reason == "idle"
        assert session.receive() == []
        with pytest.raises(SessionEndedError):
            session.send(1, ROW)
        assert len(heard) == 2


def test_a_step_that_is_repeated_waits_on_and_sends_nothing(client: ServiceClient) -> None:
    with client.open("repeat", units=UNITS, bin_width=BIN_S) as session:
        session.send(0, ROW)
        assert session.step(0, ROW, WAIT_S).index == 0
        with pytest.raises(AnswerTimeoutError, match="an answer for bin 1 within 0 s, got none"):
            session.step(1, ROW, timeout=0)
        assert session.step(1, ROW, WAIT_S).index == 1
        assert session.refused == []


def test_integers_and_names_of_numpy_are_taken(client: ServiceClient) -> None:
    names = np.array(UNITS)
    with client.open(
        "numpy",
        units=names,  # pyright: ignore[reportArgumentType]  # a sequence of strings all the same
        bin_width=np.float64(BIN_S),
        epoch=np.int32(3),
        answered=np.int64(-1),
        clocked=np.False_,
    ) as session:
        for index in np.arange(3, dtype=np.uint8):
            sent = np.int64(1000 + int(index))
            answer = session.step(index, ROW.astype(np.float32), WAIT_S, source_ns=sent)
            assert (answer.session, answer.epoch, answer.source_ns) == ("numpy", 3, sent)


OPENED: dict[str, Any] = {"session": "odd", "units": UNITS, "bin_width": BIN_S}
ODD: list[tuple[str, str, dict[str, Any], str]] = [
    *(("open", "session", OPENED | {"session": odd}, "text") for odd in (5, None, b"s")),
    *(("open", "units", OPENED | {"units": odd}, "a list of names") for odd in (None, 7, "abc")),
    ("open", r"units\[1\]", OPENED | {"units": ["a", 2]}, "text"),
    *(("open", "answered", OPENED | {"answered": odd}, "a whole number") for odd in (1.0, "1", -2)),
    *(
        ("open", "bin_width", OPENED | {"bin_width": odd}, "a number, at")
        for odd in (None, "1", -1)
    ),
    *(
        ("open", name, OPENED | {name: odd}, "True or False")
        for name in ("anytime", "clocked", "watch_units", "resume", "hear_events", "hear_details")
        for odd in ("no", None, 2)
    ),
    *(
        ("open", name, OPENED | {name: odd}, "a number, ")
        for name in ("deadline", "grace", "patience")
        for odd in ("1", [], np.nan, np.inf)
    ),
    *(
        ("open", name, OPENED | {name: odd}, "a whole number, ")
        for name in ("epoch", "lag", "origin_ns")
        for odd in ("1", 0.5, 2**64)
    ),
    ("open", "abstain", OPENED | {"abstain": "all"}, "a number, "),
    ("open", "model", OPENED | {"model": None}, "text"),
    ("open", "on_error", OPENED | {"on_error": "raise"}, "something to call"),
    ("open_spikes", "origin_ns", OPENED | {"origin_ns": 0.5}, "a whole number"),
    ("listen", "session", {"session": 5}, "text"),
    ("listen", "wait", {"session": "odd", "wait": "yes"}, "True or False"),
    ("listen", "patience", {"session": "odd", "patience": None}, "a number"),
    ("load", "path", {"path": 5}, "text"),
    ("load", "shadow", {"path": "m", "shadow": "no"}, "True or False"),
    ("load", "timeout", {"path": "m", "timeout": "1"}, "a number"),
    ("swap", "slot", {"slot": None}, "text"),
    ("roll_back", "slot", {"slot": 1}, "text"),
    ("clock", "probes", {"probes": 1.5}, "a whole number"),
    ("event", "session", {"session": 1, "name": "e"}, "text"),
    ("event", "name", {"session": "odd", "name": None}, "text"),
    ("event", "payload", {"session": "odd", "name": "e", "payload": [1]}, "a map"),
    ("event", "time_ns", {"session": "odd", "name": "e", "time_ns": "now"}, "a whole number"),
    ("event", "token", {"session": "odd", "name": "e", "token": 1}, "text"),
]


def test_an_argument_of_the_wrong_kind_is_named_and_nothing_is_sent(client: ServiceClient) -> None:
    for method, field, arguments, expected in ODD:
        with pytest.raises(ShapeError, match=rf"^{field}: expected {expected}.*, got "):
            getattr(client, method)(**arguments)
    assert "odd" not in [session.session for session in client.sessions()]
    with pytest.raises(RequestRefusedError, match=r"session.*: expected 1-64 of"):
        client.open(**(OPENED | {"session": ""}))
    odd: Any
    for name, odd in (("endpoint", {"endpoint": 5}), ("timeout", {"endpoint": "", "timeout": "1"})):
        with pytest.raises(ShapeError, match=f"^{name}: expected "):
            ServiceClient(**odd)
    with client.open(**OPENED) as session:
        for method, arguments in ((session.receive, ("1",)), (session.step, (0, ROW, "1"))):
            with pytest.raises(ShapeError, match=r"^timeout: expected a number"):
                method(*arguments)


def test_a_listener_reads_what_another_feeds(client: ServiceClient, service: Service) -> None:
    session = client.open("rat-7", units=UNITS, bin_width=BIN_S)
    with (
        pytest.raises(ServiceError, match=r"expected one that is open \(rat-7\), got 'rat-8'"),
    ):
        client.listen("rat-8")
    session.step(0, ROW, WAIT_S)
    with client.listen("rat-7") as listener:
        assert listener.newest is not None
        assert listener.newest.index == 0
        assert listener.receive() == []  # it was published before
        given = [session.step(i, ROW, WAIT_S) for i in (1, 2, 3)]
        session.close()
        answers = list(listener)
        assert [a.index for a in answers] == [1, 2, 3]
        assert all(np.array_equal(a.latent, b.latent) for a, b in zip(answers, given, strict=True))
        with client.open("rat-7", units=UNITS, bin_width=BIN_S) as again:  # and what comes after
            again.step(0, ROW, WAIT_S)
            assert [a.index for a in listener.receive(WAIT_S)] == [0]
            with client.open("rat-7", units=UNITS, bin_width=BIN_S) as restarted:
                restarted.step(0, ROW, WAIT_S)
                (answer,) = listener.receive(WAIT_S)
                assert (answer.index, answer.epoch, listener.epoch) == (0, 1, 1)
    with pytest.raises(ServiceError, match="none is"):
        client.listen("rat-7")


def test_a_listener_is_told_why_a_session_ended(model_file: Path) -> None:
    with (
        serving(model_file, idle_s=0.3) as short,
        ServiceClient(short.ingest, timeout=WAIT_S) as client,
        client.listen("quiet", wait=True) as listener,
        client.open("quiet", units=UNITS, bin_width=BIN_S),
        pytest.raises(SessionEndedError, match=rf"'quiet' at {short.ingest}.*ended \(idle\)"),
    ):
        list(listener)


def test_the_same_for_asyncio(service: Service) -> None:
    async def feed(client: AsyncServiceClient) -> list[Answer]:
        async with await client.open("aio", units=UNITS, bin_width=BIN_S) as session:
            answers = [await session.step(i, ROW, WAIT_S) for i in range(3)]
            with pytest.raises(RequestRefusedError, match="index"):
                await session.step(1, ROW)
            return answers

    async def listen(client: AsyncServiceClient, ready: asyncio.Event) -> list[Answer]:
        async with await client.listen("aio", wait=True) as listener:
            ready.set()
            return [answer async for answer in listener]

    async def both() -> tuple[list[Answer], list[Answer]]:
        async with AsyncServiceClient(service.ingest, timeout=WAIT_S) as client:
            ready = asyncio.Event()
            listening = asyncio.create_task(listen(client, ready))
            await ready.wait()
            fed = await feed(client)
            return fed, await listening

    fed, heard = asyncio.run(both())
    assert [a.index for a in fed] == [a.index for a in heard] == [0, 1, 2]
