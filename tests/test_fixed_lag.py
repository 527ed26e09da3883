"""Bins that are answered once more after later ones: what is fitted, and what is streamed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from feeder import UNITS, Feeder, open_
from ilqr_service.journal.verify import computed
from ilqr_service.settings import ServiceSettings
from ilqr_service.solving.engine import Engine
from ilqr_service.work import EngineAnswer, Insert, Solve
from ilqr_training.readout.fixed_lag import LagWindows, fit_fixed_lag, with_fixed_lag
from ilqr_vae.artifact import CLASSES_SCHEMA, load_artifact
from ilqr_vae.model.readout import KinematicReadout, ReadoutShape
from ilqr_vae.protocol import messages
from ilqr_vae.streaming.fixed_lag import FixedLags
from rig import make_model, serving

LAG = 2


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lag") / "m.safetensors"
    return make_model(out, n_units=len(UNITS), names=UNITS, members=2, later=LAG)


def works(run: int, lag: int = LAG) -> list[Solve]:
    counts = np.random.default_rng(5).poisson(1.0, (12, len(UNITS))).astype(np.float64)
    return [
        Solve(run=run, index=i, counts=c, restart=i == 0, due_ns=2**62, serial=i, lag=lag)
        for i, c in enumerate(counts)
    ]


def newest(answers: list[EngineAnswer]) -> dict[int, EngineAnswer]:
    return {answer.work.index: answer for answer in answers}


def test_a_bin_is_answered_once_more_after_so_many_others(path: Path) -> None:
    engine = Engine.load(path, ServiceSettings(device="cpu"))
    assert engine.model_info.lags == LAG
    assert load_artifact(path).manifest.schema == CLASSES_SCHEMA
    steps = [engine.solve([work]) for work in works(1)]
    plain = [engine.solve([work])[0] for work in works(2, lag=0)]
    assert [len(step) for step in steps] == [1, 1] + [2] * 10
    estimator = load_artifact(path).estimator()
    lags, state = FixedLags(estimator), estimator.init()
    projected: list[np.ndarray] = []
    for t, (step, one) in enumerate(zip(steps, plain, strict=True)):
        first = step[-1]
        np.testing.assert_array_equal(computed(first), computed(one))
        assert (first.revised, first.settles, first.serial) == (False, True, t)
        assert one.members is not None
        np.testing.assert_array_equal(one.members[0], one.latent)
        counts = estimator.mean_rate.new_tensor(works(1)[t].counts)[None]
        state, estimate = estimator.step(state, counts, counts.new_ones(counts.shape))
        projected.append(lags.project(estimate.window.numpy())[0])
        if t < LAG:
            continue
        again, was = step[0], plain[t - LAG]
        assert (again.work.index, again.revised, again.settles) == (t - LAG, True, False)
        moved = projected[t][LAG] - projected[t - LAG][0]
        np.testing.assert_allclose(again.kinematics, was.kinematics + moved, atol=1e-12)
        np.testing.assert_allclose(again.kinematics_std, was.kinematics_std * lags.scales[LAG - 1])
        np.testing.assert_array_equal(again.latent, state.published.z[0, state.age[0, 0] - LAG])
    shorter = [engine.solve([work]) for work in works(3, lag=1)][-1]
    assert [answer.work.index for answer in shorter] == [10, 11]


def test_a_late_bin_and_a_snapshot_change_nothing_of_it(path: Path) -> None:
    engine = Engine.load(path, ServiceSettings(device="cpu"))
    in_order = newest([a for work in works(1) for a in engine.solve([work])])
    late, answers = works(2)[8], list[EngineAnswer]()
    for work in works(2):
        blank = replace(work, counts=None) if work is late or work.index == 8 else work
        if work.index == 11:
            packed = engine.pack(2)
            assert packed is not None
            engine.forget(2)
            engine.restore(packed)
        answers += engine.solve([blank])
    insert = Insert(run=2, index=8, serial=12, due_ns=2**62, lag=LAG, counts=late.counts)
    revised = engine.solve([insert])
    assert [answer.settles for answer in revised] == [False] * (len(revised) - 1) + [True]
    found = newest(answers + revised)
    for index, answer in in_order.items():
        if index < late.index - 1:
            continue  # out of the window
        np.testing.assert_array_equal(computed(found[index]), computed(answer))


def test_a_session_states_its_lag_and_a_model_how_long_it_may_be(path: Path) -> None:
    with serving(path) as service, Feeder(service.ingest, service.results) as feeder:
        refused = feeder.ask(open_("s", lag=LAG + 1), messages.Refused)
        assert (refused.field, refused.expected) == ("lag", "0 to 2, the longest lag of the model")


def test_what_waiting_gains_is_fitted() -> None:
    rng = np.random.default_rng(0)
    v = np.convolve(rng.normal(size=4000), np.ones(8) / 8, "same")[:, None] * [1.0, -0.5]
    x = v + 0.5 * rng.normal(size=v.shape)
    windows = np.concatenate([np.roll(x, k, 0) for k in range(5)], 1)
    parts = [
        LagWindows(windows[a:b], v[a:b], np.arange(a, b) % 300 > 4, np.arange(a, b) // 1000)
        for a, b in ((0, 3000), (3000, 4000))
    ]
    decoded = parts[1].x @ np.linalg.lstsq(parts[0].x, parts[0].y, rcond=None)[0]
    lag = fit_fixed_lag(parts[0], parts[1], decoded, 3, (1.0, 100.0))
    assert lag is not None
    projected = lag.project(parts[1].x)
    for k in (1, 2, 3):
        later = decoded[:-k] + projected[k:, k] - projected[:-k, 0]
        sizes = [((parts[1].y[:-k] - d) ** 2).mean(0) ** 0.5 for d in (decoded[:-k], later)]
        assert (sizes[1] < 0.96 * sizes[0]).all()
        np.testing.assert_allclose(lag.scales[k - 1], sizes[1] / sizes[0], rtol=0.05)
    readout = KinematicReadout(2, 2, ReadoutShape(lags=4)).double()
    made = with_fixed_lag(readout, lag, 3).later
    assert made is not None
    np.testing.assert_array_equal(made.maps, lag.maps)
    # decodes that nothing can be added to, and parts too short
    perfect = fit_fixed_lag(parts[0], parts[1], parts[1].y, 3, (1.0,))
    assert perfect is not None
    assert not perfect.maps.any()
    short = LagWindows(*(values[:3] for values in parts[1].__dict__.values()))
    assert fit_fixed_lag(parts[0], short, decoded[:3], 3, (1.0,)) is None
