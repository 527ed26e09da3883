"""Units silent and bins lost: what is drawn, who is given what, and how the loss is counted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ilqr_training.evaluation.baselines import KALMAN, fit_baselines
from ilqr_training.evaluation.stress import CLEAN, silent_units, under_stress
from ilqr_training.evaluation.stress_scores import Stress, StressPlan, StressRow
from ilqr_training.readout.causal import causal_pass
from ilqr_vae.artifact import Artifact, load_artifact
from ilqr_vae.cli import main
from ilqr_vae.errors import ConfigError
from ilqr_vae.recordings import Recording, load_recording
from ilqr_vae.scoring.score import OURS, WIENER
from ilqr_vae.streaming.unit_watch import DEAD, UnitWatch
from rig import N_BINS, SPLIT, make_model, spec, write_recording

N = 8
BINS = SPLIT.bins("test", N_BINS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("m") / "m.safetensors", n_units=N)


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recording(tmp_path_factory.mktemp("r") / "r.mat", n_units=N)


def opened(model: Path, recording: Path) -> tuple[Artifact, Recording]:
    return load_artifact(model), load_recording(recording, spec())


def test_the_seed_decides_which_units() -> None:
    one, again, other = (silent_units(40, 0.25, seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one, again)
    assert len(set(one.tolist())) == 10
    assert one.tolist() != other.tolist()


def test_losses_and_shares_of_them() -> None:
    rows = (
        StressRow("x", OURS, "", (0.8, 0.9), 0.9),
        StressRow("x", "GRU", "zeros", (0.3, 0.5), 0.8),
        StressRow("x", "GRU", "mean counts", (0.7, 0.7), 0.8),
        StressRow("x", WIENER, "zeros", (0.9,), 0.8),
    )
    found = Stress(StressPlan(), 4, rows)
    assert rows[0].loss == pytest.approx(0.05)
    assert found.share(rows[1]) == pytest.approx(0.05 / 0.4)
    assert np.isnan(found.share(rows[3]))  # one that loses nothing
    assert [cell[-1] for cell in found.table().rows] == ["", "0.12", "0.50", "–"]


def test_everyone_under_stress(model: Path, recording: Path) -> None:
    artifact, read = opened(model, recording)
    rivals = tuple(fit_baselines(read, SPLIT, (WIENER, KALMAN)).values())
    plan = StressPlan(silent=0.25, lost=(0.2,), draws=2, seed=1)
    found = under_stress(artifact.estimator(), read, BINS, rivals, plan)
    assert read.kinematics is not None
    conditions = {r.condition: None for r in found.rows}
    silent, announced, lost = list(conditions)[2:]
    assert list(conditions)[:2] == [CLEAN, f"{CLEAN}, units watched"]
    assert [r.decoder for r in found.of(CLEAN, WIENER) + found.of(CLEAN, KALMAN)]
    assert {r.given for r in found.of(announced, WIENER)} == {"zeros", "mean counts"}
    assert {r.given for r in found.of(lost, WIENER)} == {"zeros", "last value", "mean counts"}
    assert {r.given for r in found.of(lost, KALMAN)} == {"missing bins", "mean counts"}
    assert all(len(r.r2) == 2 for r in found.rows if not r.condition.startswith(CLEAN))
    # units announced as silent are units never seen: what they did cannot matter
    gone = silent_units(N, 0.25, 1)
    observed = np.ones(read.counts.shape, dtype=bool)
    observed[BINS[0] : BINS[1], gone] = False
    unseen = replace(read, observed=observed)
    run_in = 100
    alone = causal_pass(artifact.estimator(), unseen, *BINS, run_in=run_in).kinematics
    error = ((alone - read.kinematics[slice(*BINS)]) ** 2).sum(0)
    truth = read.kinematics[slice(*BINS)]
    total = ((truth - truth.mean(0)) ** 2).sum(0)
    (ours,) = found.of(announced, OURS)
    assert ours.r2[0] == pytest.approx(float((1 - error / total).mean()))
    covered = {i.condition: i for i in found.intervals}
    assert list(covered) == list(conditions)
    std = causal_pass(artifact.estimator(), unseen, *BINS, run_in=run_in).kinematics_std
    inside = np.abs(alone - truth) <= 1.6448536 * std
    one_draw = under_stress(artifact.estimator(), read, BINS, (), replace(plan, draws=1, lost=()))
    assert one_draw.intervals[-1].coverage == pytest.approx(float(inside.mean()))
    assert len(covered[lost].by_decoded_speed.coverage) == len(covered[lost].by_speed.ratio) == 4
    # a draw stands on its own
    second = under_stress(artifact.estimator(), read, BINS, (), replace(plan, draws=1, seed=2))
    assert second.of(silent, OURS)[0].r2[0] == found.of(silent, OURS)[0].r2[1]
    assert second.of(lost, OURS)[0].r2[0] == found.of(lost, OURS)[0].r2[1]


def test_units_are_watched_as_the_service_does(model: Path, recording: Path) -> None:
    artifact, read = opened(model, recording)
    with torch.no_grad():  # rates at which silence is soon improbable
        artifact.model.group("spikes").b.fill_(float(np.log(2.0)))
        artifact.model.group("spikes").C.mul_(0.01)
    counts = read.counts.copy()
    counts[:] = 2
    counts[150:, 3] = 0
    steady = replace(read, counts=counts)
    result = causal_pass(artifact.estimator(), steady, 100, N_BINS, watch=True)
    assert result.masked is not None
    assert result.masked[:, [u for u in range(N) if u != 3]].sum() == 0
    since = int(np.argmax(result.masked[:, 3])) + 100
    assert 150 + DEAD / 2.5 < since < 150 + DEAD / 1.5
    assert result.masked[since - 100 :, 3].all()
    # the same flags, bin by bin, from what the watch is given
    watch = UnitWatch.fresh(N)
    for t in range(100):
        watch = watch.after(counts[t].astype(float), None, np.full(N, 2.0))
    for t, masked in enumerate(result.masked):
        np.testing.assert_array_equal(watch.masked, masked)
        watch = watch.after(counts[t + 100].astype(float), None, result.rates[t])
    # and they are masked for the estimate: as if the unit had not been observed from there on
    observed = np.ones(counts.shape, dtype=bool)
    observed[since:, 3] = False
    told = causal_pass(artifact.estimator(), replace(steady, observed=observed), 100, N_BINS)
    np.testing.assert_array_equal(told.kinematics, result.kinematics)
    with pytest.raises(ValueError, match="one stream"):
        causal_pass(artifact.estimator(), steady, 100, N_BINS, watch=True, streams=2)


def test_a_stream_that_begins_anew_is_not_held_against_the_last_prediction(
    model: Path, recording: Path
) -> None:
    artifact, read = opened(model, recording)
    broken = replace(read, breaks=np.array([50], dtype=np.int64))
    result = causal_pass(artifact.estimator(), broken, 0, 100, watch=True)
    assert result.masked is not None
    assert np.isfinite(result.kinematics).all()


@pytest.mark.parametrize(
    ("plan", "named"),
    [
        (StressPlan(silent=1.0), "--silent"),
        (StressPlan(lost=(0.1, 0.0)), "--lost"),
        (StressPlan(draws=0), "--draws"),
    ],
)
def test_what_cannot_be_asked_for(plan: StressPlan, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        plan.checked()


def test_the_command_shows_and_writes_it(
    model: Path, recording: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, page = tmp_path / "e.json", tmp_path / "e.html"
    said = ["evaluate", str(model), "--recording", str(recording), "--stress", "--no-gru"]
    options = ["--silent", "0.5", "--lost", "0.4", "--draws", "1", "--seed", "7"]
    assert main([*said, *options, "--json", str(out), "--html", str(page)]) == 0
    written = json.loads(out.read_text())
    rows = written["stress"]["rows"]
    assert written["stress"]["seed"] == 7
    assert {r["condition"] for r in rows} > {"50 % of units silent, announced", "40 % of bins lost"}
    assert {r["decoder"] for r in rows} == {OURS, WIENER, KALMAN}
    assert written["stress"]["intervals"][0]["coverage_90"] == pytest.approx(
        written["scores"][OURS]["coverage_90"]
    )
    clean = {r["decoder"]: r["r2"] for r in rows if r["condition"] == CLEAN}
    for name, r2 in clean.items():
        assert r2 == pytest.approx(written["scores"][name]["r2"], abs=1e-9)
    assert len(written["coverage_90_by_speed"]["coverage"]) == 4
    shown = capsys.readouterr().out
    html = page.read_text()
    for words in (
        "50 % of units silent, unannounced",
        "last value",
        "our loss of its",
        "by decoded speed",
    ):
        assert words in shown
        assert words in html
    assert "by quarter of speed" in shown
    assert "Calibration by true speed" in html
    assert main([*said, "--lost", "1.5"]) == 2
    assert "--lost: expected between 0 and 1, got 1.5" in capsys.readouterr().err
