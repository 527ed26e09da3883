"""The fixed-size C++ rival, compiled when it runs if a compiler and Eigen are available."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from ilqr_vae.lqr import LQRProblem

#: Folders to search for Eigen's headers, after EIGEN3_INCLUDE.
PLACES = ("/usr/include/eigen3", "/usr/local/include/eigen3", "/opt/homebrew/include/eigen3")
SOURCE = Path(__file__).with_name("lqr.cpp")


def eigen() -> Path | None:
    """Return the folder of the headers."""
    for place in (os.environ.get("EIGEN3_INCLUDE", ""), *PLACES):
        if place and (Path(place) / "Eigen" / "Dense").exists():
            return Path(place)
    return None


def solve(problem: LQRProblem, repeats: int) -> tuple[np.ndarray, np.ndarray, list[float]] | str:
    """Return (dz, du, seconds per solve) of the first problem of a batch, or why it failed."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    include = eigen()
    if compiler is None:
        return "no C++ compiler"
    if include is None:
        return "no Eigen headers (set EIGEN3_INCLUDE to their folder)"
    _, T, n, m = problem.sizes()
    tensors = (problem.A, problem.B, problem.Q, problem.q, problem.R, problem.r)
    given = b"".join(t[0].double().contiguous().numpy().tobytes() for t in tensors)
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder) / "lqr")
        flags = [
            "-O3",
            "-march=native",
            "-std=c++17",
            "-DNDEBUG",
            "-DEIGEN_STACK_ALLOCATION_LIMIT=0",
        ]
        sizes = [f"-DSIZE_N={n}", f"-DSIZE_M={m}", f"-DSIZE_T={T}"]
        built = subprocess.run(
            [compiler, *flags, *sizes, f"-I{include}", str(SOURCE), "-o", program],
            capture_output=True,
            text=True,
            check=False,
        )
        if built.returncode != 0:
            wrong = [line for line in built.stderr.splitlines() if "error" in line] or ["?"]
            return f"does not compile: {wrong[0][:200]}"
        ran = subprocess.run([program, str(repeats)], input=given, capture_output=True, check=False)
    if ran.returncode != 0:
        return f"ended with {ran.returncode}"
    numbers = np.frombuffer(ran.stdout)
    states, inputs = (T + 1) * n, T * m
    seconds = numbers[states + inputs :] * 1e-9
    return (
        numbers[:states].reshape(T + 1, n),
        numbers[states : states + inputs].reshape(T, m),
        seconds[repeats // 10 :].tolist(),
    )
