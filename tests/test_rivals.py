"""The decoders a lab would use instead: causal, fitted on their parts alone, better than chance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from ilqr_training.evaluation import baselines
from ilqr_training.evaluation.baselines import (
    GRIDS,
    GRU,
    GRUS,
    KALMAN,
    LSTM,
    TRANSFORMER,
    Filling,
    filled,
    fit_baselines,
    names_of,
)
from ilqr_training.evaluation.gru import GRUConfig, GRUDecoder
from ilqr_vae.errors import ShapeError
from ilqr_vae.recordings import Recording, SplitSpec
from ilqr_vae.scoring.metrics import r2
from ilqr_vae.scoring.score import WIENER, fit_wiener, histories

Array = NDArray[np.float64]
Decode = Callable[[Recording, Array, tuple[int, int]], Array]

SPLIT = SplitSpec(train=0.6, validation=0.8)
QUICK = (GRUConfig(hidden=16, dropout=0.1, steps=60, schedule=60, rate=1e-2),)
KINDS: tuple[Literal["gru", "lstm", "transformer"], ...] = ("gru", "lstm", "transformer")
T, N, D = 600, 12, 2


def made(seed: int = 0, breaks: tuple[int, ...] = ()) -> Recording:
    """Kinematics that are smooth, and counts that follow them one bin later."""
    rng = np.random.default_rng(seed)
    y = np.zeros((T, D))
    for t in range(1, T):
        y[t] = 0.9 * y[t - 1] + rng.normal(size=D)
    drive = np.exp(0.4 * y @ rng.normal(size=(D, N)) / 2 + 0.3)
    return Recording(
        counts=rng.poisson(np.minimum(drive, 20.0)).astype(np.uint16),
        bin_width=0.05,
        unit_names=tuple(f"u{i}" for i in range(N)),
        kinematics=y,
        kinematic_names=("vx", "vy"),
        kinematic_units=("m/s", "m/s"),
        breaks=np.array(breaks, dtype=np.int64),
    )


def fits(recording: Recording) -> dict[str, Decode]:
    """Each decoder, as what decodes given counts."""
    rivals = fit_baselines(recording, SPLIT, (WIENER, KALMAN))
    nets = {
        kind: GRUDecoder.fit(recording, SPLIT, grid=(replace(QUICK[0], kind=kind),))
        for kind in KINDS
    }

    def of(name: str) -> Decode:
        return lambda _, counts, bins: rivals[name].decode(bins, counts=counts)

    return {name: of(name) for name in rivals} | {kind: net.decode for kind, net in nets.items()}


@pytest.fixture(scope="module")
def fitted() -> dict[str, Decode]:
    """Each decoder, fitted on ``made()``."""
    return fits(made())


def test_each_decodes_better_than_chance_and_none_sees_the_future(
    fitted: dict[str, Decode],
) -> None:
    recording, bins = made(), (480, 600)
    assert recording.kinematics is not None
    counts = recording.counts.astype(np.float64)
    changed = counts.copy()
    changed[540:] = 0
    for name, decode in fitted.items():
        found, after = decode(recording, counts, bins), decode(recording, changed, bins)
        assert found.shape == (120, D)
        assert r2(recording.kinematics[480:], found) > 0.3, name
        np.testing.assert_allclose(after[:60], found[:60], rtol=1e-5, atol=1e-5)
        assert not np.allclose(after[60:], found[60:])


def test_nothing_of_the_test_part_is_fitted_on(fitted: dict[str, Decode]) -> None:
    recording = made()
    assert recording.kinematics is not None
    truth = recording.kinematics.copy()
    truth[480:] = 1e3
    spoiled = replace(recording, kinematics=truth)
    counts, bins = recording.counts.astype(np.float64), (0, 480)
    other = fits(spoiled)
    for name, decode in fitted.items():
        np.testing.assert_array_equal(
            decode(recording, counts, bins), other[name](spoiled, counts, bins)
        )


def test_each_begins_anew_where_the_recording_does() -> None:
    recording = made(breaks=(300, 500))
    counts = recording.counts.astype(np.float64)
    changed = counts.copy()
    changed[:500] = 0
    for name, decode in fits(recording).items():
        found, after = (decode(recording, x, (490, 600))[10:] for x in (counts, changed))
        np.testing.assert_allclose(found, after, rtol=1e-5, atol=1e-5, err_msg=name)
        part = decode(recording, counts, (520, 600))
        np.testing.assert_allclose(part, found[20:], rtol=1e-5, atol=1e-5, err_msg=name)


def test_rivals_are_those_a_lab_would_train(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean of five is that of the one and four more, and each says what it takes."""
    monkeypatch.setattr(baselines, "GRID", (replace(QUICK[0], steps=20),))
    quick = {name: (replace(grid[0], hidden=16, steps=20),) for name, grid in GRIDS.items()}
    monkeypatch.setattr(baselines, "GRIDS", quick)
    names = names_of(True, others=True)
    fitted = fit_baselines(made(), SPLIT, names)
    assert tuple(fitted) == names
    decodes = {name: fitted[name].decode((480, 600)) for name in (GRU, GRUS, LSTM, TRANSFORMER)}
    for name, decoded in decodes.items():
        assert fitted[name].answer_seconds > 0
        assert "16 units" in fitted[name].chosen
        for other in decodes:
            assert name == other or not np.array_equal(decoded, decodes[other])
    assert fitted[GRUS].chosen.count(",") == fitted[GRU].chosen.count(",") + 4
    assert fitted[GRUS].seconds > fitted[GRU].seconds


