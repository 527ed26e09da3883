"""The journal: what is written is what happened, and a torn or missing end costs only itself."""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from feeder import UNITS, Feeder, bin_, numbers, open_, spikes
from ilqr_clients.sdk import ServiceClient
from ilqr_service.journal.records import (
    MAGIC,
    Answered,
    Header,
    Queued,
    Record,
    RunClosed,
    RunOpened,
    Snapshot,
    records,
    segments,
)
from ilqr_service.journal.resume import open_runs, take_up
from ilqr_service.journal.verify import Comparison, verify
from ilqr_service.journal.writer import Writer
from ilqr_service.settings import ServiceSettings
from ilqr_service.solving.engine import Engine
from ilqr_service.solving.run import pack_work
from ilqr_service.work import Solve
from ilqr_vae.errors import ServiceError
from ilqr_vae.protocol import messages
from process import offline
from rig import make_model, serving


def engine(model: Path) -> Engine:
    return Engine.load(model, ServiceSettings(device="cpu"))


# ---- torn ends ---------------------------------------------------------------------------------


def bounds(path: Path) -> list[tuple[int, int]]:
    """Where each record begins and ends."""
    data, at, found = path.read_bytes(), len(MAGIC), []
    while at < len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "little")
        found.append((at, end))
        at = end
    return found


def standing(folder: Path) -> tuple[object, ...]:
    """What a journal says is open."""
    next_run, runs = open_runs(folder)
    live = runs[0]
    return next_run, set(runs), live.opened, live.snapshot, dict(live.works), dict(live.answers)


@pytest.mark.chaos
@pytest.mark.parametrize("kind", [Queued, Answered, Snapshot])
def test_a_journal_torn_at_every_byte_of_its_last_record_loses_that_record_alone(
    left_open: tuple[Path, list[messages.Result]], model_file: Path, kind: type[Record]
) -> None:
    folder, _ = left_open
    (path,) = segments(folder)
    data, whole, places = path.read_bytes(), list(records(path)), bounds(path)
    last = max(k for k, r in enumerate(whole) if isinstance(r, kind))
    start, end = places[last]
    assert end - start > 100
    path.write_bytes(data[:start])
    without = standing(folder)
    model_info = engine(model_file).model_info
    for cut in range(start, end):
        path.write_bytes(data[:cut])
        assert list(records(path)) == whole[:last]
        assert standing(folder) == without
        session, resumed = take_up(open_runs(folder)[1][0], model_info, 0, 0)
        kept = {r.index for r in whole[:last] if isinstance(r, Answered)}
        assert session.next_index == sum(isinstance(r, Queued) for r in whole[:last])
        assert resumed.answered == max(kept, default=-1)
    path.write_bytes(data[:end])
    assert standing(folder) != without
    for wrong in (start, start + 4, start + 20):  # a byte that is not what was written
        broken = bytearray(data[:end])
        broken[wrong] ^= 0x40
        path.write_bytes(bytes(broken))
        assert standing(folder) == without


@pytest.mark.chaos
def test_a_service_takes_up_a_torn_journal_and_answers_again_what_was_torn(
    left_open: tuple[Path, list[messages.Result]], model_file: Path
) -> None:
    folder, results = left_open
    (path,) = segments(folder)
    data, whole, places = path.read_bytes(), list(records(path)), bounds(path)
    last = max(k for k, r in enumerate(whole) if isinstance(r, Answered))
    path.write_bytes(data[: places[last][1] - 1])
    with (
        serving(model_file, journal=str(folder)) as service,
        Feeder(service.ingest, service.results) as feeder,
    ):
        feeder.subscribe("s")
        opened = feeder.ask(open_("s", resume=True, answered=28), messages.Opened)
        assert (opened.resumed, opened.next_index) == (True, 30)
        feeder.send(bin_("s", 30, spikes(31)[30]))
        again = {r.index: r for r in feeder.results(2)}
        feeder.ask(messages.Close(session="s"), messages.Closed)
    assert set(again) <= {29, 30}  # 29 may have been there already when this one subscribed
    np.testing.assert_array_equal(numbers(again[29]), numbers(results[29]))
    assert again[29].revision == 0
    verdict = verify(folder, [model_file])
    (torn,) = verdict.damaged
    assert "are cut short and skipped" in torn
    assert verdict == Comparison(1, 31, 31, damaged=[torn])


def test_a_segment_torn_in_its_beginning_counts_for_nothing(
    left_open: tuple[Path, list[messages.Result]],
) -> None:
    folder, _ = left_open
    (path,) = segments(folder)
    expected = open_runs(folder)
    for cut in (0, 5, 16, 40, 200):
        (folder / "00000002.journal").write_bytes(path.read_bytes()[:cut])
        next_run, live = open_runs(folder)
        assert (next_run, live.keys()) == (expected[0], expected[1].keys())
        assert live[0].works.keys() == expected[1][0].works.keys()


# ---- the disk ----------------------------------------------------------------------------------


def header(lost: int) -> Header:
    return Header(
        boot="b", at_ns=0, clock_ns=0, next_run=0, lost=lost, versions={}, settings={}, manifests={}
    )


