"""The CUDA step: compiled for the CPU (``cuda_host``) against the CPU's step, and for a GPU that is
not there; on a machine with a GPU, there."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import cuda_host
from ilqr_service.settings import ServiceSettings
from ilqr_service.solving.engine import Engine
from ilqr_service.work import NO_SOLVE, EngineAnswer, Solve
from ilqr_vae.inference import ilqr
from ilqr_vae.kernels.cpu.arguments import Estimates, Streams
from ilqr_vae.kernels.gpu.nvrtc import NoKernelError, compile_source
from ilqr_vae.kernels.gpu.step import Shape, source
from ilqr_vae.streaming import on_gpu
from ilqr_vae.streaming.compiled import Estimator, Rows, States, on_tensors
from ilqr_vae.streaming.ensemble import CompiledEnsemble, EnsembleHorizon
from ilqr_vae.streaming.horizon import HorizonConfig, MovingHorizon
from ilqr_vae.streaming.on_gpu import GpuEstimator
from ilqr_vae.streaming.state import Estimate, HorizonState
from kernel_rig import Stream, assert_same
from rig import make_model
from small import draw_data
from test_variants import model_of

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
Answered = tuple[HorizonState, Estimate]


@dataclass
class There:
    """An estimator's kernels, run on the CPU."""

    est: MovingHorizon
    made: GpuEstimator
    kernels: list[cuda_host.Host]

    @staticmethod
    def of(est: MovingHorizon) -> There:
        def build(shape: Shape, names: tuple[str, ...]) -> cuda_host.Host:
            kernels.append(cuda_host.build(shape, names))
            return kernels[-1]

        kernels: list[cuda_host.Host] = []
        about = (est.readout, est.mean_rate, est.bounds, est._initial)  # pyright: ignore
        options = ilqr.options(est._solver)  # pyright: ignore[reportPrivateUsage]
        made = GpuEstimator(est.model, est._w, *about, options, est.intervals, build)  # pyright: ignore
        return There(est, made, kernels)

    def take(
        self, state: HorizonState, step: Callable[[States, Rows], Estimates]
    ) -> tuple[HorizonState, Estimate]:
        """A step in both orders of a block's threads, which a missing barrier would tell apart."""
        found: list[Answered] = []
        for order in (0, 1):
            for kernel in self.kernels:
                kernel.order = order

            def poisoned(states: States, rows: Rows) -> Estimates:
                for field in states[1]:
                    field[:] = -7
                return step(states, rows)

            found.append(on_tensors(state, self.est.model.n, poisoned))
        for one, other in zip(*found, strict=True):
            for field in fields(one):
                a, b = getattr(one, field.name), getattr(other, field.name)
                assert torch.equal(a.nan_to_num(), b.nan_to_num()), field.name
        return found[0]

    def step(
        self, state: HorizonState, counts: Tensor, mask: Tensor, stop: ilqr.Stop | None = None
    ) -> Answered:
        given = counts.numpy(), mask.numpy(), ilqr.stopping(stop)
        return self.take(state, lambda s, rows: self.made.step(s, rows, *given))

    def predict_only(self, state: HorizonState, counts: Tensor, mask: Tensor) -> Answered:
        given = counts.numpy(), mask.numpy()
        return self.take(state, lambda s, rows: self.made.predict_only(s, rows, *given))