def test_a_gru_learns_from_trials_of_varying_length() -> None:
    recording = made(breaks=(100, 110, 170, 290, 340, 345, 420, 480))
    gru = GRUDecoder.fit(recording, SPLIT, grid=QUICK)
    found = gru.decode(recording, recording.counts.astype(np.float64), (480, 600))
    assert found.shape == (120, D)
    assert np.isfinite(found).all()


@pytest.mark.parametrize(
    ("filling", "expected"),
    [
        ("zeros", [[0, 0], [3, 4], [0, 0], [7, 0]]),
        ("last value", [[0, 0], [3, 4], [3, 4], [7, 4]]),
        ("mean", [[9, 8], [3, 4], [9, 8], [7, 8]]),
        ("no update", [[9, 8], [3, 4], [9, 8], [7, 8]]),
    ],
)
def test_what_stands_where_something_is_missing(
    filling: Filling, expected: list[list[int]]
) -> None:
    counts = np.arange(8.0).reshape(4, 2) + 1
    missing = np.array([[True, True], [False, False], [True, True], [False, True]])
    mean = np.array([9.0, 8.0])
    np.testing.assert_array_equal(filled(counts, missing, filling, mean), expected)


def test_a_kalman_filter_predicts_a_bin_that_is_lost() -> None:
    recording, bins = made(), (480, 600)
    missing = np.zeros((T, N), dtype=bool)
    missing[520] = True
    counts = recording.counts.copy()
    counts[520] = 99  # whatever is there is not looked at
    kalman = fit_baselines(recording, SPLIT, (KALMAN,))[KALMAN]
    whole, lost = kalman.decode(bins), kalman.decode(bins, counts=counts, missing=missing)
    np.testing.assert_array_equal(whole[:40], lost[:40])
    assert not np.allclose(whole[40:44], lost[40:44])
    with pytest.raises(ShapeError, match="filling"):
        kalman.decode(bins, missing=missing, filling="last value")


def test_a_wiener_filter_chooses_its_history_on_the_validation_part() -> None:
    recording = made()
    each = {h: fit_wiener(recording, SPLIT, (h,)).validation_r2 for h in (1, 4, 12)}
    chosen = fit_wiener(recording, SPLIT, tuple(each))
    assert chosen.validation_r2 == max(each.values()) == each[chosen.history]
    assert chosen.history > 1  # counts here follow the movement
    assert histories(0.05, 100) == (5, 10, 15)
    assert histories(0.05, 250) == (5, 10, 12)  # no more weights than that
    assert histories(2.0, 10**6) == (1,)


def test_no_behaviour_is_named() -> None:
    recording = replace(made(), kinematics=None, kinematic_names=(), kinematic_units=())
    for fit in (
        lambda: GRUDecoder.fit(recording, SPLIT, grid=QUICK),
        lambda: fit_baselines(recording, SPLIT, (KALMAN,)),
        lambda: fit_baselines(recording, SPLIT, (WIENER,)),
    ):
        with pytest.raises(ShapeError, match=r"recording\.kinematics"):
            fit()
