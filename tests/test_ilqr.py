"""iLQR: the cost never rises, converged means stationary, and every ending has its name."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ilqr_vae.inference import ilqr
from ilqr_vae.inference.problem import SolverConfig, Status
from ilqr_vae.model.dynamics import FAMILIES, Dynamics, DynamicsOptions, Weights
from ilqr_vae.model.generative import Model
from ilqr_vae.model.likelihoods import Observed
from small import TIGHT, as_problem, draw_data, loop_rollout, make_model, rest

PATIENT = SolverConfig(iterations=300, tolerance=1e-13)


def cost_through_the_loop(problem: ilqr.Problem, z0: Tensor, u: Tensor) -> Tensor:
    return problem.cost(loop_rollout(problem.model, problem.w, z0, u), u)


def gradient(problem: ilqr.Problem, state: ilqr.State) -> Tensor:
    """dJ/d(z_0, u) by autograd through the loop, (B, n + T m)."""
    z0 = state.z[:, 0].detach().requires_grad_(True)
    u = state.u.detach().requires_grad_(True)
    with torch.enable_grad():
        grads = torch.autograd.grad(cost_through_the_loop(problem, z0, u).sum(), (z0, u))
    return torch.cat([g.flatten(1) for g in grads], 1)


@pytest.mark.parametrize("exact", [False, True], ids=["gauss-newton", "exact"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
@settings(max_examples=4, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**20), scale=st.floats(0.1, 30.0))
def test_the_cost_never_rises(family: str, exact: bool, seed: int, scale: float) -> None:
    model = make_model(family, seed=seed % 97)
    problem = as_problem(model, draw_data(model, 3, 6, seed=seed, missing=0.2))
    generator = torch.Generator().manual_seed(seed)
    z0, u = rest(problem)
    z0 = z0 + scale * torch.randn(z0.shape, generator=generator, dtype=z0.dtype)
    u = u + scale * torch.randn(u.shape, generator=generator, dtype=u.dtype)
    config = SolverConfig(exact=exact)
    with torch.no_grad():
        state = ilqr.init(problem, z0, u)
        for _ in range(8):
            after, info = ilqr.step(problem, state, config)
            slack = 20 * torch.finfo(torch.float64).eps * state.cost.abs()
            assert bool((after.cost <= state.cost + slack).all())
            torch.testing.assert_close(after.cost, problem.cost(after.z, after.u))
            rolled = model.rollout(problem.w, after.z[:, 0], after.u)
            torch.testing.assert_close(after.z, rolled, rtol=1e-9, atol=1e-9)
            assert bool(((info.alpha > 0) | (after.cost == state.cost)).all())
            state = after


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_converged_means_stationary(family: str) -> None:
    model = make_model(family, kinematics=2)
    problem = as_problem(model, draw_data(model, 4, 10, missing=0.2), ("spikes", "kinematics"))
    state, _ = ilqr.solve(problem, *rest(problem), replace(PATIENT, exact=True))
    assert (state.status == Status.CONVERGED).all()
    size = 1 + state.cost.abs().detach()
    assert bool((gradient(problem, state).norm(dim=1) < 1e-5 * size).all())
    # and by finite differences along random directions, without any derivative code
    generator = torch.Generator().manual_seed(0)
    z0, u, h = state.z[:, 0].detach(), state.u.detach(), 1e-5
    for _ in range(5):
        dz0 = torch.randn(z0.shape, generator=generator, dtype=z0.dtype)
        du = torch.randn(u.shape, generator=generator, dtype=u.dtype)
        ahead = cost_through_the_loop(problem, z0 + h * dz0, u + h * du)
        behind = cost_through_the_loop(problem, z0 - h * dz0, u - h * du)
        slope = (ahead - behind) / (2 * h)
        assert bool((slope.abs() < 1e-4 * size).all())
        assert bool((ahead > state.cost).all())
        assert bool((behind > state.cost).all())


def test_newton_converges_to_rounding_and_agrees_with_gauss_newton() -> None:
    model = make_model("mgu2")
    problem = as_problem(model, draw_data(model, 4, 10))
    exact, _ = ilqr.solve(problem, *rest(problem), TIGHT)
    plain, _ = ilqr.solve(problem, *rest(problem), replace(TIGHT, exact=False))
    assert float(gradient(problem, exact).abs().max()) < 1e-10
    # Gauss-Newton creeps along this one's flat valley, to the same floor
    torch.testing.assert_close(plain.cost, exact.cost, rtol=1e-8, atol=0)
    assert bool((exact.iterations < plain.iterations).all())


@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_linear_gaussian_is_solved_in_one_step(missing: float) -> None:
    model = make_model("linear", spikes="gaussian")
    problem = as_problem(model, draw_data(model, 3, 12, missing=missing))
    z0, u = rest(problem)
    with torch.no_grad():
        state = ilqr.init(problem, z0 + 1, u - 1)
        state, info = ilqr.step(problem, state, SolverConfig())
        assert (info.alpha == 1).all()
        assert float(gradient(problem, state).abs().max()) < 1e-10
        again, info = ilqr.step(problem, state, SolverConfig())
    assert (again.status == Status.CONVERGED).all()
    assert float(info.lqr.decrease.abs().max()) < 1e-18


def assert_same(one: ilqr.State, other: ilqr.State, tolerance: float = 0.0) -> None:
    for f in fields(ilqr.State):
        a, b = getattr(one, f.name), getattr(other, f.name)
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=f.name)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("family", ["mgu2", "linear"])
def test_bad_data_ends_its_own_problem_and_no_other(family: str, poison: float) -> None:
    model = make_model(family)
    observed = draw_data(model, 4, 8)
    clean, _ = ilqr.solve(as_problem(model, observed), *rest(as_problem(model, observed)), PATIENT)
    values = observed["spikes"].values.clone()
    values[2, 3, 1] = poison
    problem = as_problem(model, {"spikes": Observed(values, observed["spikes"].mask)})
    state, _ = ilqr.solve(problem, *rest(problem), PATIENT)
    assert state.status[2] == Status.NOT_FINITE
    assert "NaN in the data" in Status(int(state.status[2])).explain
    assert bool(state.z.isfinite().all())  # it stays where it began
    neighbours = torch.tensor([0, 1, 3])
    assert_same(
        *(ilqr.State(*(getattr(s, f.name)[neighbours] for f in fields(s))) for s in (state, clean))
    )


class Cubic(Dynamics):
    """z' = z / 2 + z^3 + u: calm near zero, doubly exponential beyond one."""

    family = "cubic"

    @classmethod
    def from_options(cls, n: int, m: int, options: DynamicsOptions) -> Cubic:
        return cls(n, m)

    def weights(self) -> Weights:
        return ()

    def step(self, w: Weights, z: Tensor, u: Tensor) -> Tensor:
        return 0.5 * z + z**3 + u

    def jacobians(self, w: Weights, z: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        eye = torch.eye(self.n, dtype=z.dtype).expand(*z.shape, self.n)
        return torch.diag_embed(0.5 + 3 * z**2), eye


def test_dynamics_that_explode_are_named_and_leave_neighbours_alone() -> None:
    calm = make_model("linear", n=2, m=2)
    model = Model(Cubic(2, 2), calm.prior, calm.initial, {"spikes": calm.group("spikes")})
    observed = draw_data(calm, 3, 10)
    problem = as_problem(model, observed)
    z0, u = rest(problem)
    z0 = torch.zeros_like(z0)
    clean, _ = ilqr.solve(problem, z0, u, PATIENT)
    exploding = z0.clone()
    exploding[1] = 50.0
    state, _ = ilqr.solve(problem, exploding, u, PATIENT)
    assert state.status.tolist()[1] == Status.NOT_FINITE
    assert "explode" in Status.NOT_FINITE.explain
    for b in (0, 2):
        assert state.status[b] == clean.status[b] == Status.CONVERGED
        torch.testing.assert_close(state.u[b], clean.u[b], rtol=0, atol=0)
        torch.testing.assert_close(state.z[b], clean.z[b], rtol=0, atol=0)


def test_a_budget_used_up_is_an_iteration_limit() -> None:
    model = make_model("mgu2")
    problem = as_problem(model, draw_data(model, 3, 10))
    one, _ = ilqr.solve(problem, *rest(problem), SolverConfig(iterations=1, tolerance=1e-20))
    assert (one.status == Status.ITERATION_LIMIT).all()
    assert one.iterations.tolist() == [1, 1, 1]
    three, _ = ilqr.solve(problem, *rest(problem), SolverConfig(iterations=3, tolerance=1e-20))
    assert bool((three.cost < one.cost).all())


def test_the_callers_stop_is_asked_between_iterations_and_named() -> None:
    model = make_model("mgu2")
    problem = as_problem(model, draw_data(model, 3, 10))
    hard = SolverConfig(iterations=10, tolerance=1e-20)
    for allowed in range(4):
        asked: list[bool] = []

        def stop(asked: list[bool] = asked, allowed: int = allowed) -> bool:
            asked.append(True)
            return len(asked) > allowed

        state, _ = ilqr.solve(problem, *rest(problem), hard, stop)
        assert (state.status == Status.STOPPED).all()
        assert state.iterations.tolist() == [allowed + 1] * 3
        limit = replace(hard, iterations=allowed + 1)
        same, _ = ilqr.solve(problem, *rest(problem), limit)
        torch.testing.assert_close(state.u, same.u, rtol=0, atol=0)
    done, _ = ilqr.solve(problem, *rest(problem), PATIENT, lambda: False)
    assert (done.status == Status.CONVERGED).all()


def test_no_step_at_any_regularisation_is_a_stall() -> None:
    """A line search that must realise more than the model promises can never succeed."""
    model = make_model("mgu2")
    problem = as_problem(model, draw_data(model, 2, 6))
    greedy = SolverConfig(iterations=60, tolerance=1e-30, armijo=1e6)
    state, _ = ilqr.solve(problem, *rest(problem), greedy)
    assert (state.status == Status.STALLED).all()
    started = ilqr.init(problem, *rest(problem))
    torch.testing.assert_close(state.u, started.u, rtol=0, atol=0)
    torch.testing.assert_close(state.z, started.z, rtol=0, atol=0)


def test_a_failed_line_search_raises_the_regularisation_and_a_step_clears_it() -> None:
    model = make_model("mgu2")
    problem = as_problem(model, draw_data(model, 2, 6))
    with torch.no_grad():
        state = ilqr.init(problem, *rest(problem))
        greedy = SolverConfig(armijo=1e6)
        for expected in (1e-3, 1e-2, 1e-1):
            state, info = ilqr.step(problem, state, greedy)
            assert (info.alpha == 0).all()
            torch.testing.assert_close(state.regularisation, torch.full((2,), expected).double())
        state, _ = ilqr.step(problem, state, SolverConfig())
    assert (state.regularisation == 0).all()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_batch_is_a_loop(family: str) -> None:
    model = make_model(family, kinematics=1)
    observed = draw_data(model, 5, 9, missing=0.2)
    names = ("spikes", "kinematics")
    problem = as_problem(model, observed, names)
    together, _ = ilqr.solve(problem, *rest(problem), SolverConfig())
    assert len(set(together.iterations.tolist())) > 1 or family == "linear"
    for b in range(5):
        one = {k: Observed(o.values[b : b + 1], o.mask[b : b + 1]) for k, o in observed.items()}
        alone_problem = as_problem(model, one, names)
        alone, _ = ilqr.solve(alone_problem, *rest(alone_problem), SolverConfig())
        part = ilqr.State(*(getattr(together, f.name)[b : b + 1] for f in fields(alone)))
        assert_same(part, alone, 1e-9)


def test_float32_ends_too() -> None:
    model = make_model("mgu2").float()
    observed = {
        k: Observed(*(x.float() for x in o))
        for k, o in draw_data(make_model("mgu2"), 8, 20).items()
    }
    problem = as_problem(model, observed)
    state, _ = ilqr.solve(problem, *rest(problem), SolverConfig(iterations=60, tolerance=1e-6))
    assert (state.status == Status.CONVERGED).all()
    assert state.u.dtype == torch.float32


def test_every_status_says_what_it_means() -> None:
    said = {s.explain for s in Status}
    assert len(said) == len(Status)
    assert all(said)
