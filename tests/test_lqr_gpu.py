"""The Triton kernels: their arithmetic through the interpreter on the CPU, and that they compile.

The interpreter must be chosen before Triton is imported, so the grid runs in a process of its own
(``TRITON_INTERPRET=1 pytest tests/test_lqr_gpu.py`` runs it directly). On a machine with a GPU the
same grid runs there as well.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ilqr_vae.errors import ShapeError
from ilqr_vae.lqr import LQRProblem, marginal_covariance, solve_lqr
from test_lqr import broken_problems, make, numbers, pick

pytest.importorskip("triton")

GRID = [
    Path(__file__).with_name(f"test_{name}.py")
    for name in ("lqr_gpu", "gpu_rollout", "gpu_iteration")
]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = [
    pytest.param(
        "cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
    ),
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(
            INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device"
        ),
    ),
]
on_each_device = pytest.mark.parametrize("device", DEVICES)
DTYPES = [(torch.float64, 1e-11), (torch.float32, 1e-4)]


def moved(x: Any, **options: Any) -> Any:
    """A problem or solution, its floating tensors in another dtype or on another device."""
    made = {
        f.name: value.to(**options) if value is not None and value.is_floating_point() else value
        for f in fields(x)
        for value in (getattr(x, f.name),)
    }
    return replace(x, **made)


def on_gpu(problem: LQRProblem, device: str, **options: Any) -> Any:
    found = solve_lqr(moved(problem, device=device), backend="gpu", **options)
    return type(found)(**{name: value.cpu() for name, value in vars_of(found).items()})


def vars_of(solution: Any) -> dict[str, torch.Tensor]:
    return numbers(solution) | {"ok": solution.ok}


def units(n: int, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Units of state and input coordinates, over four orders of magnitude."""
    return (
        10.0 ** torch.linspace(-2, 2, n, dtype=torch.float64),
        10.0 ** torch.linspace(2, -2, m, dtype=torch.float64),
    )


def badly_scaled(problem: LQRProblem) -> LQRProblem:
    """The same problem with each coordinate in another unit."""
    _, _, n, m = problem.sizes()
    z, u = (x.to(problem.A.dtype) for x in units(n, m))
    return LQRProblem(
        A=problem.A * z[:, None] / z,
        B=problem.B * z[:, None] / u,
        Q=problem.Q / z[:, None] / z,
        q=problem.q / z,
        R=problem.R / u[:, None] / u,
        r=problem.r / u,
    )


