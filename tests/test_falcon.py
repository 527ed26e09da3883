"""The decoder object that the FALCON benchmark calls, against the real service."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ilqr_clients.bridges.falcon import FalconDecoder
from ilqr_clients.sdk import ServiceClient, model_of
from ilqr_vae.errors import ShapeError
from rig import make_model, serving

UNITS = 5


def test_a_batch_decodes_as_sessions_do_and_trials_begin_anew(tmp_path: Path) -> None:
    counts = np.random.default_rng(0).poisson(1.0, (6, 2, UNITS)).astype(float)
    channels = ["other", *[f"unit{k}" for k in reversed(range(UNITS))]]
    batches = np.concatenate([np.full((6, 2, 1), 9.0), counts[:, :, ::-1]], axis=2)
    with serving(make_model(tmp_path / "m.safetensors", n_units=UNITS)) as service:
        with ServiceClient(service.ingest) as client:
            model = model_of(client.describe())
            expected: list[Any] = []
            for row in range(2):
                options: dict[str, Any] = {"units": model.unit_names, "bin_width": model.bin_width}
                with client.open(f"row{row}", **options) as session:
                    expected.append(
                        [session.step(k, c[row]).kinematics for k, c in enumerate(counts)]
                    )
        with pytest.raises(ShapeError, match="unit4"):
            FalconDecoder(service.ingest, channels=channels[2:])
        decoder = FalconDecoder(
            service.ingest, channels=channels, batch_size=2, restart_trials=True, deadline=60.0
        )
        with decoder:
            decoder.reset(["a", "b"])
            with pytest.raises(ShapeError, match="neural_observations"):
                decoder.predict(counts[0])
            decoder.observe(batches[0])
            got = [decoder.predict(batch) for batch in batches[1:]]
            assert np.array_equal(np.stack(got, axis=1), np.array(expected)[:, 1:])
            decoder.on_done(np.array([0, 1]))
            first = decoder.predict(batches[0])
            assert np.array_equal(first[1], expected[1][0])
            assert not np.array_equal(first[0], expected[0][0])
            decoder.reset()
            assert np.array_equal(decoder.predict(batches[0]), np.array(expected)[:, 0])
