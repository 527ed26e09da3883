"""A journal run again offline: the same bits, or where they differ."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from feeder import UNITS, Feeder, bin_, open_, spikes
from ilqr_service.journal.records import MAGIC, Answered, frame, records, segments
from ilqr_service.journal.verify import Comparison, verify
from ilqr_service.verify_cli import summary
from ilqr_vae.cli import main
from ilqr_vae.protocol import messages
from rig import make_model, serving


@pytest.fixture(scope="module", params=[1, 2], ids=["one model", "an ensemble"])
def model_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "m.safetensors"
    classes = ("left", "right") if request.param == 1 else ()
    members = request.param
    return make_model(path, n_units=7, names=UNITS, members=members, classes=classes, later=2)


@pytest.fixture(scope="module")
def journal(model_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a service that met gaps, late bins, masks, deadlines and two epochs, in small files; bins
    are answered once more after later ones."""
    folder = tmp_path_factory.mktemp("journal")
    counts = spikes(150)
    with (
        serving(
            model_file,
            journal=str(folder),
            journal_segment_mb=0.05,
            snapshot_every=20,
            credits=500,
            keep_warm_ms=0,
        ) as service,
        Feeder(service.ingest, service.results) as feeder,
    ):
        feeder.subscribe("a")
        feeder.subscribe("b")
        b = open_("b", deadline_ns=1, anytime=True, watch_units=True, lag=1)
        feeder.send(open_("a", lag=2), b)
        order = [i for i in range(150) if i % 13 != 5]
        order[40:44] = order[43:39:-1]  # out of order, within the window
        mask = messages.pack(np.arange(7) != 3, "u1")
        for i in order:
            feeder.send(bin_("a", i, counts[i], mask=mask if i % 3 == 0 else None))
            feeder.send(bin_("b", i, counts[i]))
        feeder.ask(messages.Close(session="a"), messages.Closed)
        feeder.send(
            open_("a", epoch=1, lag=2), *(bin_("a", i, counts[i], epoch=1) for i in range(30))
        )
        feeder.ask(messages.Close(session="a", epoch=1), messages.Closed)
        feeder.ask(messages.Close(session="b"), messages.Closed)
    return folder


def test_a_journal_run_again_gives_the_same_bits(journal: Path, model_file: Path) -> None:
    assert len(segments(journal)) > 1  # how many depends on how much is written at once
    verdict = verify(journal, [model_file])
    assert verdict.runs == 3
    assert verdict.answers >= 640
    assert verdict == Comparison(3, verdict.answers, verdict.answers)
    statuses, revisions = set[str](), set[int]()
    for path in segments(journal):
        for record in records(path):
            if isinstance(record, Answered):
                result = messages.decode_published(record.frame)
                assert isinstance(result, messages.Result)
                statuses.add(result.status)
                revisions.add(result.revision)
    assert {"missing", "late"} <= statuses
    assert {0, 1} <= revisions


def test_inspect_shows_the_sessions_of_a_journal(
    journal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(journal), "--json", str(tmp_path / "j.json")]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "sessions 2 in 3 runs" in text
    assert "a, epoch 1 run" in text
    found = json.loads((tmp_path / "j.json").read_text())
    runs = {(run["session"], run["epoch"]): run for run in found["runs"]}
    first, later = runs["a", 0], runs["a", 1]
    assert first["bins"] == sum(i % 13 != 5 for i in range(150))
    assert first["first"] == 0
    assert sum(first["statuses"].values()) == first["last"] + 1
    assert first["statuses"]["missing"] > 0
    assert runs["b", 0]["statuses"]["late"] > 0
    assert later["bins"] == 30
    assert {run["end"] for run in runs.values()} == {"closed"}
    assert list(found["models"]) == [first["model"]]
    (tmp_path / "empty").mkdir()
    assert main(["inspect", str(tmp_path / "empty")]) == 2


def test_verify_says_where_another_model_differs(
    journal: Path, model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(journal), "--model", str(model_file)]) == 0
    assert "identical to the last bit" in capsys.readouterr().out
    other = make_model(tmp_path / "other.safetensors", n_units=7, names=UNITS, kinematics=False)
    nowhere = str(tmp_path / "absent" / "x.json")
    for arguments, said in (
        ([str(journal), "--model", str(other)], "error: model: expected files of"),
        ([str(tmp_path), "--model", str(model_file)], "error: journal: expected a folder with"),
        ([nowhere, "--model", str(model_file)], "error: journal: expected a folder"),
        # said before the run: the model would do
        ([str(journal), "--model", str(model_file), "--json", nowhere], "error: --json: expected"),
        ([str(journal), "--model", str(model_file), "--tolerance", "inf"], "error: --tolerance"),
    ):
        assert main(["verify", *arguments]) == 2
        told = capsys.readouterr()
        assert told.err.startswith(said)
        assert not told.out