@needs_compiler
def test_a_step_is_the_cpus() -> None:
    """Windows of different ages, missing units and bins, a count that no unit has, a state that is
    lost, budgets, and bins without a solve; in more streams than there are blocks."""
    stream = Stream(n=5, m=3, N=9)
    est = stream.estimator
    there = There.of(est)
    state = est.init(4)
    for t in range(11):
        if t == 5:
            state = HorizonState.stack([est.init(1), state[1], state[2], state[3]])
        counts, mask = stream.bin(4)
        if t == 7:
            counts[0, 2], mask[0, 2] = 1e9, 1.0
            counts[3, 1], mask[3, 1] = float("inf"), 1.0
        if t == 8:
            state.z[2, 1, 0] = float("nan")
        if t == 9:
            counts[1], mask[1] = 1e9, 1.0
        if t % 4 == 3:
            (after, answer), (found, ours) = (
                x.predict_only(state, counts, mask) for x in (Unchecked(est), there)
            )
            assert answer.z_cov.isnan().all()
            assert ours.z_cov.isnan().all()
            answer, ours = (known(x) for x in (answer, ours))
        else:
            stop = (lambda: [True, False, False, True]) if t == 6 else None
            after, answer = Unchecked(est).step(state, counts, mask, stop)
            found, ours = there.step(state, counts, mask, stop)
        assert_same(found, after, 1e-10)
        assert_same(ours, answer, 1e-10)
        # a stream's bits depend neither on its row nor on who else is there
        if t == 9:
            few = HorizonState.stack([state[3], state[1]])
            alone = there.step(few, counts[[3, 1]], mask[[3, 1]])
            for a, b in zip(alone, (found, ours), strict=True):
                for field in fields(a):
                    one, all_ = getattr(a, field.name), getattr(b, field.name)
                    assert torch.equal(one, all_[[3, 1]]), field.name
        state = after
    assert len(there.kernels) == 2  # windows in global memory, and in shared memory
    # a broken arrival cost gives way to the model's own
    broken = replace(state, precision=torch.full_like(state.precision, torch.nan))
    (after, answer), (found, ours) = (
        x.step(broken, *bins) for bins in [stream.bin(4)] for x in (Unchecked(est), there)
    )
    full = state.age == 4
    assert full.any()
    own = est.model.initial.cost(1).precision
    assert torch.equal(found.precision[full], own.expand(int(full.sum()), -1, -1))
    assert_same(ours, answer, 1e-10)


class Unchecked:
    """The CPU's step, also of bins that ``MovingHorizon.step`` refuses."""

    def __init__(self, est: MovingHorizon) -> None:
        compiled = est.compiled(est.mean_rate)
        assert isinstance(compiled, Estimator)
        self._n, self._compiled = est.model.n, compiled

    def step(
        self, state: HorizonState, counts: Tensor, mask: Tensor, stop: ilqr.Stop | None = None
    ) -> Answered:
        given = counts.numpy(), mask.numpy(), ilqr.stopping(stop)
        return on_tensors(state, self._n, lambda s, rows: self._compiled.step(s, rows, *given))

    def predict_only(self, state: HorizonState, counts: Tensor, mask: Tensor) -> Answered:
        given = counts.numpy(), mask.numpy()
        return on_tensors(
            state, self._n, lambda s, rows: self._compiled.predict_only(s, rows, *given)
        )


def known(answer: Estimate) -> Estimate:
    """An answer without what a bin passed by leaves unknown."""
    none = torch.zeros_like(answer.z_cov), torch.zeros_like(answer.kinematics_std)
    return replace(answer, z_cov=none[0], kinematics_std=none[1])


@needs_compiler
@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [
        ("authors", torch.float64, 1e-10),
        ("gaussian", torch.float32, 1e-4),
    ],
)
def test_other_families_are_the_cpus(name: str, dtype: torch.dtype, tolerance: float) -> None:
    model = model_of(name, n=5, m=2, units=9)
    data = draw_data(model, 2, 8, missing=0.1)["spikes"]
    values, mask = (x.to(dtype) for x in data)
    rate = data.values.mean((0, 1))
    config = HorizonConfig(horizon=4)
    est = MovingHorizon(model, None, rate, config)
    there = There.of(MovingHorizon(model.to(dtype), None, rate.to(dtype), config))
    state, ours = est.init(2), there.est.init(2)
    for t in range(8):
        state, answer = est.step(state, values[:, t].double(), mask[:, t].double())
        ours, found = there.step(ours, values[:, t], mask[:, t])
        for one, other in ((ours, state), (found, answer)):
            assert_same(double(one), double(other), tolerance)


def double(x: HorizonState | Estimate) -> HorizonState | Estimate:
    """With numbers in float64."""
    made = {f.name: getattr(x, f.name) for f in fields(x)}
    return type(x)(**{k: v.double() if v.is_floating_point() else v for k, v in made.items()})


