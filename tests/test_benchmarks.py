"""The benchmark command: a row for what is not there, and a page made of files alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

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