def worked(serial: int) -> Queued:
    return Queued(work=pack_work(Solve(run=0, index=serial, counts=np.ones(7), serial=serial)))


@pytest.mark.chaos
def test_a_disk_that_is_full_loses_records_not_the_run(tmp_path: Path) -> None:
    now = 0.0
    keeper = Writer(tmp_path, header, clock=lambda: now)
    keeper.start({})
    keeper.write(RunOpened(run=0, slot="main", model="m", user="", request=open_("s")))
    keeper.write(worked(0))
    keeper.flush()
    (path,) = segments(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, before[1]))
    try:
        keeper.write(worked(1))
        keeper.flush()
        assert (keeper.failed, keeper.lost) == (True, 1)
        for serial in (2, 3):
            keeper.write(worked(serial))
            keeper.flush()
        assert keeper.lost == 3
        assert len(list(records(path))) == 4  # whole up to the fault
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    now = 5.0
    keeper.write(worked(4))
    keeper.flush()
    assert not keeper.failed
    keeper.write(worked(5))
    keeper.close()
    _, live = open_runs(tmp_path)
    assert list(live[0].works) == [0, 1, 2, 3, 4, 5]
    first = next(iter(records(segments(tmp_path)[-1])))
    assert isinstance(first, Header)
    assert first.lost == 4


def test_old_segments_go_and_the_rest_is_enough(model_file: Path, tmp_path: Path) -> None:
    with (
        serving(
            model_file,
            journal=str(tmp_path),
            journal_segment_mb=0.02,
            journal_keep=2,
            snapshot_every=10,
            credits=500,
        ) as service,
        Feeder(service.ingest, service.results) as feeder,
    ):
        feeder.subscribe("s")
        feeder.ask(open_("s"), messages.Opened)
        feeder.send(*(bin_("s", i, x) for i, x in enumerate(spikes(120))))
        feeder.results(120)
    assert len(segments(tmp_path)) == 2
    verdict = verify(tmp_path, [model_file])
    assert verdict.answers == verdict.identical > 0


def test_two_services_do_not_share_a_journal(model_file: Path, tmp_path: Path) -> None:
    with serving(model_file, journal=str(tmp_path)):
        child = os.fork()  # a lock is a process's own
        if child == 0:
            try:
                Writer(tmp_path, header)
            except ServiceError:
                os._exit(7)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_a_restarted_service_goes_on_where_the_other_stood(
    model_file: Path, tmp_path: Path
) -> None:
    """Without a process: the journal of an open session, taken up by another service."""
    counts = spikes(60)
    with serving(model_file) as plain, Feeder(plain.ingest, plain.results) as feeder:
        feeder.subscribe("s")
        feeder.ask(open_("s"), messages.Opened)
        feeder.send(*(bin_("s", i, counts[i]) for i in range(60)))
        expected = feeder.results(60)
    with (
        serving(model_file, journal=str(tmp_path / "a"), snapshot_every=7) as service,
        Feeder(service.ingest, service.results) as feeder,
    ):
        feeder.subscribe("s")
        feeder.ask(open_("s"), messages.Opened)
        feeder.send(*(bin_("s", i, counts[i]) for i in range(33)))
        feeder.results(33)
        feeder.ask(messages.Describe(), messages.Described)
        shutil.copytree(tmp_path / "a", tmp_path / "b")
    with (
        serving(model_file, journal=str(tmp_path / "b")) as service,
        Feeder(service.ingest, service.results) as feeder,
    ):
        last = feeder.subscribe("s")
        assert isinstance(last, messages.Result)
        assert last.index == 32
        opened = feeder.ask(open_("s", resume=True, answered=32), messages.Opened)
        assert (opened.resumed, opened.next_index) == (True, 33)
        feeder.send(*(bin_("s", i, counts[i]) for i in range(33, 60)))
        for got, want in zip(feeder.results(27), expected[33:], strict=True):
            assert (got.index, got.revision) == (want.index, 0)
            np.testing.assert_array_equal(numbers(got), numbers(want))
        feeder.ask(messages.Close(session="s"), messages.Closed)
    verdict = verify(tmp_path / "b", [model_file])
    assert verdict == Comparison(1, 60, 60)
    kinds = {type(r) for p in segments(tmp_path / "b") for r in records(p)}
    assert {Snapshot, RunClosed} <= kinds


