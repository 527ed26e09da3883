"""One bin of one or many streams: its time, the parts of it, and how it scales."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.models import decoder_of, estimator_of
from benchmarks.rows import Row, quantiles, row
from ilqr_vae.kernels import backend
from ilqr_vae.kernels.cpu import step as kernels
from ilqr_vae.kernels.cpu import threads
from ilqr_vae.machine import cores
from ilqr_vae.streaming.ensemble import Horizon
from ilqr_vae.streaming.horizon import MovingHorizon

BASE = {"n": 20, "m": 5, "units": 196, "H": 20, "streams": 1, "iterations": 2}
DECODING = {"n": 20, "m": 8, "units": 143, "H": 10}
"""Sizes of the recording in docs/decoding.md (recipe: n = 32). ``members`` have own readouts."""
GRID: list[Row] = [
    *({"H": H} for H in (5, 10, 20, 50)),
    *({"n": n, "m": n // 4} for n in (10, 20, 32, 64)),
    *({"units": N} for N in (50, 100, 200, 400)),
    *({"streams": S} for S in (1, 8, 64, 100, 256)),
    *({"n": 32, "m": 8, "units": N, "H": H} for N in (100, 200) for H in (10, 50)),
    {"n": 32, "m": 8, "units": 192, "H": 64},
    DECODING,
    *(DECODING | {"n": n, "members": K} for n in (20, 32) for K in (1, 3)),
]
QUICK: list[Row] = [
    {},
    {"H": 10},
    {"streams": 8},
    *(DECODING | {"n": n, "members": 3} for n in (20, 32)),
]
#: The sizes in the picture, which vary one at a time.
AXES = ("H", "n", "units", "streams")


def bins_of(est: Horizon, streams: int, count: int = 64) -> torch.Tensor:
    """Draw bins (count, S, N)."""
    g = torch.Generator().manual_seed(1)
    N = est.mean_rate.shape[0]
    return torch.poisson(torch.full((count, streams, N), 0.4, dtype=torch.float64), generator=g)


def measure(
    est: Horizon, streams: int, seconds: float, stop: Callable[[], bool] | None = None
) -> list[float]:
    """Time single steps with a full window."""
    like = est.mean_rate
    counts = bins_of(est, streams).to(like)
    mask = torch.ones_like(counts[0])
    wait: Callable[[], None] = torch.cuda.synchronize if like.is_cuda else lambda: None
    state = est.init(streams)
    for t in range(est.config.horizon + 3):
        state, _ = est.step(state, counts[t % 64], mask)
    wait()
    spent: list[float] = []
    end = time.perf_counter() + seconds
    while len(spent) < 20 or time.perf_counter() < end:
        began = time.perf_counter()
        state, answer = est.step(state, counts[len(spent) % 64], mask, stop)
        answer.z.sum().item()
        spent.append(time.perf_counter() - began)
    return spent


class _Stopwatch:
    """Measure the time inside the compiled step, by its parts, while installed."""

    def __init__(self) -> None:
        self.spent: dict[int, list[float]] = defaultdict(list)

    def __enter__(self) -> _Stopwatch:
        self._original = step = kernels.step

        def timed(queue: Any, which: int, *rest: Any) -> None:
            began = time.perf_counter()
            step(queue, which, *rest)
            self.spent[which].append(time.perf_counter() - began)

        kernels.step = timed
        return self

    def __exit__(self, *_: object) -> None:
        kernels.step = self._original


def time_parts(est: MovingHorizon, whole: float, *, seconds: float = 0.3) -> Row:
    """Return median microseconds of shifting the window, solving, the estimate, and Python.

    To measure them, the step runs in parts, as it does with a callback between iterations.
    """
    with _Stopwatch() as watch:
        for after_one in (False, True):
            measure(est, 1, seconds / 2, stop=lambda ended=after_one: ended)
    us = {which: float(np.median(spent)) * 1e6 for which, spent in watch.spent.items()}
    leave = us[kernels.LEAVE]
    iteration = us[kernels.SOLVE | kernels.LEAVE] - leave
    parts = {
        "enter": round(us[kernels.ENTER | kernels.SOLVE] - iteration, 1),
        "solve": round(est.config.iterations * iteration, 1),
        "leave": round(leave, 1),
    }
    return parts | {"python": round(whole - sum(parts.values()), 1)}


def exponents(rows: list[Row]) -> dict[str, float]:
    """Fit the exponent e of cost ~ size^e for each size that varies alone."""
    found: dict[str, float] = {}
    for axis in AXES:
        points = sorted(line(rows, axis))
        if len(points) > 2:
            x, y = np.log(np.asarray(points)).T
            found[axis] = round(float(np.polyfit(x, y, 1)[0]), 2)
    return found


def line(rows: list[Row], axis: str) -> list[tuple[float, float]]:
    """Return (size, median us) of our rows in which only ``axis`` (m with n) varies."""
    held = [k for k in BASE if k not in {axis, "m" if axis == "n" else axis}]
    return sorted(
        {
            r[axis]: r["median_us"]
            for r in rows
            if r["implementation"] == "ilqr-vae"
            and "members" not in r
            and all(r[k] == BASE[k] for k in held)
        }.items()
    )


def run(quick: bool) -> list[Row]:
    """Return rows for all configurations, and for the torch definition in a few."""
    torch.set_num_threads(1)
    rows: list[Row] = []
    seconds = 1.0 if quick else 4.0
    for change in QUICK if quick else GRID:
        size = BASE | change
        sizes = size["n"], size["m"], size["units"], size["H"], size["iterations"]
        members = size.get("members")
        est = estimator_of(*sizes) if members is None else decoder_of(members, *sizes)
        threads.use(1 if size["streams"] * (members or 1) == 1 else cores())
        found = quantiles(measure(est, size["streams"], seconds))
        common = size | {"dtype": "float64", "device": "cpu", "threads": threads.count()}
        ours = row("stream", "ilqr-vae", **common) | found
        if isinstance(est, MovingHorizon) and size["streams"] == 1:
            ours["parts_us"] = time_parts(est, found["median_us"])
        rows.append(ours)
        if change in QUICK and members is None:
            with backend.using("reference"):
                found = quantiles(measure(est, size["streams"], seconds / 2))
            rows.append(row("stream", "torch reference", **common) | found)
    threads.use(None)
    if not quick:
        for axis, exponent in exponents(rows).items():
            rows.append(row("stream", "exponent", axis=axis, exponent=exponent))
    return rows


def picture(rows: list[Row], path: Path) -> None:
    """Plot cost against each size on log axes, with the fitted exponent."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    fitted = exponents(rows)
    names = {"H": "H, bins in the window", "n": "n, latents (m = n / 4)", "units": "N, units"}
    figure, axes = plt.subplots(1, len(AXES), figsize=(13, 3.4), sharey=True)
    for ax, axis in zip(axes, AXES, strict=True):
        points = line(rows, axis)
        if not points:
            continue
        x, y = np.asarray(points).T
        ax.loglog(x, y / 1e3, "o-", label=f"exponent {fitted.get(axis, float('nan')):.2f}")
        ax.set_xlabel(names.get(axis, axis))
        ax.legend(frameon=False)
        ax.grid(visible=True, which="both", alpha=0.3)
    axes[0].set_ylabel("ms per bin, median")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
