"""Wiener and Kalman: steps equal batches, fits are what they claim, the real recording's figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge

from ilqr_vae.errors import ShapeError
from ilqr_vae.recordings import RecordingSpec, load_recording
from ilqr_vae.scoring.baselines import KalmanFilter, WienerFilter
from ilqr_vae.scoring.metrics import r2, r2_per_axis

ROOT = Path(__file__).resolve().parent.parent


def made_up(seed: int, bins: int = 300, units: int = 6) -> tuple[Any, Any]:
    """Counts (T, N) that follow smooth two-dimensional kinematics (T, 2) linearly."""
    rng = np.random.default_rng(seed)
    x = np.zeros((bins, 2))
    for t in range(1, bins):
        x[t] = 0.9 * x[t - 1] + rng.normal(size=2)
    rate = np.clip(5 + x @ rng.normal(size=(2, units)), 0.1, None)
    return rng.poisson(rate).astype(np.uint16), x


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 6), st.integers(0, 299))
def test_wiener_steps_equal_the_batch(seed: int, history: int, start: int) -> None:
    counts, x = made_up(seed)
    wiener = WienerFilter.fit(
        counts, x, train=(0, 200), validation=(200, 250), history=history, alphas=(1.0, 10.0)
    )
    state, stepped = wiener.init(), []
    for bin_counts in counts:
        state, decoded = wiener.step(state, bin_counts)
        stepped.append(decoded)
    assert np.allclose(stepped[start:], wiener.predict(counts, start), atol=1e-10)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(0, 299))
def test_kalman_steps_equal_the_batch(seed: int, start: int) -> None:
    counts, x = made_up(seed)
    kalman = KalmanFilter.fit(counts, x, train=(0, 200))
    state, stepped = kalman.init(), []
    for bin_counts in counts:
        state, decoded = kalman.step(state, bin_counts)
        stepped.append(decoded)
    assert np.allclose(stepped[start:], kalman.predict(counts, start), atol=1e-12)
    assert np.linalg.eigvalsh(state.covariance).min() > 0


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(0, 298))
def test_decodes_do_not_depend_on_what_comes_later(seed: int, t: int) -> None:
    counts, x = made_up(seed)
    changed = counts.copy()
    changed[t + 1 :] += 7
    options = {"train": (0, 200)}
    for decoder in (
        WienerFilter.fit(counts, x, alphas=(1.0,), **options),
        KalmanFilter.fit(counts, x, **options),
    ):
        before = decoder.predict(counts)[: t + 1]
        assert np.array_equal(before, decoder.predict(changed)[: t + 1])


def test_wiener_is_ridge_regression() -> None:
    counts, x = made_up(3)
    history, alpha = 4, 5.0
    wiener = WienerFilter.fit(counts, x, train=(3, 250), history=history, alphas=(alpha,))
    lags = np.concatenate([counts[3 - k : 300 - k].astype(float) for k in range(history)], axis=1)
    ridge = Ridge(alpha=alpha).fit(lags[:247], x[3:250])
    assert np.allclose(wiener.predict(counts, 3), ridge.predict(lags), atol=1e-9)


def test_wiener_chooses_on_validation_and_looks_at_nothing_else() -> None:
    counts, x = made_up(4, bins=400)
    spans = {"train": (0, 200), "validation": (200, 300)}
    one = WienerFilter.fit(counts, x, **spans)
    x[300:], counts[300:] = 99.0, 0
    other = WienerFilter.fit(counts, x, **spans)
    assert np.array_equal(one.weights, other.weights)
    scores = {
        alpha: WienerFilter.fit(counts, x, refit=False, alphas=(alpha,), **spans).validation_r2
        for alpha in (10.0, 100.0, 1e4)
    }
    chosen = WienerFilter.fit(counts, x, alphas=tuple(scores), **spans)
    assert chosen.alpha == max(scores, key=lambda alpha: scores[alpha])


def test_bins_marked_invalid_are_not_fitted() -> None:
    counts, x = made_up(5)
    spoilt, valid = x.copy(), np.ones(300, dtype=bool)
    spoilt[50:60], valid[50:60] = 1e3, False
    good = WienerFilter.fit(counts, x, train=(0, 200), alphas=(1.0,), valid=valid)
    same = WienerFilter.fit(counts, spoilt, train=(0, 200), alphas=(1.0,), valid=valid)
    assert np.array_equal(good.weights, same.weights)
    first = KalmanFilter.fit(counts, x, train=(0, 200), valid=valid)
    second = KalmanFilter.fit(counts, spoilt, train=(0, 200), valid=valid)
    assert np.array_equal(first.transition, second.transition)


def test_kalman_recovers_a_linear_gaussian_system() -> None:
    rng = np.random.default_rng(0)
    a, emission = np.array([[0.9, 0.2], [-0.2, 0.9]]), rng.normal(size=(8, 2))
    x = np.zeros((4000, 2))
    for t in range(1, len(x)):
        x[t] = a @ x[t - 1] + 0.3 * rng.normal(size=2)
    z = 3 + x @ emission.T + 0.5 * rng.normal(size=(len(x), 8))
    kalman = KalmanFilter.fit(z, x, train=(0, 3000))
    assert np.allclose(kalman.transition, a, atol=0.03)
    assert np.allclose(kalman.transition_noise, 0.09 * np.eye(2), atol=0.02)
    assert np.allclose(kalman.gain, emission.T / 0.25, rtol=0.2, atol=0.4)
    # Beside the textbook's filter, which knows the system.
    mean, p, textbook = np.zeros(2), np.eye(2), []
    for observed in z - 3:
        mean, p = a @ mean, a @ p @ a.T + 0.09 * np.eye(2)
        gain = p @ emission.T @ np.linalg.inv(emission @ p @ emission.T + 0.25 * np.eye(8))
        mean, p = mean + gain @ (observed - emission @ mean), p - gain @ emission @ p
        textbook.append(mean)
    ideal = r2(x[3000:], np.array(textbook)[3000:])
    assert r2(x[3000:], kalman.predict(z, 3000)) == pytest.approx(ideal, abs=0.003)


def test_a_silent_unit_changes_nothing() -> None:
    counts, x = made_up(6)
    with_silent = np.concatenate([counts, np.zeros((300, 1), dtype=np.uint16)], axis=1)
    one = KalmanFilter.fit(counts, x, train=(0, 200)).predict(counts)
    two = KalmanFilter.fit(with_silent, x, train=(0, 200)).predict(with_silent)
    assert np.allclose(one, two, atol=1e-4)


def test_what_does_not_fit_is_named() -> None:
    counts, x = made_up(7)
    with pytest.raises(ShapeError, match="kinematics: expected"):
        WienerFilter.fit(counts, x[:-1], train=(0, 200), alphas=(1.0,))
    with pytest.raises(ShapeError, match="train: expected bins within"):
        KalmanFilter.fit(counts, x, train=(0, 900))
    with pytest.raises(ShapeError, match="validation: expected a span"):
        WienerFilter.fit(counts, x, train=(0, 200))
    wiener = WienerFilter.fit(counts, x, train=(0, 200), alphas=(1.0,))
    with pytest.raises(ShapeError, match=r"counts: expected \(6,\), got \(5,\)"):
        wiener.step(wiener.init(), counts[0, :5])


@pytest.mark.recording
def test_the_real_recordings_wiener_figure() -> None:
    path = ROOT.parent / "shared" / "data" / "StevensonV2.mat"
    if not path.is_file():
        pytest.skip(f"the real recording is not at {path}")
    config = msgspec.toml.decode((ROOT / "configs" / "stevenson.toml").read_bytes())
    spec = msgspec.convert(config["data"], RecordingSpec)
    recording = load_recording(path, spec)
    assert recording.counts.shape == (15536, 196)
    assert recording.kinematics is not None
    train, validation, test = (
        spec.split.bins(span, len(recording)) for span in ("train", "validation", "test")
    )
    wiener = WienerFilter.fit(
        recording.counts, recording.kinematics, train=train, validation=validation, history=10
    )
    decoded = wiener.predict(recording.counts, *test)
    scores = r2_per_axis(recording.kinematics[slice(*test)], decoded)
    assert scores.mean() == pytest.approx(0.789, abs=0.003)
    assert scores == pytest.approx([0.835, 0.744], abs=0.01)


def test_a_channel_that_never_moves_stays_where_it_is() -> None:
    counts, x = made_up(7)
    still = np.concatenate([x, np.full((len(x), 1), 0.1)], axis=1)
    one = KalmanFilter.fit(counts, x, train=(0, 200)).predict(counts)
    two = KalmanFilter.fit(counts, still, train=(0, 200)).predict(counts)
    np.testing.assert_allclose(two[:, :-1], one, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(two[:, -1], 0.1, rtol=1e-9)
