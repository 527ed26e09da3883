"""The process of HPIPM and PIQP, which is timed in turns with our solver."""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.rivals.environment import Environment
from ilqr_vae.lqr import LQRProblem

ENVIRONMENT = Environment(
    "ilqr-vae-rivals-hpipm",
    ("comma-deps-acados", "piqp", "scipy", "numpy"),
    ("acados", "piqp", "scipy"),
)
WORKER = Path(__file__).with_name("hpipm_lqr.py")
_A_TURN = 20


def in_turns(
    problem: LQRProblem, dz: np.ndarray, ours: dict[str, Callable[[], object]], seconds: float
) -> tuple[dict[str, list[float]], dict[str, float], str]:
    """Time single calls of our solver and theirs, in alternating blocks.

    Args:
        problem: float64.
        dz: solution of the problem.
        ours: functions to time in this process, by name.
        seconds: approximate total time.

    Returns:
        Seconds by name, the errors of the others by name, and why they are missing ("" if not).
    """
    spent: dict[str, list[float]] = {name: [] for name in ours}

    def here(turns: int) -> None:
        for name, call in ours.items():
            call()
            for _ in range(turns):
                began = time.perf_counter()
                call()
                spent[name].append(time.perf_counter() - began)

    interpreter, why = ENVIRONMENT.python()
    until = time.monotonic() + seconds
    if interpreter is None:
        while time.monotonic() < until:
            here(_A_TURN)
        return spent, {}, why
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "problem.npz")
        np.savez(file, dz=dz, **{k: v.numpy() for k, v in problem.tensors().items()})
        command = [interpreter, str(WORKER), file]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as theirs:
            assert theirs.stdin is not None
            assert theirs.stdout is not None

            def answer() -> dict[str, Any]:
                line = theirs.stdout.readline() if theirs.stdout else ""
                return json.loads(line) if line else {}

            errors = answer()
            while errors and (time.monotonic() < until or len(next(iter(spent.values()))) < 100):
                here(_A_TURN)
                theirs.stdin.write(f"{_A_TURN}\n")
                theirs.stdin.flush()
                for name, values in answer().items():
                    spent.setdefault(name, []).extend(values)
            theirs.stdin.close()
    return spent, errors, "" if errors else f"ended with {theirs.returncode}"
