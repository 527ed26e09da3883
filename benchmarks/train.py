"""Training: seconds per gradient step and to a bound, beside the reference path and diffilqrax."""

from __future__ import annotations

import time

import numpy as np
import torch

from benchmarks.models import training_run
from benchmarks.rivals import jax_side
from benchmarks.rows import Row, absent, quantiles, row
from ilqr_training.config import LoopConfig
from ilqr_training.fit.loop import Report, train_steps
from ilqr_vae.inference import ilqr
from ilqr_vae.kernels import backend
from ilqr_vae.kernels.cpu import threads
from ilqr_vae.machine import cores
from ilqr_vae.model.dynamics import MGU2

UNITS = 143


def _warm(loop: LoopConfig) -> None:
    """Compile the kernels before a timed run."""
    run, _ = training_run(UNITS, loop)
    next(train_steps(run, loop))


def _steps(loop: LoopConfig, count: int, seconds: float) -> tuple[list[float], list[Report]]:
    run, _ = training_run(UNITS, loop)
    spent: list[float] = []
    reports: list[Report] = []
    _warm(loop)
    steps = train_steps(run, loop)
    end = time.perf_counter() + seconds
    while len(spent) < count and (len(spent) < 5 or time.perf_counter() < end):
        began = time.perf_counter()
        reports.append(next(steps))
        spent.append(time.perf_counter() - began)
    return spent, reports


def _to_bound(spent: list[float], reports: list[Report], target: float) -> float | None:
    """Time until the mean bound of five steps reaches a target."""
    bounds = np.asarray([r.bound for r in reports])
    if len(bounds) < 5:
        return None
    smooth = np.convolve(bounds, np.full(5, 0.2), "valid")
    reached = np.flatnonzero(smooth >= target)
    return round(float(np.sum(spent[: reached[0] + 5])), 2) if reached.size else None


def _common(loop: LoopConfig) -> Row:
    return {
        "n": 20,
        "m": 8,
        "units": UNITS,
        "T": loop.chunk,
        "batch": loop.batch,
        "dtype": loop.dtype,
        "device": "cpu",
    }


def run(quick: bool) -> list[Row]:
    """Return rows for gradient steps, and for the solves of one step."""
    torch.set_num_threads(1)
    loop = LoopConfig(steps=100_000)
    common = _common(loop)
    jax_side.ENVIRONMENT.beside(lambda: _warm(loop), 40.0 if quick else 600.0)
    rows: list[Row] = []
    ours: tuple[list[float], list[Report]] | None = None
    policies = [cores()] if quick else [1, cores()]
    budget = 8.0 if quick else 60.0
    for count in policies:
        threads.use(count)
        spent, reports = _steps(loop, 40 if quick else 300, budget)
        ours = (spent, reports)
        rows.append(
            row("train", "ilqr-vae", threads=count, iterations=_mean(reports), **common)
            | quantiles(spent[1:])
        )
    assert ours is not None
    target = float(np.mean([r.bound for r in ours[1]][-10:])) - 0.5
    rows[-1] |= {"bound": round(target, 2), "seconds_to_bound": _to_bound(*ours, target)}
    with backend.using("reference"):
        spent, reports = _steps(loop, 8 if quick else 120, budget)
    rows.append(
        row("train", "torch reference", threads=1, iterations=_mean(reports), **common)
        | quantiles(spent[1:])
        | {"bound": round(target, 2), "seconds_to_bound": _to_bound(spent, reports, target)}
    )
    rows += _solves(loop, 1.0 if quick else 10.0)
    threads.use(None)
    return rows


def _mean(reports: list[Report]) -> float:
    return round(float(np.mean([r.iterations for r in reports])), 2)


def _solves(loop: LoopConfig, seconds: float) -> list[Row]:
    """Time the solves of one step alone, from zero, by our solver and by diffilqrax."""
    threads.use(cores())
    built, _ = training_run(UNITS, loop)
    model, batches = built.model, built.crops
    index = batches.draw(loop.batch)
    observed = {"spikes": batches.observed(index)["spikes"]}
    w = tuple(t.detach() for t in model.dynamics.weights())
    problem = ilqr.Problem(model, w, observed, model.initial.cost(loop.batch))
    z0 = torch.zeros(loop.batch, model.n)
    u = torch.zeros(loop.batch, loop.chunk, model.m)
    config = ilqr.SolverConfig(iterations=loop.iterations, tolerance=loop.tolerance)
    spent: list[float] = []
    state, _ = ilqr.solve(problem, z0, u, config)
    end = time.perf_counter() + seconds
    while len(spent) < 3 or time.perf_counter() < end:
        began = time.perf_counter()
        state, _ = ilqr.solve(problem, z0, u, config)
        spent.append(time.perf_counter() - began)
    mean = float(state.iterations.double().mean())
    common = _common(loop)
    rows = [
        row("train solves", "ilqr-vae", threads=threads.count(), iterations=mean, **common)
        | quantiles(spent)
    ]
    assert isinstance(model.dynamics, MGU2)
    spikes, prior = model.group("spikes"), model.prior
    arrays = {
        **{f"w{i}": t.numpy() for i, t in enumerate(w)},
        "C": spikes.C.detach().numpy(),
        "b": spikes.b.detach().numpy(),
        "precision": torch.exp(-2 * prior.log_scale).detach().numpy(),
        "counts": observed["spikes"].values.numpy(),
        "z0": state.z[:, 0].numpy(),
        "u": u.numpy(),
        "iterations": np.asarray(round(mean)),
    }
    found = jax_side.solve_ilqr(arrays, seconds)
    if isinstance(found, str):
        return [*rows, absent("train solves", "diffilqrax", found, **common)]
    for one in found:
        measured = one.pop("seconds")
        rows.append(row("train solves", **(common | one)) | quantiles(measured))
    return rows
