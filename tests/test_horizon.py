"""Moving-horizon estimation: the Kalman filter, the full history, missing bins, and purity."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from ilqr_vae.inference import ilqr
from ilqr_vae.inference.problem import SolverConfig, Status
from ilqr_vae.kernels import backend
from ilqr_vae.model.generative import Model
from ilqr_vae.model.likelihoods import Observed
from ilqr_vae.model.readout import KinematicReadout, ReadoutShape
from ilqr_vae.streaming import horizon as streaming_horizon
from ilqr_vae.streaming.horizon import HorizonConfig, MovingHorizon
from ilqr_vae.streaming.state import Estimate, HorizonState
from small import as_problem, draw_data, kalman, make_model, rest

NUMBERS = ("z", "z_cov", "window", "rates", "kinematics", "kinematics_std", "bits", "spikes")


@pytest.fixture(scope="module", params=backend.NAMES, autouse=True)
def every_backend(request: pytest.FixtureRequest) -> Iterator[None]:
    with backend.using(request.param):
        yield


def estimator(
    model: Model,
    bins: int,
    iterations: int = 8,
    *,
    lags: int | None = None,
    tolerance: float = 1e-14,
) -> MovingHorizon:
    readout = None
    if lags is not None:
        shape = ReadoutShape(lags=lags, residuals=lags, hidden=2, recurrent=3 if lags else 0)
        units = model.group("spikes").b.shape[0]
        readout = KinematicReadout(model.n, 2, shape, units=units).double()
        generator = torch.Generator().manual_seed(9)
        for b in readout.buffers():
            if b.ndim != 2:
                continue
            b.copy_(torch.randn(b.shape, generator=generator, dtype=torch.float64))
    channels = model.group("spikes").b.shape[0]
    rate = torch.full((channels,), 1.5, dtype=torch.float64)
    config = HorizonConfig(horizon=bins, iterations=iterations, tolerance=tolerance)
    return MovingHorizon(model, readout, rate, config)


def streamed(
    est: MovingHorizon, values: Tensor, mask: Tensor, state: HorizonState | None = None
) -> tuple[HorizonState, list[Estimate]]:
    """Bins (S, T, N) one after the other."""
    state = state or est.init(values.shape[0])
    answers: list[Estimate] = []
    for t in range(values.shape[1]):
        state, answer = est.step(state, values[:, t], mask[:, t])
        answers.append(answer)
    return state, answers


def assert_same(one: Estimate, other: Estimate, tolerance: float) -> None:
    for name in NUMBERS:
        a, b = getattr(one, name), getattr(other, name)
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=name)
    assert one.status.tolist() == other.status.tolist()
    assert one.iterations.tolist() == other.iterations.tolist()


def stream_of(answer: Estimate, i: int) -> Estimate:
    return Estimate(*(getattr(answer, f.name)[i : i + 1] for f in fields(Estimate)))


@pytest.mark.parametrize("missing", [0.0, 0.3], ids=["complete", "bins and units missing"])
@pytest.mark.parametrize("horizon", [1, 5, 20])
def test_linear_gaussian_is_the_kalman_filter(horizon: int, missing: float) -> None:
    model = make_model("linear", spikes="gaussian")
    T = 25
    values, mask = draw_data(model, 1, T, missing=missing)["spikes"]
    if missing:
        mask[0, 11:15] = 0.0  # a gap longer than the shortest horizon
    _, answers = streamed(estimator(model, horizon, iterations=2), values, mask)
    truth = kalman(model, values[0], mask[0])
    for t, answer in enumerate(answers):
        torch.testing.assert_close(answer.z[0], truth.filtered[t], rtol=0, atol=1e-6)
        torch.testing.assert_close(answer.z_cov[0], truth.filtered_cov[t], rtol=0, atol=1e-6)
        assert answer.status == Status.CONVERGED


def full_history(model: Model, values: Tensor, mask: Tensor) -> Tensor:
    """The newest state of the whole problem's optimum, bin after bin, (T, n)."""
    newest: list[Tensor] = []
    for t in range(1, values.shape[1] + 1):
        problem = as_problem(model, {"spikes": Observed(values[:, :t], mask[:, :t])})
        config = SolverConfig(iterations=200, tolerance=1e-14, exact=True)
        state, _ = ilqr.solve(problem, *rest(problem), config)
        newest.append(state.z[0, -1])
    return torch.stack(newest)