@needs_compiler
def test_members_of_an_ensemble_are_stepped_one_after_the_other() -> None:
    stream = Stream(n=3, m=2, N=4)
    there = There.of(stream.estimator)
    state = EnsembleHorizon([stream.estimator] * 2).init(3)
    on_cpu = EnsembleHorizon([stream.estimator] * 2).compiled(state.z)
    assert on_cpu is not None
    on_host = CompiledEnsemble([there.made] * 2, None)
    counts, mask = stream.bin(3)
    after = [torch.zeros_like(t) for t in state.tensors()]
    rows = (np.arange(3), np.array([1, 2, 0]))
    stopped = ilqr.stopping(lambda: True)
    given = (rows, counts.numpy(), mask.numpy(), stopped)
    ours = on_host.step((Streams(*state.tensors()), Streams(*after)), *given)
    arrays = [torch.zeros_like(t).numpy() for t in after]
    before = Streams(*(t.numpy() for t in state.tensors()))
    theirs = on_cpu.step((before, Streams(*arrays)), *given)
    for name, a, b in zip(Estimates._fields, ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-9, err_msg=name)
    for a, b in zip(after, arrays, strict=True):
        np.testing.assert_allclose(a.numpy(), b, rtol=0, atol=1e-9)


@needs_compiler
def test_an_engine_steps_rows_where_they_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model(tmp_path / "m.safetensors", n_units=4, horizon=3)
    settings, rng = ServiceSettings(device="cpu"), np.random.default_rng(0)
    counts = rng.poisson(1.0, (6, 2, 4)).astype(np.float64)

    def answers() -> list[EngineAnswer]:
        engine = Engine.load(tmp_path / "m.safetensors", settings)
        found = list[EngineAnswer]()
        for t, bins in enumerate(counts):
            budget = NO_SOLVE if t == 2 else 1 if t == 3 else 0
            found += engine.solve(
                [
                    Solve(run=r, index=t, counts=x, restart=t == 0, due_ns=2**62, budget=budget)
                    for r, x in enumerate(bins)
                ]
            )
        return found

    on_cpu = answers()
    monkeypatch.setattr(on_gpu, "usable", lambda model, like: True)
    monkeypatch.setattr(on_gpu, "build_cuda", cuda_host.build)
    for ours, theirs in zip(answers(), on_cpu, strict=True):
        assert (ours.solver, ours.iterations) == (theirs.solver, theirs.iterations)
        for name in ("latent", "latent_std", "rates", "kinematics", "kinematics_std", "inputs"):
            a, b = getattr(ours, name), getattr(theirs, name)
            assert (a is None) == (b is None)
            if a is not None:
                np.testing.assert_allclose(a, b, rtol=0, atol=1e-9, err_msg=name)


def test_the_kernel_compiles_for_a_gpu_that_is_not_there() -> None:
    pytest.importorskip("cuda.bindings")
    shape = Shape(
        single=True, n=6, m=2, units=8, horizon=4, poisson=8, family="mgu2", student=False,
        linked=False, channels=2, lags=1, residuals=1, hidden=2, recurrent=0, direct=20,
        features=20,
    )  # fmt: skip
    try:
        quickly = "--Ofast-compile=max"
        made = compile_source(source(shape, cuda_host.FIELDS), "sm_90", quickly)
    except NoKernelError as error:
        if "no NVRTC" not in str(error):
            raise
        pytest.skip(str(error))
    assert made.startswith(b"\x7fELF")
    with pytest.raises(NoKernelError, match="NVRTC: step"):
        compile_source("not C++", "sm_90")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_on_a_gpu_is_the_cpus() -> None:
    stream = Stream()
    here = stream.estimator
    assert here.readout is not None
    about = (here.readout.cuda(), here.mean_rate.cuda(), here.config)
    there = MovingHorizon(copy.deepcopy(here.model).cuda(), *about)
    a, b = here.init(5), there.init(5)
    for _ in range(12):
        counts, mask = stream.bin(5)
        a, mine = here.step(a, counts, mask)
        b, theirs = there.step(b, counts.cuda(), mask.cuda())
        assert isinstance(there.compiled(b.z), GpuEstimator)
        on_host = Estimate(*(getattr(theirs, f.name).cpu() for f in fields(theirs)))
        assert_same(on_host, mine, 1e-9)