def test_a_feeder_that_pauses_goes_on_where_it_stood_though_the_service_died_meanwhile(
    model_file: Path, tmp_path: Path
) -> None:
    counts, pauses = spikes(60), (20, 40)
    clocked = open_("s", clocked=True, deadline_ns=60_000_000_000)
    newest: dict[int, messages.Result] = {}

    def answered(feeder: Feeder, last: int, status: str) -> None:
        """Until the newest bin is this one or later, with this status; no revision comes twice."""
        while not (newest and max(newest) >= last and newest[last].status == status):
            (result,) = feeder.results(1)
            known = newest.get(result.index)
            assert known is None or result.revision > known.revision
            newest[result.index] = result

    def feed(feeder: Feeder, first: int, last: int) -> None:
        feeder.send(*(bin_("s", i, counts[i]) for i in range(first, last)))
        answered(feeder, last - 1, "ok")

    with (
        serving(model_file, journal=str(tmp_path / "a"), snapshot_every=7) as service,
        Feeder(service.ingest, service.results) as feeder,
    ):
        horizon = feeder.ask(clocked, messages.Opened).horizon
        feeder.subscribe("s")
        feed(feeder, 0, pauses[0])
        answered(feeder, pauses[0] + horizon + 1, "missing")
        feed(feeder, pauses[0], pauses[1])
        answered(feeder, pauses[1] + horizon + 1, "missing")
        feeder.ask(messages.Describe(), messages.Described)
        shutil.copytree(tmp_path / "a", tmp_path / "b")
    with (
        serving(model_file, journal=str(tmp_path / "b")) as service,
        Feeder(service.ingest, service.results) as feeder,
    ):
        feeder.subscribe("s")
        feeder.ask(replace(clocked, resume=True, answered=max(newest)), messages.Opened)
        feed(feeder, pauses[1], 60)
        feeder.ask(messages.Close(session="s"), messages.Closed)
    for index, expected in enumerate(offline(model_file, counts, np.ones(counts.shape, bool))):
        np.testing.assert_array_equal(numbers(newest[index]), expected)
    verdict = verify(tmp_path / "b", [model_file])
    assert verdict == Comparison(1, verdict.answers, verdict.answers)


def test_a_session_whose_model_is_not_served_waits_until_it_is(
    model_file: Path, left_open: tuple[Path, list[messages.Result]], tmp_path: Path
) -> None:
    folder, _ = left_open
    other = make_model(tmp_path / "other.safetensors", n_units=7, names=UNITS, kinematics=False)
    with (
        serving(other, journal=str(folder)) as service,  # by mistake
        Feeder(service.ingest, service.results) as feeder,
    ):
        assert not feeder.ask(open_("s", resume=True), messages.Opened).resumed
        feeder.ask(messages.Describe(), messages.Described)
        shutil.copytree(folder, tmp_path / "died")
    with (
        serving(model_file, journal=str(folder)) as service,
        Feeder(service.ingest, service.results) as feeder,
    ):
        opened = feeder.ask(open_("s", resume=True), messages.Opened)
        assert (opened.resumed, opened.next_index) == (True, 30)
    with (  # both are there: the newer of two of one name goes on, and the older is closed
        serving(model_file, extra={"other": other}, journal=str(tmp_path / "died")) as service,
        Feeder(service.ingest, service.results) as feeder,
    ):
        opened = feeder.ask(open_("s", resume=True), messages.Opened)
        assert (opened.resumed, opened.next_index) == (True, 0)
    assert open_runs(tmp_path / "died")[1] == {}


@pytest.mark.parametrize("served", ["old and new", "new"])
def test_a_service_that_died_soon_after_a_swap_is_taken_up_on_the_new_model(
    model_file: Path, tmp_path: Path, served: str
) -> None:
    counts = spikes(30)
    new = make_model(model_file.with_name("new.safetensors"), n_units=7, names=UNITS, seed=1)
    with (
        serving(model_file, journal=str(tmp_path / "a")) as service,
        Feeder(service.ingest, service.results) as feeder,
        ServiceClient(service.ingest, timeout=60.0) as control,
    ):
        feeder.subscribe("s")
        feeder.ask(open_("s"), messages.Opened)
        feeder.send(*(bin_("s", i, counts[i]) for i in range(15)))
        feeder.results(15)
        control.load(new.name)
        feeder.send(*(bin_("s", i, counts[i]) for i in range(15, 18)))
        feeder.results(3)
        feeder.ask(messages.Describe(), messages.Described)
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        feeder.send(*(bin_("s", i, counts[i]) for i in range(18, 30)))
        expected = feeder.results(12)
    main_model, extra = (new, None) if served == "new" else (model_file, {"new": new})
    with (
        serving(main_model, extra=extra, journal=str(tmp_path / "b")) as service,
        Feeder(service.ingest, service.results) as feeder,
    ):
        feeder.subscribe("s")
        opened = feeder.ask(open_("s", resume=True, answered=17), messages.Opened)
        assert (opened.resumed, opened.next_index) == (True, 18)
        feeder.send(*(bin_("s", i, counts[i]) for i in range(18, 30)))
        for got, want in zip(feeder.results(12), expected, strict=True):
            assert (got.index, got.model) == (want.index, want.model)
            np.testing.assert_array_equal(numbers(got), numbers(want))


def test_bins_left_unanswered_before_a_reboot_are_due_at_once(
    left_open: tuple[Path, list[messages.Result]], model_file: Path
) -> None:
    """The clock begins anew at a boot: what was received by the old one may lie ahead."""
    _, live = open_runs(left_open[0])
    live[0].answers.clear()
    newest = max(record.work.received_ns for _, record in live[0].works.values())
    model_info = engine(model_file).model_info
    for now, changed in ((newest, False), (newest // 2, True)):
        _, resumed = take_up(live[0], model_info, 0, now)
        last = resumed.works[-1]
        assert ((last.received_ns, last.due_ns) == (now, now)) == changed
