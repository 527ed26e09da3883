"""The compiled streaming step against the torch that defines it, and what it may cost."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ilqr_vae.inference import ilqr
from ilqr_vae.kernels import backend
from ilqr_vae.kernels.cpu import threads
from ilqr_vae.streaming.horizon import HorizonConfig, MovingHorizon
from ilqr_vae.streaming.state import Estimate, HorizonState
from kernel_rig import Stream, assert_identical, assert_same


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads.use(1)
    yield
    threads.use(None)


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
            counts[0, 2], mask[0, 2] = 1e9, 1.0
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


def test_a_bin_passed_by_is_the_one_torch_defines() -> None:
    stream = Stream()
    est = stream.estimator
    state = HorizonState.stack([est.init(1), est.init(1)])
    for t in range(14):
        if t == 6:  # windows of different ages side by side
            state = HorizonState.stack([est.init(1), state[1]])
        counts, mask = stream.bin(2)
        if t == 9:
            counts[0, 2], mask[0, 2] = 1e9, 1.0
        after, answer = est.predict_only(state, counts, mask)
        with backend.using("reference"):
            expected, theirs = est.predict_only(state, counts, mask)
        assert_same(after, expected, 1e-10)
        assert_same(without_spread(answer), without_spread(theirs), 1e-10)
        alone, said = est.predict_only(state[1], counts[1:], mask[1:])
        assert_identical(alone, after, slice(1, 2))
        assert_identical(without_spread(said), without_spread(answer), slice(1, 2))
        state = after if t % 3 else est.step(state, counts, mask)[0]


def without_spread(answer: Estimate) -> Estimate:
    """Of a bin passed by it is not known."""
    assert answer.z_cov.isnan().all()
    assert answer.kinematics_std.isnan().all()
    zero = torch.zeros_like(answer.kinematics_std)
    return replace(answer, z_cov=torch.zeros_like(answer.z_cov), kinematics_std=zero)


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


STEADY = """
import gc, tracemalloc
import psutil
from ilqr_vae.kernels.cpu import iteration, lqr, step
from tests.kernel_rig import Stream

entries = (step.step, iteration.solve, lqr.solve, lqr.covariance)
stream = Stream(n=4, m=2, N=6)
state = stream.estimator.init(5)
bins = [stream.bin(5) for _ in range(50)]

def take(count):
    global state
    for t in range(count):
        # in one call, and asked between iterations
        stop = None if t % 2 else lambda: False
        state, _ = stream.estimator.step(state, *bins[t % 50], stop=stop)

take(300)
compiled = [len(entry.nopython_signatures) for entry in entries]
tracemalloc.start()
take(3000)  # until Python's own free lists are full
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
    """numba would count a record for each array made, or handed over by code that can make some."""
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
    assert made == [0, 0]
