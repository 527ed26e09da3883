"""Decoders on a stream whose units change: how it is made, what they do, and how it is scored."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ilqr_training.adaptation.labels import adapt_with_labels, intended
from ilqr_training.evaluation.another_day import (
    ADAPTED,
    DECODERS,
    FROZEN,
    LABELLED,
    Fitted,
    Schedule,
    regained,
    scored,
    streamed,
)
from ilqr_training.evaluation.another_day_tables import UNCHANGED, picture, scores_table
from ilqr_training.evaluation.changed import (
    Stream,
    days_after,
    divided,
    earlier_split,
    turnover,
)
from ilqr_training.evaluation.stabiliser import Stabiliser
from ilqr_vae.artifact import Artifact
from ilqr_vae.cli import main
from ilqr_vae.errors import ConfigError
from ilqr_vae.progress import SILENT
from ilqr_vae.recordings import Recording, SplitSpec
from ilqr_vae.scoring.metrics import r2
from rig import BIN_S, write_recording
from test_adaptation import CHANGED, NAMES, rows, spikes_of
from test_adaptation import artifact as artifact
from test_adaptation import recorded as recorded_units
from tiny import config, write_config

T, UNITS = 1400, 18
SPLIT = SplitSpec(train=0.4, validation=0.5)
SCHEDULE = Schedule(least=20.0, window=20.0, trial=7.5, steps=2)


def recorded(seed: int, units: int = UNITS) -> Recording:
    """Velocity in the plane and units tuned to it."""
    rng = np.random.default_rng(seed)
    phase = np.arange(T) * BIN_S * 2 * np.pi
    velocity = np.stack([np.cos(0.31 * phase), np.sin(0.47 * phase)], 1)
    tuning = rng.normal(size=(2, units))
    counts = rng.poisson(np.exp(-0.3 + 0.8 * velocity @ tuning)).astype(np.uint16)
    return Recording(
        counts=counts,
        bin_width=BIN_S,
        unit_names=tuple(f"unit{i}" for i in range(units)),
        kinematics=velocity,
        kinematic_names=("vx", "vy"),
        kinematic_units=("m/s", "m/s"),
    )


def test_every_decoder_follows_a_stream_whose_units_are_replaced(artifact: Artifact) -> None:
    """The model of ``test_adaptation``: its latents are the behaviour."""
    C, b = rows(0)
    latents, counts = spikes_of(C, b, 20)
    base = replace(
        recorded_units(counts, NAMES),
        kinematics=latents[:, :1].copy(),
        kinematic_names=("x",),
        kinematic_units=("m",),
    )
    moved = C.clone()
    moved[CHANGED] *= -1
    rates = (latents @ moved.numpy().T + b.numpy())[700:, CHANGED]
    changed = counts.copy()
    changed[700:, CHANGED] = np.random.default_rng(0).poisson(np.exp(rates))
    recording = replace(base, counts=changed)
    stream = Stream("changed", recording, recording, (700, T), 700)
    model = adapt_with_labels(artifact, base, (0, 700))  # its readout was drawn at random
    fitted = Fitted.beside(model, base, SPLIT, steps=2, seed=0, progress=SILENT)
    decodes, attempts = streamed(fitted, stream, SCHEDULE, 0, SILENT)
    result = scored(stream, decodes, attempts, after=30.0)
    assert tuple(result["decoders"]) == DECODERS
    first = result["attempts"][0]
    assert (first["at"], first["outcome"]) == (20.0, "swapped in")
    assert first["units"]["learnt"] >= len(CHANGED) - 1
    before = {name: decoded[:550] for name, decoded in decodes.items()}
    np.testing.assert_array_equal(before[ADAPTED], before[FROZEN])  # until it is swapped in
    r2s = {name: scores["settled"] for name, scores in result["decoders"].items()}
    assert r2s[ADAPTED] > r2s[FROZEN] + 0.1
    assert r2s[LABELLED] > r2s[FROZEN] + 0.1
    whole = {"recording": "made up", "scored": "", "after": 30.0, "seeds": [{"seed": 0, "streams": [
        result, scored(replace(stream, name=UNCHANGED), decodes, [], after=30.0)]}]}  # fmt: skip
    table = scores_table(whole)
    assert [row[1] for row in table.rows] == [*DECODERS, *DECODERS]
    assert table.rows[1][-3] == f"{r2s[ADAPTED]:.3f}"
    assert len(picture(whole).axes) == 2


def test_the_verb_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path / "c.toml", config(steps=2))
    read = write_recording(tmp_path / "r.mat", n_units=6)
    said = [str(path), "--recording", str(read), "--out", str(tmp_path / "out")]
    for verb, options, named in (
        ("adapt", ["--at", "6", "--span", "test"], "--at, --after"),
        ("adapt", ["--after", "1", "--change", "x"], "--change: expected one of nothing"),
        ("adapt", ["--least", "0"], "--least, --window, --trial"),
        ("adapt", ["--span", "all"], "--span"),
        ("adapt", ["--model", "m"], "--span: expected test"),
        ("days", [], "two days or more"),
        ("days", ["--recording", str(read)], "files of different names"),
    ):
        assert main(["experiment", verb, *said, *options]) == 2
        assert named in capsys.readouterr().err


def test_parts_hold_what_they_say() -> None:
    recording = recorded(2)
    earlier = earlier_split(recording, SplitSpec(train=0.6, validation=0.75))
    assert len(earlier) == round(0.75 * T)
    start, stop = SplitSpec().span("test", earlier)
    assert stop - start == T - len(earlier)
    kept, others = divided(recording.unit_names, 0)
    assert sorted(kept + others) == sorted(recording.unit_names)
    base, spare = recording.select_units(kept), recording.select_units(others)
    streams = turnover(base, spare, (700, T), 900, 0)
    for stream in streams:
        assert (stream.recording.counts[:900] == base.counts[:900]).all()
    changed = (streams[2].recording.counts[900:] != base.counts[900:]).any(0)
    assert changed.sum() == round(0.5 * base.n_units)
    one = recorded(3).select_units(tuple(reversed(recording.unit_names[2:])))
    one = replace(one, unit_names=(*one.unit_names[:-1], "new"))
    whole, (day,) = days_after(recording, {"next": one}, SPLIT, 0.5)
    assert day.bins == (T, T + 600)
    assert not whole.mask()[T:, :3].any()  # gone: two, and the one that is called another now
    assert (whole.counts[T:, 3:] == one.counts[:600, -2::-1]).all()
    assert (day.own.counts[T:] == one.counts[:600]).all()
    with pytest.raises(ConfigError, match="three units or more"):
        divided(("a", "b"), 0)
    assert regained(0.7, 0.5, 0.9) == pytest.approx(0.5)
    assert np.isnan(regained(0.7, 0.9, 0.9))


def test_factors_are_turned_back_by_the_units_that_stay() -> None:
    recording = recorded(4)
    fitted = Stabiliser.fit(recording, SPLIT)
    counts = recording.counts.copy()
    gone = np.arange(0, UNITS, 4)
    counts[700:, gone] = recorded(5).counts[700:, gone]
    changed = replace(recording, counts=counts)
    aligned = fitted.aligned(changed, (700, 1200))
    truth = np.asarray(recording.kinematics)[1200:]
    scores = [r2(truth, d.decode(changed, (1200, T))) for d in (fitted, aligned)]
    assert scores[1] > scores[0] + 0.05


def test_the_intended_velocity_points_at_the_target_and_keeps_the_speed() -> None:
    rng = np.random.default_rng(6)
    decoded, cursor = rng.normal(size=(50, 3)), 0.1 * rng.normal(size=(50, 2))
    heading, distance = rng.uniform(-np.pi, np.pi, 50), rng.uniform(0.03, 0.1, 50)
    target = cursor + distance[:, None] * np.stack([np.cos(heading), np.sin(heading)], 1)
    target[0], cursor[1] = np.nan, target[1] + 0.01  # no target; at the target
    made, known = intended(decoded, cursor, target, np.full(50, 0.02))
    assert known.tolist() == [False, *[True] * 49]
    np.testing.assert_array_equal(made[1], [0.0, 0.0, decoded[1, 2]])
    speed = np.hypot(decoded[2:, 0], decoded[2:, 1])
    np.testing.assert_allclose(np.hypot(made[2:, 0], made[2:, 1]), speed)
    np.testing.assert_allclose(np.arctan2(made[2:, 1], made[2:, 0]), heading[2:])
    np.testing.assert_array_equal(made[2:, 2], decoded[2:, 2])
