"""What is believable: absurd counts are ignored, what is far from training is said, lost states
begin anew; in the compiled step and in the one torch defines, in float32 and float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ilqr_service.settings import ServiceSettings
from ilqr_service.solving.engine import Engine
from ilqr_service.work import EngineAnswer, Solve, status_of
from ilqr_vae.artifact import load_artifact, save_artifact
from ilqr_vae.errors import ArtifactError, ShapeError
from ilqr_vae.inference.problem import Status
from ilqr_vae.kernels import backend
from ilqr_vae.streaming.bounds import TrainingRange, highest_counts
from ilqr_vae.streaming.horizon import HorizonConfig, MovingHorizon
from ilqr_vae.streaming.state import Estimate, HorizonState
from kernel_rig import assert_same
from small import draw_data, make_model

H, T, AT = 5, 24, 8
ABSURD = (65_535.0, 1e6, 1e8, 1e9, 2.0**31 - 1)
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])


@pytest.fixture(params=backend.NAMES)
def every_backend(request: pytest.FixtureRequest) -> Iterator[None]:
    with backend.using(request.param):
        yield


def estimator(
    dynamics: str = "mgu2", dtype: torch.dtype = torch.float64, seen: TrainingRange | None = None
) -> tuple[MovingHorizon, Tensor, Tensor]:
    """And ordinary bins for it, (1, T, N), all observed."""
    model = make_model(dynamics, units=6)
    values, mask = draw_data(model, 1, T)["spikes"]
    rate = torch.ones(6, dtype=dtype)
    est = MovingHorizon(model.to(dtype), None, rate, HorizonConfig(horizon=H, iterations=2), seen)
    return est, values.to(dtype), mask.to(dtype)


def streamed(est: MovingHorizon, values: Tensor, mask: Tensor) -> list[Estimate]:
    state, answers = est.init(values.shape[0]), []
    for t in range(values.shape[1]):
        state, answer = est.step(state, values[:, t], mask[:, t])
        answers.append(answer)
    return answers


@DTYPES
@pytest.mark.usefixtures("every_backend")
@pytest.mark.parametrize("dynamics", ["linear", "mgu2"])
def test_an_absurd_count_is_as_if_its_unit_had_not_been_observed(
    dynamics: str, dtype: torch.dtype
) -> None:
    est, *clean = estimator(dynamics, dtype)
    units, bins = ([3], [0, 4], list(range(6))), ([AT], [AT, AT + 1, AT + 2])
    cases = list(product(ABSURD, units, bins))  # a stream each, side by side
    values, mask = (x.expand(len(cases), -1, -1) for x in clean)
    bad, fewer = values.clone(), mask.clone()
    for row, (value, some, when) in enumerate(cases):
        for t in when:
            bad[row, t, some] = value
            fewer[row, t, some] = 0.0
    answers, without = streamed(est, bad, mask), streamed(est, values, fewer)
    for t, (ours, theirs) in enumerate(zip(answers, without, strict=True)):
        ignored = [len(some) if t in when else 0 for _, some, when in cases]
        assert ours.ignored.tolist() == ignored
        assert ours.beyond.tolist() == [n == 6 for n in ignored]
        for f in fields(Estimate):
            if f.name not in {"ignored", "beyond"}:
                assert torch.equal(getattr(ours, f.name), getattr(theirs, f.name))


@pytest.mark.usefixtures("every_backend")
def test_ordinary_counts_are_all_used() -> None:
    est, values, mask = estimator()
    for answer in streamed(est, values, mask):
        assert not answer.ignored.any()
        assert not answer.beyond.any()
        assert not answer.restarted.any()


@DTYPES
@pytest.mark.usefixtures("every_backend")
def test_a_burst_at_the_limit_is_over_when_it_leaves_the_window(dtype: torch.dtype) -> None:
    est, values, mask = estimator(dtype=dtype)
    clean = streamed(est, values, mask)
    burst = values.clone()
    burst[0, AT] = est.bounds.counts
    answers = streamed(est, burst, mask)
    assert int(answers[AT].ignored) == 0
    for ours, theirs in zip(answers[AT + 2 * H :], clean[AT + 2 * H :], strict=True):
        assert ours.status != Status.NOT_FINITE
        assert bool(((ours.z - theirs.z).abs() <= 2 * theirs.z_std).all())


@DTYPES
@pytest.mark.usefixtures("every_backend")
@pytest.mark.parametrize("far", [float("nan"), float("inf"), 1e12])
@pytest.mark.parametrize("field", ["z", "mean", "u"])
def test_a_lost_state_begins_anew(field: str, far: float, dtype: torch.dtype) -> None:
    """Its neighbour in the batch goes on."""
    if field == "u" and np.isfinite(far):
        return
    est, values, mask = estimator(dtype=dtype)
    state = est.init(2)
    for t in range(AT):
        state, _ = est.step(state, *(x[0, t].expand(2, -1) for x in (values, mask)))
    poisoned = getattr(state, field).clone()
    poisoned[0].view(-1)[-1] = far
    lost = replace(state, **{field: poisoned})
    bin_ = tuple(x[0, AT].expand(2, -1) for x in (values, mask))
    for take in (est.step, est.predict_only):
        after, answer = take(lost, *bin_)
        expected, theirs = take(HorizonState.stack([est.init(1), state[1]]), *bin_)
        assert answer.restarted.tolist() == [True, False]
        for f in fields(HorizonState):
            assert torch.equal(getattr(after, f.name), getattr(expected, f.name)), f.name
        assert torch.equal(answer.z, theirs.z)
        assert not answer.beyond.any()


@pytest.mark.usefixtures("every_backend")
def test_an_answer_beyond_training_is_said() -> None:
    _, values, mask = estimator()
    low, high = torch.full((4,), -0.2).double(), torch.full((4,), 0.2).double()
    none = torch.zeros(2, 0).double()
    seen = TrainingRange(torch.full((6,), 1e6).double(), torch.stack([low, high]), none)
    est, *_ = estimator(seen=seen)
    bounds = est.bounds
    burst = values.clone()
    burst[0, AT] = 3e4  # within the counts of this training part
    beyond = [bool(a.beyond) for a in streamed(est, burst, mask)]
    for answer, said in zip(streamed(est, burst, mask), beyond, strict=True):
        far = ((answer.z - bounds.latent_centre).abs() > bounds.latent_reach).any()
        assert said == bool(far | (answer.rates > bounds.counts).any())
    assert beyond[AT]
    assert not any(beyond[:AT])


@pytest.mark.usefixtures("every_backend")
@pytest.mark.parametrize("wrong", [-1.0, float("nan"), float("inf")])
def test_what_no_count_can_be_is_refused_at_the_door(wrong: float) -> None:
    est, values, mask = estimator()
    counts, seen = values[:, 0].clone(), mask[:, 0].clone()
    counts[0, 2] = wrong
    for take in (est.step, est.predict_only):
        with pytest.raises(ShapeError, match=r"counts: expected counts of zero or more .*, got"):
            take(est.init(1), counts, seen)
    seen[0, 2] = 0.0
    _, answer = est.step(est.init(1), counts, seen)
    assert bool(answer.z.isfinite().all())


def test_a_gaussian_observation_may_be_negative_but_not_nan() -> None:
    model = make_model("linear", spikes="gaussian")
    est = MovingHorizon(model, None, torch.ones(5).double(), HorizonConfig(horizon=3))
    counts, mask = torch.full((1, 5), -4.0).double(), torch.ones(1, 5).double()
    _, answer = est.step(est.init(1), counts, mask)
    assert int(answer.ignored) == 0
    counts[0, 1] = float("nan")
    with pytest.raises(ShapeError, match="finite numbers"):
        est.step(est.init(1), counts, mask)


def test_both_backends_agree_on_absurd_bins() -> None:
    est, values, mask = estimator()
    values[0, AT, 2], values[0, AT + 1] = 1e9, 1e6
    state = est.init(1)
    for t in range(T):
        after, answer = est.step(state, values[:, t], mask[:, t])
        expected, theirs = est.step_reference(state, values[:, t], mask[:, t])
        assert_same(after, expected, 1e-9)
        assert_same(answer, theirs, 1e-9)
        state = after


def test_the_estimator_leaves_its_model_as_it_is() -> None:
    model = make_model("mgu2").train()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    est = MovingHorizon(model, None, torch.ones(5).double(), HorizonConfig(horizon=3))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert any(before.values())
    assert model.training
    assert not est.model.training
    with torch.no_grad():
        model.group("spikes").b.add_(1.0)
    assert not torch.equal(model.group("spikes").b, est.model.group("spikes").b)


def test_a_few_corrupted_bins_do_not_raise_the_highest_count() -> None:
    rng = np.random.default_rng(0)
    counts = rng.poisson([0.02, 1.0, 20.0], (20_000, 3)).astype(np.uint16)
    mask = np.ones_like(counts, dtype=bool)
    clean = highest_counts(counts, mask)
    assert clean.tolist() == counts.max(0).tolist()
    counts[77] = 65_535
    corrupted = highest_counts(counts, mask)
    assert (corrupted >= clean).all()
    assert (corrupted <= 4 * (clean + 1)).all()
    mask[77] = False
    assert highest_counts(counts, mask).tolist() == clean.tolist()


def test_training_ranges_are_kept_in_the_model_file(model_file: Path, tmp_path: Path) -> None:
    plain = load_artifact(model_file)
    assert plain.seen is None
    N, n, D = 7, plain.manifest.latents, len(plain.manifest.kinematic_names)
    low_high = torch.tensor([[-1.0], [1.0]]).double()
    seen = TrainingRange(torch.arange(N).double(), low_high.expand(2, n), low_high.expand(2, D))
    path = tmp_path / "m.safetensors"
    about = (plain.model, plain.readout, plain.mean_rate)
    written = save_artifact(path, plain.manifest, *about, seen)
    assert written.model_id != plain.manifest.model_id
    loaded = load_artifact(path)
    assert loaded.seen is not None
    for ours, theirs in zip(loaded.seen, seen, strict=True):
        assert torch.equal(ours, theirs)
    # twice the highest count of unit 6, 8 deviations and 8 more
    assert loaded.estimator().bounds.counts[6] == np.ceil(12 + 8 * np.sqrt(13) + 8)
    save_artifact(path, plain.manifest, *about, seen._replace(counts=seen.counts[1:]))
    with pytest.raises(ArtifactError, match=r"seen\.\* of shapes"):
        load_artifact(path)


def test_the_engine_names_the_units_that_it_ignored(model_file: Path) -> None:
    engine = Engine.load(model_file, ServiceSettings(device="cpu"))
    names = engine.model_info.unit_names
    rng = np.random.default_rng(3)

    def solve(index: int, **absurd: float) -> EngineAnswer:
        counts = rng.poisson(1.0, len(names)).astype(np.float64)
        for name, value in absurd.items():
            counts[names.index(name)] = value
        work = Solve(run=1, index=index, counts=counts, restart=index == 0, due_ns=2**62)
        (answer,) = engine.solve([work])
        return answer

    for index in range(12):
        assert solve(index).ignored == ()
    one = solve(12, **{names[2]: 2.0**31 - 1})
    assert (one.ignored, status_of(one, 0)) == ((names[2],), "ok")
    every = solve(13, **dict.fromkeys(names, 1e6))
    assert (every.ignored, status_of(every, 0)) == (names, "extrapolated")
    after = solve(14)
    assert (after.ignored, status_of(after, 0)) == ((), "ok")