def in_common_units(name: str, value: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """A badly scaled problem's numbers in the units of the problem it was made from."""
    z, u = units(n, m)
    factors = {
        "dz": 1 / z,
        "dz0": 1 / z,
        "du": 1 / u,
        "k": 1 / u,
        "K": z / u[:, None],
        "V": z * z[:, None],
        "v": z,
        "costate": z,
        "Quu_inv": 1 / (u * u[:, None]),
    }
    return value * factors.get(name, torch.ones((), dtype=torch.float64))


@on_each_device
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize(("n", "m", "T"), [(1, 1, 1), (3, 7, 3), (20, 5, 3), (33, 17, 1)])
@pytest.mark.parametrize("scaled", [False, True])
def test_agrees_with_the_reference(
    device: str, dtype: torch.dtype, tolerance: float, n: int, m: int, T: int, scaled: bool
) -> None:
    problem = make(1 + (T > 2), T, n, m, dtype=dtype, offsets=not scaled, cross=not scaled)
    if scaled:
        problem = badly_scaled(problem)
    exact = LQRProblem(**{name: value.double() for name, value in problem.tensors().items()})
    damping = torch.tensor([0.3, 0.0], dtype=dtype)[: problem.sizes()[0]]
    for free in (True, False):
        options: dict[str, Any] = {"free_initial": free, "regularisation": damping.to(device)}
        found = on_gpu(problem, device, **options)
        options["regularisation"] = damping.double()
        truth = solve_lqr(exact, backend="reference", **options)
        assert found.ok.all()
        for name, expected in numbers(truth).items():
            got = numbers(found)[name]
            assert got.dtype == dtype
            got = got.double()
            if scaled:
                got, expected = (in_common_units(name, x, n, m) for x in (got, expected))
            scale = float(expected.abs().max())
            error = float((got - expected).abs().max())
            assert error <= tolerance * scale, (name, error / scale)


@on_each_device
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_an_ill_conditioned_problem_is_solved_as_if_by_substitution(device: str) -> None:
    problem = make(2, 12, 6, 4, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    U = torch.linalg.qr(torch.randn(2, 13, 6, 6, generator=generator, dtype=torch.float64))[0]
    Q = (U * torch.logspace(8, 0, 6, dtype=torch.float64)) @ U.mT
    R = torch.eye(4, dtype=torch.float64).expand(2, 12, 4, 4).contiguous()
    problem = replace(problem, Q=(Q + Q.mT) / 2, R=R, S=None)
    truth = solve_lqr(problem, free_initial=True, backend="reference")
    found = on_gpu(problem, device, free_initial=True)
    for name in ("K", "k", "dz", "du"):
        expected, got = numbers(truth)[name], numbers(found)[name]
        # a product with an explicit inverse is off by 1e-6
        assert float((got - expected).abs().max()) <= 5e-8 * float(expected.abs().max()), name


@on_each_device
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_covariance_agrees_with_the_reference(
    device: str, dtype: torch.dtype, tolerance: float
) -> None:
    problem = make(2, 2, 18, 5, dtype=dtype)
    found = solve_lqr(problem, free_initial=True, backend="reference")
    truth = marginal_covariance(
        moved(problem, dtype=torch.float64), moved(found, dtype=torch.float64), backend="reference"
    )
    there = moved(problem, device=device)
    ours = marginal_covariance(there, moved(found, device=device), backend="gpu").cpu()
    assert ours.dtype == dtype
    scale = float(truth.abs().max())
    torch.testing.assert_close(ours.double(), truth, rtol=0, atol=tolerance * scale)
    found.V[1] = 0.0
    ours = marginal_covariance(there, moved(found, device=device), backend="gpu").cpu()
    assert (ours[1] == 0).all()
    torch.testing.assert_close(ours[0].double(), truth[0], rtol=0, atol=tolerance * scale)


@on_each_device
# the interpreter computes with numpy, which warns of what the kernel then finds out
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    "name",
    ["indefinite R", "indefinite Q0", "no curvature", "nan in A", "inf in q", "overflow"],
)
def test_a_broken_problem_has_the_references_verdict(device: str, name: str) -> None:
    broken, well = broken_problems()[name], make(batch=3)
    found = on_gpu(broken, device, free_initial=True)
    theirs = solve_lqr(broken, free_initial=True, backend="reference")
    assert found.ok.tolist() == theirs.ok.tolist() == [True, False, True]
    same = replace(well, S=None) if broken.S is None else well
    untouched = on_gpu(same, device, free_initial=True)
    for key, value in numbers(found).items():
        assert (value[1] == 0).all(), key
        assert torch.equal(value[[0, 2]], numbers(untouched)[key][[0, 2]]), key


@on_each_device
def test_bits_do_not_depend_on_the_batch(device: str) -> None:
    problem = make(3, 2, 6, 3)
    found = on_gpu(problem, device, free_initial=True)
    alone = on_gpu(pick(problem, slice(1, 2)), device, free_initial=True)
    for name, value in numbers(alone).items():
        assert torch.equal(numbers(found)[name][1:2], value), name


@on_each_device
def test_an_empty_batch_and_wrong_shapes(device: str) -> None:
    assert on_gpu(pick(make(), slice(0, 0)), device, free_initial=True).dz.shape == (0, 6, 4)
    problem = make()
    with pytest.raises(ShapeError, match=r"^A: expected"):
        on_gpu(replace(problem, A=problem.A[:, :-1]), device, free_initial=True)
    half = LQRProblem(**{name: value.half() for name, value in problem.tensors().items()})
    with pytest.raises(ShapeError, match="float16"):
        on_gpu(half, device, free_initial=True)


@on_each_device
def test_what_is_too_large_is_solved_by_the_reference(
    device: str, caplog: pytest.LogCaptureFixture
) -> None:
    problem = make(1, 1, 65, 2)
    for _ in range(2):
        found = on_gpu(problem, device, free_initial=True)
    theirs = solve_lqr(problem, free_initial=True, backend="reference")
    torch.testing.assert_close(found.dz, theirs.dz)
    assert [r.getMessage().startswith("no GPU kernel for n = 65") for r in caplog.records] == [True]


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ilqr_vae.kernels.gpu import dynamics, iteration, lqr

sizes = {name: "i32" for name in ("T", "H", "n", "m", "N", "laws", "tiles", "tries")}
sizes |= {name: "fp32" for name in ("eps", "largest", "armijo", "slack")}
sizes |= {"ok": "*i8", "seeking": "*i8", "numbers": "*fp64"}
kernels = (
    lqr.solve,
    lqr.covariance,
    dynamics.closed_loop,
    dynamics.adjoint,
    iteration.search,
    iteration.linearise,
    iteration.derivatives,
)
for number, some in (("fp32", kernels), ("fp64", kernels[:1])):
    for kernel in some:
        fixed = {"NP": 32, "MP": 16, "HAS_C": True, "HAS_S": True, "FREE": True, "HOW": 2}
        fixed |= {"NB": 64, "GATED": True, "CLOSED": True}
        fixed = {name: value for name, value in fixed.items() if name in kernel.arg_names}
        kinds = {
            name: "constexpr" if name in fixed else sizes.get(name, "*" + number)
            for name in kernel.arg_names
        }
        made = triton.compile(
            ASTSource(fn=kernel, signature=kinds, constexprs=fixed),
            target=GPUTarget("cuda", 90, 32),
            options={"num_warps": 4},
        )
        assert made.asm["cubin"], kernel
        # what one block of an H100 or H200 may use
        assert made.metadata.shared <= 227 * 1024, made.metadata.shared
"""


@pytest.mark.skipif(INTERPRETED, reason="started by the process that interprets")
class TestWithoutInterpreter:
    @pytest.mark.timeout(1200)
    def test_the_grid_through_the_interpreter(self) -> None:
        ran = subprocess.run(
            [sys.executable, "-m", "pytest", *map(str, GRID), "-p", "no:cacheprovider"],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"TRITON_INTERPRET": "1"},
            cwd=Path(__file__).parents[1],
        )
        assert ran.returncode == 0, ran.stdout

    def test_the_kernels_compile_for_a_gpu_that_is_not_there(self) -> None:
        ran = subprocess.run(
            [sys.executable, "-c", COMPILE],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"TRITON_DEFAULT_FP_FUSION": "1"},
        )
        assert ran.returncode == 0, ran.stderr
