"""A journal that was damaged is read back: the damage is said, and costs itself alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from feeder import Feeder, bin_, numbers, open_, spikes
from ilqr_service.journal.live import Live, follow
from ilqr_service.journal.records import (
    MAGIC,
    Queued,
    RunOpened,
    Snapshot,
    frame,
    records,
    segments,
)
from ilqr_service.journal.resume import model_of, models_of, open_runs
from ilqr_service.journal.verify import verify
from ilqr_service.journal.writer import Writer
from ilqr_service.solving.run import PackedRun, pack_work
from ilqr_service.work import Solve, SwapModel, Work
from ilqr_vae.cli import main
from ilqr_vae.errors import JournalError
from ilqr_vae.protocol import messages
from process import offline
from rig import serving
from test_journal_faults import header


def test_damage_in_the_middle_is_said_and_costs_itself_alone(
    left_open: tuple[Path, list[messages.Result]],
    model_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder, _ = left_open
    (path,) = segments(folder)
    whole, data = list(records(path)), path.read_bytes()
    where = len(MAGIC) + sum(len(frame(r)) for r in whole[: len(whole) // 2])
    for at in (where + 1, where + 30):  # in the length and in the record
        broken = bytearray(data)
        broken[at] ^= 0x10
        path.write_bytes(broken)
        damage: list[str] = []
        assert list(records(path, damage)) == [
            r for k, r in enumerate(whole) if k != len(whole) // 2
        ]
        assert len(damage) == 1
        assert main(["verify", str(folder), "--model", str(model_file)]) == 0
        assert "damaged" in capsys.readouterr().out
        assert verify(folder, [model_file]).damaged == damage
    out = tmp_path / "out.nwb"
    assert main(["export", str(folder), "--session", "s", "--out", str(out)]) == 0
    assert "damaged" in capsys.readouterr().err
    with serving(model_file, journal=str(folder)):
        assert any("not as it was written" in r.getMessage() for r in caplog.records)


@pytest.mark.parametrize("harm", ["magic", "junk after it", "zeros after it", "zeros at its end"])
def test_a_file_that_is_no_journal_any_more_costs_itself_alone(
    left_open: tuple[Path, list[messages.Result]], model_file: Path, harm: str
) -> None:
    folder, _ = left_open
    (path,) = segments(folder)
    whole, data = list(records(path)), path.read_bytes()
    following, junk = folder / "00000002.journal", np.random.default_rng(0).bytes(5000)
    match harm:
        case "magic":
            path.write_bytes(b"\0" + data[1:])
        case "junk after it":
            following.write_bytes(junk)
        case "zeros after it":
            following.write_bytes(bytes(5000))
        case _:  # as file systems leave it where the machine lost power
            path.write_bytes(data + bytes(5000))
    assert list(records(path)) == whole
    verdict = verify(folder, [model_file])
    assert (verdict.answers, verdict.identical) == (30, 30)
    assert len(verdict.damaged) == 1
    with (
        serving(model_file, journal=str(folder)) as service,
        Feeder(service.ingest, service.results) as feeder,
    ):
        opened = feeder.ask(open_("s", resume=True, answered=29), messages.Opened)
        assert (opened.resumed, opened.next_index) == (True, 30)


def test_nothing_but_junk_is_no_journal_and_another_version_is_not_read(
    tmp_path: Path, model_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "00000001.journal").write_bytes(b"something else")
    assert open_runs(tmp_path) == (0, {})
    assert main(["verify", str(tmp_path), "--model", str(model_file)]) == 2
    assert "journal: expected records, got none" in capsys.readouterr().err
    (tmp_path / "00000002.journal").write_bytes(MAGIC.replace(b"1", b"2"))
    with pytest.raises(JournalError, match="this version"):
        open_runs(tmp_path)


def test_a_bin_whose_record_is_damaged_counts_as_missing_until_it_comes_again(
    left_open: tuple[Path, list[messages.Result]],
    model_file: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder, _ = left_open
    (path,) = segments(folder)
    data, counts, lost = bytearray(path.read_bytes()), spikes(32), 27
    at = len(MAGIC)
    for record in records(path):  # one that no snapshot holds yet
        if isinstance(record, Queued) and record.work.index == lost:
            data[at + 30] ^= 0x10
        at += len(frame(record))
    path.write_bytes(data)
    seen = np.ones(counts.shape, dtype=bool)
    expected = offline(model_file, counts, seen)
    seen[lost] = False
    without = offline(model_file, counts, seen)
    with (
        serving(model_file, journal=str(folder)) as service,
        Feeder(service.ingest, service.results) as feeder,
    ):
        assert any(
            f"session s: the records of bins {lost} are lost" in r.__dict__["data"]["what"]
            for r in caplog.records
            if "not as it was written" in r.getMessage()
        )
        feeder.subscribe("s")
        opened = feeder.ask(open_("s", resume=True, answered=29), messages.Opened)
        assert (opened.resumed, opened.next_index) == (True, 30)
        feeder.send(bin_("s", 30, counts[30]))
        (last,) = feeder.results(1)
        np.testing.assert_array_equal(numbers(last), without[30])
        feeder.send(bin_("s", lost, counts[lost]), bin_("s", 31, counts[31]))
        again = feeder.results(5)
        feeder.ask(messages.Close(session="s"), messages.Closed)
    assert [(r.index, r.revision) for r in again] == [(i, 1) for i in range(lost, 31)] + [(31, 0)]
    for result in again:
        np.testing.assert_array_equal(numbers(result), expected[result.index])
    verdict = verify(folder, [model_file])
    assert verdict.identical == verdict.answers > 0


@pytest.mark.parametrize("kept", [True, False], ids=["snapshot", "works alone"])
def test_a_run_whose_swap_is_lost_goes_on_with_the_model_of_what_followed(kept: bool) -> None:
    runs: dict[int, Live] = {}
    state = PackedRun(run=0, model="new", serial=2, state=(), watch=(), works=())
    for record in (
        RunOpened(run=0, slot="main", model="old", user="", request=open_("s")),
        *(
            Queued(work=pack_work(Solve(run=0, index=i, serial=s, counts=None, model=m)))
            for s, i, m in ((0, 0, "old"), (2, 1, "new"))
        ),
        *([Snapshot(packed=state)] if kept else []),
    ):
        follow(runs, record, frame(record))
    assert model_of(runs[0]) == "new"
    assert "new" in models_of(runs[0])


Place = tuple[int, int, str]  # serial, index, kind


@pytest.mark.parametrize(
    ("kept", "filled"),
    [
        ([(1, 1, ""), (2, 2, "")], [(0, 0, "restart")]),
        ([(0, 0, "restart"), (3, 3, "")], [(1, 1, ""), (2, 2, "")]),
        ([(0, 0, "restart"), (2, 501, "")], [(1, 500, "restart")]),  # after a reset
        ([(0, 0, "restart"), (2, 500, "restart")], []),
        ([(0, 0, "restart"), (2, 1, "")], []),  # a swap, or a late bin
        ([(0, 0, "restart"), (1, 1, ""), (3, 3, "swap"), (4, 3, "")], [(2, 2, "")]),
        ([(0, 0, "restart"), (1, 2, "")], []),  # nothing is lost: not of this service
    ],
)
def test_what_a_lost_record_of_a_bin_was_is_seen_from_the_next(
    tmp_path: Path, kept: list[Place], filled: list[Place]
) -> None:
    writer = Writer(tmp_path, header)
    writer.start({})
    writer.write(RunOpened(run=0, slot="main", model="m", user="", request=open_("s")))
    for serial, index, kind in kept:
        work: Work = Solve(
            run=0, index=index, counts=np.ones(7), serial=serial, restart=kind == "restart"
        )
        if kind == "swap":
            work = SwapModel(run=0, index=index, serial=serial, to="n")
        writer.write(Queued(work=pack_work(work)))
    writer.close()
    (live,) = open_runs(tmp_path)[1].values()
    works = {serial: record.work for serial, (_, record) in live.works.items()}
    new = [works[serial] for serial in works if serial not in {place[0] for place in kept}]
    assert list(live.works) == sorted(live.works)
    assert [(w.serial, w.index, "restart" if w.restart else "") for w in new] == filled
    assert all(w.counts is None for w in new)
