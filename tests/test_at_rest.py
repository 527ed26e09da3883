"""Kinematics that do not move, in a channel or in a part: said in words, before the work."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import io

from ilqr_vae.artifact import load_artifact
from ilqr_vae.cli import main
from ilqr_vae.recordings import Recording, SplitSpec
from ilqr_vae.recordings.split import at_rest
from ilqr_vae.scoring.score import OURS, WIENER, score_decodes
from rig import N_BINS, SPLIT, write_recording
from tiny import config, write_config

TRAIN, VALIDATION, TEST = (SPLIT.bins(span, N_BINS) for span in ("train", "validation", "test"))


def resting(path: Path, *parts: tuple[int, int], channel: int | slice = slice(None)) -> Path:
    """``write_recording``'s file with the hand held still in these bins."""
    write_recording(path, n_units=5)
    held = io.loadmat(path, variable_names=["spikes", "velocity"])
    for start, stop in parts:
        held["velocity"][channel, start:stop] = 0.1  # whose mean is not 0.1 to the last bit
    io.savemat(path, {"spikes": held["spikes"], "velocity": held["velocity"]})
    return path


def train(folder: Path, recording: Path, *options: str) -> int:
    settings = write_config(folder / "c.toml", config(steps=2, validate_every=1))
    out = str(folder / "m.safetensors")
    return main(["train", str(settings), "--recording", str(recording), "--out", out, *options])


@pytest.mark.parametrize(("part", "name"), [(TRAIN, "train"), (VALIDATION, "validation")])
@pytest.mark.parametrize("options", [(), ("--check",)])
def test_rest_in_a_part_is_refused_before_training(
    part: tuple[int, int],
    name: str,
    options: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train(tmp_path, resting(tmp_path / "r.mat", part), *options) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"expected movement in the {name} part" in error
    assert "got none: vx, vy do not vary" in error
    assert not (tmp_path / "m.safetensors.checkpoint").exists()


def test_a_session_that_rests_is_refused_before_all_are_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = write_recording(tmp_path / "one.mat", n_units=5)
    two = resting(tmp_path / "two.mat", VALIDATION)
    assert train(tmp_path, one, "--recording", str(two)) == 2
    assert "movement in the validation part" in capsys.readouterr().err
    assert not (tmp_path / "m.safetensors").exists()


def test_a_check_of_a_recording_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert train(tmp_path, tmp_path / "later.nwb", "--check") == 2


def test_a_channel_that_never_moves_is_trained_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recording = resting(tmp_path / "r.mat", (0, N_BINS), channel=1)
    assert train(tmp_path, recording, "--json", str(tmp_path / "t.json")) == 0
    err = capsys.readouterr().err
    assert "vy: no movement in the train and validation and test part; R2 there says nothing" in err
    manifest = load_artifact(tmp_path / "m.safetensors").manifest
    assert "r2.vy" not in manifest.scores
    assert np.isfinite(list(manifest.scores.values())).all()
    told = json.loads((tmp_path / "t.json").read_text())
    assert [w["name"] for w in told["warnings"]] == ["at-rest"]
    assert [w.name for w in manifest.warnings] == ["at-rest"]
    assert set(told["baselines"]) == {WIENER, "Kalman filter"}  # neither refuses it
    page, numbers = tmp_path / "e.html", tmp_path / "e.json"
    arguments = ["--recording", str(recording), "--json", str(numbers), "--html", str(page)]
    assert main(["evaluate", str(tmp_path / "m.safetensors"), *arguments]) == 0
    out = capsys.readouterr().out
    head, *rows = (line for line in out.splitlines() if "mean R2" in line or "iLQR-VAE" in line)
    assert {row[head.index("r2.vy") :].split()[0] for row in rows} == {"–"}
    assert "nan" not in out
    scores = json.loads(numbers.read_text())
    ours = scores["scores"][OURS]
    assert ours["r2.vy"] is None
    assert ours["r2"] == ours["r2.vx"]
    assert "No movement in these bins, so no R2: vy." in scores["notes"]
    assert [w["name"] for w in scores["warnings"]] == ["at-rest"]
    for said in ("No movement in these bins, so no R2: vy.", "vy: no movement in the train"):
        assert said in page.read_text()


def test_rest_in_the_test_part_is_a_note_then_and_words_in_the_scores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recording = resting(tmp_path / "r.mat", TEST)
    assert train(tmp_path, recording) == 0
    assert "vx: no movement in the test part" in capsys.readouterr().err
    numbers = tmp_path / "e.json"
    arguments = ["--recording", str(recording), "--json", str(numbers)]
    assert main(["evaluate", str(tmp_path / "m.safetensors"), *arguments]) == 0
    assert "No movement in these bins, so no R2: vx, vy." in capsys.readouterr().out
    told = json.loads(numbers.read_text())
    assert told["scores"][OURS]["r2"] is None
    assert told["intervals_95"] == {}
    assert 0 <= told["scores"][OURS]["coverage_90"] <= 1


def recording_of(kinematics: np.ndarray) -> Recording:
    return Recording(
        counts=np.random.default_rng(0).poisson(2.0, (N_BINS, 4)).astype(np.uint16),
        bin_width=1.0,
        unit_names=tuple("abcd"),
        kinematics=kinematics,
        kinematic_names=tuple(f"k{i}" for i in range(kinematics.shape[1])),
    )


def test_a_part_that_hardly_moves_is_said() -> None:
    k = np.random.default_rng(1).normal(size=(N_BINS, 2))
    k[VALIDATION[0] : VALIDATION[1], 0] *= 1e-3
    (said,) = at_rest(recording_of(k), SPLIT)
    assert said.name == "at-rest"
    assert said.text == "k0: hardly any movement in the validation part; R2 there says little."


def test_a_still_channel_changes_no_score_of_the_others() -> None:
    rng = np.random.default_rng(2)
    k = rng.normal(size=(N_BINS, 2)).cumsum(0)
    still = np.concatenate([k, np.full((N_BINS, 1), 0.1)], axis=1)
    split, bins = SplitSpec(train=0.5, validation=0.7), (280, 400)
    noise = rng.normal(size=(120, 2))
    two = score_decodes(
        recording_of(k), split, bins=bins, decoded=k[280:] + noise, std=np.ones((120, 2))
    )
    wider = [np.c_[a, np.full(120, b)] for a, b in ((k[280:] + noise, 0.1), (np.ones((120, 2)), 0))]
    three = score_decodes(recording_of(still), split, bins=bins, decoded=wider[0], std=wider[1])
    assert three.actual == two.actual
    assert three.by_speed == two.by_speed
    for name in (OURS, WIENER):
        assert three.methods[name]["r2"] == pytest.approx(two.methods[name]["r2"], rel=1e-9)
        assert three.intervals[name]["r2"] == pytest.approx(two.intervals[name]["r2"], rel=1e-6)
        assert np.isnan(three.methods[name]["r2.k2"])


def test_a_training_log_that_cannot_be_read_ends_no_evaluation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recording = write_recording(tmp_path / "r.mat", n_units=5)
    assert train(tmp_path, recording) == 0
    (tmp_path / "m-log" / "events.out.tfevents.0").mkdir()
    assert main(["evaluate", str(tmp_path / "m.safetensors"), "--recording", str(recording)]) == 0
    assert "No learning curve of the bound: m-log cannot be read" in capsys.readouterr().out
