"""The benchmark command: a row for what is not there, and a page made of files alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.models import decoder_of, estimator_of
from benchmarks.stream import measure, time_parts

from ilqr_clients.load import Generator
from ilqr_clients.load_schedule import Faults, LoadSize

ROOT = Path(__file__).parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there to be measured")
def test_without_a_gpu_a_row_says_so_and_the_page_shows_it(tmp_path: Path) -> None:
    file, page = tmp_path / "gpu.json", tmp_path / "performance.md"
    ran = run("gpu", "--quick", "--json", str(file))
    assert ran.returncode == 0, ran.stderr
    content = json.loads(file.read_text())
    assert content["quick"] is True
    assert {"processor", "cores", "commit", "versions", "load_at_start"} <= set(content["machine"])
    assert [r["not_measured"] for r in content["rows"]] == ["no CUDA device"]
    ran = run("table", str(file), "--page", str(page))
    assert ran.returncode == 0, ran.stderr
    text = page.read_text()
    assert "no CUDA device" in text
    assert text.count("Not measured.") == 4  # the benchmarks whose files are not given


def test_an_unknown_benchmark_is_refused() -> None:
    ran = run("abacus", "--json", "x.json")
    assert ran.returncode == 2
    assert "abacus" in ran.stderr


def test_a_streams_step_is_timed_in_parts_and_several_members_as_one() -> None:
    sizes = (4, 2, 5, 3, 2)
    assert len(measure(decoder_of(2, *sizes), 1, 0.0)) == 20
    parts = time_parts(estimator_of(*sizes), 0.0, seconds=0.0)
    assert all(parts[name] > 0 for name in ("enter", "solve", "leave"))


def test_the_load_generator_sends_each_bin_at_its_time_and_matches_its_answer() -> None:
    every = 20_000_000
    load = LoadSize(sessions=3, bins=12, warm_up=4)
    command = [sys.executable, "-m", "benchmarks.echo", "2", "5", str(every / 1e9)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as echo:
        try:
            assert echo.stdout is not None
            with Generator(json.loads(echo.stdout.readline())["ingest"], load, Faults()) as made:
                made.open()
                outcome = made.run()
        finally:
            echo.kill()
    assert (outcome.first_statuses, outcome.unanswered) == ({"ok": 36}, 0)
    assert len(outcome.stamps) == 3 * 8
    times = np.array(outcome.stamps).T
    assert (np.diff(times, axis=0) >= 0).all()
    phases = np.unique(times[0] % every)
    assert len(phases) == 3  # each begins at a time of its own, and keeps to it
    for phase in phases:
        assert (np.diff(np.sort(times[0][times[0] % every == phase])) == every).all()
    assert outcome.to_json()["latency_ms"]["n"] == 24
