"""The same on a GPU, beside the least time its memory and arithmetic allow; else "not measured"."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import torch

from benchmarks import stream
from benchmarks.lqr import BATCHES, SIZES, operations, problem_of
from benchmarks.models import estimator_of
from benchmarks.rows import Row, absent, quantiles, row, timed
from ilqr_training.experiments.maze import MazeConfig, maze_size
from ilqr_vae.kernels import backend
from ilqr_vae.lqr import LQRProblem, solve_lqr
from ilqr_vae.progress import SILENT

STREAMS: list[Row] = [
    {"n": 32, "m": 8, "units": 192, "H": 64, "streams": 1},
    *({"n": 20, "m": 5, "units": 196, "H": 20, "streams": S} for S in (1, 64, 256, 1000)),
    {"n": 20, "m": 5, "units": 196, "H": 10, "streams": 1000},
]
#: Published peaks of one card, bytes and float32 operations a second: (memory, arithmetic).
PEAKS = {"H200": (4.8e12, 67e12), "H100": (3.35e12, 67e12), "A100": (2.0e12, 19.5e12)}


def lqr_floor(batch: int, n: int, m: int, T: int, size: int) -> tuple[float, float]:
    """(bytes, operations) that one solve cannot do without: each number in and out once."""
    read = T * (n * n + n * m + m * m + m) + (T + 1) * (n * n + n)
    written = (T + 1) * (n * n + 3 * n) + T * (m * n + m * m + 2 * m)
    return batch * size * (read + written), batch * operations(n, m, T)


def share_of_floor(floor: tuple[float, float], seconds: float) -> Row:
    """What part of the time the floor is, where the card's peaks are known."""
    name = torch.cuda.get_device_name()
    for known, (memory, arithmetic) in PEAKS.items():
        if known in name:
            least = max(floor[0] / memory, floor[1] / arithmetic)
            return {"floor_us": round(least * 1e6, 3), "share_of_floor": round(least / seconds, 4)}
    return {}


def _wait(work: Callable[[], object]) -> Callable[[], None]:
    def one() -> None:
        work()
        torch.cuda.synchronize()

    return one


def _lqr(seconds: float) -> list[Row]:
    rows: list[Row] = []
    for n, m, T in SIZES:
        for batch in (*BATCHES, 1024):
            problem = problem_of(batch, n, m, T)
            for dtype in (torch.float32, torch.float64):
                cast = LQRProblem(**{k: v.to("cuda", dtype) for k, v in problem.tensors().items()})

                def one(cast: LQRProblem = cast) -> object:
                    return solve_lqr(cast, free_initial=True, backend="gpu")

                found = timed(_wait(one), seconds=seconds)
                floor = lqr_floor(batch, n, m, T, cast.A.element_size())
                name = str(dtype).removeprefix("torch.")
                common = {"n": n, "m": m, "T": T, "batch": batch, "dtype": name, "device": "cuda"}
                rows.append(
                    row("gpu lqr", "ilqr-vae gpu", **common)
                    | found
                    | share_of_floor(floor, found["median_us"] * 1e-6)
                )
    return rows


def run(quick: bool) -> list[Row]:
    """Rows for LQR and streaming; one row that says so where there is no GPU."""
    if not torch.cuda.is_available():
        return [absent("gpu", "ilqr-vae gpu", "no CUDA device", device="cuda")]
    seconds = 0.5 if quick else 3.0
    rows = _lqr(seconds)
    for size in STREAMS[:2] if quick else STREAMS:
        est = estimator_of(size["n"], size["m"], size["units"], size["H"], 2, device="cuda")
        common = size | {"iterations": 2, "dtype": "float64", "device": "cuda"}
        for name, label in (("auto", "ilqr-vae CUDA graph"), ("reference", "torch reference")):
            with backend.using(name):
                found = quantiles(stream.measure(est, size["streams"], seconds))
            rows.append(row("gpu stream", label, **common) | found)
    return [*rows, *_train(4 if quick else 12)]


def _train(steps: int) -> list[Row]:
    """Gradient steps of the maze-size model, solves to convergence or 25 iterations."""
    config = MazeConfig(device="cuda")
    config = msgspec.structs.replace(
        config, fit=msgspec.structs.replace(config.fit, steps=steps, iterations=25)
    )
    spent = maze_size(config, 0, SILENT).figures
    common = {"n": 60, "m": 15, "units": 182, "T": 140, "batch": 168, "device": "cuda"}
    per_step = round(spent["seconds_per_step"] * 1e6)
    return [
        row("gpu train", "ilqr-vae gpu", dtype="float32", **common)
        | {"median_us": per_step, "samples": steps - 1, "hours_3500": per_step * 3.5e-3 / 3600}
    ]
