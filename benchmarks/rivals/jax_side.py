"""The process of the JAX implementations: a Python that has jax and diffilqrax."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.rivals.environment import Environment
from ilqr_vae.lqr import LQRProblem

ENVIRONMENT = Environment("ilqr-vae-rivals", ("jax", "diffilqrax"), ("jax", "diffilqrax"))
WORKER = Path(__file__).with_name("jax_lqr.py")
TRAINING = Path(__file__).with_name("jax_ilqr.py")


def _lines(script: Path, arguments: list[str], timeout: float) -> list[dict[str, Any]] | str:
    interpreter, why = ENVIRONMENT.python()
    if interpreter is None:
        return why
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    try:
        ran = subprocess.run(
            [interpreter, str(script), *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return f"not done within {timeout:.0f} s"
    if ran.returncode != 0:
        return f"failed: {(ran.stderr.strip().splitlines() or ['?'])[-1][:200]}"
    return [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]


def solve_lqr(problem: LQRProblem, dz: np.ndarray, seconds: float) -> list[dict[str, Any]] | str:
    """Time each JAX implementation on this problem, or say why it is missing."""
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "problem.npz")
        np.savez(file, dz=dz, **{k: v.numpy() for k, v in problem.tensors().items()})
        return _lines(WORKER, [file, str(seconds)], 300 + 10 * seconds)


def solve_ilqr(arrays: dict[str, Any], seconds: float) -> list[dict[str, Any]] | str:
    """Time the iLQR of diffilqrax on a batch of chunks, or say why it is missing."""
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "chunks.npz")
        np.savez(file, **arrays)
        return _lines(TRAINING, [file, str(seconds)], 300 + 10 * seconds)
