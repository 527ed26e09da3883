"""The benchmarks on a GPU, relative to its peak bandwidth and arithmetic; else "not measured"."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable

import msgspec
import numpy as np
import torch

from benchmarks import stream
from benchmarks.lqr import BATCHES, SIZES, operations, problem_of
from benchmarks.models import estimator_of
from benchmarks.rivals.environment import Environment
from benchmarks.rows import ROOT, Row, absent, quantiles, row, timed
from ilqr_training.experiments.maze import MazeConfig, maze_size
from ilqr_vae.kernels.cpu.arguments import Streams
from ilqr_vae.lqr import LQRProblem, solve_lqr
from ilqr_vae.progress import SILENT
from ilqr_vae.streaming.horizon import MovingHorizon
from ilqr_vae.streaming.on_gpu import GpuEstimator

STREAMS: list[Row] = [
    {"n": 32, "m": 8, "units": 192, "H": 64, "streams": 1},
    *({"n": 20, "m": 5, "units": 196, "H": 20, "streams": S} for S in (1, 64, 1000, 10_000)),
]
SOCU = Environment("ilqr-vae-rivals-socu", ("socu",), ("socu", "warp"))
SOCU_WORKER = ROOT / "benchmarks" / "rivals" / "socu_lqr.py"
#: Numbers of streams at which the step in torch is measured too; time limits for it and for socu.
RECORDED, PATIENCE, SOCU_PATIENCE = (1, 1000), 100.0, 40.0
#: Published peaks per card: (bytes, float32 operations) per second.
PEAKS = {"H200": (4.8e12, 67e12), "H100": (3.35e12, 67e12), "A100": (2.0e12, 19.5e12)}


def lqr_floor(batch: int, n: int, m: int, T: int, size: int) -> tuple[float, float]:
    """Return the least (bytes, operations) of a solve: each number in and out once."""
    read = T * (n * n + n * m + m * m + m) + (T + 1) * (n * n + n)
    written = (T + 1) * (n * n + 3 * n) + T * (m * n + m * m + 2 * m)
    return batch * size * (read + written), batch * operations(n, m, T)


def share_of_floor(floor: tuple[float, float], seconds: float) -> Row:
    """Return the floor as a share of the measured time, if the card's peaks are known."""
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
        rows += _socu(n, m, T, seconds)
    return rows


def _socu(n: int, m: int, T: int, seconds: float) -> list[Row]:
    """Time socu on the system of one problem's multipliers; see ``rivals/socu_lqr.py``."""
    problem = problem_of(1, n, m, T)
    given = {name: value.numpy() for name, value in problem.tensors().items()}
    given["dz"] = solve_lqr(problem, free_initial=True, backend="reference").dz.numpy()
    found = SOCU.lines(SOCU_WORKER, given, seconds, SOCU_PATIENCE)
    common = {"n": n, "m": m, "T": T, "batch": 1}
    if isinstance(found, str):
        return [absent("gpu lqr", "socu", found, **common, device="cuda")]
    return [
        row("gpu lqr", **common, **{k: v for k, v in line.items() if k != "seconds"})
        | quantiles(line["seconds"])
        for line in found
    ]


def step_floor(size: Row, itemsize: int, iterations: int) -> tuple[float, float]:
    """Return the least (bytes, operations) of a bin of all streams.

    States go in and out once. Each iteration takes the LQR solution, curvatures of the units,
    Jacobians, one rollout and its cost.
    """
    n, m, N, H, S = (size[k] for k in ("n", "m", "units", "H", "streams"))
    state = n + n * n + (H + 1) * n + H * m + 2 * H * N
    per_bin = N * n * (n + 1) / 2 + 3 * N * n + n**3 + 2 * n * n + 2 * n * m
    work = iterations * (operations(n, m, H) + 2 * H * per_bin)
    return 2.0 * S * itemsize * state, S * work


