"""The decoders a lab would use instead: causal, fitted on their parts alone, better than chance."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from ilqr_training.gru import GRUConfig, GRUDecoder, filled
from ilqr_training.rivals import kalman
from ilqr_vae.errors import ShapeError
from ilqr_vae.metrics import r2
from ilqr_vae.recordings import Recording, SplitSpec

SPLIT = SplitSpec(train=0.6, validation=0.8)
QUICK = (GRUConfig(hidden=16, dropout=0.1, steps=60, schedule=60, rate=1e-2),)
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


def test_each_decodes_better_than_chance_and_none_sees_the_future() -> None:
    recording, bins = made(), (480, 600)
    assert recording.kinematics is not None
    gru = GRUDecoder.fit(recording, SPLIT, grid=QUICK)

    def decoded(r: Recording) -> dict[str, NDArray[np.float64]]:
        return {"kalman": kalman(r, SPLIT, bins, None), "gru": gru.predict(r, *bins)}

    counts = recording.counts.copy()
    counts[540:] = 0
    changed = replace(recording, counts=counts)
    for name, found in decoded(recording).items():
        assert found.shape == (120, D)
        assert r2(recording.kinematics[480:], found) > 0.3, name
        after = decoded(changed)[name]
        np.testing.assert_allclose(after[:60], found[:60], rtol=1e-5, atol=1e-5)
        assert not np.allclose(after[60:], found[60:])


def test_nothing_of_the_test_part_is_fitted_on() -> None:
    recording = made()
    assert recording.kinematics is not None
    truth = recording.kinematics.copy()
    truth[480:] = 1e3
    spoiled = replace(recording, kinematics=truth)
    for a, b in (
        (kalman(recording, SPLIT, (0, 480), None), kalman(spoiled, SPLIT, (0, 480), None)),
        tuple(
            GRUDecoder.fit(r, SPLIT, grid=QUICK).predict(r, 0, 480) for r in (recording, spoiled)
        ),
    ):
        np.testing.assert_array_equal(a, b)


def test_a_gru_begins_anew_where_the_recording_does() -> None:
    recording = made(breaks=(300, 500))
    gru = GRUDecoder.fit(recording, SPLIT, grid=QUICK)
    counts = recording.counts.copy()
    counts[:500] = 0
    found = gru.predict(replace(recording, counts=counts), 500, 600)
    np.testing.assert_allclose(found, gru.predict(recording, 500, 600), rtol=1e-5, atol=1e-5)


def test_what_stands_in_for_missing_bins() -> None:
    counts = np.arange(8.0).reshape(4, 2) + 1
    seen = np.array([False, True, False, False])
    np.testing.assert_array_equal(filled(counts, seen, "zeros")[[0, 2, 3]], 0.0)
    np.testing.assert_array_equal(filled(counts, seen, "last"), [[0, 0], [3, 4], [3, 4], [3, 4]])


def test_no_behaviour_is_named() -> None:
    recording = replace(made(), kinematics=None, kinematic_names=(), kinematic_units=())
    for fit in (
        lambda: GRUDecoder.fit(recording, SPLIT, grid=QUICK),
        lambda: kalman(recording, SPLIT, (0, 10), None),
    ):
        with pytest.raises(ShapeError, match=r"recording\.kinematics"):
            fit()
