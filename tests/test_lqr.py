"""The LQR primitive against dense linear algebra, and its backends against each other."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from ilqr_vae.errors import ShapeError
from ilqr_vae.kernels.cpu import threads
from ilqr_vae.lqr import LQRProblem, LQRSolution, marginal_covariance, solve_lqr

BACKENDS = ("reference", "cpu")
SIZES = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "steps": st.integers(1, 6),
        "n": st.integers(1, 10),
        "m": st.integers(1, 11),
        "offsets": st.booleans(),
        "cross": st.booleans(),
        "seed": st.integers(0, 2**31),
    }
)
grid = settings(max_examples=40, deadline=None, derandomize=True)


def make(
    batch: int = 2,
    steps: int = 5,
    n: int = 4,
    m: int = 2,
    offsets: bool = True,
    cross: bool = True,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> LQRProblem:
    """A random well-posed problem: each step's joint cost is positive definite."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def curvature(count: int, size: int) -> Tensor:
        half = normal(batch, count, size, size) / size**0.5
        return half @ half.mT + 0.3 * torch.eye(size, dtype=torch.float64)

    joint = curvature(steps, n + m)
    tensors = {
        "A": normal(batch, steps, n, n) / n**0.5,
        "B": normal(batch, steps, n, m) / m**0.5,
        "Q": torch.cat([joint[..., :n, :n], curvature(1, n)], dim=1),
        "q": normal(batch, steps + 1, n),
        "R": joint[..., n:, n:],
        "r": normal(batch, steps, m),
        "c": normal(batch, steps, n) if offsets else None,
        "S": joint[..., n:, :n] if cross else None,
    }
    return LQRProblem(**{k: None if t is None else t.to(dtype) for k, t in tensors.items()})


def pick(problem: LQRProblem, index: slice | Tensor) -> LQRProblem:
    return LQRProblem(**{name: value[index] for name, value in problem.tensors().items()})


class Dense:
    """One problem written out over the stacked (dz_0 .. dz_T, du_0 .. du_{T-1})."""

    def __init__(self, problem: LQRProblem, b: int, free: bool) -> None:
        _, steps, n, m = problem.sizes()
        self.states = (steps + 1) * n
        size = self.states + steps * m
        self.H = torch.zeros(size, size, dtype=torch.float64)
        self.g = torch.cat([problem.q[b].flatten(), problem.r[b].flatten()])
        self.G = torch.zeros((steps + (not free)) * n, size, dtype=torch.float64)
        self.h = torch.zeros(self.G.shape[0], dtype=torch.float64)
        for t in range(steps + 1):
            z = slice(t * n, (t + 1) * n)
            self.H[z, z] = problem.Q[b, t]
            if t == steps:
                break
            u = slice(self.states + t * m, self.states + (t + 1) * m)
            self.H[u, u] = problem.R[b, t]
            if problem.S is not None:
                self.H[u, z] = problem.S[b, t]
                self.H[z, u] = problem.S[b, t].mT
            self.G[z, z] = problem.A[b, t]
            self.G[z, u] = problem.B[b, t]
            self.G[z, (t + 1) * n : (t + 2) * n] = -torch.eye(n, dtype=torch.float64)
            if problem.c is not None:
                self.h[z] = -problem.c[b, t]
        if not free:
            self.G[steps * n :, :n] = torch.eye(n, dtype=torch.float64)
        self.damped = torch.zeros(size, dtype=torch.float64)
        self.damped[self.states :] = 1.0
        if free:
            self.damped[:n] = 1.0

    def solve(self, damping: float) -> tuple[Tensor, Tensor]:
        """The optimal (dz, du), and the multipliers of the transitions."""
        size, rows = self.g.numel(), self.h.numel()
        system = torch.zeros(size + rows, size + rows, dtype=torch.float64)
        system[:size, :size] = self.H + damping * torch.diag(self.damped)
        system[:size, size:], system[size:, :size] = self.G.mT, self.G
        answer = torch.linalg.solve(system, torch.cat([-self.g, self.h]))
        return answer[:size], answer[size:]

    def J(self, x: Tensor) -> Tensor:
        return 0.5 * x @ self.H @ x + self.g @ x


