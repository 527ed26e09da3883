"""Replay through the real service: the same decodes at any speed, and as offline."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from scipy import io

import layouts
from ilqr_clients.sdk import ServiceClient
from ilqr_clients.stream import StreamLog, stream
from ilqr_service.server import Service
from ilqr_training.readout.causal import causal_pass
from ilqr_vae.artifact import load_artifact
from ilqr_vae.cli import main
from ilqr_vae.errors import ServiceError
from ilqr_vae.recordings import load_recording
from ilqr_vae.recordings.split import WARMUP_BINS, plan_drops, warmup_start
from rig import BIN_S, N_BINS, SPLIT, make_model, serving, spec, write_recording

N_UNITS = 6
UNITS = tuple(f"unit{i}" for i in range(N_UNITS))


@dataclass(frozen=True)
class Rig:
    service: Service
    model: Path
    recording: Path

    def replay(self, *options: str | Path) -> int:
        return main(
            ["replay", str(self.recording), "--to", self.service.ingest, *map(str, options)]
        )


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    folder = tmp_path_factory.mktemp("rig")
    model = make_model(folder / "m.safetensors", n_units=N_UNITS)
    recording = write_recording(folder / "reach.mat", n_units=N_UNITS)
    # Credits for everything: on a loaded machine a timed replay queues, and nothing is refused.
    with serving(model, credits=1000) as service:
        yield Rig(service, model, recording)


def test_any_speed_gives_the_offline_decodes_with_bins_dropped(rig: Rig, tmp_path: Path) -> None:
    fast, timed = tmp_path / "fast.npz", tmp_path / "timed.npz"
    options = ("--drop", "0.1", "--seed", "3", "--deadline-ms", "60000")
    assert rig.replay("--speed", "max", *options, "--arrays", fast) == 0
    assert rig.replay("--speed", "10", *options, "--arrays", timed) == 0
    with np.load(fast) as a, np.load(timed) as b:
        one, two = dict(a), dict(b)
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)
    start, stop = SPLIT.bins("test", N_BINS)
    first = warmup_start(start)
    assert start - first == WARMUP_BINS
    dropped = plan_drops(stop - first, 0.1, 3)
    assert ((one["status"] == "missing") == dropped[start - first :]).all()
    assert set(one["status"]) == {"ok", "missing"}

    everywhere = np.zeros(N_BINS, dtype=bool)
    everywhere[first:stop] = dropped
    recording = load_recording(rig.recording, spec())
    estimator = load_artifact(rig.model, device="cpu").estimator()
    offline = causal_pass(estimator, recording, start, stop, run_in=WARMUP_BINS, dropped=everywhere)
    np.testing.assert_allclose(one["kinematics"], offline.kinematics, rtol=0, atol=1e-6)
    np.testing.assert_allclose(one["kinematics_std"], offline.kinematics_std, rtol=0, atol=1e-6)
    np.testing.assert_allclose(one["bits"], offline.bits, rtol=0, atol=1e-6)
    known = np.isfinite(offline.inputs)  # not of the last bins
    np.testing.assert_allclose(one["inputs"][known], offline.inputs[known], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(np.isfinite(one["inputs"]), known)


def test_the_report_says_what_was_asked_of_it(
    rig: Rig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers, page = tmp_path / "r.json", tmp_path / "r.html"
    done = rig.replay("--speed", "max", "--json", numbers, "--html", page, "--session", "named")
    assert done == 0
    report = json.loads(numbers.read_text())
    start, stop = SPLIT.bins("test", N_BINS)
    n = stop - start
    assert report["bins"] == report["scored_bins"] == n
    assert set(report["scores"]) == {"iLQR-VAE", "Wiener filter"}
    assert set(report["scores"]["iLQR-VAE"]) == {"r2", "r2.vx", "r2.vy", "coverage_90"}
    assert report["scores"]["Wiener filter"]["r2"] > 0.3
    assert sum(report["statuses"].values()) == n
    assert report["session"] == "named"
    assert report["model"] == rig.service.model
    assert report["recording"]["sha256"] in report["provenance"]["recording"]
    for stage in ("solve", "queue", "publish", "wire", "feeder", "total"):
        summary = report["latency_ms"][stage]
        assert summary["n"] == n
        assert 0 <= summary["p50"] <= summary["p99"] <= summary["p99.9"] <= summary["max"]
        assert "clock_uncertainty" not in summary  # by one clock alone
    clock = report["clock"]
    for stage in ("wire_in", "wire_out"):
        assert report["latency_ms"][stage]["n"] == n
        assert report["latency_ms"][stage]["clock_uncertainty"] == clock["uncertainty_ms"]
    said = "same clock as the service" if clock["same"] else "probes"
    assert said in page.read_text()
    assert report["flagged"] == report["unit_notices"] == []
    assert page.read_text().startswith("<!doctype html>")
    shown = capsys.readouterr().out
    assert "Wiener filter" in shown
    assert said in shown


def test_a_replay_that_watches_units_says_which_were_masked(rig: Rig, tmp_path: Path) -> None:
    broken = io.loadmat(rig.recording)
    broken["spikes"][2] = 0  # from the first bin on
    io.savemat(tmp_path / "broken.mat", {k: broken[k] for k in ("spikes", "velocity")})
    numbers, page = tmp_path / "r.json", tmp_path / "r.html"
    other = Rig(rig.service, rig.model, tmp_path / "broken.mat")
    outputs = ("--speed", "max", "--json", numbers, "--html", page)
    assert other.replay(*outputs, "--watch-units") == 0
    report = json.loads(numbers.read_text())
    assert "unit2:dead" in report["flagged"]
    assert "unit unit2 masked: dead" in report["unit_notices"]
    assert "unit2 (dead)" in page.read_text()
    assert other.replay(*outputs) == 0  # who does not ask is not told
    assert json.loads(numbers.read_text())["flagged"] == []


def test_without_kinematics_latents_and_bits_are_reported(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m.safetensors", n_units=N_UNITS, kinematics=False)
    recording = write_recording(tmp_path / "reach.mat", n_units=N_UNITS)
    numbers = tmp_path / "r.json"
    with serving(model) as service:
        assert Rig(service, model, recording).replay("--speed", "max", "--json", numbers) == 0
    report = json.loads(numbers.read_text())
    assert report["scores"] == {}
    assert np.isfinite(report["bits_per_spike"])
    assert any("no kinematics" in note for note in report["notes"])


def test_the_feeder_keeps_an_absolute_schedule(rig: Rig) -> None:
    counts = load_recording(rig.recording, spec()).counts[:40]
    dropped = plan_drops(40, 0.2, 0)
    with (
        ServiceClient(rig.service.ingest) as client,
        client.open("clocked", units=UNITS, bin_width=BIN_S) as session,
    ):
        log = stream(session, counts, dropped=dropped, interval=0.01)
    index = np.flatnonzero(~dropped)
    assert (np.diff(log.intended[index]) == np.diff(index) * 10_000_000).all()
    assert (log.sent[index] >= log.intended[index]).all()
    assert (log.sent[dropped] == 0).all()
    assert log.answered == 40
    latency = log.latency_ms(slice(None))
    parts = sum(latency[s][index] for s in ("solve", "queue", "publish", "wire", "feeder"))
    np.testing.assert_allclose(parts, latency["total"][index], atol=1e-3)
    assert np.isnan(latency["total"][dropped]).all()


def test_bins_inside_a_gap_of_the_recording_are_sent_masked(rig: Rig) -> None:
    counts = load_recording(rig.recording, spec()).counts[:12]
    valid = np.ones(12, dtype=bool)
    valid[4:7] = False
    mask = np.broadcast_to(valid[:, None], counts.shape)
    with (
        ServiceClient(rig.service.ingest) as client,
        client.open("gap", units=UNITS, bin_width=BIN_S, deadline=60.0) as session,
    ):
        log = stream(session, counts, mask=mask)
    assert [s == "extrapolated" for s in log.status] == (~valid).tolist()


def test_units_not_recorded_throughout_are_masked_as_offline(rig: Rig, tmp_path: Path) -> None:
    nwb = layouts.file()
    nwb.add_unit_column("unit_name", "names")
    rng = np.random.default_rng(0)
    for i, name in enumerate(UNITS):
        end = 6.0 if i < 3 else 12.0  # three are lost halfway
        times = np.sort(rng.uniform(0, end, 200))
        nwb.add_unit(spike_times=times, obs_intervals=np.array([[0.0, end]]), unit_name=name)
    lossy = Rig(rig.service, rig.model, layouts.save(tmp_path / "lossy.nwb", nwb))
    out = tmp_path / "a.npz"
    assert lossy.replay("--speed", "max", "--span", "all", "--arrays", out) == 0
    recording = load_recording(lossy.recording, spec())
    assert recording.observed is not None
    estimator = load_artifact(rig.model, device="cpu").estimator()
    offline = causal_pass(estimator, recording, 0, len(recording))
    with np.load(out) as streamed:
        for name in ("kinematics", "kinematics_std", "bits"):
            expected = getattr(offline, name)
            np.testing.assert_allclose(streamed[name], expected, rtol=0, atol=1e-6, err_msg=name)


def test_dropping_is_repeatable_and_spares_the_ends() -> None:
    assert (plan_drops(1000, 0.3, 5) == plan_drops(1000, 0.3, 5)).all()
    assert 0.25 < plan_drops(1000, 0.3, 5).mean() < 0.35
    for seed in range(50):
        dropped = plan_drops(4, 0.9, seed)
        assert not dropped[0]
        assert not dropped[-1]
    assert not plan_drops(10, 0.0, 0).any()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--speed", "fast"], 2, "--speed: expected a number above zero, or max"),
        (["--speed", "0"], 2, "--speed"),
        (["--span", "tests"], 2, "--span: expected train, validation, test or all"),
        (["--deadline-ms", "-1"], 2, "--deadline-ms"),
        (["--deadline-ms", "1e300"], 2, "--deadline-ms: expected milliseconds above zero, at most"),
        (["--json", "absent/r.json"], 2, "--json"),
        (["--config", "absent.toml"], 2, "config absent.toml"),
        (["--session", "no spaces"], 3, "session (refused"),
    ],
)
def test_wrong_options_end_with_their_name(
    rig: Rig, capsys: pytest.CaptureFixture[str], options: list[str], code: int, message: str
) -> None:
    assert rig.replay("--speed", "max", *options) == code
    assert message in capsys.readouterr().err


def test_a_recording_that_does_not_fit_the_model_ends_with_its_field(
    rig: Rig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = write_recording(tmp_path / "few.mat", n_units=N_UNITS - 1)
    to = ["--to", rig.service.ingest, "--speed", "max"]
    assert main(["replay", str(few), *to]) == 2
    assert "unit_names: expected the model's 6 units" in capsys.readouterr().err
    config = tmp_path / "c.toml"
    config.write_text("[data]\nbin_width = 0.1\n[data.mat]\nspikes = 'spikes'\n")
    assert main(["replay", str(rig.recording), *to, "--config", str(config)]) == 2
    assert "bin_width" in capsys.readouterr().err
    config.write_text("[data]\nbinwidth = 0.1\n")
    assert main(["replay", str(rig.recording), *to, "--config", str(config)]) == 2
    assert "binwidth" in capsys.readouterr().err


def test_trials_of_an_hdf5_file_are_not_streamed(
    rig: Rig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = layouts.nlb_hdf5(tmp_path / "a.h5")
    assert main(["replay", str(file), "--to", rig.service.ingest]) == 2
    message = "recording: expected a .nwb or .mat file (trials of an HDF5 file"
    assert message in capsys.readouterr().err


def test_no_service_ends_with_3_and_writes_nothing(
    rig: Rig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nobody = f"ipc://{tmp_path}/nobody"
    out = tmp_path / "out"
    out.mkdir()
    options = ["--to", nobody, "--timeout", "0.2", "--json", str(out / "r.json")]
    assert main(["replay", str(rig.recording), *options]) == 3
    assert "nobody" in capsys.readouterr().err
    assert list(out.iterdir()) == []


def test_a_service_that_goes_away_is_said(rig: Rig) -> None:
    counts = load_recording(rig.recording, spec()).counts
    with serving(rig.model) as service, ServiceClient(service.ingest) as client:

        def watch(log: StreamLog, _: float) -> None:
            if log.answered >= 20:
                service.stop()

        with (
            client.open("cut", units=UNITS, bin_width=BIN_S) as session,
            pytest.raises(ServiceError, match=r"ended \(shutdown\)"),
        ):
            stream(session, counts, watch=watch)


def test_bins_beyond_the_credits_are_counted_and_become_gaps(rig: Rig) -> None:
    counts = load_recording(rig.recording, spec()).counts[:60]
    with (
        serving(rig.model, credits=2) as service,
        ServiceClient(service.ingest) as client,
        client.open("flood", units=UNITS, bin_width=BIN_S, deadline=60.0) as session,
    ):
        log = stream(session, counts, interval=1e-5, patience=1.0)
    assert log.refused > 0
    assert log.status.count("ok") == 60 - log.refused
    # Refused bins show as missing once a later one comes; those at the very end have no answer.
    assert log.status.count("missing") + log.status.count("") == log.refused
    assert "" not in log.status[: log.answered]


def test_bins_of_a_gap_beyond_the_limit_are_not_waited_for(rig: Rig) -> None:
    counts = load_recording(rig.recording, spec()).counts[:60]
    dropped = np.zeros(60, dtype=bool)
    dropped[10:40] = dropped[45:48] = True
    with (
        serving(rig.model, gap_limit=20) as service,
        ServiceClient(service.ingest) as client,
        client.open("gaps", units=UNITS, bin_width=BIN_S, deadline=60.0) as session,
    ):
        log = stream(session, counts, dropped=dropped)
    assert log.unbridged == 30
    assert np.flatnonzero(np.array(log.status) == "").tolist() == list(range(10, 40))
    assert log.status.count("missing") == 3
    assert log.answered == 30


def test_an_interrupted_replay_writes_nothing_and_closes_its_session(
    rig: Rig, tmp_path: Path
) -> None:
    out = tmp_path / "r.json"
    program = [sys.executable, "-c", "import sys; from ilqr_vae.cli import main; sys.exit(main())"]
    options = ["--speed", "0.5", "--session", "cut-off", "--json", str(out)]
    replay = subprocess.Popen(
        [*program, "replay", str(rig.recording), "--to", rig.service.ingest, *options],
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True,
    )
    with ServiceClient(rig.service.ingest) as client, replay:
        end = time.monotonic() + 30.0
        while not any(s.session == "cut-off" and s.bins for s in client.sessions()):
            assert replay.poll() is None
            assert time.monotonic() < end
        replay.send_signal(signal.SIGINT)
        assert replay.stderr is not None
        assert "interrupted" in replay.stderr.read()
        assert replay.wait(10) == 130
        assert "cut-off" not in {s.session for s in client.sessions()}
    assert list(tmp_path.iterdir()) == []
