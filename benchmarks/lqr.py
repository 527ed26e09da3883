"""LQR alone: batches of 1 and 64 problems, beside other solvers."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from benchmarks.rivals import cpp, hpipm_side, jax_side
from benchmarks.rows import Row, absent, quantiles, row, timed
from ilqr_vae.kernels.cpu import threads
from ilqr_vae.lqr import LQRProblem, on_cpu, solve_lqr
from ilqr_vae.machine import cores

SIZES = [(20, 5, 50), (32, 8, 64), (64, 16, 64)]
BATCHES = [1, 64]


def operations(n: int, m: int, T: int) -> int:
    """Return the floating-point operations of a solution, counting additions and multiplications.

    They are those of the square-root form of the recursion, the cheapest known one: per step the
    triangular product L' [B | A], its symmetric square, and a Cholesky decomposition of size n + m.
    """
    return round(T * (7 / 3 * n**3 + 4 * n**2 * m + 2 * n * m**2 + m**3 / 3))


def problem_of(batch: int, n: int, m: int, T: int) -> LQRProblem:
    """Draw a stable, well-posed problem in float64."""
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


def _float64(problem: LQRProblem, truth: Tensor, seconds: float, common: Row) -> list[Row]:
    """Time our solver and HPIPM in turns."""

    def whole() -> Tensor:
        return solve_lqr(problem, free_initial=True, backend="cpu").dz

    solve, solution = on_cpu.prepared(problem, free_initial=True)
    solve()
    ours = {"ilqr-vae cpu": whole, "ilqr-vae cpu, solve alone": solve}
    spent, errors, why = hpipm_side.in_turns(problem, truth.numpy(), ours, seconds)
    error = float((solution.dz - truth).abs().max() / truth.abs().max())
    rows = [
        row("lqr", name, dtype="float64", error=errors.get(name, error), **common)
        | quantiles(found)
        for name, found in spent.items()
    ]
    return rows + ([absent("lqr", "HPIPM, PIQP", why, dtype="float64", **common)] if why else [])


def _others(problem: LQRProblem, truth: Tensor, seconds: float, common: Row) -> list[Row]:
    single = LQRProblem(**{k: v.float() for k, v in problem.tensors().items()})
    rows: list[Row] = []
    for dtype, given, backend, label in (
        ("float64", problem, "reference", "torch eager reference"),
        ("float32", single, "cpu", "ilqr-vae cpu"),
    ):

        def one(given: LQRProblem = given, backend: str = backend) -> Tensor:
            return solve_lqr(given, free_initial=True, backend=backend).dz  # pyright: ignore[reportArgumentType]

        error = float((one().double() - truth).abs().max() / truth.abs().max())
        least = 3 if backend == "reference" else 5
        rows.append(
            row("lqr", label, dtype=dtype, error=error, **common)
            | timed(one, seconds=seconds, least=least)
        )
    return rows


def _compile() -> None:
    """Compile the kernels before timing."""
    problem = problem_of(1, 2, 1, 2)
    for dtype in (torch.float64, torch.float32):
        cast = LQRProblem(**{k: v.to(dtype) for k, v in problem.tensors().items()})
        solve_lqr(cast, free_initial=True, backend="cpu")


def run(quick: bool) -> list[Row]:
    """Return rows for each size, batch, implementation and dtype."""
    torch.set_num_threads(1)
    threads.use(cores())
    rows: list[Row] = []
    seconds = 0.3 if quick else 3.0
    patience = 40.0 if quick else 600.0
    jax_side.ENVIRONMENT.beside(lambda: hpipm_side.ENVIRONMENT.beside(_compile, patience), patience)
    for n, m, T in SIZES[:2] if quick else SIZES:
        for batch in BATCHES[:1] if quick else BATCHES:
            problem = problem_of(batch, n, m, T)
            truth = solve_lqr(problem, free_initial=True, backend="reference").dz
            common = {"n": n, "m": m, "T": T, "batch": batch, "device": "cpu"}
            rows += _float64(problem, truth, 2 * seconds, common)
            rows += _others(problem, truth, seconds, common)
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
    products = _products(seconds)
    best = {one["dtype"]: one["gflops"] for one in products}
    for one in rows:
        if "gflops" in one:
            one["share_of_product"] = round(one["gflops"] / best[one["dtype"]], 2)
    return rows + products


def _products(seconds: float, size: int = 1024) -> list[Row]:
    """Time a product of large matrices in torch: the peak of one core."""
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
