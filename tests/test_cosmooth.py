"""Co-smoothing: units predicted from others, by the model and by what it is held against."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ilqr_training.evaluation.cosmoothing import (
    LONG,
    OURS_REGRESSED,
    cosmooth,
    held_out_units,
    smoothing_solve,
)
from ilqr_training.evaluation.cosmoothing_baselines import (
    FACTORS,
    SMOOTHING,
    factors,
    fit_offline,
    smoothed,
    smoothing,
)
from ilqr_vae.artifact import load_artifact
from ilqr_vae.cli import main
from ilqr_vae.errors import ConfigError, ShapeError
from ilqr_vae.inference.prediction import infer
from ilqr_vae.model.likelihoods import Observed
from ilqr_vae.recordings import Recording, SplitSpec, load_recording
from ilqr_vae.scoring.metrics import bits_per_spike
from ilqr_vae.scoring.score import OURS
from rig import make_model, spec, write_recording
from small import make_model as make_gaussian

SPLIT = SplitSpec(train=0.6, validation=0.8)
OUT = np.array([True, False, False, True, False, False, False, False])
T, N = 700, 8


def made(breaks: tuple[int, ...] = ()) -> Recording:
    """Units that share one slow drive."""
    rng = np.random.default_rng(0)
    drive = np.zeros(T)
    for t in range(1, T):
        drive[t] = 0.97 * drive[t - 1] + 0.25 * rng.normal()
    rates = np.exp(0.3 + np.outer(drive, rng.uniform(0.5, 1.0, N)))
    return Recording(
        counts=rng.poisson(np.minimum(rates, 30.0)).astype(np.uint16),
        bin_width=0.05,
        unit_names=tuple(f"u{i}" for i in range(N)),
        breaks=np.array(breaks, dtype=np.int64),
    )


def test_the_file_names_the_units_or_the_seed_draws_them() -> None:
    recording = made()
    one, again, other = (held_out_units(recording, 0.25, seed)[0] for seed in (1, 1, 2))
    assert one.sum() == 2
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)
    named, said = held_out_units(replace(recording, held_out=("u5", "u2")), 0.25, 1)
    np.testing.assert_array_equal(np.flatnonzero(named), [2, 5])
    assert "file" in said
    for share in (0.0, 1.0, -1.0, 5.0, float("nan")):
        with pytest.raises(ConfigError, match="--held-out"):
            held_out_units(recording, share, 1)


@pytest.mark.parametrize("kind", [SMOOTHING, FACTORS])
def test_a_baseline_predicts_units_and_looks_at_no_test_target(kind: str) -> None:
    recording = made()
    ways = {SMOOTHING: smoothing, FACTORS: factors}[kind]
    fitted = fit_offline(ways(recording, ~OUT), recording, SPLIT, OUT)
    bins = (560, 700)
    truth = recording.counts[560:, OUT].astype(float)
    assert bits_per_spike(fitted.rates(bins), truth) > 0.05
    assert fitted.validation_bits > 0.05
    spoiled = recording.counts.copy()
    spoiled[560:, OUT] = 99
    other = replace(recording, counts=spoiled)
    again = fit_offline(ways(other, ~OUT), other, SPLIT, OUT)
    np.testing.assert_array_equal(again.rates(bins), fitted.rates(bins))
    assert again.chosen == fitted.chosen


def test_smoothing_stays_within_a_segment_and_skips_what_is_missing() -> None:
    counts = np.zeros((20, 2), dtype=np.uint16)
    counts[:10], counts[10:] = 4, 0
    observed = np.ones((20, 2), dtype=bool)
    observed[3, 0] = False
    counts[3, 0] = 99
    recording = Recording(
        counts=counts,
        bin_width=0.05,
        unit_names=("a", "b"),
        observed=observed,
        breaks=np.array([10]),
    )
    found = smoothed(recording, np.array([True, True]), 0.2)
    np.testing.assert_allclose(found[:10], 4.0)
    np.testing.assert_allclose(found[10:], 0.0)


def test_ours_depends_on_no_held_out_count_and_segments_stand_alone(tmp_path: Path) -> None:
    recording = made(breaks=(600, 640))
    artifact = load_artifact(make_model(tmp_path / "m.safetensors", n_units=N))
    bins = (560, 700)
    rates = smoothing_solve(artifact, recording, bins, OUT)[1]
    assert rates.shape == (140, N)
    spoiled = recording.counts.copy()
    spoiled[:, OUT] = 60
    spoiled[:560] = 7
    other = smoothing_solve(artifact, replace(recording, counts=spoiled), bins, OUT)[1]
    np.testing.assert_array_equal(other, rates)
    alone = smoothing_solve(artifact, recording.slice(600, 640), (0, 40), OUT)[1]
    np.testing.assert_allclose(rates[40:80], alone, rtol=1e-5)


def test_a_regression_on_our_latents_looks_at_no_test_target(tmp_path: Path) -> None:
    recording = made()
    artifact = load_artifact(make_model(tmp_path / "m.safetensors", n_units=N))
    bins = (560, 700)
    fair = cosmooth(artifact, recording, SPLIT, bins, OUT)
    spoiled = recording.counts.copy()
    spoiled[560:, OUT] = 1 + np.arange(140)[:, None] % 3
    other = replace(recording, counts=spoiled)
    assert cosmooth(artifact, other, SPLIT, bins, OUT).chosen == fair.chosen
    assert fair.bits[OURS_REGRESSED] > fair.bits[OURS]  # this model was never trained


def test_a_long_segment_is_solved_as_one(tmp_path: Path) -> None:
    recording = made()
    artifact = load_artifact(make_model(tmp_path / "m.safetensors", n_units=N))
    rates = smoothing_solve(artifact, recording, (0, LONG + 20), OUT)[1]
    # far from the cut, what comes after it hardly matters
    shorter = smoothing_solve(artifact, recording, (0, LONG), OUT)[1]
    far = np.abs(rates[: LONG - 100] / shorter[: LONG - 100] - 1).max(axis=1)
    assert np.quantile(far, 0.8) < 1e-3  # this model's posterior may have more optima than one


def test_rates_under_the_posterior_are_what_samples_average_to() -> None:
    model = make_gaussian("linear", n=3, m=2, units=4)
    generator = torch.Generator().manual_seed(0)
    counts = torch.poisson(torch.full((2, 12, 4), 2.0, dtype=torch.float64), generator=generator)
    observed = {"spikes": Observed(counts, torch.ones_like(counts))}
    found = infer(model, observed, generator=generator)
    exact, sampled = found.posterior_rates("spikes"), found.mean_rates(4000)["spikes"]
    torch.testing.assert_close(exact, sampled, rtol=0.06, atol=0.0)
    assert bool((exact > found.rates()["spikes"]).all())  # the exponential is convex


def test_silence_of_the_held_out_units_is_named() -> None:
    recording = made()
    counts = recording.counts.copy()
    counts[420:560, OUT] = 0
    silent = replace(recording, counts=counts)
    with pytest.raises(ShapeError, match="validation"):
        fit_offline(smoothing(silent, ~OUT), silent, SPLIT, OUT)


def test_the_command_shows_and_writes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_recording(tmp_path / "r.mat", n_units=N)
    model, out = make_model(tmp_path / "m.safetensors", n_units=N), tmp_path / "e.json"
    said = ["evaluate", str(model), "--recording", str(path), "--held-out", "0.25"]
    assert main([*said, "--seed", "3", "--json", str(out)]) == 0
    written = json.loads(out.read_text())["cosmoothing"]
    assert list(written["bits_per_spike"]) == [OURS, OURS_REGRESSED, SMOOTHING, FACTORS]
    assert len(written["held_out"]) == 2
    shown = capsys.readouterr().out
    assert "2 units held out, drawn by seed 3" in shown
    assert "Training used all units" in shown
    read = load_recording(path, spec())
    held: NDArray[np.bool_] = np.isin(read.unit_names, written["held_out"])
    start, stop = spec().split.bins("test", len(read))
    rates = smoothing_solve(load_artifact(model), read, (start, stop), held)[1][:, held]
    bits = bits_per_spike(rates, read.counts[start:stop, held].astype(float))
    assert written["bits_per_spike"][OURS] == pytest.approx(bits)
    assert main([*said[:-1], "0.01"]) == 2
    assert "--held-out" in capsys.readouterr().err
