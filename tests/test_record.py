"""A session recorded as NWB while it runs; the recorder killed, the service gone."""

from __future__ import annotations

import resource
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nwbinspector import inspect_nwbfile
from pynwb import NWBHDF5IO

from ilqr_clients.record import Recorder
from ilqr_clients.record_log import MAGIC, Heard, RecordLog
from ilqr_clients.sdk import ServiceClient, model_of
from ilqr_service.journal.export import choose, runs_of, write
from ilqr_vae.cli import main
from ilqr_vae.errors import RecordingError
from process import ENVIRONMENT
from rig import make_model, serving, until

WAIT_S = 60.0
WHO = ["--subject", "R7", "--species", "Rattus norvegicus", "--sex", "F", "--age", "P90D"]
WHO += ["--experimenter", "Doe, Jo", "--institution", "Lab"]


def read(path: Path) -> dict[str, Any]:
    """The series of an NWB file, and its events."""
    with NWBHDF5IO(path, "r") as io:
        nwb: Any = io.read()
        found = {name: s.data[:] for name, s in nwb.processing["misc"].data_interfaces.items()}
        found["rate"] = nwb.processing["misc"]["index"].rate
        if "behavior" in nwb.processing:
            found["events"] = nwb.processing["behavior"]["events"].to_dataframe()
        found["trials"] = None if nwb.trials is None else nwb.trials.to_dataframe()
    return found


def test_a_recorder_that_is_killed_loses_nothing_that_it_heard_and_goes_on(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m.safetensors", n_units=5, classes=("left", "right"))
    journal, out = tmp_path / "journal", tmp_path / "rat.nwb"
    command = [sys.executable, "-m", "ilqr_vae.cli", "record", "rat", "--out", str(out), *WHO]
    with serving(model, journal=str(journal)) as service, ServiceClient(service.ingest) as client:
        served = model_of(client.describe())
        options: dict[str, Any] = {"units": served.unit_names, "bin_width": served.bin_width}

        def recording(*more: str) -> subprocess.Popen[bytes]:
            at = ["--to", service.ingest, *more]
            return subprocess.Popen([*command, *at], env=ENVIRONMENT, stderr=subprocess.PIPE)

        counts = np.random.default_rng(0).poisson(1.0, (4096, 5))
        with client.open("rat", abstain=0.7, **options) as session:
            session.step(0, counts[0])
            first = recording("--follow")
            index = 1

            def step() -> None:
                nonlocal index
                session.step(index, counts[index])
                index += 1

            def grown() -> bool:
                step()
                return out.exists() and len(read(out)["index"]) > 3

            until("an NWB file while the session runs", grown)
            client.event("rat", "trial_start", {"target": {"x": 1, "y": [2]}, "note": "a"})
            client.event("rat", "trial_start", {"target": {"x": 4.5}, "id": 7})
            step()
            log = out.with_name("rat.nwb.log")
            heard = index - 1
            until("the last bin", lambda: heard in indices(log))
            first.kill()
            first.wait()
            before = indices(log)
            assert len(read(out)["index"]) > 3  # whole, whenever it was killed
            second = recording()
            assert second.stderr is not None
            assert b"goes on with rat.nwb.log" in second.stderr.readline()

            def resumes() -> bool:
                step()
                return index - 1 in indices(log) or index - 2 in indices(log)

            until("bins after the restart", resumes)
            until("the last bin", lambda: index - 1 in indices(log))
        assert second.wait(WAIT_S) == 0
        second.stderr.close()
        assert first.stderr is not None
        first.stderr.close()
    found = read(out)
    rows = found["index"].astype(int).tolist()
    assert before == set(range(min(before), heard + 1))
    assert before <= set(rows)
    assert index - 1 in rows
    events, trials = found["events"], found["trials"]
    assert events["event"].tolist() == ["trial_start"] * 2
    assert trials["target.x"].tolist() == [1.0, 4.5]
    assert trials["target.y"].tolist() == ["[2]", ""]
    assert (events["note"].tolist(), events["id_"].tolist()[1:]) == (["a", ""], [7.0])
    # what was published is what the service has in its journal
    runs, manifests = runs_of(journal)
    write(tmp_path / "exported.nwb", choose(runs, "rat", None, None), manifests)
    exported = read(tmp_path / "exported.nwb")
    for name in ("latent", "kinematics", "kinematics_std", "rates", "status", "bits", "classes"):
        assert np.array_equal(found[name], exported[name][rows]), name
    # no class is named where the largest probability is below what the session asked for
    sure = found["classes"].max(1) >= 0.7
    assert 0 < sure.sum() < len(sure)
    assert np.array_equal(found["class"], np.where(sure, found["classes"].argmax(1), -1))
    assert [str(m) for m in inspect_nwbfile(nwbfile_path=out)] == []


def indices(log: Path) -> set[int]:
    """Bins that a log holds, read as another process does while it is written."""
    from ilqr_clients.record_log import _MAX_RECORD, _decoder
    from ilqr_vae.files import FRAME, frame_at
    from ilqr_vae.protocol import messages

    data, at, found = log.read_bytes() if log.exists() else b"", len(MAGIC), set[int]()
    while (payload := frame_at(data, at, _MAX_RECORD)) is not None:
        at += FRAME.size + len(payload)
        record = _decoder.decode(payload)
        if isinstance(record, Heard):
            message = messages.decode_published(record.frame)
            if isinstance(message, messages.Result):
                found.add(message.index)
    return found


def test_a_log_cut_anywhere_keeps_what_was_whole(tmp_path: Path) -> None:
    log = RecordLog(tmp_path / "a.log")
    assert list(log.read()) == []
    kept = [Heard(bytes([k]) * k) for k in range(1, 6)]
    ends = [len(MAGIC)]
    for record in kept:
        log.add(record)
        ends.append((tmp_path / "a.log").stat().st_size)
    log.close(remove=False)
    data = (tmp_path / "a.log").read_bytes()
    for cut in range(len(data) + 1):
        (tmp_path / "b.log").write_bytes(data[:cut])
        again = RecordLog(tmp_path / "b.log")
        whole = max(0, sum(end <= cut for end in ends) - 1)
        assert list(again.read()) == kept[:whole]
        again.add(Heard(b"more"))
        assert list(again.read()) == [*kept[:whole], Heard(b"more")]
        again.close(remove=True)
    (tmp_path / "c.log").write_bytes(b"something else")
    with pytest.raises(RecordingError, match="a file that a recorder wrote"):
        list(RecordLog(tmp_path / "c.log").read())


def test_what_a_full_disk_does_not_take_is_written_once_there_is_room(tmp_path: Path) -> None:
    log = RecordLog(tmp_path / "a.log")
    assert list(log.read()) == []
    kept = [Heard(bytes([k]) * 100) for k in range(1, 6)]
    log.add(kept[0])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    full = (tmp_path / "a.log").stat().st_size + 50
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (full, before[1]))
        for record in kept[1:4]:
            log.add(record)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert log.failure == "File too large"
    assert (tmp_path / "a.log").stat().st_size == full
    with pytest.raises(RecordingError, match="no other recorder"):
        RecordLog(tmp_path / "a.log")
    log.sync()
    assert not log.failure
    log.add(kept[4])
    assert list(log.read()) == kept
    log.close(remove=True)


