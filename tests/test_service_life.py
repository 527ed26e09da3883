"""A service's life around its sessions: not ready until warm, kept warm, silent sessions ended."""

from __future__ import annotations

import socket
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from feeder import UNITS, WAIT_S, Feeder, bin_, numbers, open_, spikes
from ilqr_service import server
from ilqr_service.serve_cli import await_ready
from ilqr_service.server import Service
from ilqr_service.settings import ServiceSettings
from ilqr_service.solving.engine import Engine
from ilqr_service.transport.connections import Received
from ilqr_vae.protocol import messages
from process import offline
from rig import serving, until


def ready(address: str) -> int:
    """The status of /readyz; 0 where nobody listens yet."""
    try:
        with urllib.request.urlopen(f"http://{address}/readyz", timeout=WAIT_S) as page:
            return page.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except OSError:
        return 0


def test_ready_only_when_warm_and_then_at_once(model_file: Path) -> None:
    """Whoever asks from the first moment on: refused and 503, then served and 200."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        http = f"127.0.0.1:{s.getsockname()[1]}"
    settings = ServiceSettings(
        ingest="tcp://127.0.0.1:*", results="tcp://127.0.0.1:*", http=http, device="cpu"
    )
    service = Service(Engine.load(model_file, settings), settings)
    statuses: list[int] = []

    def watch() -> None:
        while not statuses or statuses[-1] != 200:
            statuses.append(ready(http))

    watching = threading.Thread(target=watch)
    watching.start()
    service.start()
    try:
        with Feeder(service.ingest, service.results) as feeder:
            while True:
                feeder.send(open_("early"))
                reply = feeder.reply()
                if isinstance(reply, messages.Opened):
                    break
                assert isinstance(reply, messages.Refused)
                assert (reply.field, reply.got) == ("service", "still warming up")
            feeder.subscribe("early")
            feeder.send(bin_("early", 0, spikes(1)[0]))
            assert feeder.results(1)[0].status == "ok"
        watching.join(WAIT_S)
        assert not watching.is_alive()
        assert set(statuses[:-1]) <= {0, 503}
        assert ready(http) == 200
    finally:
        service.stop()
    assert service.failure is None


def test_one_that_ended_while_it_warmed_up_is_never_called_ready(model_file: Path) -> None:
    running, told = threading.Event(), threading.Event()
    told.set()
    with serving(model_file) as service:
        assert await_ready(service, running)
        assert not await_ready(service, told)
    assert service.ended.is_set()
    assert not await_ready(service, running)


def test_keeping_warm_changes_no_answer(model_file: Path) -> None:
    """Steps that nobody sees, between bins that come one by one."""
    counts = spikes(30)
    with (
        serving(model_file, keep_warm_ms=1.0) as service,
        Feeder(service.ingest, service.results) as feeder,
    ):
        feeder.subscribe("s")
        feeder.ask(open_("s"), messages.Opened)
        results: list[messages.Result] = []
        for index, row in enumerate(counts):
            feeder.ask(messages.Describe(), messages.Described)
            feeder.send(bin_("s", index, row))
            results += feeder.results(1)
    expected = offline(model_file, counts, np.ones(counts.shape, dtype=bool))
    for result, values in zip(results, expected, strict=True):
        np.testing.assert_array_equal(numbers(result), values)


def test_a_silent_session_ends_with_a_notice_and_its_feeder_is_told(model_file: Path) -> None:
    with (
        serving(model_file, idle_s=0.2, http="127.0.0.1:0") as service,
        Feeder(service.ingest, service.results) as feeder,
    ):
        feeder.subscribe("dozing")
        feeder.ask(open_("dozing"), messages.Opened)
        feeder.send(bin_("dozing", 0, spikes(1)[0]))
        assert feeder.notice("idle").session == "dozing"
        assert feeder.reply_of(messages.Closed).bins == 1
        assert feeder.ask(messages.Sessions(), messages.SessionList).sessions == ()
        assert feeder.ask(bin_("dozing", 1, spikes(1)[0]), messages.Refused).field == "session"
        feeder.ask(open_("dozing", units=UNITS), messages.Opened)  # name and epoch are free again
    assert service.telemetry.counts()["idle"] >= 1


def test_bins_that_came_while_the_service_was_held_up_are_not_called_missing(
    model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process may be stopped after it looked at its sockets and before it looks at the time."""
    counts, newest, grace_ns = spikes(20), 7, 500_000_000
    held, release = threading.Event(), threading.Event()
    with (
        serving(model_file) as service,
        Feeder(service.ingest, service.results) as feeder,
    ):
        poll, bins = service._connections.poll, 0

        def stopped(timeout_s: float) -> list[Received]:
            nonlocal bins
            came = poll(timeout_s)
            if bins > newest and not held.is_set():
                held.set()
                assert release.wait(WAIT_S)
            bins += sum(b"counts" in received.message.body for received in came)
            return came

        monkeypatch.setattr(service._connections, "poll", stopped)
        feeder.subscribe("s")
        feeder.ask(open_("s", clocked=True, grace_ns=grace_ns), messages.Opened)
        feeder.send(*(bin_("s", i, counts[i]) for i in range(newest + 1)))
        assert held.wait(WAIT_S)
        feeder.send(*(bin_("s", i, counts[i]) for i in range(newest + 1, 20)))
        time.sleep(0.8)  # the fault itself: the time of bins 8 to 12 passes
        release.set()
        results = feeder.results(20)
    assert [(r.index, r.revision) for r in results] == [(i, 0) for i in range(20)]
    assert "missing" not in {r.status for r in results}


def test_answers_beyond_what_a_turn_handles_wait_for_nothing(
    model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = spikes(150)
    with (
        serving(model_file, credits=200) as service,
        Feeder(service.ingest, service.results) as feeder,
        monkeypatch.context() as patch,
    ):
        poll, bins, held = service._connections.poll, 0, False

        def after_all_are_solved(timeout_s: float) -> list[Received]:
            nonlocal bins, held
            if bins == len(counts) and not held:
                held, waiting = True, service._solver._answers
                until("answers", lambda: sum(s.bins for s in service._table) + len(waiting) == bins)
            came = poll(timeout_s)
            bins += sum(b"counts" in received.message.body for received in came)
            return came

        patch.setattr(service._connections, "poll", after_all_are_solved)
        patch.setattr(server, "_POLL_S", 2 * WAIT_S)  # a turn that waits comes too late
        feeder.subscribe("s")
        feeder.ask(open_("s"), messages.Opened)
        feeder.send(*(bin_("s", i, counts[i]) for i in range(len(counts))))
        assert [r.index for r in feeder.results(len(counts))] == list(range(len(counts)))
        assert held
        patch.undo()
        feeder.ask(messages.Close(session="s"), messages.Closed)
