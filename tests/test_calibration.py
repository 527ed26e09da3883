"""The calibration index: bits beyond the stream's own mean rates, against those at validation."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ilqr_service.sessions.calibration import Calibration
from ilqr_service.work import EngineInfo
from ilqr_vae.protocol.answer import Vector

N, BINS, WIDTH_S = 12, 6000, 0.05
MU = np.linspace(0.2, 2.0, N)
EXPECTED = 0.1


def model_info(**changed: Any) -> EngineInfo:
    about: dict[str, Any] = {
        "model": "m",
        "unit_names": tuple(f"u{i}" for i in range(N)),
        "bin_width_ns": round(1e9 * WIDTH_S),
        "latents": 2,
        "kinematic_names": (),
        "kinematic_units": (),
        "horizon": 5,
        "iterations": 2,
        "bits_per_spike": EXPECTED,
        "mean_rates": tuple(MU),
    }
    return EngineInfo(**(about | changed))


def bits(counts: Vector, rates: Vector, means: Vector) -> Vector:
    """Of each bin: the log-likelihood that rates gain over means."""
    return (counts * np.log2(rates / means) - (rates - means) / np.log(2)).sum(-1)


def index_of(counts: Vector, rates: Vector, used: Vector | None = None) -> float:
    calibration = Calibration(model_info())
    seen = np.ones_like(counts) if used is None else used
    stated = (bits((counts * seen)[..., None], rates[..., None], MU[:, None]) * seen).sum(-1)
    for t, row in enumerate(counts):
        answer: Any = SimpleNamespace(
            work=SimpleNamespace(counts=row),
            ignored=(),
            used=None if used is None else used[t] > 0,
            bits=stated[t],
            spikes=int((row * seen[t]).sum()),
        )
        calibration.add(answer)
    assert calibration.index is not None
    return calibration.index


def modulated(gain: Vector, depth: float, seed: int = 0) -> tuple[Vector, Vector]:
    """Counts, and the rates that they were drawn from: of mean ``gain`` MU, with some tuning."""
    rng = np.random.default_rng(seed)
    tuning = depth * np.sin(np.arange(BINS)[:, None] * 0.3 + rng.uniform(0, 6, N))
    rates = gain * MU * np.exp(tuning)
    return rng.poisson(rates).astype(float), rates


@given(seed=st.integers(0, 99), depth=st.sampled_from([0.3, 0.8]))
@settings(max_examples=8, deadline=None, derandomize=True)
def test_it_is_the_gain_over_the_means_of_the_stream(seed: int, depth: float) -> None:
    gain = np.exp(np.random.default_rng(seed).normal(size=N))
    counts, rates = modulated(gain, depth, seed)
    newest = slice(BINS // 2, None)
    own = bits(counts[newest], rates[newest], counts[newest].mean(0)).sum()
    wanted = own / counts[newest].sum() / EXPECTED
    assert index_of(counts, rates) == pytest.approx(wanted, rel=0.15)


def test_a_model_that_knows_no_more_than_new_mean_rates_is_worth_nothing() -> None:
    gain = np.exp(np.random.default_rng(0).normal(size=N))
    counts, _ = modulated(gain, 0.0)
    rates = np.broadcast_to(gain * MU, counts.shape)
    assert bits(counts, rates, MU).sum() / counts.sum() > EXPECTED  # as good as ever, it would seem
    assert abs(index_of(counts, rates)) < 0.1


def test_units_that_are_masked_have_no_part_in_it() -> None:
    counts, rates = modulated(np.ones(N), 0.5)
    used = np.ones_like(counts)
    used[:, :4] = 0.0
    known = index_of(counts, rates, used)
    counts[:, :4] += 50.0
    assert index_of(counts, rates, used) == known
    few = bits(counts[:, 4:], rates[:, 4:], counts[:, 4:].mean(0)).sum()
    assert known == pytest.approx(few / counts[:, 4:].sum() / EXPECTED, rel=0.1)