def test_runs_of_a_session_that_is_opened_anew_are_files_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = make_model(tmp_path / "m.safetensors", n_units=5), tmp_path / "rat.nwb"
    said: list[str] = []
    stop = threading.Event()

    def feed(n_bins: int, *, close: bool = True) -> None:
        with ServiceClient(service.ingest) as client:
            served = model_of(client.describe())
            options: dict[str, Any] = {"units": served.unit_names, "bin_width": served.bin_width}
            session = client.open("rat", **options)
            for index in range(n_bins):
                session.step(index, np.full(5, index))
            session.close() if close else session.abandon()

    with serving(model) as service:
        with Recorder(service.ingest, "rat", out, follow=True, say=said.append) as recorder:
            thread = threading.Thread(target=recorder.run, args=(stop,), daemon=True)
            thread.start()
            feed(4)
            until("the first file", lambda: any("rat.nwb: 4 bins" in line for line in said))
            feed(3, close=False)
            feed(5)
            third = tmp_path / "rat-3.nwb"
            until("the third file", lambda: any(f"{third}: 5 bins" in line for line in said))
            feed(2, close=False)
            until("the fourth file", (tmp_path / "rat-4.nwb").exists)
            until("its last bin", lambda: len(read(tmp_path / "rat-4.nwb")["index"]) == 2)
            stop.set()
            thread.join(WAIT_S)
        assert list(recorder.written.values()) == [4, 3, 5, 2]
        assert [len(read(path)["index"]) for path in recorder.written] == [4, 3, 5, 2]
        assert not out.with_name("rat.nwb.log").exists()
        arguments = ["record", "rat", "--out", str(out), "--to", service.ingest]
        for wrong in ("", "x" * 5000 + ".nwb"):
            assert main(["record", "rat", "--out", wrong]) == 2
        assert "5004 characters" in capsys.readouterr().err
        assert main([*arguments, "--duration", "0.1"]) == 2
        assert "--force" in capsys.readouterr().err
