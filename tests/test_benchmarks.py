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


def test_the_feeder_sends_each_bin_at_its_time_and_matches_its_answer(tmp_path: Path) -> None:
    streams, bins, warm, every = 3, 12, 4, 20_000_000
    command = [sys.executable, "-m", "benchmarks.echo", "2", "5"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as echo:
        try:
            assert echo.stdout is not None
            plan = json.loads(echo.stdout.readline()) | {
                "streams": streams, "bins": bins, "warm": warm, "interval_ns": every,
                "bin_width_ns": every, "units": list("abcde"), "rate": 1.0, "pid": echo.pid,
            }  # fmt: skip
            files = tmp_path / "plan.json", tmp_path / "fed.json"
            files[0].write_text(json.dumps(plan))
            feeder = [sys.executable, "-m", "benchmarks.feeder", *map(str, files)]
            subprocess.run(feeder, check=True, cwd=ROOT)
        finally:
            echo.kill()
    fed = json.loads(files[1].read_text())
    assert (fed["statuses"], fed["unanswered"]) == ({"ok": streams * (bins - warm)}, 0)
    names = ("intended", "sent", "received", "published", "arrived")
    times = np.array([fed[name] for name in names])
    assert (np.diff(times, axis=0) >= 0).all()
    phases = {int(at) % every for at in fed["intended"]}
    assert len(phases) == streams  # each begins at a time of its own, and keeps to it
    per_phase = [np.sort(times[0][times[0] % every == phase]) for phase in phases]
    assert all((np.diff(at) == every).all() for at in per_phase)
