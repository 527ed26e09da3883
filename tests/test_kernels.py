"""The compiled solves against the torch that defines them, and what a steady stream may cost."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ilqr_vae import backend, ilqr, line_search, threads
from ilqr_vae.artifact import GroupSpec, ModelSpec, build
from ilqr_vae.errors import ConfigError
from ilqr_vae.fused import solver
from ilqr_vae.fused.graphs import Graphs, padded_size, record_plainly
from ilqr_vae.horizon import Estimate, HorizonConfig, HorizonState, MovingHorizon
from ilqr_vae.likelihoods import Observed
from ilqr_vae.readout import KinematicReadout, ReadoutShape
from ilqr_vae.rollout import adjoint, closed_loop, rollout

SIZES = [(20, 5, 40, 3, 8), (3, 2, 7, 4, 5), (17, 9, 33, 2, 3), (1, 1, 1, 1, 1)]
DTYPES = [(torch.float64, 1e-10), (torch.float32, 1e-4)]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads.use(1)
    yield
    threads.use(None)


def model_of(dynamics: str, n: int, m: int, N: int, *, kinematics: int = 0) -> Any:
    groups = {"spikes": GroupSpec(family="poisson", channels=N, log_rate_max=1.5)}
    if kinematics:
        groups = {"kinematics": GroupSpec(family="gaussian", channels=kinematics)} | groups
    with torch.random.fork_rng():
        torch.manual_seed(n)
        return build(ModelSpec(dynamics=dynamics, latents=n, inputs=m, groups=groups))


def problem_of(
    dynamics: str, sizes: tuple[int, ...], dtype: torch.dtype
) -> tuple[ilqr.Problem, Tensor, Tensor]:
    n, m, N, batch, T = sizes
    model = model_of(dynamics, n, m, N, kinematics=2).to(dtype)
    g = torch.Generator().manual_seed(1)
    observed = {}
    for name, channels in (("kinematics", 2), ("spikes", N)):
        shape = (batch, T, channels)
        values = torch.randn(shape, generator=g).abs().mul(2).round()
        mask = torch.rand(shape, generator=g) < 0.8
        observed[name] = Observed(values.to(dtype), mask.to(dtype))
    w = tuple(t.detach() for t in model.dynamics.weights())
    problem = ilqr.Problem(model, w, observed, model.initial.cost(batch))
    z0 = 0.1 * torch.randn(batch, n, generator=g)
    return problem, z0.to(dtype), (0.1 * torch.randn(batch, T, m, generator=g)).to(dtype)


def assert_same(ours: Any, theirs: Any, tolerance: float) -> None:
    for field in fields(ours):
        a, b = getattr(ours, field.name), getattr(theirs, field.name)
        if not isinstance(b, Tensor):
            assert a is None
            continue
        assert (a.shape, a.dtype) == (b.shape, b.dtype), field.name
        if not b.numel():
            continue
        if not b.is_floating_point():
            assert torch.equal(a, b), field.name
            continue
        scale = 1.0 + float(b.abs().max())
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * scale, msg=field.name)


def assert_identical(ours: Any, theirs: Any, rows: slice = slice(None)) -> None:
    for field in fields(ours):
        assert torch.equal(getattr(ours, field.name), getattr(theirs, field.name)[rows]), field.name


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dynamics", ["linear", "mgu2"])
def test_a_solve_is_the_one_torch_defines(
    dynamics: str, sizes: tuple[int, ...], dtype: torch.dtype, tolerance: float
) -> None:
    problem, z0, u = problem_of(dynamics, sizes, dtype)
    settled = 1e-9 if dtype == torch.float64 else 1e-5
    for iterations in (1, 3, 8):
        config = ilqr.SolverConfig(iterations=iterations, tolerance=settled)
        state, info = ilqr.solve(problem, z0, u, config)
        with torch.no_grad(), backend.using("reference"):
            expected, theirs = ilqr.solve_reference(problem, z0, u, config)
        assert_same(state, expected, tolerance)
        assert_same(info.problem, theirs.problem, tolerance)
        assert_same(info.lqr, theirs.lqr, tolerance)


def test_a_step_resumes_a_state() -> None:
    problem, z0, u = problem_of("mgu2", SIZES[0], torch.float64)
    config = ilqr.SolverConfig(iterations=3, tolerance=1e-12)
    with torch.no_grad():
        state = ilqr.init(problem, z0, u)
        for _ in range(3):
            state = replace(state, status=state.status.clone())
            state.status[1] = int(ilqr.Status.STALLED)
            ours, info = ilqr.step(problem, state, config)
            expected, theirs = ilqr.step_reference(problem, state, config)
            assert_same(ours, expected, 1e-10)
            assert_same(info.lqr, theirs.lqr, 1e-10)
            state = ours


@pytest.mark.parametrize("what", ["nan", "infinite start", "needs damping", "hopeless"])
def test_what_breaks_down_has_the_same_status(what: str) -> None:
    problem, z0, u = problem_of("mgu2", SIZES[1], torch.float64)
    spikes, initial = problem.observed["spikes"], problem.initial
    if what == "nan":
        values = spikes.values.clone()
        values[1, 2, 0] = float("nan")
        observed = {**problem.observed, "spikes": Observed(values, torch.ones_like(values))}
        problem = replace(problem, observed=observed)
    elif what == "infinite start":
        z0 = z0.clone()
        z0[1, 0] = float("inf")
    else:
        precision = initial.precision.clone()
        precision[1] -= (8.0 if what == "needs damping" else 1e12) * torch.eye(3).double()
        problem = replace(problem, initial=replace(initial, precision=precision))
    config = ilqr.SolverConfig(iterations=20)
    state, info = ilqr.solve(problem, z0, u, config)
    with torch.no_grad():
        expected, theirs = ilqr.solve_reference(problem, z0, u, config)
    assert state.status.tolist() == expected.status.tolist()
    assert state.iterations.tolist() == expected.iterations.tolist()
    assert info.lqr.ok.tolist() == theirs.lqr.ok.tolist()
    others = [0, 2, 3]
    torch.testing.assert_close(state.z[others], expected.z[others], rtol=0, atol=1e-9)
    for field in fields(info.lqr):
        assert getattr(info.lqr, field.name).isfinite().all(), field.name


def test_bits_do_not_depend_on_batch_threads_or_being_asked_to_stop() -> None:
    problem, z0, u = problem_of("mgu2", (12, 5, 40, 24, 40), torch.float64)
    config = ilqr.SolverConfig(iterations=4, tolerance=1e-6)
    alone, _ = ilqr.solve(problem, z0, u, config)
    threads.use(3)
    shared, _ = ilqr.solve(problem, z0, u, config)
    asked, _ = ilqr.solve(problem, z0, u, config, stop=lambda: False)
    assert_identical(alone, shared)
    assert_identical(alone, asked)
    for b in (0, 13):
        rows = slice(b, b + 1)
        picked = {k: Observed(*(t[rows] for t in o)) for k, o in problem.observed.items()}
        one = replace(problem, observed=picked, initial=problem.model.initial.cost(1))
        assert_identical(ilqr.solve(one, z0[rows], u[rows], config)[0], alone, rows)


def test_each_problem_can_be_stopped_alone() -> None:
    problem, z0, u = problem_of("mgu2", SIZES[1], torch.float64)
    config = ilqr.SolverConfig(iterations=4, tolerance=1e-12)
    for solve in (ilqr.solve, ilqr.solve_reference):
        asked = iter([[False, True, False, False], [True, True, False, False]])
        with torch.no_grad():
            state, _ = solve(problem, z0, u, config, lambda a=asked: next(a, [False] * 4))
        stopped = int(ilqr.Status.STOPPED)
        assert state.iterations.tolist() == [2, 1, 4, 4]
        assert (state.status == stopped).tolist() == [True, True, False, False]


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("dynamics", ["linear", "mgu2"])
def test_rollouts_are_the_ones_torch_defines(
    dynamics: str, dtype: torch.dtype, tolerance: float
) -> None:
    g = torch.Generator().manual_seed(0)
    for n, m, N, B, T in SIZES:
        family = model_of(dynamics, n, m, N).to(dtype).dynamics
        w = tuple(t.detach() for t in family.weights())
        shapes = ((B, n), (B, T + 1, n), (B, T, m), (B, T, m, n), (B, T, m), (B,))
        given = [0.3 * torch.randn(*shape, generator=g).to(dtype) for shape in shapes]
        A = torch.randn(B, T, n, n, generator=g).to(dtype) / n**0.5
        ours = (
            *closed_loop(family, w, *given),
            rollout(family, w, given[0], given[2]),
            adjoint(A, given[1]),
        )
        with backend.using("reference"):
            theirs = (
                *closed_loop(family, w, *given),
                rollout(family, w, given[0], given[2]),
                adjoint(A, given[1]),
            )
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


class Stream:
    """A moving-horizon estimator and made-up bins for it."""

    def __init__(self, dynamics: str = "mgu2", *, n: int = 6, m: int = 3, N: int = 12) -> None:
        shape = ReadoutShape(lags=2, residuals=3, hidden=4)
        readout = KinematicReadout(n, 2, shape, units=N).double()
        g = torch.Generator().manual_seed(5)
        for b in readout.buffers():
            b.copy_(torch.rand(b.shape, generator=g) + 0.1)
        self.estimator = MovingHorizon(
            model_of(dynamics, n, m, N).double(),
            readout,
            torch.full((N,), 0.5, dtype=torch.float64),
            HorizonConfig(horizon=4, iterations=2),
        )
        self.N, self.g = N, torch.Generator().manual_seed(3)

    def bin(self, streams: int) -> tuple[Tensor, Tensor]:
        counts = torch.poisson(torch.full((streams, self.N), 0.7), generator=self.g).double()
        mask = (torch.rand(streams, self.N, generator=self.g) < 0.8).double()
        mask[torch.rand(streams, generator=self.g) < 0.2] = 0.0
        return counts, mask


@pytest.mark.parametrize("dynamics", ["linear", "mgu2"])
def test_a_streaming_step_is_the_one_torch_defines(dynamics: str) -> None:
    stream = Stream(dynamics)
    est = stream.estimator
    state = est.init(3)
    for t in range(12):
        if t == 5:  # windows of different ages side by side
            state = HorizonState.stack([est.init(1), state[1], state[2]])
        counts, mask = stream.bin(3)
        if t == 7:
            counts[0, 2], mask[0, 2] = float("nan"), 1.0
        after, answer = est.step(state, counts, mask)
        with backend.using("reference"):
            expected, theirs = est.step_reference(state, counts, mask)
        assert_same(after, expected, 1e-10)
        assert_same(answer, theirs, 1e-10)
        asked = est.step(state, counts, mask, stop=lambda: False)
        assert_identical(asked[0], after)
        assert_identical(asked[1], answer)
        alone = est.step(state[1], counts[1:2], mask[1:2])
        assert_identical(alone[0], after, slice(1, 2))
        assert_identical(alone[1], answer, slice(1, 2))
        state = after


def test_streams_with_different_deadlines_stop_apart() -> None:
    stream = Stream()
    est = stream.estimator
    state = est.init(2)
    counts, mask = stream.bin(2)
    mask[:] = 1.0
    _, both = est.step(state, counts, mask, stop=lambda: [True, False])
    _, first = est.step(state[0], counts[:1], mask[:1], stop=lambda: True)
    _, second = est.step(state[1], counts[1:], mask[1:])
    assert both.iterations.tolist() == [1, 2]
    assert both.status[0] == ilqr.Status.STOPPED
    assert torch.equal(both.z, torch.cat([first.z, second.z]))


def test_an_arrival_cost_that_breaks_down_starts_from_the_models_own() -> None:
    stream = Stream()
    est = stream.estimator
    state = est.init(1)
    for _ in range(4):
        state, _ = est.step(state, *stream.bin(1))
    broken = replace(state, precision=torch.full_like(state.precision, float("nan")))
    for take in (est.step, est.step_reference):
        after, answer = take(broken, *stream.bin(1))
        assert torch.equal(after.precision, est.model.initial.cost(1).precision)
        assert answer.z.isfinite().all()


def test_trying_every_step_size_at_once_finds_the_same_step() -> None:
    problem, z0, u = problem_of("mgu2", SIZES[0], torch.float64)
    config = ilqr.SolverConfig()
    with torch.no_grad():
        state = ilqr.init(problem, z0, u)
        _, info = ilqr.step_reference(problem, state, config)
        # steps that overshoot by different factors, so that different halvings are needed
        factor = torch.tensor([1.0, 7.0, 40.0]).double()
        lqr = replace(
            info.lqr,
            k=info.lqr.k * factor.view(-1, 1, 1),
            dz0=info.lqr.dz0 * factor.view(-1, 1),
            decrease=info.lqr.decrease * factor,
        )
        for seeking in ([True, True, True], [True, False, True], [False] * 3):
            given = (problem, state, lqr, torch.tensor(seeking), config)
            ours, theirs = line_search.all_at_once(*given), line_search.backtrack(*given)
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    alphas = line_search.backtrack(problem, state, lqr, torch.ones(3).bool(), config)[-1]
    assert len(set(alphas.tolist())) > 1


def test_a_recorded_step_of_any_batch_is_the_step() -> None:
    """Padding and bookkeeping of CUDA graphs, with a recorder that runs the step on the CPU."""
    stream = Stream()
    est = stream.estimator
    graphs = est.graphs(record_plainly)
    state = est.init(3)
    for t in range(8):
        if t == 5:
            state = HorizonState.stack([est.init(1), state[0], state[1], state[2], state[2]])
        counts, mask = stream.bin(state.z.shape[0])
        after, answer = est.step(state, counts, mask)
        given = (*(getattr(state, f.name) for f in fields(state)), counts, mask)
        out = graphs(given)
        assert_same(after, HorizonState(*out[:7]), 1e-10)
        assert_same(answer, Estimate(*out[7:]), 1e-10)
        state = after
    assert [padded_size(s) for s in (1, 2, 64, 65, 1024, 1025)] == [1, 4, 64, 256, 1024, 2048]


def test_a_step_that_cannot_be_recorded_is_run_and_the_log_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(step: object, inputs: object) -> object:
        raise RuntimeError("no recorder here")

    graphs = Graphs(lambda given: (given[0] + 1,), (torch.zeros(1),), refuse)
    for _ in range(3):
        assert torch.equal(graphs((torch.zeros(2),))[0], torch.ones(2))
    assert len(caplog.records) == 1


STEADY = """
import gc, tracemalloc
import psutil
from ilqr_vae.fused import iteration, window
from ilqr_vae.lqr import kernels
from tests.test_kernels import Stream

