"""The JAX rivals' side here: a Python of their own that has jax and diffilqrax."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import venv
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ilqr_vae.lqr import LQRProblem

#: Names a Python that has the rivals; else one is made here, once.
VARIABLE = "ILQR_VAE_RIVALS"
HOME = Path.home() / ".cache" / "ilqr-vae-rivals"
WORKER = Path(__file__).with_name("jax_lqr.py")
TRAINING = Path(__file__).with_name("jax_ilqr.py")


def _has_them(python: str) -> bool:
    ran = subprocess.run([python, "-c", "import jax, diffilqrax"], capture_output=True, check=False)
    return ran.returncode == 0


_patience: list[float] = []


def _left() -> float:
    """Seconds that an installation may take."""
    return max(1.0, _patience[-1] - time.monotonic()) if _patience else 600.0


@cache
def python() -> tuple[str | None, str]:
    """(a Python with the rivals, or None, and why not)."""
    named = os.environ.get(VARIABLE)
    for candidate in (named, sys.executable, str(HOME / "bin" / "python")):
        if candidate and Path(candidate).exists() and _has_them(candidate):
            return candidate, ""
    try:
        venv.create(HOME, with_pip=True)
        made = str(HOME / "bin" / "python")
        pip = [made, "-m", "pip", "install", "-q", "jax", "diffilqrax"]
        ran = subprocess.run(pip, capture_output=True, text=True, check=False, timeout=_left())
    except subprocess.TimeoutExpired as error:
        return None, f"not installed within {error.timeout:.0f} s"
    except (OSError, subprocess.SubprocessError) as error:
        return None, f"cannot be installed: {str(error)[:200]}"
    if ran.returncode != 0 or not _has_them(made):
        return None, f"does not install: {(ran.stderr.strip().splitlines() or ['?'])[-1][:200]}"
    return made, ""


def beside(work: Callable[[], object], patience: float) -> None:
    """Do other work, and find or install the rivals meanwhile.

    Args:
        patience: seconds that it may take in all; what is not installed by then is not there.
    """
    _patience.append(time.monotonic() + patience)
    finding = threading.Thread(target=python, daemon=True)
    finding.start()
    work()
    finding.join()


def _lines(script: Path, arguments: list[str], timeout: float) -> list[dict[str, Any]] | str:
    interpreter, why = python()
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
    """Times of each JAX implementation on this problem, or why there are none."""
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "problem.npz")
        np.savez(file, dz=dz, **{k: v.numpy() for k, v in problem.tensors().items()})
        return _lines(WORKER, [file, str(seconds)], 300 + 10 * seconds)


def solve_ilqr(arrays: dict[str, Any], seconds: float) -> list[dict[str, Any]] | str:
    """Times of diffilqrax's iLQR on a batch of chunks, or why there are none."""
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "chunks.npz")
        np.savez(file, **arrays)
        return _lines(TRAINING, [file, str(seconds)], 300 + 10 * seconds)
