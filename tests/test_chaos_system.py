"""The system below a service process: a file system that is full, a kernel that grants or refuses
what steady latency asks of it."""

from __future__ import annotations

import gc
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from feeder import UNITS, Feeder, bin_, numbers, open_, spikes
from ilqr_service.hygiene import Hygiene
from ilqr_service.journal.verify import verify
from ilqr_service.settings import ServiceSettings
from ilqr_vae.protocol import messages
from process import metrics, offline, served
from rig import make_model

pytestmark = pytest.mark.chaos


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "m.safetensors", n_units=7, names=UNITS)


# ---- a disk that is full -----------------------------------------------------------------------

MIB = 4
"""Of the file system."""


@contextmanager
def small_disk(at: Path) -> Iterator[tuple[str, ...]]:
    """A command that mounts a small file system of its own at ``at`` for what it becomes."""
    at.mkdir()
    script = f'mount -t tmpfs -o size={MIB}m tmpfs "{at}" && exec "$@"'
    under = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh")
    if shutil.which("unshare") is None:
        pytest.skip("no unshare here (util-linux)")
    done = subprocess.run([*under, "true"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system of one's own can be mounted here: {done.stderr.strip()}")
    yield under


def fill(ballast: Path) -> None:
    """Write until the kernel refuses. Raises OSError."""
    with ballast.open("wb", buffering=0) as file:
        while True:
            file.write(b"\0" * 4096)


def test_a_disk_without_space_stops_no_answer_and_the_journal_goes_on_when_there_is_some(
    model_file: Path, tmp_path: Path
) -> None:
    """ENOSPC by the kernel: a file system filled to its last byte, and freed again."""
    counts = spikes(4_000)
    results: list[messages.Result] = []
    (tmp_path / "s.toml").write_text("snapshot_every = 10\n")
    disk = tmp_path / "disk"
    with (
        small_disk(disk) as under,
        served(
            model_file,
            tmp_path / "log",
            *("--journal", str(disk / "journal"), "--config", str(tmp_path / "s.toml")),
            under=under,
        ) as service,
        Feeder(service.ingest, service.results) as feeder,
    ):
        inside = Path(f"/proc/{service.process.pid}/root{disk}")
        feeder.subscribe("disk")
        feeder.ask(open_("disk"), messages.Opened)

        def feed(n: int) -> None:
            first = len(results)
            feeder.send(*(bin_("disk", i, counts[i]) for i in range(first, first + n)))
            results.extend(feeder.results(n))

        feed(40)
        assert metrics(service)["ilqr_journal_ok"] == 1.0
        ballast = inside / "ballast"
        with pytest.raises(OSError, match="No space left"):
            fill(ballast)
        while metrics(service)["ilqr_journal_ok"] == 1.0 and len(results) < 1_000:
            feed(20)
        feed(60)  # answered all the same
        full = metrics(service)
        assert (full["ilqr_journal_ok"], full["ilqr_ready"]) == (0.0, 1.0)
        assert full["ilqr_journal_lost_total"] > 0
        ballast.unlink()
        while metrics(service)["ilqr_journal_ok"] == 0.0 and len(results) < 3_900:
            feed(5)
        feed(40)
        assert metrics(service)["ilqr_journal_ok"] == 1.0
        feeder.ask(messages.Close(session="disk"), messages.Closed)
        shutil.copytree(inside / "journal", tmp_path / "kept")
        assert service.stop() == 0
    log = (tmp_path / "log").read_text()
    assert "No space left on device" in log
    assert "the journal can be written again" in log
    n = len(results)
    assert [(r.index, r.revision, r.status) for r in results] == [(i, 0, "ok") for i in range(n)]
    everything = np.ones((n, len(UNITS)), dtype=bool)
    for result, expected in zip(results, offline(model_file, counts[:n], everything), strict=True):
        np.testing.assert_array_equal(numbers(result), expected)
    # what was written before and after is whole, and gives the same bits again
    verdict = verify(tmp_path / "kept", [model_file])
    assert verdict.answers == verdict.identical
    assert 80 <= verdict.answers + verdict.skipped < n


# ---- what steady latency asks for --------------------------------------------------------------


def threads(pid: int) -> list[tuple[set[int], int, int]]:
    """Of each thread: its cores, scheduling class and priority."""
    found: list[tuple[set[int], int, int]] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        tid = int(task.name)
        policy = os.sched_getscheduler(tid) & ~os.SCHED_RESET_ON_FORK
        found.append((os.sched_getaffinity(tid), policy, os.sched_getparam(tid).sched_priority))
    return found


def locked_kb(pid: int) -> int:
    found = re.search(r"^VmLck:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no /proc to look at")
@pytest.mark.parametrize("forbidden", [False, True], ids=["as the kernel grants", "refused"])
def test_what_is_asked_of_the_kernel_is_in_force_or_said_not_to_be(
    model_file: Path, tmp_path: Path, forbidden: bool
) -> None:
    core = max(os.sched_getaffinity(0))
    asked = ("--cpus", "4095" if forbidden else str(core), "--realtime", "7", "--lock-memory")
    under: tuple[str, ...] = ()
    if forbidden:  # no privilege, and no memory to lock
        under = ("prlimit", "--memlock=0", "--rtprio=0", "unshare", "--user")
        tried = subprocess.run([*under, "true"], capture_output=True, check=False)
        if tried.returncode:
            pytest.skip("privileges cannot be given up here")
    with (
        served(model_file, tmp_path / "log", *asked, under=under) as service,
        Feeder(service.ingest, service.results) as feeder,
    ):
        feeder.subscribe("s")
        feeder.ask(open_("s"), messages.Opened)
        feeder.send(*(bin_("s", i, row) for i, row in enumerate(spikes(20))))
        assert {r.status for r in feeder.results(20)} == {"ok"}
        report: dict[str, str] = service.ready["hygiene"]
        pid = service.process.pid
        seen, locked, shown = threads(pid), locked_kb(pid), metrics(service)
        feeder.ask(messages.Close(session="s"), messages.Closed)
        assert service.stop() == 0
    settings = ("cpus", "slice", "realtime")
    each = [f"{what} {thread}" for what in settings for thread in ("io", "solver")]
    assert set(report) == {"gc", "malloc", "lock_memory", *each}
    for what, came in report.items():
        assert came == "on" or came.startswith("off: ")
        assert shown[f'ilqr_hygiene{{what="{what}"}}'] == float(came == "on")
    on = {what for what, came in report.items() if came == "on"}
    assert "gc" in on
    assert sum(policy == os.SCHED_FIFO for _, policy, _ in seen) == len(
        on & {"realtime io", "realtime solver"}
    )
    assert {p for _, policy, p in seen if policy == os.SCHED_FIFO} <= {7}
    assert (locked > 0) == ("lock_memory" in on)
    pinned = sum(cores == {core} for cores, _, _ in seen)
    if len(os.sched_getaffinity(0)) > 1:
        assert pinned == len(on & {"cpus io", "cpus solver"})
    log = (tmp_path / "log").read_text()
    if forbidden:
        assert on - {"slice io", "slice solver"} == {"gc", "malloc"}  # a slice needs no right
        for what in set(report) - on:
            reason = report[what].removeprefix("off: ")
            assert reason in log
        assert "not permitted" in report["realtime io"]
        assert "Invalid argument" in report["cpus solver"]
    elif os.geteuid() == 0:
        assert {"cpus io", "cpus solver"} <= on


def test_garbage_is_left_alone_while_bins_are_queued() -> None:
    before = gc.isenabled()
    try:
        now = [0.0]
        idle = Hygiene(ServiceSettings(gc="idle", malloc="auto"), lambda: now[0])
        idle.process()
        assert not gc.isenabled()
        assert idle.report == {"gc": "on"}
        young = gc.get_stats()[1]["collections"]
        idle.collect(idle=True)
        assert gc.get_stats()[1]["collections"] == young  # not yet
        now[0] = 30.0
        idle.collect(idle=False)
        assert gc.get_stats()[1]["collections"] == young  # bins are queued
        idle.collect(idle=True)
        assert gc.get_stats()[1]["collections"] == young + 1
    finally:
        if before:
            gc.enable()
