"""The process of the JAX implementations: a Python that has jax and diffilqrax."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.rivals.environment import Environment
from ilqr_vae.lqr import LQRProblem

ENVIRONMENT = Environment("ilqr-vae-rivals", ("jax", "diffilqrax"), ("jax", "diffilqrax"))
WORKER = Path(__file__).with_name("jax_lqr.py")
TRAINING = Path(__file__).with_name("jax_ilqr.py")


def _lines(script: Path, arrays: dict[str, Any], seconds: float) -> list[dict[str, Any]] | str:
    return ENVIRONMENT.lines(script, arrays, seconds, 300 + 10 * seconds, JAX_PLATFORMS="cpu")


def solve_lqr(problem: LQRProblem, dz: np.ndarray, seconds: float) -> list[dict[str, Any]] | str:
    """Time each JAX implementation on this problem, or say why it is missing."""
    given = {name: value.numpy() for name, value in problem.tensors().items()}
    return _lines(WORKER, {"dz": dz, **given}, seconds)


def solve_ilqr(arrays: dict[str, Any], seconds: float) -> list[dict[str, Any]] | str:
    """Time the iLQR of diffilqrax on a batch of chunks, or say why it is missing."""
    return _lines(TRAINING, arrays, seconds)