entries = (window.enter, window.leave, iteration.solve, kernels.solve, kernels.covariance)
stream = Stream(n=4, m=2, N=6)
state = stream.estimator.init(5)
bins = [stream.bin(5) for _ in range(50)]

def take(count):
    global state
    for t in range(count):
        state, _ = stream.estimator.step(state, *bins[t % 50], stop=lambda: False)

take(300)
compiled = [len(entry.nopython_signatures) for entry in entries]
tracemalloc.start()
take(300)
gc.collect()
traced = tracemalloc.get_traced_memory()[0]
take(1500)
gc.collect()
traced = tracemalloc.get_traced_memory()[0] - traced
tracemalloc.stop()
take(2000)
resident = psutil.Process().memory_info().rss
take(BINS)
resident = psutil.Process().memory_info().rss - resident
assert [len(entry.nopython_signatures) for entry in entries] == compiled
print(traced, resident)
"""


def test_a_steady_stream_compiles_nothing_and_keeps_nothing() -> None:
    # a process of its own: type checks at every call keep memory of their own
    # 20,000 steps of 5 streams: 1e5 bins
    ran = subprocess.run(
        [sys.executable, "-c", STEADY.replace("BINS", "20000")],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
    )
    assert ran.returncode == 0, ran.stderr
    traced, resident = (int(x) for x in ran.stdout.split())
    # half of what one small object kept per step would be
    assert traced < 1500 * 32 / 2
    assert resident < 4 << 20


def test_kernels_allocate_nothing() -> None:
    """numba counts one record per array handed over, and nothing for the work done inside."""
    from numba.core.runtime import _nrt_python, rtsys

    made = []
    for iterations in (1, 7):
        stream = Stream()
        est = stream.estimator
        config = HorizonConfig(horizon=4, iterations=iterations, tolerance=0.0)
        est = MovingHorizon(est.model, est.readout, est.mean_rate, config)
        state = est.init(2)
        for _ in range(6):
            state, answer = est.step(state, *stream.bin(2))
        assert answer.iterations.tolist() == [iterations] * 2
        _nrt_python.memsys_enable_stats()
        try:
            before = rtsys.get_allocation_stats()
            est.step(state, *stream.bin(2))
            after = rtsys.get_allocation_stats()
        finally:
            _nrt_python.memsys_disable_stats()
        made.append(after.alloc - before.alloc)
        assert after.free - before.free == made[-1]
    assert made[0] == made[1] > 0


def test_families_without_kernels_run_in_torch_and_the_log_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = build(
        ModelSpec(
            dynamics="rnn",
            latents=3,
            inputs=2,
            groups={"spikes": GroupSpec(family="poisson", channels=4)},
        )
    ).double()
    est = MovingHorizon(model, None, torch.ones(4).double(), HorizonConfig(horizon=3))
    solver._say.cache_clear()
    state = est.init(1)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            state, answer = est.step(state, torch.ones(1, 4).double(), torch.ones(1, 4).double())
    assert answer.z.isfinite().all()
    assert [r.getMessage() for r in caplog.records] == [
        "no compiled iLQR for the dynamics 'rnn': it runs in torch"
    ]


def test_the_switch() -> None:
    problem, _, u = problem_of("mgu2", SIZES[1], torch.float64)
    assert solver.usable(problem.model, problem.observed, u)
    with backend.using("reference"):
        assert not solver.usable(problem.model, problem.observed, u)
        assert backend.current() == "reference"
    assert backend.current() == "auto"
    with pytest.raises(ConfigError, match="abacus"):
        backend.use("abacus")


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_scratch_is_the_threads_own_and_grows_once(dtype: type[np.floating]) -> None:
    first = threads.scratch(dtype, 100)
    assert threads.scratch(dtype, 50) is first
    assert threads.scratch(dtype, first.size + 1) is not first
    assert threads.scratch(dtype, 10).ctypes.data % 64 == 0
