"""LQR alone: one problem and 64, against everything else that solves it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from benchmarks.rivals import cpp, jax_side
from benchmarks.rows import Row, absent, quantiles, row, timed
from ilqr_vae.kernels.cpu import threads
from ilqr_vae.lqr import LQRProblem, solve_lqr
from ilqr_vae.machine import cores

SIZES = [(20, 5, 50), (32, 8, 64), (64, 16, 64)]
BATCHES = [1, 64]


def operations(n: int, m: int, T: int) -> int:
    """Floating-point operations of one solution, a multiplication and an addition each one.

    Per step V [B | A]; B' of that, half of its symmetric part; half of A' V A; the elimination of
    Quu, L Qux, W' W, the gains; and the step itself. What no method of this recursion avoids.
    """
    products = n * n * (n + m) + m * n * (n + (m + 1) // 2) + n * n * (n + 1) // 2
    gains = m**3 // 2 + n * m * m + m * n * (n + 1) // 2
    step = n * (n + m) + m * n + n * n
    return 2 * T * (products + gains + step)


def problem_of(batch: int, n: int, m: int, T: int) -> LQRProblem:
    """A random stable, well-posed problem; float64."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def curvature(count: int, size: int) -> Tensor:
        half = normal(batch, count, size, size) / size**0.5
        return half @ half.mT + 0.3 * torch.eye(size, dtype=torch.float64)

    return LQRProblem(
        A=0.9 * normal(batch, T, n, n) / n**0.5,
        B=normal(batch, T, n, m) / m**0.5,
        Q=curvature(T + 1, n),
        q=normal(batch, T + 1, n),
        R=curvature(T, m),
        r=normal(batch, T, m),
    )


def _ours(problem: LQRProblem, truth: Tensor, seconds: float, common: Row) -> list[Row]:
    rows: list[Row] = []
    for dtype in (torch.float64, torch.float32):
        cast = LQRProblem(**{k: v.to(dtype) for k, v in problem.tensors().items()})
        name = str(dtype).removeprefix("torch.")
        for backend, label in (("cpu", "ilqr-vae cpu"), ("reference", "torch eager reference")):
            if backend == "reference" and dtype == torch.float32:
                continue

            def one(cast: LQRProblem = cast, backend: str = backend) -> Tensor:
                return solve_lqr(cast, free_initial=True, backend=backend).dz  # pyright: ignore[reportArgumentType]

            error = float((one().double() - truth).abs().max() / truth.abs().max())
            least = 3 if backend == "reference" else 5
            rows.append(
                row("lqr", label, dtype=name, error=error, **common)
                | timed(one, seconds=seconds, least=least)
            )
    return rows


def _compile() -> None:
    """What is compiled on first use."""
    problem = problem_of(1, 2, 1, 2)
    for dtype in (torch.float64, torch.float32):
        cast = LQRProblem(**{k: v.to(dtype) for k, v in problem.tensors().items()})
        solve_lqr(cast, free_initial=True, backend="cpu")


def run(quick: bool) -> list[Row]:
    """Rows for every size, batch, implementation and dtype."""
    torch.set_num_threads(1)
    threads.use(cores())
    rows: list[Row] = []
    seconds = 0.3 if quick else 3.0
    jax_side.beside(_compile, 40.0 if quick else 600.0)
    for n, m, T in SIZES[:2] if quick else SIZES:
        for batch in BATCHES[:1] if quick else BATCHES:
            problem = problem_of(batch, n, m, T)
            truth = solve_lqr(problem, free_initial=True, backend="reference").dz
            common = {"n": n, "m": m, "T": T, "batch": batch, "device": "cpu"}
            rows += _ours(problem, truth, seconds, common)
            if batch == 1:
                rows.append(_cpp(problem, truth, common, 300 if quick else 3000))
            found = jax_side.solve_lqr(problem, truth.numpy(), seconds)
            if isinstance(found, str):
                rows += [
                    absent("lqr", name, found, **common) for name in ("jax-scan", "diffilqrax")
                ]
                continue
            for one in found:
                spent = one.pop("seconds")
                rows.append(row("lqr", **one, **common) | quantiles(spent))
    for one in rows:
        if "median_us" in one:
            work = one["batch"] * operations(one["n"], one["m"], one["T"])
            one["gflops"] = round(work / one["median_us"] / 1e3, 1)
    return rows + _products(seconds)


def _products(seconds: float, size: int = 1024) -> list[Row]:
    """What one core does at best: a product of large matrices by torch's library."""
    rows: list[Row] = []
    for dtype in (torch.float64, torch.float32):
        X = torch.ones(size, size, dtype=dtype)
        found = timed(lambda X=X: X @ X, seconds=seconds)
        label, name = f"product of {size} x {size}, one thread", str(dtype).removeprefix("torch.")
        rate = {"gflops": round(2 * size**3 / found["median_us"] / 1e3, 1)}
        rows.append(row("lqr", label, n=size, batch=1, dtype=name, device="cpu") | found | rate)
    return rows


def _cpp(problem: LQRProblem, truth: Tensor, common: Row, repeats: int) -> Row:
    label = "fixed-size C++ (Eigen)"
    found = cpp.solve(problem, repeats)
    if isinstance(found, str):
        return absent("lqr", label, found, dtype="float64", **common)
    dz, _, seconds = found
    error = float(np.abs(dz - truth[0].numpy()).max() / truth[0].abs().max())
    return row("lqr", label, dtype="float64", error=error, **common) | quantiles(seconds)
