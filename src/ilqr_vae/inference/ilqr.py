"""iLQR: the initial state and inputs that best explain the observations.

    minimise over (z_0, u)   J = initial(z_0) + sum_k [ -log p(u_k) - log p(o_k | z_{k+1}) ]
    subject to               z_{k+1} = f(z_k, u_k)

Single shooting. Each iteration linearises f and quadratises J along the current trajectory
(Gauss-Newton: no second derivatives of f), solves one LQR problem, and rolls the resulting affine
policy out through the true dynamics, backtracking the step size alpha until the cost decreases by a
fraction of what the quadratic model predicts. J never increases. A failed line search raises the
Levenberg regularisation of Quu, which is zero otherwise.

A batch runs until each problem has stopped; stopped problems are frozen. Shapes: B problems, T
steps, z (B, T+1, n), u (B, T, m).
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from ilqr_vae.inference import compiled, line_search
from ilqr_vae.inference.problem import Info, Problem, SolverConfig, State, Stop, where
from ilqr_vae.inference.problem import Status as Status
from ilqr_vae.lqr import LQRProblem, LQRSolution, solve_lqr
from ilqr_vae.model.rollout import adjoint


def init(problem: Problem, z0: Float[Tensor, "B n"], u: Float[Tensor, "B T m"]) -> State:
    """Return the state at the start, from an initial state and inputs (zeros, or a warm start)."""
    on_gpu = problem.on_gpu()
    if on_gpu is None:
        z = problem.model.rollout(problem.w, z0, u)
        cost = problem.cost(z, u)
    else:
        z, cost = on_gpu.begin(z0, u, problem.observed, problem.initial)
    status = torch.where(cost.isfinite(), int(Status.RUNNING), int(Status.NOT_FINITE))
    zero = torch.zeros_like(cost)
    return State(z, u, cost, zero, status, torch.zeros_like(status))


def quadratise(
    problem: Problem, z: Float[Tensor, "B T1 n"], u: Float[Tensor, "B T m"]
) -> LQRProblem:
    """Return the Gauss-Newton model of J around the rollout z of u; compiled without gradients."""
    p = problem
    if not torch.is_grad_enabled() and compiled.usable(p.model, p.observed, u):
        return compiled.quadratise(p.packed, z, u)
    return p.model.lqr_problem(p.w, z, u, p.observed, p.initial)


def solve_exact(
    problem: Problem,
    quadratic: LQRProblem,
    z: Float[Tensor, "B T1 n"],
    u: Float[Tensor, "B T m"],
    costate: Float[Tensor, "B T1 n"],
    regularisation: Float[Tensor, " B"],
) -> LQRSolution:
    """Solve ``quadratic`` with the curvature of the dynamics added.

    A problem whose exact Hessian is not positive definite is solved without it.
    """
    full = problem.model.add_dynamics_curvature(problem.w, quadratic, z, u, costate)
    exact = solve_lqr(full, free_initial=True, regularisation=regularisation)
    if bool(exact.ok.all()):
        return exact
    plain = solve_lqr(quadratic, free_initial=True, regularisation=regularisation)
    return where_solved(exact, plain)


def where_solved(exact: LQRSolution, plain: LQRSolution) -> LQRSolution:
    """Select ``exact`` for problems where it was found, ``plain`` for the others."""
    return LQRSolution(
        **{
            field.name: where(exact.ok, getattr(exact, field.name), getattr(plain, field.name))
            for field in fields(LQRSolution)
        }
    )


def step(problem: Problem, state: State, config: SolverConfig) -> tuple[State, Info]:
    """Do one iteration in torch. Stopped problems do not change."""
    model, w = problem.model, problem.w
    running = state.status == int(Status.RUNNING)
    on_gpu = problem.on_gpu()
    about = (problem.observed, problem.initial)
    if on_gpu is None:
        quadratic = model.lqr_problem(w, state.z, state.u, *about)
    else:
        quadratic = on_gpu.quadratise(state.z, state.u, *about)
    if config.exact:
        costate = adjoint(quadratic.A, quadratic.q)
        lqr = solve_exact(problem, quadratic, state.z, state.u, costate, state.regularisation)
    else:
        lqr = solve_lqr(quadratic, free_initial=True, regularisation=state.regularisation)

    seeking = running & lqr.ok
    if on_gpu is None:
        search = line_search.Search(problem, state, lqr, seeking, config)
        on_cpu = state.z.device.type == "cpu"
        z, u, cost, taken = search.backtrack() if on_cpu else search.all_at_once()
    else:
        z, u, cost, taken = on_gpu.search(
            state.z, state.u, state.cost, lqr, seeking, *about,
            armijo=config.armijo, tries=config.backtracks + 1,
        )  # fmt: skip
    moved = taken > 0
    converged = running & lqr.ok & (lqr.decrease <= config.tolerance * (1 + state.cost.abs()))
    raised = (10 * state.regularisation).clamp(min=config.regularisation_min)
    failed = running & ~moved & ~converged
    regularisation = torch.where(moved, torch.zeros_like(raised), state.regularisation)
    regularisation = torch.where(failed, raised, regularisation)
    finite = lqr.decrease.isfinite() & quadratic.q.isfinite().all(-1).all(-1)
    status = state.status
    status = torch.where(converged, int(Status.CONVERGED), status)
    status = torch.where(failed & (raised > config.regularisation_max), int(Status.STALLED), status)
    status = torch.where(failed & ~finite, int(Status.NOT_FINITE), status)
    after = State(z, u, cost, regularisation, status, state.iterations + running.to(torch.int64))
    return after, Info(quadratic, lqr, taken)


def options(config: SolverConfig) -> compiled.Options:
    """Return a configuration for the compiled solve."""
    c = config
    return compiled.Options(
        c.iterations,
        (c.tolerance, c.armijo, c.backtracks, c.regularisation_min, c.regularisation_max),
    )


def _outcome(work: compiled.SolveArrays) -> tuple[State, Info]:
    quadratic, lqr = work.lqr()
    state = State(*(torch.from_numpy(x) for x in work.state))
    return state, Info(quadratic, lqr, torch.from_numpy(work.taken))


def stopping(stop: Stop | None) -> compiled.Stopped | None:
    """Wrap ``stop`` as a function that marks the stopped statuses and returns whether to end."""
    if stop is None:
        return None

    def stopped(status: NDArray[np.int64]) -> bool:
        running = status == Status.RUNNING
        if not running.any():
            return True
        cut = running & np.asarray(stop(), dtype=bool)
        status[cut] = Status.STOPPED
        return bool((running == cut).all())

    return stopped


def finish(status: NDArray[np.int64]) -> None:
    """Set the status of problems that are still running after the last iteration."""
    status[status == Status.RUNNING] = Status.ITERATION_LIMIT


def solve(
    problem: Problem,
    z0: Float[Tensor, "B n"],
    u: Float[Tensor, "B T m"],
    config: SolverConfig,
    stop: Stop | None = None,
) -> tuple[State, Info]:
    """Iterate until every problem has stopped.

    Args:
        stop: called before every iteration but the first; True ends the solve (``Status.STOPPED``)
            with the best iterate so far. One truth value, or one per problem.

    Returns:
        The final state, and ``Info`` of the last iteration of each problem, whose LQR problem is
        around the trajectory before that iteration (at convergence, the same to the tolerance).
    """
    with torch.no_grad():
        p = problem
        if not config.exact and compiled.usable(p.model, p.observed, u):
            work = compiled.solve(p.packed, (z0, u), options(config), stopping(stop))
            finish(work.status)
            return _outcome(work)
        return solve_reference(problem, z0, u, config, stop)


def solve_reference(
    problem: Problem,
    z0: Float[Tensor, "B n"],
    u: Float[Tensor, "B T m"],
    config: SolverConfig,
    stop: Stop | None = None,
    *,
    sync_free: bool = False,
) -> tuple[State, Info]:
    """Solve in torch: the reference for the compiled solve.

    Args:
        sync_free: never synchronise with the device: run all iterations, which do not change
            stopped problems.
    """
    stopped = stopping(stop)
    state = init(problem, z0, u)
    state, info = step(problem, state, config)
    for _ in range(1, config.iterations):
        running = state.status == int(Status.RUNNING)
        if stopped is not None:
            status = state.status.cpu().numpy().copy()
            ended = stopped(status)
            state = replace(state, status=torch.from_numpy(status).to(state.status.device))
            running = state.status == int(Status.RUNNING)
            if ended:
                break
        if not sync_free and not bool(running.any()):
            break
        state, later = step(problem, state, config)
        all_run = not sync_free and bool(running.all())
        info = later if all_run else _latest(running, later, info)
    running = state.status == int(Status.RUNNING)
    limit = torch.where(running, int(Status.ITERATION_LIMIT), state.status)
    return replace(state, status=limit), info


def _latest(running: Bool[Tensor, " B"], new: Info, old: Info) -> Info:
    """Select ``new`` for problems that were running, ``old`` for stopped ones."""

    def merged(after: Any, before: Any) -> dict[str, Any]:
        pairs = {f.name: (getattr(after, f.name), getattr(before, f.name)) for f in fields(after)}
        return {k: None if a is None else where(running, a, b) for k, (a, b) in pairs.items()}

    return Info(
        LQRProblem(**merged(new.problem, old.problem)),
        LQRSolution(**merged(new.lqr, old.lqr)),
        where(running, new.alpha, old.alpha),
    )
