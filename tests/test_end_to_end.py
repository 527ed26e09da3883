"""Real processes, real sockets: train, serve, replay with bins dropped, compare with evaluate."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import zmq
from numpy.typing import NDArray
from pynwb import NWBHDF5IO

from feeder import WAIT_S, Feeder
from ilqr_clients.sdk import ServiceClient
from ilqr_service.journal import export
from ilqr_service.journal.export import runs_of
from ilqr_vae.protocol import messages
from ilqr_vae.recordings import load_recording
from ilqr_vae.recordings.split import plan_drops, warmup_start
from rig import BIN_S, N_BINS, SPLIT, spec, write_recording
from tiny import config, write_config

N_UNITS = 8
SEED = 2
DROPS = ("--drop", "0.05", "--seed", str(SEED))
PROGRAM = (sys.executable, "-m", "ilqr_vae.cli")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
LIMIT_S = 280.0


def run(*args: str | Path) -> str:
    """One verb as its own process; what it printed."""
    done = subprocess.run(
        [*PROGRAM, *map(str, args)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@dataclass(frozen=True)
class Served:
    """A trained model behind a service that runs as its own process."""

    folder: Path
    recording: Path
    model: Path
    process: subprocess.Popen[str]
    ingest: str
    results: str
    http: str

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://{self.http}{path}", timeout=WAIT_S) as response:
            assert response.status == 200
            return response.read().decode()

    def metrics(self) -> dict[str, float]:
        lines = re.findall(r"^(ilqr_\S+) (\S+)$", self.get("/metrics"), re.MULTILINE)
        return {name: float(value) for name, value in lines}

    def replay(self, *options: str | Path) -> list[str]:
        # A loaded machine must not make a bin late: the deadline is generous.
        to = ("--to", self.ingest, "--deadline-ms", "60000")
        return [*map(str, (*PROGRAM, "replay", self.recording, *to, *options))]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("chain")
    recording = write_recording(folder / "reach.mat", n_units=N_UNITS)
    asked = config(data=spec(trials=True), steps=30, batch=8, validate_every=0)
    settings = write_config(folder / "c.toml", asked, readout={"classes": True})
    model = folder / "m.safetensors"
    run("train", settings, "--recording", recording, "--out", model)
    service = folder / "service.toml"
    service.write_text("credits = 1000\n")  # a timed replay may queue where the machine is busy
    free = ("--ingest", "tcp://127.0.0.1:*", "--results", "tcp://127.0.0.1:*")
    process = subprocess.Popen(
        [
            *(*PROGRAM, "serve", str(model), *free, "--http", "127.0.0.1:0"),
            *("--config", str(service), "--device", "cpu", "--ready-file", "-"),
            *("--journal", str(folder / "journal")),
        ],
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    with process:
        try:
            assert process.stdout is not None
            ready = json.loads(process.stdout.readline())
            at = {key: ready[key] for key in ("ingest", "results", "http")}
            yield Served(folder, recording, model, process, **at)
            assert process.poll() is None, "the service ended by itself"
            process.send_signal(signal.SIGTERM)
            assert process.wait(WAIT_S) == 0
        finally:
            process.kill()


def read(path: Path) -> dict[str, NDArray[np.generic]]:
    with np.load(path) as file:
        return dict(file)


def test_the_whole_chain(served: Served) -> None:
    folder = served.folder
    fast, timed, offline = (folder / f"{name}.npz" for name in ("fast", "timed", "offline"))
    before = served.metrics()

    run(*served.replay("--speed", "max", *DROPS, "--arrays", fast)[len(PROGRAM) :])

    # in time, and mid-way somebody else sends what is no message
    clocked = subprocess.Popen(
        served.replay(
            *("--speed", "4", *DROPS, "--session", "timed", "--arrays", timed),
            *("--json", folder / "timed.json"),
        ),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    with clocked, Feeder(served.ingest, served.results) as stranger:
        try:
            stranger.sub.setsockopt(zmq.SUBSCRIBE, messages.topic("timed"))
            assert len(stranger.results(20)) == 20
            refused = stranger.ask(b"\xc1 no message", messages.Refused)
            assert refused.field
            assert refused.session == ""
            assert clocked.poll() is None, "the malformed message came too late"
            assert clocked.stderr is not None
            log = clocked.stderr.read()
            assert clocked.wait(LIMIT_S) == 0, log
        finally:
            clocked.kill()
    options = (*DROPS, "--arrays", offline, "--json", folder / "offline.json")
    run("evaluate", served.model, "--recording", served.recording, *options)

    # exactly the bins left out are flagged, everything else is ok
    start, stop = SPLIT.bins("test", N_BINS)
    first = warmup_start(start)
    dropped = plan_drops(stop - first, 0.05, SEED)
    assert dropped[start - first :].sum() >= 3
    one, two, truth = read(fast), read(timed), read(offline)
    assert ((one["status"] == "missing") == dropped[start - first :]).all()
    assert set(one["status"]) == {"ok", "missing"}

    # at any speed, with or without a stranger: the same bits
    assert one.keys() == two.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, two[name], err_msg=name)

    # and the decodes of evaluate
    for name in ("kinematics", "kinematics_std", "bits", "classes"):
        np.testing.assert_allclose(one[name], truth[name], rtol=0, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(one["classes"].sum(1), 1.0)
    offline_report, timed_report = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("offline", "timed")
    )
    classes = offline_report["classes"]
    assert classes["names"] == ["left", "right"]
    assert classes["n"] == sum(classes["sizes"]) == timed_report["classes"]["n"]

    # the recording's trials were events of the session: in the journal, the export and the report
    played = load_recording(served.recording, spec(trials=True)).slice(first, stop).trials
    assert played is not None
    runs, manifests = runs_of(folder / "journal")
    export.write(folder / "timed.nwb", export.choose(runs, "timed", None, None), manifests)
    with NWBHDF5IO(folder / "timed.nwb", "r") as io:
        trials = io.read().trials.to_dataframe()
    assert trials["condition"].tolist() == list(played.condition)
    lasted = (trials["stop_time"] - trials["start_time"]).to_numpy() * 4  # of the recording
    np.testing.assert_allclose(lasted, (played.stop - played.start) * BIN_S, atol=1e-6)
    begun = (np.diff(trials["start_time"]) * 4, np.diff(played.start) * BIN_S)
    np.testing.assert_allclose(*begun, atol=1e-6)
    shown = [event["name"] for event in timed_report["events"]]
    assert shown == ["trial_start", "trial_stop"] * len(played)

    # the service is up, and counted
    assert served.get("/healthz") == served.get("/readyz") == "ok\n"
    counted = {name: value - before.get(name, 0.0) for name, value in served.metrics().items()}
    streams, n_missing = 2, int(dropped.sum())
    assert counted['ilqr_bins_total{status="missing"}'] == streams * n_missing
    assert counted['ilqr_bins_total{status="ok"}'] == streams * (len(dropped) - n_missing)
    assert counted['ilqr_refused_total{reason="message"}'] == 1
    assert counted["ilqr_gap_total"] > 0


def test_the_service_describes_the_file_it_was_given(served: Served) -> None:
    manifest = served.folder / "manifest.json"
    run("inspect", served.model, "--json", manifest)
    with ServiceClient(served.ingest) as client:
        described = client.describe().manifest
    assert described["model_id"] == json.loads(manifest.read_text())["model_id"]
    assert described["scores"] == json.loads(manifest.read_text())["scores"]


def test_a_second_service_on_the_same_address_says_so(served: Served) -> None:
    again = subprocess.run(
        [*PROGRAM, "serve", str(served.model), "--ingest", served.ingest, "--http", ""],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert again.returncode == 3
    assert again.stderr.splitlines()[-1].startswith("error: ingest: expected an address")
    assert served.get("/healthz") == "ok\n"
