"""Warm-up of an engine: compiles and touches everything before the first bin, and measures
costs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ilqr_service.solving.engine import NOBODY, Engine
from ilqr_service.work import FAILED, NO_SOLVE, Solve
from ilqr_vae.errors import ServiceError

_ROUND = 16
_MAX_ROUNDS = 24
_STEADY = 1.25
_LONGEST_S = 20.0
"""Time limit of the steps of a warm-up, without the first of each kind, which compiles."""
_NEVER = 2**62


@dataclass(frozen=True, slots=True)
class WarmUp:
    """Measurements of a warm-up. Times are in milliseconds."""

    steps: int
    seconds: float
    first_ms: float
    steady_ms: float


def keep_warm(engine: Engine) -> None:
    """Make a hidden step, to keep caches and clocks warm for the next bin."""
    counts = np.ones(len(engine.model_info.unit_names))
    engine.solve([Solve(run=NOBODY, index=0, counts=counts, due_ns=_NEVER)])


def warm_up(engine: Engine) -> WarmUp:
    """Compile and touch everything: a growing window, a full one, and bins of all kinds.

    Real steps on random counts, in rounds, until the typical step no longer becomes faster, within
    a time limit. Call it in the solver thread.

    Raises:
        ServiceError: a solve fails, or a window takes too long to fill.
    """
    torch.set_num_threads(1)  # leave the cores to the kernels
    rng = np.random.default_rng(0)
    n_units, horizon = len(engine.model_info.unit_names), engine.model_info.horizon
    began = engine.clock()
    steps, best_ns, typical = 0, 0, 0
    first_ns: dict[int, int] = {}  # by budget: with and without a solve
    rates = np.ones(n_units)

    def late() -> bool:
        return engine.clock() - began - sum(first_ns.values()) > _LONGEST_S * 1e9

    for round_ in range(_MAX_ROUNDS):
        spent: list[int] = []
        for k in range(max(_ROUND, horizon + 4)):
            work = Solve(
                run=NOBODY,
                index=steps,
                counts=None if k % 8 == 4 else rng.poisson(rates).astype(np.float64),
                mask=None if k % 8 else rng.random(n_units) < 0.8,
                restart=k == 0 and round_ % 2 == 0,  # every other round grows a new window
                due_ns=_NEVER,
                anytime=k % 8 == 6,
                budget=NO_SOLVE if k % 8 == 2 else 0,
            )
            (answer,) = engine.solve([work])
            if answer.solver == FAILED:
                raise ServiceError(
                    "model", expected="one whose solves succeed", got="a failed solve (see log)"
                )
            rates = np.nan_to_num(answer.rates, nan=1.0).clip(0.0, 10.0)
            spent.append(answer.solve_end_ns - answer.solve_start_ns)
            first_ns.setdefault(work.budget, spent[-1])
            steps += 1
            if late():
                break
        if steps <= horizon:
            raise ServiceError(
                "model",
                expected=f"a window of {horizon} bins that fills in {_LONGEST_S:g} s",
                got=f"{steps} bins",
            )
        typical = int(np.median(spent))
        if late() or (round_ >= 2 and typical <= _STEADY * best_ns):
            break
        best_ns = min(best_ns or typical, typical)
    engine.cost.measured(float(max(typical, 1)), 0.0, 1)
    bins, many = _fill(engine)
    engine.cost.measured(float(max(typical, 1)), many, bins)
    seconds = (engine.clock() - began) / 1e9
    return WarmUp(steps, seconds, first_ns[0] / 1e6, typical / 1e6)


def _fill(engine: Engine) -> tuple[int, float]:
    """Make steps of more and more runs, up to what fits; return the last number and its time."""
    cost = engine.cost
    size, took = 1, cost.ns(1)
    counts = np.ones(len(engine.model_info.unit_names))
    while size < cost.most and took < cost.slice_ns:
        size = min(2 * size, cost.most)
        spent: list[int] = []
        for k in range(5):
            step = [
                Solve(run=NOBODY - r, index=k, counts=counts, restart=k == 0, due_ns=_NEVER)
                for r in range(size)
            ]
            started = engine.clock()
            engine.solve(step)
            spent.append(engine.clock() - started)
        took = float(np.median(spent))
    for r in range(size):
        engine.forget(NOBODY - r)
    return size, took
