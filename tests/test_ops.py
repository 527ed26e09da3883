"""Operations: rules, dashboard, a real Prometheus; export to NWB; replay of a journal; hygiene."""

from __future__ import annotations

import gc
import json
import math
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from feeder import UNITS, WAIT_S, Feeder, bin_, open_, spikes
from ilqr_clients.load import quantiles
from ilqr_clients.load_schedule import Faults, LoadSize, schedule
from ilqr_service.fleet.replica import Copier
from ilqr_service.hygiene import Hygiene, parse_cpus
from ilqr_service.metrics.telemetry import Telemetry
from ilqr_service.server import Service
from ilqr_service.settings import ServiceSettings
from ilqr_vae.cli import main
from ilqr_vae.protocol import messages
from rig import make_model, serving

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, Path, Path]]:
    folder = tmp_path_factory.mktemp("ops")
    model = make_model(folder / "m.safetensors", n_units=7, names=UNITS)
    journal = folder / "journal"
    cores = ",".join(str(core) for core in os.sched_getaffinity(0))  # so that something is asked
    with serving(
        model, journal=str(journal), http="127.0.0.1:0", credits=500, cpus=cores
    ) as running:
        yield running, journal, model
    assert running.failure is None


@pytest.fixture(scope="module")
def fed(served: tuple[Service, Path, Path]) -> tuple[Service, Path, Path]:
    service, _, _ = served
    counts = spikes(80)
    with Feeder(service.ingest, service.results) as feeder:
        feeder.subscribe("rat-7")
        feeder.ask(open_("rat-7"), messages.Opened)
        feeder.send(*(bin_("rat-7", i, counts[i]) for i in range(80) if i not in (9, 30)))
        feeder.results(80)
        feeder.ask(messages.Close(session="rat-7"), messages.Closed)
    return served


def tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed (Debian: apt-get install prometheus)")
    return path


