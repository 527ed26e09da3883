"""Kills, nonsense, churn, a full disk and a long run: a real service process on loopback."""

from __future__ import annotations

import os
import resource
import socket
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from feeder import UNITS, WAIT_S, Feeder, bin_, numbers, open_, spikes
from ilqr_clients.sdk import ServiceClient, Session
from ilqr_service.engine import Engine
from ilqr_service.settings import ServiceSettings
from ilqr_service.verify import verify
from ilqr_vae import wire
from process import Served, offline, served
from rig import BIN_S, make_model

pytestmark = pytest.mark.chaos
FULL = os.environ.get("CHAOS") == "full"


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "m.safetensors", n_units=7, names=UNITS)


@pytest.fixture(scope="module")
def service(model_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("service")
    with served(model_file, folder / "log", "--journal", str(folder / "journal")) as running:
        yield running
        assert running.stop() == 0


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def collect(session: Session, into: dict[tuple[int, int], np.ndarray], until: int) -> None:
    """Answers until bin ``until`` is there; one that comes again must be the same."""
    end = time.monotonic() + WAIT_S
    while (until, 0) not in into:
        assert time.monotonic() < end, f"no answer for bin {until}"
        for a in session.receive(0.2):
            vectors = (a.latent, a.latent_std, a.rates, a.kinematics, a.kinematics_std)
            values = np.concatenate([*vectors, [a.bits, a.spikes, a.iterations]])
            known = into.setdefault((a.index, a.revision), values)
            np.testing.assert_array_equal(known, values)


def test_killed_service_and_killed_feeder_go_on_where_they_stood(
    model_file: Path, tmp_path: Path
) -> None:
    counts, port = spikes(90), free_port()
    answers: dict[tuple[int, int], np.ndarray] = {}
    options = ("--journal", str(tmp_path / "journal"))

    def feeding(running: Served, first: int, last: int, resume: bool) -> None:
        newest = max((i for i, _ in answers), default=-1)
        with ServiceClient(running.ingest, timeout=WAIT_S) as client:
            session = client.open(
                "s", units=UNITS, bin_width=BIN_S, deadline=60, resume=resume, answered=newest
            )
            begin = session.opened.next_index
            assert session.opened.resumed == resume
            assert first - 8 <= begin <= first + 8  # at most what was in flight comes again
            for index in range(begin, last):
                session.send(index, counts[index])
            collect(session, answers, last - 9)
            session.abandon()  # as one that dies: nothing closed, answers in flight

    with served(model_file, tmp_path / "log", *options, port=port) as running:
        feeding(running, 0, 20, False)
        feeding(running, 20, 45, True)
        running.kill()
    with served(model_file, tmp_path / "log", *options, port=port) as running:
        feeding(running, 45, 70, True)
        running.kill()
    with served(model_file, tmp_path / "log", *options, port=port) as running:
        with ServiceClient(running.ingest, timeout=WAIT_S) as client:
            newest = max(i for i, _ in answers)
            with client.open(
                "s", units=UNITS, bin_width=BIN_S, deadline=60, resume=True, answered=newest
            ) as session:
                for index in range(session.opened.next_index, 90):
                    session.send(index, counts[index])
                collect(session, answers, 89)
        assert running.stop() == 0
    assert sorted(answers) == [(i, 0) for i in range(90)]
    expected = offline(model_file, counts, np.ones(counts.shape, dtype=bool))
    for i in range(90):
        np.testing.assert_array_equal(answers[i, 0], expected[i])
    verdict = verify(tmp_path / "journal", [Engine.load(model_file, ServiceSettings(device="cpu"))])
    assert verdict.answers == verdict.identical == 90


def test_nonsense_is_refused_message_by_message(service: Served) -> None:
    rng = np.random.default_rng(0)
    good = [
        wire.encode(m)
        for m in (open_("fuzz"), wire.Close(session="fuzz"), bin_("fuzz", 0, spikes(1)[0]))
    ]
    total, batch = (100_000 if FULL else 6_000), 100
    with Feeder(service.ingest, service.results) as feeder:
        feeder.subscribe("steady")
        feeder.ask(open_("steady"), wire.Opened)
        for at in range(0, total, batch):
            frames: list[bytes] = []
            for _ in range(batch):
                frame = bytearray(good[rng.integers(len(good))])
                match rng.integers(4):
                    case 0:
                        frame = bytearray(rng.bytes(int(rng.integers(0, 80))))
                    case 1:
                        frame = frame[: rng.integers(len(frame))]
                    case 2:
                        frame[rng.integers(len(frame))] ^= 1 << rng.integers(8)
                    case _:
                        frame += rng.bytes(int(rng.integers(1, 9)))
                frames.append(bytes(frame))
            feeder.send(*frames)
            feeder.send(wire.Probe(client_ns=at))
            refused = 0
            while not isinstance(reply := feeder.reply(), wire.Probed):
                refused += isinstance(reply, wire.Refused)
            assert refused >= 0.8 * batch  # a flipped bit in a count is still a bin
            feeder.send(bin_("steady", at // batch, spikes(1)[0]))
        results = feeder.results(total // batch)
        assert {r.status for r in results} == {"ok"}
        for name in ("steady", "fuzz"):
            feeder.send(wire.Close(session=name))


def test_sessions_that_come_and_go_leave_nothing_behind(service: Served) -> None:
    process = psutil.Process(service.process.pid)
    rounds, sessions = (40, 200) if FULL else (6, 200)
    row = spikes(1)[0]
    grown: list[tuple[int, int, int]] = []
    for round_ in range(rounds):
        with Feeder(service.ingest, service.results) as feeder:
            names = [f"churn-{round_}-{k}" for k in range(sessions)]
            for name in names:
                feeder.send(open_(name), bin_(name, 0, row), wire.Close(session=name))
            closed = 0
            while closed < sessions:
                closed += isinstance(feeder.reply(), wire.Closed)
        memory = process.memory_info().rss >> 20
        grown.append((memory, process.num_threads(), process.num_fds()))
    half = len(grown) // 2
    assert grown[-1][0] <= grown[half][0] + (8 if FULL else 4)
    assert grown[-1][1] == grown[half][1]
    assert abs(grown[-1][2] - grown[half][2]) <= 3  # connections of the last feeder may linger
    with ServiceClient(service.ingest, timeout=WAIT_S) as client:
        assert not [s for s in client.sessions() if s.session.startswith("churn")]


def test_a_full_disk_stops_no_answer_and_is_told(service: Served) -> None:
    counts = spikes(120)
    with Feeder(service.ingest, service.results) as feeder:
        feeder.subscribe("disk")
        feeder.ask(open_("disk"), wire.Opened)
        feeder.send(*(bin_("disk", i, counts[i]) for i in range(40)))
        results = feeder.results(40)
        pid = service.process.pid
        before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (4096, before[1]))
        try:
            feeder.send(*(bin_("disk", i, counts[i]) for i in range(40, 80)))
            results += feeder.results(40)
            assert metric(service, "ilqr_journal_ok", 0.0) == 0.0
            assert metric(service, "ilqr_journal_lost_records", None) > 0
        finally:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, before)
        index = 80
        while metric(service, "ilqr_journal_ok", None) == 0.0 and index < 119:
            feeder.send(bin_("disk", index, counts[index]))
            results += feeder.results(1)
            index += 1
        feeder.send(*(bin_("disk", i, counts[i]) for i in range(index, 120)))
        results += feeder.results(120 - index)
        feeder.ask(wire.Close(session="disk"), wire.Closed)
    assert metric(service, "ilqr_journal_ok", 1.0) == 1.0
    assert [r.index for r in results] == list(range(120))
    assert {r.status for r in results} == {"ok"}


def metric(service: Served, name: str, wanted: float | None) -> float:
    """A metric; where one is wanted, looked at until it is that or 5 s have passed."""
    end = time.monotonic() + 5.0
    while True:
        with urllib.request.urlopen(f"http://{service.http}/metrics", timeout=WAIT_S) as page:
            lines = page.read().decode().splitlines()
        value = next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))
        if wanted is None or value == wanted or time.monotonic() > end:
            return value


def test_a_long_run_stays_flat_and_exact(service: Served, model_file: Path) -> None:
    n_bins = 100_000 if FULL else 3_000
    counts = spikes(n_bins, seed=5)
    process = psutil.Process(service.process.pid)
    memory: list[int] = []
    tail: list[wire.Result] = []
    with Feeder(service.ingest, service.results) as feeder:
        feeder.subscribe("soak")
        feeder.ask(open_("soak"), wire.Opened)
        for first in range(0, n_bins, 50):
            feeder.send(*(bin_("soak", i, counts[i]) for i in range(first, first + 50)))
            tail = feeder.results(50)
            assert [r.index for r in tail] == list(range(first, first + 50))
            memory.append(process.memory_info().rss)
        feeder.ask(wire.Close(session="soak"), wire.Closed)
    half = len(memory) // 2
    assert (max(memory[half:]) - max(memory[:half])) >> 20 <= (16 if FULL else 8)
    everything = np.ones(counts.shape, dtype=bool)
    for result, expected in zip(tail, offline(model_file, counts, everything)[-50:], strict=True):
        np.testing.assert_array_equal(numbers(result), expected)
