"""Faults of the journal's folder and files: answers go on, the alarm is true, nothing is silent."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from feeder import Feeder, bin_, open_, spikes
from ilqr_service.journal import journal as journal_module
from ilqr_service.journal import writer as writer_module
from ilqr_service.journal.records import (
    MAGIC,
    Header,
    Queued,
    RunOpened,
    segments,
    survey,
)
from ilqr_service.journal.resume import open_runs
from ilqr_service.journal.writer import Writer
from ilqr_service.solving.run import pack_work
from ilqr_service.work import Solve
from ilqr_vae.errors import ServiceError
from ilqr_vae.protocol import messages
from rig import serving


def header(lost: int) -> Header:
    return Header(
        boot="b", at_ns=0, clock_ns=0, next_run=0, lost=lost, versions={}, settings={}, manifests={}
    )


def queued(serial: int) -> Queued:
    return Queued(work=pack_work(Solve(run=0, index=serial, counts=np.ones(7), serial=serial)))


@pytest.fixture
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each segment is followed by the next one, however long the disk takes."""
    monkeypatch.setattr(writer_module, "_RETIRED", 1000)


class Kept:
    """A journal that is written, with a clock of its own and one open run."""

    def __init__(self, folder: Path, **options: object) -> None:
        self.now, self.folder, self.serial = 0.0, folder, 0
        self.writer = Writer(folder, header, clock=lambda: self.now, **options)  # pyright: ignore
        self.writer.start({})
        self.writer.write(RunOpened(run=0, slot="main", model="m", user="", request=open_("s")))
        self.add()

    def add(self, after: float = 0.0) -> None:
        """One more work, ``after`` seconds later."""
        self.now += after
        self.writer.write(queued(self.serial))
        self.serial += 1
        self.writer.flush()

    def works(self) -> list[int]:
        """Serials of the run's works by the files."""
        return list(open_runs(self.folder)[1][0].works)


@pytest.mark.parametrize("leave", [shutil.rmtree, lambda f: f.rename(f.with_name("elsewhere"))])
@pytest.mark.parametrize("whole", [False, True])
def test_a_folder_that_is_gone_raises_the_alarm_and_is_made_again(
    tmp_path: Path, leave: Callable[[Path], object], whole: bool
) -> None:
    kept = Kept(tmp_path / "mounted" / "j")
    leave(kept.folder.parent if whole else kept.folder)
    kept.add(after=0.2)
    assert (kept.writer.ok, kept.writer.failed) == (False, whole)
    if whole:  # its parent too: it cannot be made
        kept.add(after=5.0)
        assert not kept.writer.ok
        kept.folder.parent.mkdir()
        kept.add(after=1.0)
    kept.add(after=3.0)
    assert kept.writer.ok
    with pytest.raises(ServiceError):  # the new folder is locked too
        Writer(kept.folder, header)
    kept.writer.close()
    assert kept.works() == list(range(kept.serial))


def cut(keep: int) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, keep)


def replaced(path: Path) -> None:
    shutil.copy(path, path.with_name("x"))
    path.with_name("x").rename(path)


@pytest.mark.parametrize("harm", [Path.unlink, cut(0), cut(len(MAGIC) + 40), replaced])
def test_a_segment_that_somebody_else_harms_is_noticed_and_another_begun(
    tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    kept = Kept(tmp_path)
    (path,) = segments(tmp_path)
    harm(path)
    kept.add()  # before it is looked at again
    kept.add(after=0.2)
    assert not kept.writer.failed  # begun anew at once
    assert not kept.writer.ok  # and said for long enough to be seen
    kept.add(after=3.0)
    assert kept.writer.ok
    assert kept.writer.lost == 4  # all that the segment held, and what was added then
    kept.writer.close()
    assert kept.works() == [0, 1, 2, 3]
    assert len({survey(tmp_path)[0][-1], path}) == 2


@pytest.mark.usefixtures("quick_disk")
def test_what_is_no_segment_is_left_alone_with_a_word(tmp_path: Path) -> None:
    """At the start, at a rotation, and where old segments are removed."""
    tmp_path.joinpath("backup.journal").write_text("mine")
    Kept(tmp_path).writer.close()
    first = tmp_path / "00000001.journal"
    tmp_path.joinpath("00000002.journal").mkdir()
    tmp_path.joinpath("00000003.journal").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "00000004.journal")
    shutil.copy(first, tmp_path / "00000001 (copy).journal")
    foreign = {p.name for p in tmp_path.iterdir()} - {"lock", first.name}
    kept = Kept(tmp_path, segment_bytes=1, keep=2)
    for _ in range(4):
        kept.add()
    kept.writer.close()
    paths, odd = survey(tmp_path)
    assert len(paths) == 2
    assert foreign <= {p.name for p in tmp_path.iterdir()}
    assert {line.split(" is not used")[0] for line in odd} == foreign
    assert kept.works()[-1] == 4