@pytest.mark.parametrize("backend", BACKENDS)
@given(sizes=SIZES, free=st.booleans(), damping=st.sampled_from([0.0, 0.7]))
@grid
def test_agrees_with_a_dense_kkt_solve(
    backend: str, sizes: dict[str, int], free: bool, damping: float
) -> None:
    problem = make(**sizes)
    found = solve_lqr(problem, free_initial=free, regularisation=damping, backend=backend)
    assert found.ok.all()
    for b in range(sizes["batch"]):
        dense = Dense(problem, b, free)
        x, multipliers = dense.solve(damping)
        ours = torch.cat([found.dz[b].flatten(), found.du[b].flatten()])
        close = {"rtol": 1e-10, "atol": 1e-10 * (1.0 + float(x.abs().max()))}
        torch.testing.assert_close(ours, x, **close)
        transitions = multipliers[: sizes["steps"] * sizes["n"]]
        scale = 1e-10 * (1.0 + float(multipliers.abs().max()))
        torch.testing.assert_close(found.costate[b, 1:].flatten(), transitions, rtol=0, atol=scale)
        start = torch.zeros(sizes["n"], dtype=torch.float64)
        if not free:  # the multiplier of dz_0 = 0 has the constraint's sign, the costate the cost's
            start = -multipliers[sizes["steps"] * sizes["n"] :]
        torch.testing.assert_close(found.costate[b, 0], start, rtol=0, atol=scale)
        J = dense.J(x)
        torch.testing.assert_close(found.decrease[b], -J, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found.linear[b], dense.g @ x, rtol=1e-9, atol=1e-9)
        if not sizes["offsets"]:
            assert found.decrease[b] >= 0
            linear, decrease = found.linear[b], found.decrease[b]
            torch.testing.assert_close(
                dense.J(0.3 * x), 0.3 * linear - 0.09 * (linear + decrease), rtol=1e-9, atol=1e-9
            )
    torch.testing.assert_close(found.dz0, found.dz[:, 0], rtol=0, atol=0)
    feedback = found.k + (found.K @ found.dz[:, :-1, :, None])[..., 0]
    torch.testing.assert_close(found.du, feedback, rtol=1e-12, atol=1e-12)
    costate = found.v + (found.V @ found.dz[..., None])[..., 0]
    torch.testing.assert_close(found.costate, costate, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@given(sizes=SIZES)
@grid
def test_marginal_covariance_is_the_diagonal_of_the_inverse_hessian(
    backend: str, sizes: dict[str, int]
) -> None:
    problem = make(**sizes)
    found = solve_lqr(problem, free_initial=True, backend=backend)
    Sigma = marginal_covariance(problem, found, backend=backend)
    n = sizes["n"]
    for b in range(sizes["batch"]):
        dense = Dense(problem, b, free=True)
        # Trajectories as an affine image of (dz_0, du): invert there, map back.
        transitions = dense.G[:, n : dense.states]
        chosen = torch.cat([dense.G[:, :n], dense.G[:, dense.states :]], dim=1)
        followed = -torch.linalg.solve(transitions, chosen)
        eye = torch.eye(chosen.shape[1], dtype=torch.float64)
        image = torch.cat([eye[:n], followed, eye[n:]])
        covariance = image @ torch.linalg.inv(image.mT @ dense.H @ image) @ image.mT
        for t in range(sizes["steps"] + 1):
            block = covariance[t * n : (t + 1) * n, t * n : (t + 1) * n]
            scale = float(block.abs().max())
            torch.testing.assert_close(Sigma[b, t], block, rtol=0, atol=1e-9 * scale)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-4)])
@pytest.mark.parametrize(("n", "m", "steps"), [(1, 1, 1), (3, 7, 4), (20, 5, 20), (33, 9, 8)])
@pytest.mark.parametrize("free", [True, False])
def test_backends_agree(
    dtype: torch.dtype, tolerance: float, n: int, m: int, steps: int, free: bool
) -> None:
    problem = make(3, steps, n, m, dtype=dtype)
    damping = torch.tensor([0.0, 0.1, 2.0], dtype=dtype)
    exact = LQRProblem(**{name: value.double() for name, value in problem.tensors().items()})
    truth = solve_lqr(exact, free_initial=free, regularisation=damping, backend="reference")
    for backend in BACKENDS:
        found = solve_lqr(problem, free_initial=free, regularisation=damping, backend=backend)
        assert found.ok.all()
        for name, expected in numbers(truth).items():
            got = numbers(found)[name]
            assert got.dtype == dtype
            scale = float(expected.abs().max())
            torch.testing.assert_close(got.double(), expected, rtol=0, atol=tolerance * scale)
        covariances = [
            marginal_covariance(
                p, replace(s, V=s.V + torch.eye(n, dtype=s.V.dtype)), backend=backend
            ).double()
            for p, s in ((problem, found), (exact, truth))
        ]
        scale = float(covariances[1].abs().max())
        torch.testing.assert_close(*covariances, rtol=0, atol=tolerance * scale)