def _steps(est: MovingHorizon, streams: int, seconds: float) -> list[float]:
    """Time single steps with full windows, from counts on the host to estimates on the host.

    The states stay on the GPU, as in the service.
    """
    compiled = est.compiled(est.mean_rate)
    assert isinstance(compiled, GpuEstimator), "no kernel: the log says why"
    first = est.init(streams).tensors()
    states = Streams(*(torch.cat([t, torch.empty_like(t)]) for t in first))
    counts = stream.bins_of(est, streams, 16).to(est.mean_rate.dtype).numpy()
    mask, here, there = np.ones_like(counts[0]), np.arange(streams), np.arange(streams) + streams
    spent: list[float] = []
    warm, end = est.config.horizon + 3, None
    while end is None or len(spent) < warm + 20 or time.perf_counter() < end:
        began = time.perf_counter()
        compiled.step((states, states), (here, there), counts[len(spent) % 16], mask, None)
        here, there = there, here
        spent.append(time.perf_counter() - began)
        if len(spent) == warm:
            end = time.perf_counter() + seconds
    return spent[warm:]


def _recorded(size: Row, seconds: float) -> list[float] | str:
    """Time the step in torch, compiled and recorded as a CUDA graph, or say why it failed."""
    given = [str(size[k]) for k in ("n", "m", "units", "H", "streams")]
    command = [sys.executable, "-m", "benchmarks.rivals.recorded_step", *given, str(seconds)]
    try:
        ran = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=PATIENCE, cwd=ROOT
        )
    except subprocess.TimeoutExpired:
        return f"not compiled within {PATIENCE:.0f} s"
    if ran.returncode != 0:
        return f"failed: {(ran.stderr.strip().splitlines() or ['?'])[-1][:200]}"
    return json.loads(ran.stdout.strip().splitlines()[-1])


def _streams(quick: bool, seconds: float) -> list[Row]:
    rows: list[Row] = []
    for size in STREAMS[:2] if quick else STREAMS:
        sizes = [size[k] for k in ("n", "m", "units", "H")]
        for dtype in (torch.float32, torch.float64):
            name = str(dtype).removeprefix("torch.")
            common = size | {"iterations": 2, "device": "cuda", "dtype": name}
            est = estimator_of(*sizes, 2, device="cuda", dtype=dtype)
            found = quantiles(_steps(est, size["streams"], seconds))
            floor = share_of_floor(step_floor(size, dtype.itemsize, 2), found["median_us"] * 1e-6)
            rows.append(row("gpu stream", "ilqr-vae", **common) | found | floor)
            if dtype == torch.float32 and size["streams"] in RECORDED and not quick:
                spent = _recorded(size, seconds)
                label = "torch.compile in a CUDA graph"
                if isinstance(spent, str):
                    rows.append(absent("gpu stream", label, spent, **common))
                else:
                    rows.append(row("gpu stream", label, **common) | quantiles(spent))
    return rows


def _agreement(bins: int) -> Row:
    """Compare float32 on the GPU with float64 on the CPU over some bins of one stream."""
    here = estimator_of(20, 5, 196, 20, 2)
    there = estimator_of(20, 5, 196, 20, 2, device="cuda", dtype=torch.float32)
    a, b = here.init(1), there.init(1)
    counts = stream.bins_of(here, 1, bins)
    worst = {"z": 0.0, "z_cov": 0.0, "rates": 0.0}
    differing = 0
    for t in range(bins):
        mask = torch.full_like(counts[t], float(t % 97 != 50))
        a, mine = here.step(a, counts[t], mask)
        b, theirs = there.step(b, counts[t].float(), mask.float())
        differing += int(mine.status != theirs.status.cpu())
        for name in worst:
            truth = getattr(mine, name)
            error = (getattr(theirs, name).cpu().double() - truth).norm() / truth.norm()
            worst[name] = max(worst[name], float(error))
    errors = {f"error_{name}": value for name, value in worst.items()}
    return row("gpu agreement", "ilqr-vae", bins=bins, statuses_differ=differing, **errors)


def run(quick: bool) -> list[Row]:
    """Return rows for LQR, streaming, agreement with the CPU, and training, in ten minutes.

    Without a GPU there is one row that says so.
    """
    if not torch.cuda.is_available():
        return [absent("gpu", "ilqr-vae gpu", "no CUDA device", device="cuda")]
    seconds = 0.5 if quick else 2.0
    rows: list[Row] = []
    SOCU.beside(lambda: rows.extend(_streams(quick, seconds)), SOCU_PATIENCE)
    rows.append(_agreement(100 if quick else 1000))
    rows += _lqr(seconds / 2)
    return [*rows, *_train(4 if quick else 51)]


def _train(steps: int) -> list[Row]:
    """Time gradient steps of the maze-size model, with solves of at most 25 iterations."""
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
