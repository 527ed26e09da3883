"""Shared by all benchmarks: rows, timing, and a description of the machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]
ROOT = Path(__file__).parents[1]


def quantiles(seconds: list[float]) -> Row:
    """Quantiles in microseconds, and the number of samples."""
    us = np.sort(np.asarray(seconds)) * 1e6

    def at(q: float) -> float:
        return round(float(us[min(us.size - 1, max(0, int(np.ceil(q * us.size)) - 1))]), 2)

    return {
        "samples": int(us.size),
        "min_us": round(float(us[0]), 2),
        "median_us": at(0.5),
        "p99_us": at(0.99),
        "p999_us": at(0.999),
        "max_us": round(float(us[-1]), 2),
    }


def timed(work: Callable[[], object], *, seconds: float, least: int = 5) -> Row:
    """Time single calls after a few warm-up calls."""
    for _ in range(3):
        work()
    spent: list[float] = []
    end = time.perf_counter() + seconds
    while len(spent) < least or time.perf_counter() < end:
        began = time.perf_counter()
        work()
        spent.append(time.perf_counter() - began)
    return quantiles(spent)


def row(benchmark: str, implementation: str, **values: Any) -> Row:
    """Return a row, with the load of the machine during the measurement."""
    return {"benchmark": benchmark, "implementation": implementation, "load": load(), **values}


def absent(benchmark: str, implementation: str, why: str, **values: Any) -> Row:
    """Return a row for a missing measurement."""
    return row(benchmark, implementation, not_measured=why, **values)


def load() -> float:
    """Return the load average over the last minute, including this process."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else float("nan")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _first(command: list[str]) -> str:
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    except OSError:
        return "none"
    return ran.stdout.strip().split("\n")[0] if ran.returncode == 0 else "none"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def machine() -> Row:
    """Describe the hardware, commit and versions."""
    import torch

    from ilqr_vae.machine import cores

    commit = _first(["git", "rev-parse", "--short", "HEAD"])
    changed = _first(["git", "status", "--porcelain"]) not in ("", "none")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "processor": _processor(),
        "cores": cores(),
        "gpu": gpu,
        "system": f"{platform.system()} {platform.release()}",
        "python": sys.version.split()[0],
        "versions": {p: _version(p) for p in ("torch", "numpy", "numba", "triton")},
        "compiler": _first(["c++", "--version"]),
        "commit": commit + ("+changes" if changed else ""),
        "load_at_start": load(),
    }