def numbers(solution: LQRSolution) -> dict[str, Tensor]:
    named = {item.name: getattr(solution, item.name) for item in fields(solution)}
    del named["ok"]
    return named


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_is_its_problems_one_by_one(backend: str) -> None:
    problem = make(batch=40, steps=30, n=12, m=5)  # enough work for several threads
    found = solve_lqr(problem, free_initial=True, backend=backend)
    for b in range(0, 40, 13):
        one = slice(b, b + 1)
        alone = solve_lqr(pick(problem, one), free_initial=True, backend=backend)
        for name, value in numbers(alone).items():
            exact = backend == "cpu"
            torch.testing.assert_close(
                numbers(found)[name][one], value, rtol=0, atol=0 if exact else 1e-11
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (3, 2), (8, 9), (20, 5), (32, 8)])
def test_a_problem_in_a_lane_has_the_bits_that_it_has_alone(
    n: int, m: int, dtype: torch.dtype
) -> None:
    problem = make(batch=35, steps=6, n=n, m=m, offsets=False, cross=False, dtype=dtype)
    problem.R[9, 2, 0, 0], problem.A[20, 1, 0, 0] = -1e4, float("nan")
    damping = torch.linspace(0.0, 0.5, 35, dtype=dtype)
    found = solve_lqr(problem, free_initial=True, regularisation=damping, backend="cpu")
    assert (~found.ok).nonzero()[:, 0].tolist() == [9, 20]
    for b in range(35):
        one = slice(b, b + 1)
        alone = solve_lqr(
            pick(problem, one), free_initial=True, regularisation=damping[one], backend="cpu"
        )
        for name, value in numbers(alone).items():
            assert torch.equal(numbers(found)[name][one], value), (b, name)