def test_rules_are_right_by_promtool() -> None:
    promtool, folder = tool("promtool"), CONFIGS / "prometheus"
    for arguments in (["check", "config", "prometheus.yml"], ["test", "rules", "rules_test.yml"]):
        done = subprocess.run(
            [promtool, *arguments], cwd=folder, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


def queries() -> list[str]:
    """Every expression of the dashboard and the rules."""
    board = json.loads((CONFIGS / "grafana/dashboards/ilqr.json").read_text())
    return [t["expr"] for panel in board["panels"] for t in panel["targets"]]


def test_every_metric_that_is_asked_for_is_there(fed: tuple[Service, Path, Path]) -> None:
    service, _, _ = fed
    with urllib.request.urlopen(f"http://{service.http}/metrics", timeout=WAIT_S) as page:
        shown = set(re.findall(r"^(ilqr_\w+?)(?:\{| )", page.read().decode(), re.MULTILINE))
    rules = (CONFIGS / "prometheus/rules.yml").read_text()
    asked = set(re.findall(r"\bilqr_\w+", " ".join([*queries(), rules])))
    assert len(asked) > 20
    assert asked <= shown, asked - shown
    alerts = re.findall(r"- alert: (\w+)", rules)
    told = (CONFIGS.parent / "docs/operations.md").read_text()
    assert [a for a in alerts if f"| {a} |" not in told] == []
    tried = (CONFIGS / "prometheus/rules_test.yml").read_text()
    for one in alerts:  # each is seen to fire and seen not to
        assert tried.count(f"alertname: {one}") - tried.count(f"{one}, exp_alerts: []") == 1, one
        assert f"alertname: {one}, exp_alerts: []" in tried, one


def test_what_operations_names_is_there() -> None:
    root = CONFIGS.parent
    told = (root / "docs/operations.md").read_text()
    tests = set(re.findall(r"`(test_\w+\.py)`", told))
    assert len(tests) > 5
    assert [t for t in tests if not (root / "tests" / t).exists()] == []
    settings = set(ServiceSettings.__struct_fields__)
    assigned = set(re.findall(r"`(\w+) = ", told))
    assert assigned <= settings
    fleet = set(
        re.findall(r'"(\w+)": \(', (root / "service/ilqr_service/fleet/fleet.py").read_text())
    )
    counted = set(re.findall(r"`(ilqr_\w+)", told)) - {f"ilqr_fleet_{name}" for name in fleet}
    with closing(Copier("a", b"", None)) as copier:
        known = [*Telemetry(0.05).registry.collect(), *copier.collect()]
    names = {s.name for m in known for s in m.samples} | {m.name for m in known} | {"ilqr_hygiene"}
    assert counted <= names, counted - names


def test_a_real_prometheus_scrapes_and_evaluates(
    fed: tuple[Service, Path, Path], tmp_path: Path
) -> None:
    service, _, _ = fed
    prometheus = tool("prometheus")
    config = (CONFIGS / "prometheus/prometheus.yml").read_text()
    config = config.replace("127.0.0.1:9464", service.http).replace("5s", "1s")
    (tmp_path / "prometheus.yml").write_text(config)
    shutil.copy(CONFIGS / "prometheus/rules.yml", tmp_path)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    log = (tmp_path / "log").open("wb")
    process = subprocess.Popen(
        [
            prometheus,
            f"--config.file={tmp_path / 'prometheus.yml'}",
            f"--storage.tsdb.path={tmp_path / 'data'}",
            f"--web.listen-address={address}",
        ],
        stdout=log,
        stderr=log,
    )
    try:
        asked = 'sum by (status) (ilqr_bins_total{status=~"ok|late|missing"})'
        found: list[dict[str, Any]] = []
        end = time.monotonic() + 30.0
        while not found and time.monotonic() < end:
            found = query(address, asked)
        values = {r["metric"]["status"]: float(r["value"][1]) for r in found}
        assert values["missing"] >= 2
        assert values["ok"] + values["late"] >= 78
        with urllib.request.urlopen(f"http://{address}/api/v1/rules", timeout=WAIT_S) as page:
            groups = json.load(page)["data"]["groups"]
        assert {r.get("lastError", "") for g in groups for r in g["rules"]} <= {""}
        for one in queries():
            query(address, one, strict=True)
    finally:
        process.terminate()
        process.wait(WAIT_S)
        log.close()


def query(address: str, text: str, *, strict: bool = False) -> list[dict[str, Any]]:
    """An instant query; nothing where Prometheus is not up yet, unless ``strict``."""
    url = f"http://{address}/api/v1/query?" + urllib.parse.urlencode({"query": text})
    try:
        with urllib.request.urlopen(url, timeout=WAIT_S) as page:
            answer = json.load(page)
    except OSError:
        if strict:
            raise
        return []
    assert answer["status"] == "success"
    return list(answer["data"]["result"])


# ---- the journal's verbs -----------------------------------------------------------------------


def test_a_journal_becomes_nwb_that_the_inspector_finds_clean(
    fed: tuple[Service, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    service, journal, _ = fed
    out = tmp_path / "rat-7.nwb"
    who = ("--subject", "rat-7", "--species", "Rattus norvegicus", "--sex", "F", "--age", "P90D")
    by = ("--experimenter", "Doe, Jane", "--institution", "A Lab")
    arguments = ["export", str(journal), "--out", str(out), "--session", "rat-7", *who, *by]
    assert main(arguments) == 0
    assert main(arguments) == 2  # exists
    assert main(["export", str(journal), "--out", str(out), "--session", "nobody"]) == 2
    capsys.readouterr()
    import h5py
    from nwbinspector import inspect_nwbfile

    assert [m.message for m in inspect_nwbfile(nwbfile_path=out)] == []
    with h5py.File(out) as file:
        counts = np.asarray(file["processing/ecephys/binned_spikes/data"])
        assert counts.shape == (80, 7)
        assert np.flatnonzero(np.isnan(counts[:, 0])).tolist() == [9, 30]
        np.testing.assert_array_equal(counts[10], spikes(80)[10])
        assert np.isfinite(file["processing/misc/kinematics/data"]).all()
        assert (np.asarray(file["processing/misc/status/data"])[[9, 30]] == 4).all()
        manifest = json.loads(file["scratch/model_manifest"][()])
        assert list(manifest) == [service.model]
        assert json.loads(file["scratch/service_settings"][()])["credits"] == 500


def test_a_session_of_gaps_and_shed_bins_and_one_of_several_of_its_name_are_clean_nwb_too(
    served: tuple[Service, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import h5py
    from nwbinspector import inspect_nwbfile

    service, journal, _ = served
    counts = spikes(60)
    with Feeder(service.ingest, service.results) as feeder:
        feeder.subscribe("gaps")
        # two recordings under one name and epoch, of which the second begins anywhere
        for first in (0, 2**40):
            feeder.ask(open_("gaps", anytime=True, deadline_ns=1), messages.Opened)
            lost = first + 40_000  # further than a gap is bridged
            indices = [*range(first, first + 50), *range(lost, lost + 10)]
            bins = zip(indices, counts, strict=True)
            feeder.send(*(bin_("gaps", i, x) for i, x in bins))
            assert "shed" in {r.solver for r in feeder.results(60)}
            feeder.ask(messages.Close(session="gaps"), messages.Closed)
    capsys.readouterr()
    arguments = ["export", str(journal), "--out", str(tmp_path / "gaps.nwb"), "--session", "gaps"]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    runs = re.findall(r"gaps, epoch 0, run (\d+) \(60 bins", said)
    assert len(runs) == 2, said
    about = ("--subject", "r", "--species", "Rattus norvegicus", "--sex", "F", "--age", "P90D")
    by = ("--experimenter", "Doe, Jane", "--institution", "A Lab")
    assert main([*arguments, "--run", runs[1], *about, *by]) == 0
    assert [m.message for m in inspect_nwbfile(nwbfile_path=tmp_path / "gaps.nwb")] == []
    with h5py.File(tmp_path / "gaps.nwb") as file:
        spikes_in = file["processing/ecephys/binned_spikes"]
        np.testing.assert_array_equal(spikes_in["data"], counts)
        np.testing.assert_allclose(spikes_in["timestamps"][[0, 49, 50]], [0.0, 2.45, 2000.0])
        assert file["processing/misc/index/data"][50] == 2**40 + 40_000


# ---- parts -------------------------------------------------------------------------------------


def test_hygiene_is_optional_and_reported() -> None:
    assert parse_cpus("0,2-4") == {0, 2, 3, 4}
    for wrong in ("0-99999999", "1-", "-1", "3-2", "a-b"):
        with pytest.raises(ValueError, match=r"cores|int"):
            parse_cpus(wrong)
    plain = Hygiene(ServiceSettings(gc="auto", malloc="auto", slice_ms=0))
    plain.process()
    plain.thread()
    plain.collect(idle=True)
    assert plain.report == {}
    impossible = Hygiene(ServiceSettings(gc="auto", cpus="100000", slice_ms=0))
    impossible.thread()
    ((what, came),) = impossible.report.items()
    assert what.startswith("cpus")
    assert came.startswith("off: ")


def test_garbage_is_collected_under_steady_load_and_all_of_it_at_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, generations = 0.0, list[int]()
    monkeypatch.setattr(gc, "collect", generations.append)
    hygiene = Hygiene(ServiceSettings(gc="idle"), clock=lambda: now)

    def run(seconds: int, *, idle: bool) -> list[int]:
        nonlocal now
        generations.clear()
        for _ in range(seconds):
            now += 1.0
            hygiene.collect(idle=idle)
        return generations

    assert len(run(61, idle=True)) == 12
    assert set(generations) == {1, 2}
    assert len(run(181, idle=False)) == 3
    assert 2 in run(12 * 60 + 1, idle=False)


def test_a_load_is_open_loop_and_drawn_from_its_seed() -> None:
    load = LoadSize(sessions=3, bins=100)
    even = schedule(load, Faults(), 0.05)
    assert len(even) == 300
    assert [at for at, s, _ in even if s == 0] == [50_000_000 * (i + 1) for i in range(100)]
    faults = Faults(drop=0.2, duplicate=0.1, reorder=5, jitter=2.0, stall=1.0, seed=4)
    bad = schedule(load, faults, 0.05)
    assert bad == schedule(load, faults, 0.05) == sorted(bad)
    assert len({(s, i) for _, s, i in bad}) < 300 * 0.9
    assert len(bad) > len({(s, i) for _, s, i in bad})
    held = [at for at, _, _ in bad if 2.5e9 <= at < 3.5e9]
    assert held == []
    assert quantiles([]) == {"n": 0}
    assert quantiles([1.0, 2.0, 3.0, 4.0])["p50"] == 2.0


def test_load_reports_as_json(
    served: tuple[Service, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    service, _, _ = served
    arguments = ["load", "--to", service.ingest, "--sessions", "3", "--duration", "1"]
    assert main([*arguments, "--deadline-ms", "60000", "--drop", "0.1", "--json", "-"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["answered"] == 60
    assert set(told["statuses"]) == {"ok", "missing"}
    assert told["unanswered"] == told["repeated"] == 0
    assert told["latency_ms"]["n"] == told["statuses"]["ok"]


def test_the_calibration_index_is_of_the_last_minute() -> None:
    now = 0
    telemetry = Telemetry(0.05, clock=lambda: now)

    def index() -> float:
        telemetry.settle()
        value = telemetry.registry.get_sample_value("ilqr_calibration_index")
        assert value is not None
        return value

    assert math.isnan(index())  # no model said what is expected of it
    for second in range(1, 181):  # two minutes as at training, then one of half the bits
        now = second * 1_000_000_000
        telemetry.count({}, 5.0, 20, 10.0, 10.0 if second <= 120 else 5.0)
        if second in (120, 150, 180):
            assert index() == pytest.approx({120: 1.0, 150: 0.75, 180: 0.5}[second])
        else:
            telemetry.settle()
    now += 120 * 1_000_000_000
    index()
    now += 2 * 1_000_000_000
    assert math.isnan(index())  # nothing came for a minute