def test_longer_horizons_approach_the_full_history() -> None:
    model = make_model("mgu2", seed=7).requires_grad_(False)
    T = 14
    values, mask = draw_data(model, 1, T, missing=0.1)["spikes"]
    with backend.using("auto"):
        truth = full_history(model, values, mask)
    errors: list[float] = []
    for horizon in (1, 2, 4, T):
        _, answers = streamed(estimator(model, horizon, iterations=25), values, mask)
        z = torch.stack([a.z[0] for a in answers])
        errors.append(float((z - truth).norm() / truth.norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1e-2  # the horizon matters here at all
    assert errors[2] < 0.1 * errors[0]
    assert errors[3] < 1e-6


def test_a_young_window_is_the_exact_problem() -> None:
    """Slots whose bins have not come change nothing, whatever the horizon."""
    model = make_model("mgu2")
    values, mask = draw_data(model, 1, 6)["spikes"]
    _, short = streamed(estimator(model, 6, 3), values, mask)
    _, long = streamed(estimator(model, 15, 3), values, mask)
    for a, b in zip(short, long, strict=True):
        torch.testing.assert_close(a.z, b.z, rtol=0, atol=1e-9)
        torch.testing.assert_close(a.z_cov, b.z_cov, rtol=0, atol=1e-9)


def test_a_missing_bin_is_a_bin_without_a_likelihood_term() -> None:
    model = make_model("mgu2").requires_grad_(False)
    est = estimator(model, 5, lags=1)
    values, mask = draw_data(model, 1, 14)["spikes"]
    mask[0, 7] = 0.0
    other = values.clone()
    other[0, 7] = 1e4
    state, answers = streamed(est, values, mask)
    _, same = streamed(est, other, mask)
    for a, b in zip(answers, same, strict=True):
        assert_same(a, b, 0.0)
    assert float(answers[7].bits) == float(answers[7].spikes) == 0
    # nothing was learned: the prediction, and more uncertain than the bin before
    predicted = model.dynamics.step(
        model.dynamics.weights(), answers[6].z, torch.zeros(1, 2, dtype=torch.float64)
    )
    torch.testing.assert_close(answers[7].z, predicted, rtol=0, atol=1e-3)
    assert state.z.isfinite().all()


def test_a_bin_passed_by_is_predicted_and_counts_in_the_next_solve() -> None:
    model = make_model("mgu2").requires_grad_(False)
    est = estimator(model, 20, 25, lags=1)
    values, mask = draw_data(model, 1, 8)["spikes"]
    _, solved = streamed(est, values, mask)
    state, before = streamed(est, values[:, :4], mask[:, :4])
    w, u = model.dynamics.weights(), torch.zeros(1, 2, dtype=torch.float64)
    z = before[-1].z
    for t in range(4, 7):
        state, answer = est.predict_only(state, values[:, t], mask[:, t])
        z = model.dynamics.step(w, z, u)
        torch.testing.assert_close(answer.z, z, rtol=0, atol=1e-3)
        torch.testing.assert_close(answer.rates, est.spikes.mean(answer.z), rtol=0, atol=1e-9)
        assert (int(answer.iterations), answer.z_cov.isnan().all()) == (0, True)
    assert float(before[-1].bits) != float(answer.bits)
    # the window holds them all: nothing was lost, as far as one solve converges
    _, answer = est.step(state, values[:, 7], mask[:, 7])
    torch.testing.assert_close(answer.z, solved[7].z, rtol=0, atol=1e-4)
    mask[:, 4:7] = 0.0
    _, blind = streamed(est, values, mask)
    assert float((answer.z - blind[7].z).abs().max()) > 1e-2


def test_what_passes_by_a_full_window_is_forgotten_by_halves() -> None:
    model = make_model("mgu2").requires_grad_(False)
    est = estimator(model, 4)
    values, mask = draw_data(model, 1, 40)["spikes"]
    state, _ = streamed(est, values[:, :10], mask[:, :10])
    prior = model.initial.cost(1).precision
    known = state.precision - prior
    for t in range(10, 14):
        state, _ = est.predict_only(state, values[:, t], mask[:, t])
        known = known / 2
        torch.testing.assert_close(state.precision - prior, known, rtol=0, atol=1e-9)
    # and after a few solves it is as if nothing had been passed by
    state, _ = streamed(est, values[:, 14:], mask[:, 14:], state)
    whole, _ = streamed(est, values, mask)
    torch.testing.assert_close(state.z, whole.z, rtol=0, atol=2e-2)


def test_missing_units_are_a_smaller_model() -> None:
    model, fewer = make_model("mgu2", units=5), make_model("mgu2", units=5)
    seen = torch.tensor([True, False, True, True, False])
    spikes = fewer.group("spikes")
    for name in ("C", "b"):
        setattr(spikes, name, torch.nn.Parameter(getattr(spikes, name).detach()[seen]))
    values, mask = draw_data(model, 1, 12)["spikes"]
    mask = mask * seen
    _, answers = streamed(estimator(model, 4), values, mask)
    _, alone = streamed(estimator(fewer, 4), values[..., seen], mask[..., seen])
    for a, b in zip(answers, alone, strict=True):
        torch.testing.assert_close(a.z, b.z, rtol=0, atol=1e-9)
        torch.testing.assert_close(a.z_cov, b.z_cov, rtol=0, atol=1e-9)
        torch.testing.assert_close(a.bits, b.bits, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("iterations", "tolerance"),
    [(2, 1e-10), (8, 1e-3)],
    ids=["as served", "each stopping in its own time"],
)
def test_streams_of_any_age_in_a_batch_are_the_streams_alone(
    iterations: int, tolerance: float
) -> None:
    model = make_model("mgu2")
    est = estimator(model, 4, iterations, lags=2, tolerance=tolerance)
    values, mask = draw_data(model, 3, 12, missing=0.15)["spikes"]
    ages = (0, 3, 7)  # young, about to be full, long full
    alone, expected = [], []
    for i, age in enumerate(ages):
        state, _ = streamed(est, values[i : i + 1, :age], mask[i : i + 1, :age])
        alone.append(state)
        expected.append(streamed(est, values[i : i + 1, age:], mask[i : i + 1, age:], state)[1])
    together = HorizonState.stack(alone)
    assert together.age.tolist() == [0, 3, 4]
    for step in range(5):
        now = torch.stack([values[i, age + step] for i, age in enumerate(ages)])
        seen = torch.stack([mask[i, age + step] for i, age in enumerate(ages)])
        together, answer = est.step(together, now, seen)
        for i in range(3):
            assert_same(stream_of(answer, i), expected[i][step], 1e-9)


def test_stacking_and_taking_apart() -> None:
    est = estimator(make_model("mgu2"), 3)
    values, mask = draw_data(est.model, 2, 5)["spikes"]
    both, _ = streamed(est, values, mask)
    again = HorizonState.stack([both[0], both[1]])
    for f in fields(HorizonState):
        assert torch.equal(getattr(both, f.name), getattr(again, f.name))
        assert getattr(both[0], f.name).shape[0] == 1


def test_a_step_is_pure() -> None:
    model = make_model("mgu2")
    est = estimator(model, 4, 2, lags=1)
    values, mask = draw_data(model, 2, 9)["spikes"]
    for bins in (2, 8):  # filling, and full
        state, _ = streamed(est, values[:, :bins], mask[:, :bins])
        before = {f.name: getattr(state, f.name).clone() for f in fields(HorizonState)}
        one, first = est.step(state, values[:, bins], mask[:, bins])
        est.step(one, values[:, 0], mask[:, 0])  # something in between
        two, second = est.step(state, values[:, bins], mask[:, bins])
        assert_same(first, second, 0.0)
        for f in fields(HorizonState):
            assert torch.equal(getattr(one, f.name), getattr(two, f.name)), f.name
            assert torch.equal(getattr(state, f.name), before[f.name]), f.name


def test_stop_ends_a_solve_after_any_number_of_iterations() -> None:
    model = make_model("mgu2")
    est = estimator(model, 6, 8)
    values, mask = draw_data(model, 1, 6)["spikes"]
    state, _ = streamed(est, values[:, :5], mask[:, :5])
    for allowed in (0, 1, 2):
        asked: list[bool] = []

        def stop(asked: list[bool] = asked, allowed: int = allowed) -> bool:
            asked.append(True)
            return len(asked) > allowed

        _, answer = est.step(state, values[:, 5], mask[:, 5], stop)
        assert answer.status == Status.STOPPED
        assert answer.iterations == allowed + 1
        # the same as a budget of that many: what a journal's replay relies on
        budget = estimator(model, 6, allowed + 1)
        _, same = budget.step(state, values[:, 5], mask[:, 5])
        torch.testing.assert_close(answer.z, same.z, rtol=0, atol=0)
    _, answer = est.step(state, values[:, 5], mask[:, 5], lambda: False)
    assert answer.status != Status.STOPPED


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_never_spreads(poison: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not to the other streams, not to the same stream's later bins."""
    model = make_model("mgu2")
    est = estimator(model, 3, 4, lags=1)
    values, mask = draw_data(model, 2, 16)["spikes"]
    _, clean = streamed(est, values, mask)
    bad = values.clone()
    bad[0, 5, 2] = poison
    monkeypatch.setattr(
        streaming_horizon, "check_bin", lambda *_: None
    )  # refused there, but were it not
    _, answers = streamed(est, bad, mask)
    assert answers[5].status[0] == Status.NOT_FINITE
    for t, (a, b) in enumerate(zip(answers, clean, strict=True)):
        assert_same(stream_of(a, 1), stream_of(b, 1), 1e-12)
        for name in NUMBERS:
            assert bool(getattr(a, name).isfinite().all()), f"{name} at bin {t}"
        if t != 5:
            assert a.status[0] != Status.NOT_FINITE
        if t < 5:
            assert_same(a, b, 0.0)
    # it recovers: what was not finite was not counted
    torch.testing.assert_close(answers[-1].z, clean[-1].z, rtol=0, atol=0.05)


def test_extreme_counts_leave_everything_finite() -> None:
    model = make_model("mgu2")
    est = estimator(model, 3, 2)
    values, mask = draw_data(model, 1, 12)["spikes"]
    values[0, 4:6] = 65535.0
    _, answers = streamed(est, values, mask)
    for answer in answers:
        for name in NUMBERS:
            assert bool(getattr(answer, name).isfinite().all()), name


def test_the_answer_is_what_it_says() -> None:
    model = make_model("mgu2").requires_grad_(False)
    est = estimator(model, 5, lags=2)
    values, mask = draw_data(model, 1, 9)["spikes"]
    mask[0, 8, 1] = 0.0
    _, answers = streamed(est, values, mask)
    last, spikes = answers[-1], model.group("spikes")
    n = model.n
    units = values.shape[-1]
    at = 3 * n + 2 * units  # then the bins held, and the counts of two with what is missing filled
    assert last.window.shape == (1, at + 1 + 2 * units)
    assert last.window[0, at] == 2
    filled = torch.where(mask[:, 8] > 0, values[:, 8], spikes.mean(last.z))
    torch.testing.assert_close(last.window[:, at + 1 : at + 1 + units], filled, rtol=1e-12, atol=0)
    torch.testing.assert_close(last.window[:, :n], last.z, rtol=0, atol=0)
    left = mask[:, 8] * (values[:, 8] - spikes.mean(last.z))
    torch.testing.assert_close(last.window[:, 3 * n : 3 * n + units], left, rtol=0, atol=1e-12)
    torch.testing.assert_close(last.rates, spikes.mean(last.z), rtol=1e-12, atol=0)
    torch.testing.assert_close(last.z_std**2, last.z_cov.diagonal(dim1=-2, dim2=-1))
    assert float(last.spikes) == float((values[0, 8] * mask[0, 8]).sum())
    assert est.readout is not None
    mean, std = est.readout(last.window, last.z_cov)
    torch.testing.assert_close(last.kinematics, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(last.kinematics_std, std, rtol=1e-12, atol=1e-12)
    # bits: the one-step prediction against the mean rates, over the units seen
    w, u = model.dynamics.weights(), torch.zeros(1, 2, dtype=torch.float64)
    rate = spikes.mean(model.dynamics.step(w, answers[-2].z, u))
    ratio = torch.distributions.Poisson(rate).log_prob(values[:, 8])
    ratio = ratio - torch.distributions.Poisson(est.mean_rate).log_prob(values[:, 8])
    expected = (ratio * mask[:, 8]).sum() / torch.log(torch.tensor(2.0).double())
    assert float(last.bits) == pytest.approx(float(expected), abs=1e-6)


def test_without_a_readout_there_are_no_kinematics() -> None:
    est = estimator(make_model("mgu2"), 3)
    _, answer = est.step(est.init(2), torch.ones(2, 5).double(), torch.ones(2, 5).double())
    assert answer.kinematics.shape == answer.kinematics_std.shape == (2, 0)


@pytest.mark.parametrize("method", ["step", "step_reference"])
def test_a_solve_that_breaks_down_states_the_priors_covariance(method: str) -> None:
    """It must not look certain; its neighbour in the batch is not touched."""
    model = make_model("mgu2")
    est = estimator(model, 6, 4, lags=1)
    values, mask = draw_data(model, 2, 4)["spikes"]
    take = getattr(est, method)
    state = est.init(2)
    for t in range(3):
        state, _ = take(state, values[:, t], mask[:, t])
    _, clean = take(state, values[:, 3], mask[:, 3])
    precision = state.precision.clone()
    precision[0] = float("nan")
    _, answer = take(replace(state, precision=precision), values[:, 3], mask[:, 3])
    assert answer.status[0] == Status.NOT_FINITE
    wide = torch.diag_embed(1 / model.initial.cost(1).precision.diagonal(dim1=-2, dim2=-1))[0]
    torch.testing.assert_close(answer.z_cov[0], wide)
    assert bool((answer.kinematics_std[0] > clean.kinematics_std[0]).all())
    assert bool(answer.z.isfinite().all())
    assert_same(stream_of(answer, 1), stream_of(clean, 1), 1e-12)