@pytest.mark.parametrize(("batch", "n"), [(1, 10), (9, 10), (9, 16)])
def test_nothing_beyond_the_problem_is_read(
    batch: int, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels read whole vectors, some beyond a tensor's end or of unused scratch."""
    problem = make(batch=batch, steps=3, n=n, m=5, offsets=batch == 1, cross=batch == 1)
    plain = solve_lqr(problem, free_initial=True, backend="cpu")
    scratch = threads.scratch

    def spoilt(dtype: DTypeLike, size: int) -> NDArray[Any]:
        return np.full_like(scratch(dtype, size), math.nan)

    def surrounded(tensor: Tensor) -> Tensor:
        room = torch.full((tensor.numel() + 64,), math.nan, dtype=tensor.dtype)
        return room[32:-32].view(tensor.shape).copy_(tensor)

    monkeypatch.setattr(threads, "scratch", spoilt)
    there = LQRProblem(**{name: surrounded(t) for name, t in problem.tensors().items()})
    found = solve_lqr(there, free_initial=True, backend="cpu")
    for field in fields(LQRSolution):
        assert torch.equal(getattr(found, field.name), getattr(plain, field.name)), field.name
    Sigma = marginal_covariance(there, found, backend="cpu")
    assert torch.equal(Sigma, marginal_covariance(problem, plain, backend="cpu"))


def test_an_empty_batch_is_no_special_case() -> None:
    for backend in BACKENDS:
        found = solve_lqr(pick(make(), slice(0, 0)), free_initial=True, backend=backend)
        assert found.dz.shape == (0, 6, 4)
        assert found.ok.shape == (0,)


def broken_problems() -> dict[str, LQRProblem]:
    """Problem 1 of 3 is not well posed, each time for another reason."""

    def with_entry(name: str, value: float, *at: int) -> LQRProblem:
        problem = make(batch=3)
        tensors = dict(problem.tensors())
        tensors[name] = tensors[name].clone()
        tensors[name][1][at] = value
        return LQRProblem(**tensors)

    base = make(batch=3)
    flat = torch.where(torch.arange(3) == 1, 0.0, 1.0)[:, None, None, None].double()
    return {
        "indefinite R": with_entry("R", -100.0, 2, 0, 0),
        "indefinite R first": with_entry("R", -100.0, 0, 1, 1),
        "indefinite Q0": with_entry("Q", -1e4, 0, 1, 1),
        "indefinite Q end": with_entry("Q", -1e4, 5, 1, 1),
        "no curvature": LQRProblem(
            **{**base.tensors(), "R": base.R * flat, "Q": base.Q * flat, "S": None}
        ),
        **{
            f"{value} in {name}": with_entry(
                name, value, 1, *(0,) * (base.tensors()[name].dim() - 2)
            )
            for name in base.tensors()
            for value in (float("nan"), float("inf"))
        },
        "overflow": with_entry("q", 1e308, 2, 0),
    }


@pytest.mark.parametrize("name", broken_problems())
def test_a_broken_problem_leaves_its_neighbours_alone(name: str) -> None:
    broken = broken_problems()[name]
    well = make(batch=3)
    others = torch.tensor([0, 2])
    verdicts = []
    for backend in BACKENDS:
        found = solve_lqr(broken, free_initial=True, backend=backend)
        untouched = solve_lqr(
            replace(well, S=None) if broken.S is None else well, free_initial=True, backend=backend
        )
        for key, value in numbers(found).items():
            assert torch.equal(value[others], numbers(untouched)[key][others])
            assert (value[1] == 0).all()
        Sigma = marginal_covariance(well, found, backend=backend)
        assert torch.isfinite(Sigma).all()
        assert (Sigma[1] == 0).all()
        verdicts.append(found.ok.tolist())
    assert verdicts == [[True, False, True]] * 2


def test_a_fixed_initial_state_needs_no_curvature_there() -> None:
    problem = broken_problems()["indefinite Q0"]
    for backend in BACKENDS:
        assert solve_lqr(problem, free_initial=False, backend=backend).ok.all()


def test_damping_rescues_an_indefinite_problem() -> None:
    problem = broken_problems()["indefinite R"]
    for backend in BACKENDS:
        found = solve_lqr(problem, free_initial=True, regularisation=200.0, backend=backend)
        assert found.ok.all()


@pytest.mark.parametrize("free", [True, False])
def test_the_reference_is_differentiable(free: bool) -> None:
    problem = make(batch=1, steps=2, n=2, m=2)
    names = tuple(problem.tensors())

    def outputs(*values: Tensor) -> tuple[Tensor, ...]:
        tensors = dict(zip(names, values, strict=True))
        for name in ("Q", "R"):
            tensors[name] = 0.5 * (tensors[name] + tensors[name].mT)
        found = solve_lqr(LQRProblem(**tensors), free_initial=free)
        return (found.dz, found.du, found.V, found.costate, found.Quu_inv, found.decrease)

    values = [value.clone().requires_grad_() for value in problem.tensors().values()]
    assert torch.autograd.gradcheck(outputs, values, fast_mode=True)


def test_a_broken_problem_sends_no_nan_into_shared_gradients() -> None:
    problem = broken_problems()["indefinite R"]
    gain = torch.ones((), dtype=torch.float64, requires_grad=True)
    found = solve_lqr(replace(problem, A=gain * problem.A), free_initial=True)
    found.dz.square().sum().backward()
    assert not found.ok[1]
    assert gain.grad is not None
    assert torch.isfinite(gain.grad)


def test_auto_takes_the_reference_only_where_gradients_are_wanted() -> None:
    problem = make()
    tracked = replace(problem, q=problem.q.clone().requires_grad_())
    compiled = solve_lqr(problem, free_initial=True, backend="cpu").dz
    assert torch.equal(solve_lqr(problem, free_initial=True).dz, compiled)
    assert solve_lqr(tracked, free_initial=True).dz.requires_grad
    with torch.no_grad():
        assert torch.equal(solve_lqr(tracked, free_initial=True).dz, compiled)


def test_tensors_that_are_not_contiguous() -> None:
    problem = make(n=4, m=4)
    strided = replace(problem, A=problem.A.mT.contiguous().mT, q=problem.q[:1].expand(2, -1, -1))
    dense = replace(strided, q=strided.q.clone())
    ours, theirs = (solve_lqr(p, free_initial=True, backend="cpu") for p in (strided, dense))
    assert torch.equal(ours.dz, theirs.dz)


def test_wrong_shapes_name_the_tensor() -> None:
    problem = make()
    for name, value in problem.tensors().items():
        wrong = LQRProblem(**{**problem.tensors(), name: value[:, :-1]})
        if name == "B":  # B says what T is, so another tensor is the one that disagrees
            continue
        for backend in BACKENDS:
            with pytest.raises(ShapeError, match=f"^{name}: expected"):
                solve_lqr(wrong, free_initial=True, backend=backend)
    with pytest.raises(ShapeError, match="regularisation"):
        solve_lqr(problem, free_initial=True, regularisation=torch.zeros(5))
    with pytest.raises(ShapeError, match="backend"):
        solve_lqr(problem, free_initial=True, backend="abacus")
