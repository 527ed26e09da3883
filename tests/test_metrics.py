"""The benchmark's scores against its own tools' answers; the rest against their definitions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ilqr_vae.errors import ShapeError
from ilqr_vae.scoring import metrics

VECTORS = np.load(Path(__file__).parent / "data" / "nlb_metric_vectors.npz")
RATES, SPIKES, NAN_SPIKES = (VECTORS[k] for k in ("rates", "spikes", "spikes_with_nan"))
SEEDS = st.integers(0, 2**32 - 1)


def close(value: float, key: str) -> None:
    assert value == pytest.approx(float(VECTORS[key]), abs=1e-9, rel=0)


def test_bits_per_spike_is_the_benchmarks() -> None:
    close(metrics.bits_per_spike(RATES, SPIKES), "bits_per_spike")
    close(metrics.bits_per_spike(RATES, NAN_SPIKES), "bits_per_spike_nan")


def test_co_and_forward_bits_are_the_benchmarks() -> None:
    close(metrics.co_bps(RATES, SPIKES, slice(-5, None)), "co_bps")
    close(metrics.co_bps(RATES, SPIKES, np.arange(13, 18)), "co_bps")
    close(metrics.fp_bps(RATES, SPIKES, slice(40, 60)), "fp_bps")


def test_velocity_r2_is_the_benchmarks() -> None:
    flat, velocity = RATES.reshape(-1, RATES.shape[-1]), VECTORS["velocity"]
    score = metrics.nlb_velocity_r2(flat, velocity, slice(0, 1080), slice(1080, None))
    close(score.r2, "velocity_r2")
    assert score.alpha in np.logspace(-4, 0, 9)


def test_psth_r2_is_the_benchmarks() -> None:
    close(metrics.psth_r2(RATES, VECTORS["condition"], VECTORS["psth"]), "psth_r2")


@given(SEEDS)
def test_the_mean_rate_gains_no_bits_and_no_rate_beats_the_truth_on_average(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.uniform(0.5, 2.0, size=(200, 4))
    spikes = rng.poisson(truth).astype(float)
    mean = np.broadcast_to(spikes.mean(axis=0), spikes.shape)
    assert metrics.bits_per_spike(mean, spikes) == pytest.approx(0.0, abs=1e-12)
    assert metrics.bits_per_spike(truth, spikes) > metrics.bits_per_spike(truth[::-1] * 2, spikes)


def test_no_spikes_is_nan_and_bad_input_names_its_field() -> None:
    zeros, ones = np.zeros((3, 2)), np.ones((3, 2))
    assert np.isnan(metrics.bits_per_spike(ones, zeros))
    with pytest.raises(ShapeError, match="rates: expected finite"):
        metrics.bits_per_spike(-ones, ones)
    with pytest.raises(ShapeError, match="rates: expected spikes's shape"):
        metrics.bits_per_spike(np.ones((3, 1)), ones)
    with pytest.raises(ShapeError, match="spikes: expected units observed"):
        metrics.bits_per_spike(ones, np.array([[np.nan, 1.0]] * 3))


def test_r2_is_one_minus_sse_over_sst_averaged_over_axes() -> None:
    truth = np.array([[0.0, 0.0], [2.0, 4.0]])
    guess = np.array([[0.0, 1.0], [1.0, 4.0]])
    assert metrics.r2_per_axis(truth, guess) == pytest.approx([1 - 1 / 2, 1 - 1 / 8])
    assert metrics.r2(truth, guess) == pytest.approx(0.6875)
    assert metrics.r2(truth, truth) == 1.0
    assert np.isnan(metrics.r2_per_axis(np.ones(4), np.ones(4))).all()
    # a channel that varies by rounding alone says nothing, and spoils nothing
    flat = np.stack([truth[:, 0], 0.1 + 1e-17 * np.arange(len(truth))], 1)
    flat[1, 1] = np.nextafter(flat[1, 1], 1.0)
    assert np.isnan(metrics.r2_per_axis(flat, guess)).tolist() == [False, True]
    assert metrics.r2(flat, guess) == pytest.approx(1 - 1 / 2)
    assert np.isnan(metrics.r2(truth, np.where(guess > 0, np.nan, guess)))
    with pytest.raises(ShapeError):
        metrics.r2(np.empty((0, 2)), np.empty((0, 2)))


@pytest.mark.parametrize("level", [0.5, 0.9, 0.99])
def test_coverage_of_an_honest_gaussian_is_the_level(level: float) -> None:
    rng = np.random.default_rng(0)
    mean, std = rng.normal(size=(20_000, 2)), rng.uniform(0.1, 3.0, size=(20_000, 2))
    truth = mean + std * rng.normal(size=mean.shape)
    assert metrics.interval_coverage(truth, mean, std, level) == pytest.approx(level, abs=0.01)
    with pytest.raises(ShapeError, match="level"):
        metrics.interval_coverage(truth, mean, std, 1.0)


@given(SEEDS)
def test_k_step_r2_of_a_known_system(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, trials, bins, steps = 0.8, 3, 50, 4
    values = np.zeros((trials, bins, 2))
    for t in range(1, bins):
        values[:, t] = a * values[:, t - 1] + rng.normal(size=(trials, 2))
    powers = a ** np.arange(1, steps + 1)
    forecasts = values[:, :, None, :] * powers[:, None]
    scores = metrics.k_step_r2(values, forecasts)
    for k in range(1, steps + 1):
        truth = values[:, k:].reshape(-1, 2)
        error = truth - (powers[k - 1] * values[:, :-k]).reshape(-1, 2)
        total = ((truth - truth.mean(axis=0)) ** 2).sum()
        assert scores[k - 1] == pytest.approx(1 - (error**2).sum() / total)
    with pytest.raises(ShapeError, match="forecasts"):
        metrics.k_step_r2(values, forecasts[..., :1])
