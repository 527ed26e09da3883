"""The compiled solves against the torch that defines them, and what a steady stream may cost."""

from __future__ import annotations

import logging
import os
import resource
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numba
import numpy as np
import pytest
import torch
from torch import Tensor

from ilqr_vae.artifact import GroupSpec, ModelSpec, build
from ilqr_vae.errors import ConfigError
from ilqr_vae.inference import compiled, ilqr, line_search
from ilqr_vae.kernels import backend, cache
from ilqr_vae.kernels.cache import KernelCache, cache_folder
from ilqr_vae.kernels.cpu import algebra, step, threads
from ilqr_vae.model.likelihoods import Observed
from ilqr_vae.model.rollout import adjoint, closed_loop, jacobians, rollout
from ilqr_vae.streaming.horizon import HorizonConfig, MovingHorizon
from kernel_rig import assert_identical, assert_same, model_of

SIZES = [(20, 5, 40, 3, 8), (3, 2, 7, 4, 5), (17, 9, 33, 2, 3), (1, 1, 1, 1, 1)]
DTYPES = [(torch.float64, 1e-10), (torch.float32, 1e-4)]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads.use(1)
    yield
    threads.use(None)


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


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("dynamics", ["linear", "mgu2"])
def test_the_quadratic_model_is_the_one_torch_defines(
    dynamics: str, dtype: torch.dtype, tolerance: float
) -> None:
    problem, z0, u = problem_of(dynamics, SIZES[0], dtype)
    with torch.no_grad():
        z = problem.model.rollout(problem.w, z0, u)
        ours = ilqr.quadratise(problem, z, u)
        with backend.using("reference"):
            theirs = ilqr.quadratise(problem, z, u)
    assert_same(ours, theirs, tolerance)


@pytest.mark.parametrize("what", ["nan", "infinite start", "needs damping", "hopeless"])
def test_what_breaks_down_has_the_same_status(what: str) -> None:
    # enough problems that several are solved at once, the broken one among them
    problem, z0, u = problem_of("mgu2", (3, 2, 7, 12, 5), torch.float64)
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
    others = [b for b in range(12) if b != 1]
    torch.testing.assert_close(state.z[others], expected.z[others], rtol=0, atol=1e-9)
    for field in fields(info.lqr):
        assert getattr(info.lqr, field.name).isfinite().all(), field.name


def test_bits_do_not_depend_on_batch_threads_or_being_asked_to_stop() -> None:
    problem, z0, u = problem_of("mgu2", (16, 5, 40, 24, 40), torch.float64)
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
            *jacobians(family, w, given[1], given[2]),
        )
        with backend.using("reference"):
            theirs = (
                *closed_loop(family, w, *given),
                rollout(family, w, given[0], given[2]),
                adjoint(A, given[1]),
                *jacobians(family, w, given[1], given[2]),
            )
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_trying_every_step_size_at_once_finds_the_same_step() -> None:
    problem, z0, u = problem_of("mgu2", SIZES[0], torch.float64)
    config = ilqr.SolverConfig()
    with torch.no_grad():
        state = ilqr.init(problem, z0, u)
        _, info = ilqr.step(problem, state, config)
        # steps that overshoot by different factors, so that different halvings are needed
        factor = torch.tensor([1.0, 7.0, 40.0]).double()
        lqr = replace(
            info.lqr,
            k=info.lqr.k * factor.view(-1, 1, 1),
            dz0=info.lqr.dz0 * factor.view(-1, 1),
            decrease=info.lqr.decrease * factor,
        )
        for seeking in ([True, True, True], [True, False, True], [False] * 3):
            search = line_search.Search(problem, state, lqr, torch.tensor(seeking), config)
            ours, theirs = search.all_at_once(), search.backtrack()
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    alphas = search._replace(seeking=torch.ones(3).bool()).backtrack().alpha
    assert len(set(alphas.tolist())) > 1


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
    compiled._say.cache_clear()
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
    assert compiled.usable(problem.model, problem.observed, u)
    with backend.using("reference"):
        assert not compiled.usable(problem.model, problem.observed, u)
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


def test_machine_code_is_kept_in_a_folder_named_by_the_kernels_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sources, stated = tmp_path / "sources", tmp_path / "stated"
    sources.mkdir()
    (sources / "a.py").write_text("one")
    first = cache_folder(sources)
    assert first is not None
    assert first.parent == sources / "__pycache__"
    (sources / "b.py").write_text("another file")
    assert cache_folder(sources) != first
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(stated))
    named = cache_folder(sources)
    assert named is not None
    assert named.parent == stated
    assert not caplog.records
    # nothing can be written, as on a read-only file system
    stated.rename(tmp_path / "elsewhere")
    stated.write_text("")
    (sources / "__pycache__").rename(tmp_path / "old")
    (sources / "__pycache__").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(stated))
    assert cache_folder(sources) is None
    (record,) = caplog.records
    assert "NUMBA_CACHE_DIR" in record.getMessage()


def test_a_folder_without_room_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=4096))
    assert cache_folder(tmp_path) is None
    assert len(caplog.records) == 1


def test_folders_of_other_versions_are_removed_once_they_are_old(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("one")
    used = cache_folder(tmp_path)
    assert used is not None
    names = {"old": f"kernels-{16 * 'a'}", "new": f"kernels-{16 * 'b'}", "other": "kernels-mine"}
    long_ago = time.time() - 31 * 86400
    for which, name in names.items():
        (used.parent / name / "cpu_1").mkdir(parents=True)
        if which != "new":
            os.utime(used.parent / name, (long_ago, long_ago))
    os.utime(used, (long_ago, long_ago))
    assert cache_folder(tmp_path) == used
    left = {folder.name for folder in used.parent.iterdir()}
    assert left == {used.name, names["new"], names["other"]}
    assert used.stat().st_mtime > long_ago + 86400  # used now


@pytest.mark.parametrize("trouble", ["full", "no file", "damaged"])
def test_a_cache_that_fails_costs_a_warning_and_no_call(
    trouble: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(algebra, "_folder", tmp_path)
    monkeypatch.setattr(KernelCache, "_warned", False)

    def doubled(x: float) -> float:
        return 2.0 * x

    def tripled(x: float) -> float:
        return 3.0 * x

    first = algebra.compiled(doubled)
    assert first(2.0) == 4.0
    (index,) = tmp_path.rglob("*doubled*.nbi")
    if trouble == "no file":
        index.unlink()
        index.mkdir()
    elif trouble == "damaged":
        index.write_bytes(b"")
    assert not caplog.records
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if trouble == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))  # a write beyond it fails
    try:
        again, another = algebra.compiled(doubled), algebra.compiled(tripled)
        assert (again(2.0), again(2), another(2.0)) == (4.0, 4.0, 6.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    (record,) = caplog.records
    assert str(tmp_path) in record.getMessage()


def test_other_code_s_kernels_are_kept_where_they_were() -> None:
    assert algebra._folder is not None
    assert str(algebra._folder) not in str(numba.config.CACHE_DIR)
    assert algebra._folder.name.startswith("kernels-")
    assert str(algebra._folder) in step.step.stats.cache_path
