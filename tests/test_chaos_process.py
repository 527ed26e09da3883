"""Kills, churn, a full disk and a long run: a real service process on loopback."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import zmq

from feeder import UNITS, WAIT_S, Feeder, bin_, numbers, open_, spikes
from ilqr_clients.load_schedule import Faults, LoadSize, counts_of
from ilqr_clients.sdk import ServiceClient, Session
from ilqr_service.journal.records import Answered, records, segments
from ilqr_service.journal.verify import verify
from ilqr_vae.protocol import messages
from process import ENVIRONMENT, Served, free_port, offline, served
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
            # what was answered is never asked for again, so at most what was in flight is
            assert newest < begin <= first
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
    verdict = verify(tmp_path / "journal", [model_file])
    assert verdict.answers == verdict.identical == 90
    assert answered_once(tmp_path / "journal") == {(i, 0) for i in range(90)}


def test_a_feeder_that_is_killed_is_followed_by_another(
    service: Served, model_file: Path, tmp_path: Path
) -> None:
    """SIGKILL to a process that feeds: another goes on from the first bin not taken, and what it
    gets is what one feeder would have got."""
    load, faults = LoadSize(bins=10_000, speed=10.0), Faults(seed=8)
    counts = counts_of(load, faults, 0, len(UNITS))
    command = [*(sys.executable, "-m", "ilqr_vae.cli", "load", "--to", service.ingest)]
    command += [*("--seed", "8", "--speed", "10", "--duration", "50", "--deadline-ms", "60000")]
    with (
        ServiceClient(service.ingest, timeout=WAIT_S) as client,
        Feeder(service.ingest, service.results) as reader,
    ):
        reader.sub.setsockopt(zmq.SUBSCRIBE, b"load-")
        feeding = subprocess.Popen(command, env=ENVIRONMENT)
        try:
            name, newest = "", -1
            while newest < 40:
                assert reader.sub.poll(WAIT_S * 1e3)
                message = messages.decode_published(reader.sub.recv_multipart()[-1])
                if isinstance(message, messages.Result):
                    name, newest = message.session, message.index
        finally:
            feeding.kill()
            feeding.wait()
        with client.open(
            name, units=UNITS, bin_width=BIN_S, deadline=60, resume=True, answered=newest
        ) as session:
            assert session.opened.resumed
            begin = session.opened.next_index
            assert begin > newest  # nothing that was answered is asked for again
            answers: dict[tuple[int, int], np.ndarray] = {}
            for index in range(begin, begin + 20):
                session.send(index, counts[index])
            collect(session, answers, begin + 19)
    n = begin + 20
    expected = offline(model_file, counts[:n], np.ones((n, len(UNITS)), dtype=bool))
    assert {revision for _, revision in answers} == {0}
    assert {i for i, _ in answers} >= set(range(begin, n))
    for (i, _), values in answers.items():
        np.testing.assert_array_equal(values, expected[i])


def answered_once(journal: Path) -> set[tuple[int, int]]:
    """Index and revision of all answers of a journal's only run: each was given once, at one time,
    however often a segment repeats it."""
    given: dict[tuple[int, int], set[bytes]] = {}
    for path in segments(journal):
        for record in records(path):
            if isinstance(record, Answered):
                assert record.run == 0
                given.setdefault((record.index, record.revision), set()).add(record.frame)
    assert {len(frames) for frames in given.values()} == {1}
    return set(given)


def test_bins_that_pass_while_the_service_is_dead_are_a_stated_gap(
    model_file: Path, tmp_path: Path
) -> None:
    """A feeder that goes on with its own time: a short gap is answered as missing, bin by bin; one
    beyond the gap limit is told by a notice, and the estimate starts again after it."""
    counts, port = spikes(420), free_port()
    answers: dict[int, tuple[str, np.ndarray]] = {}
    notices: list[str] = []
    gaps = ((30, 37), (60, 400))  # killed after the bin before; this many passed meanwhile
    spans = ((0, 30), (37, 60), (400, 420))
    for (first, last), gap in zip(spans, [None, *gaps], strict=True):
        options = ("--journal", str(tmp_path / "journal"))
        with served(model_file, tmp_path / "log", *options, port=port) as running:
            with ServiceClient(running.ingest, timeout=WAIT_S) as client:
                session = client.open(
                    "s",
                    units=UNITS,
                    bin_width=BIN_S,
                    deadline=60,
                    resume=gap is not None,
                    answered=max(answers, default=-1),
                )
            assert session.opened.next_index == (0 if gap is None else gap[0])
            for index in range(first, last):
                session.send(index, counts[index])
            end = time.monotonic() + WAIT_S
            while last - 1 not in answers:
                assert time.monotonic() < end
                for a in session.receive(0.2):
                    vectors = (a.latent, a.latent_std, a.rates, a.kinematics, a.kinematics_std)
                    values = np.concatenate([*vectors, [a.bits, a.spikes, a.iterations]])
                    known = answers.setdefault(a.index, (a.status, values))
                    np.testing.assert_array_equal(known[1], values)
                    assert a.revision == 0
            notices += session.notices
            session.abandon()
            running.kill()
    assert sorted(answers) == [*range(60), *range(400, 420)]
    assert {i for i, (status, _) in answers.items() if status == "missing"} == set(range(30, 37))
    assert "reset: bins 60 to 399 did not come and have no answers" in notices
    observed = np.ones(counts.shape, dtype=bool)
    observed[30:37] = False
    expected = offline(model_file, counts[:60], observed[:60])
    fresh = offline(model_file, counts[400:], observed[400:])
    for i, (_, values) in answers.items():
        np.testing.assert_array_equal(values, expected[i] if i < 60 else fresh[i - 400])
    assert answered_once(tmp_path / "journal") == {(i, 0) for i in answers}


def test_sessions_that_come_and_go_leave_nothing_behind(service: Served) -> None:
    process = psutil.Process(service.process.pid)
    rounds, sessions = (40, 200) if FULL else (6, 200)
    row = spikes(1)[0]
    grown: list[tuple[int, int, int]] = []
    for round_ in range(rounds):
        with Feeder(service.ingest, service.results) as feeder:
            names = [f"churn-{round_}-{k}" for k in range(sessions)]
            for name in names:
                feeder.send(open_(name), bin_(name, 0, row), messages.Close(session=name))
            closed = 0
            while closed < sessions:
                closed += isinstance(feeder.reply(), messages.Closed)
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
        feeder.ask(open_("disk"), messages.Opened)
        feeder.send(*(bin_("disk", i, counts[i]) for i in range(40)))
        results = feeder.results(40)
        pid = service.process.pid
        before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (4096, before[1]))
        try:
            feeder.send(*(bin_("disk", i, counts[i]) for i in range(40, 80)))
            results += feeder.results(40)
            assert metric(service, "ilqr_journal_ok", 0.0) == 0.0
            assert metric(service, "ilqr_journal_lost_total", None) > 0
        finally:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, before)
        index = 80
        while metric(service, "ilqr_journal_ok", None) == 0.0 and index < 119:
            feeder.send(bin_("disk", index, counts[index]))
            results += feeder.results(1)
            index += 1
        feeder.send(*(bin_("disk", i, counts[i]) for i in range(index, 120)))
        results += feeder.results(120 - index)
        feeder.ask(messages.Close(session="disk"), messages.Closed)
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
    tail: list[messages.Result] = []
    with Feeder(service.ingest, service.results) as feeder:
        feeder.subscribe("soak")
        feeder.ask(open_("soak"), messages.Opened)
        for first in range(0, n_bins, 50):
            feeder.send(*(bin_("soak", i, counts[i]) for i in range(first, first + 50)))
            tail = feeder.results(50)
            assert [r.index for r in tail] == list(range(first, first + 50))
            memory.append(process.memory_info().rss)
        feeder.ask(messages.Close(session="soak"), messages.Closed)
    half = len(memory) // 2
    assert (max(memory[half:]) - max(memory[:half])) >> 20 <= (16 if FULL else 8)
    everything = np.ones(counts.shape, dtype=bool)
    for result, expected in zip(tail, offline(model_file, counts, everything)[-50:], strict=True):
        np.testing.assert_array_equal(numbers(result), expected)