def rewritten(
    journal: Path, folder: Path, alter: Callable[[messages.Result], messages.Result]
) -> Path:
    """A copy in which bin 3 of run 0 was first answered otherwise."""
    folder.mkdir()
    for path in segments(journal):
        framed: list[bytes] = []
        for record in records(path):
            at = (record.run, record.serial, record.index) if isinstance(record, Answered) else ()
            if isinstance(record, Answered) and at == (0, 3, 3):
                result = messages.decode_published(record.frame)
                assert isinstance(result, messages.Result)
                record = replace(record, frame=messages.encode(alter(result)))
            framed.append(frame(record))
            if isinstance(record, Answered) and not record.settles:
                framed.append(framed[-1])  # as a segment does that begins between two answers
        (folder / path.name).write_bytes(MAGIC + b"".join(framed))
    return folder


def test_a_number_lost_or_a_solve_that_ended_otherwise_is_beyond_any_tolerance(
    journal: Path, model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def exact(folder: Path, tolerance: str) -> tuple[int, dict[str, object]]:
        options = ("--model", str(model_file), "--tolerance", tolerance, "--json", "-")
        code = main(["verify", str(folder), *options])
        return code, json.loads(capsys.readouterr().out)

    def latent(values: np.ndarray) -> Callable[[messages.Result], messages.Result]:
        return lambda result: replace(result, latent=messages.pack(values, "<f8"))

    lost = rewritten(journal, tmp_path / "lost", latent(np.array([0.0, 0.0, 0.0, np.nan])))
    code, verdict = exact(lost, "1e6")
    assert (code, verdict["largest"], verdict["changed"]) == (1, None, 0)
    assert str(verdict["first"]).endswith("bin 3")
    solver = rewritten(journal, tmp_path / "solver", lambda r: replace(r, solver="stalled"))
    code, verdict = exact(solver, "1e6")
    assert (code, verdict["largest"], verdict["changed"]) == (1, 0.0, 1)
    near = rewritten(journal, tmp_path / "near", latent(np.zeros(4)))
    assert exact(near, "1e6")[0] == 0
    assert exact(near, "1e-6")[0] == 1


@pytest.mark.parametrize("changed", [{"iterations": 1}, {"horizon": 8}])
def test_each_part_is_run_again_with_the_settings_it_was_served_with(
    left_open: tuple[Path, list[messages.Result]], model_file: Path, changed: dict[str, int]
) -> None:
    """A session goes on under other settings, and one begins; then both services' are gone over."""
    folder, _ = left_open
    counts = spikes(40)
    with (
        serving(model_file, journal=str(folder), **changed) as service,
        Feeder(service.ingest, service.results) as feeder,
    ):
        feeder.subscribe("s")
        feeder.subscribe("new")
        assert feeder.ask(open_("s", resume=True, answered=29), messages.Opened).next_index == 30
        feeder.ask(open_("new"), messages.Opened)
        feeder.send(*(bin_("s", i, counts[i]) for i in range(30, 40)))
        feeder.send(*(bin_("new", i, counts[i]) for i in range(20)))
        feeder.results(30)
    assert verify(folder, [model_file]) == Comparison(2, 60, 60)


def test_one_altered_bit_is_found(journal: Path, model_file: Path, tmp_path: Path) -> None:
    """Altered together with its checksum: only computing again can tell."""

    def flipped(result: messages.Result) -> messages.Result:
        first, *rest = result.latent.data
        return replace(result, latent=replace(result.latent, data=bytes([first ^ 1, *rest])))

    verdict = verify(rewritten(journal, tmp_path / "altered", flipped), [model_file])
    assert verdict.answers - verdict.identical == 1
    assert 0 < verdict.largest < 1e-12
    assert verdict.first.endswith("bin 3")


WRITTEN = Path(__file__).parent / "data" / "journal_1"
"""By the service as it was on 2026-11-27: a late bin, a gap, a mask, a swap, watched units, solves
cut short and bins that were shed, in two segments."""


def test_a_journal_of_an_earlier_service_is_read_and_gives_the_same_answers() -> None:
    """Its on-disk format stays readable; its answers are the same up to rounding, and what of the
    build differs is named."""
    verdict = verify(WRITTEN, sorted(WRITTEN.glob("*.safetensors")))
    assert (verdict.runs, verdict.answers, verdict.skipped) == (3, 56, 0)
    assert verdict.within(1e-9), verdict
    assert verdict.versions["arithmetic"] == "not stated"
    other = dataclasses.replace(verdict, identical=55)
    assert "arithmetic not stated: other bits are expected" in summary(other)
    assert "--tolerance" not in summary(dataclasses.replace(other, versions={}))