@pytest.mark.usefixtures("quick_disk")
def test_a_copy_under_another_number_is_not_used_and_not_removed(tmp_path: Path) -> None:
    Kept(tmp_path).writer.close()
    shutil.copy(tmp_path / "00000001.journal", tmp_path / "99999999.journal")
    assert survey(tmp_path)[1] == ["99999999.journal is not used: it is a copy of 00000001.journal"]
    kept = Kept(tmp_path, segment_bytes=1, keep=1)
    for _ in range(2):
        kept.add()
    kept.writer.close()
    assert {p.name for p in tmp_path.glob("*.journal")} == {"99999999.journal", "00000005.journal"}
    assert kept.works() == [0, 1, 2]


def test_a_failed_fsync_raises_the_alarm(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    kept.writer._sync_error = OSError(5, "Input/output error")
    kept.add(after=0.2)
    assert not kept.writer.ok
    kept.writer.close()
    assert len(segments(tmp_path)) == 2


def test_rotation_leaves_fsync_and_close_to_the_writers_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    callers: set[str] = set()
    entered, go_on = threading.Event(), threading.Event()
    fsync = os.fsync

    def slow(fd: int) -> None:
        callers.add(threading.current_thread().name)
        entered.set()
        assert go_on.wait(20)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", slow)
    kept = Kept(tmp_path, segment_bytes=1)
    assert entered.wait(20)
    for _ in range(9):  # the first begin a segment while the fsync is under way
        kept.add()
    assert callers == {"journal"}
    assert 3 <= len(segments(tmp_path)) <= 5  # the others wait for it: files do not pile up
    go_on.set()
    kept.writer.close()
    assert kept.works() == list(range(10))


def test_the_journal_is_locked_before_it_is_read(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def locked(folder: Path, odd: list[str]) -> tuple[int, dict[int, object]]:
        with pytest.raises(ServiceError):
            Writer(folder, header)
        seen.append(folder)
        return 0, {}

    seen: list[Path] = []
    monkeypatch.setattr(journal_module, "open_runs", locked)
    with serving(model_file, journal=str(tmp_path)):
        pass
    assert seen == [tmp_path]


def test_versions_are_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The packages may be replaced while the service runs."""
    before = journal_module.versions()

    def gone(name: str) -> str:
        raise journal_module.PackageNotFoundError(name)

    monkeypatch.setattr(journal_module, "version", gone)
    assert journal_module.versions() == before


@pytest.mark.usefixtures("quick_disk")
def test_segments_are_in_the_order_of_their_headers(tmp_path: Path) -> None:
    kept = Kept(tmp_path, segment_bytes=1)
    for _ in range(3):
        kept.add()
    kept.writer.close()
    paths = segments(tmp_path)
    first, last = paths[0], paths[-1]
    first.rename(tmp_path / "x")
    last.rename(first)
    (tmp_path / "x").rename(last)
    assert segments(tmp_path) == [last, *paths[1:-1], first]
    assert kept.works() == [0, 1, 2, 3]
    paths[2].unlink()
    odd = survey(tmp_path)[1]
    assert "segment 3 is missing and skipped" in odd
    assert sum("by its header" in line for line in odd) == 2


def test_a_refused_request_is_not_written(model_file: Path, tmp_path: Path) -> None:
    with (
        serving(model_file, journal=str(tmp_path)) as service,
        Feeder(service.ingest, service.results) as feeder,
    ):
        for message in (messages.Load(path="n" * 100_000), messages.Swap(), messages.Rollback()):
            feeder.ask(message, messages.Refused)
        feeder.ask(messages.Describe(), messages.Described)
    assert sum(path.stat().st_size for path in segments(tmp_path)) < 50_000


def test_answers_go_on_without_the_journals_folder(model_file: Path, tmp_path: Path) -> None:
    folder, counts = tmp_path / "j", spikes(60)
    with (
        serving(model_file, journal=str(folder), journal_segment_mb=0.02) as service,
        Feeder(service.ingest, service.results) as feeder,
    ):
        feeder.subscribe("s")
        feeder.ask(open_("s"), messages.Opened)
        shutil.rmtree(folder)
        for i, row in enumerate(counts):
            feeder.send(bin_("s", i, row))
            feeder.results(1)
        assert service.healthy
