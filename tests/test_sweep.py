"""Sweeps by Ray Tune: spaces, methods, a driver that is killed, and the model that comes out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from feeder import Feeder, bin_, open_
from ilqr_training.config import TrainConfig
from ilqr_training.distributed.halving import Halving
from ilqr_training.distributed.space import at, parse
from ilqr_vae.artifact import load_artifact
from ilqr_vae.cli import main
from ilqr_vae.errors import ConfigError
from ilqr_vae.protocol import messages
from process import ENVIRONMENT
from rig import serving, write_recording
from tiny import config, write_config

N_UNITS = 5
TRIALS = 8 if os.environ.get("CHAOS") == "full" else 3
RATE = "training.learning_rate"


@pytest.fixture
def command(tmp_path: Path, ray_cluster: str) -> list[str]:
    recording = write_recording(tmp_path / "r.mat", n_units=N_UNITS)
    settings = write_config(tmp_path / "c.toml", config(steps=2, validate_every=1))
    given = ["sweep", str(settings), "--recording", str(recording), "--address", ray_cluster]
    return [*given, "--search", f"{RATE}=log(1e-3, 1e-1)"]


def table(folder: Path) -> list[dict[str, Any]]:
    """The trials, without where their files are."""
    rows = json.loads((folder / "sweep.json").read_text())
    return [{k: v for k, v in row.items() if k != "model"} for row in rows]


def killed_midway(command: list[str], out: Path) -> None:
    """Run the driver until a trial has ended, and kill it."""
    words = [sys.executable, "-m", "ilqr_vae.cli", *command, "--out", str(out)]
    driver = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert driver.stderr is not None
    with driver, driver.stderr:
        said = _until_a_trial_ends(driver.stderr)
        driver.kill()
    assert said.startswith("trial ")
    assert not (out / "sweep.json").exists()


def _until_a_trial_ends(lines: Any) -> str:
    for line in lines:
        if line.startswith("trial "):
            return line
    return ""


def test_a_killed_sweep_goes_on_to_the_same_table_and_its_best_model_serves(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which trials are stopped depends on who reports first; what trials reach does not."""
    command += ["--search", "model.latents=[3, 4]", "--trials", str(TRIALS)]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    killed_midway(command, killed)
    assert main([*command, "--out", str(killed)]) == 0
    assert main([*command, "--out", str(whole)]) == 0
    rows = table(killed)
    assert len(rows) == TRIALS == len({row["point"][RATE] for row in rows})
    others = {str(row["point"]): row for row in table(whole)}
    for row in rows:
        other = others.pop(str(row["point"]))
        shorter, longer = sorted((row["curve"], other["curve"]), key=len)
        assert longer[: len(shorter)] == shorter
        assert row == other or {row["state"], other["state"]} != {"done"}
    done = [row["score"] for row in rows if row["state"] == "done"]
    assert {row["state"] for row in rows} <= {"done", "stopped early"}
    assert done == sorted(done, reverse=True)
    # what was reported before and after the kill is all compared
    halving = Halving(killed / "trials", time_attr="validation", metric="score", mode="max")
    halving.on_trial_add(None, SimpleNamespace(trial_id="one more"))
    for validations, scores in halving.recorded.items():
        curves = [dict(row["curve"]) for row in rows]
        assert scores == sorted(c[validations] for c in curves if validations in c)
    assert len(halving.recorded[1]) == TRIALS
    assert (killed / "sweep.png").read_bytes().startswith(b"\x89PNG")
    manifest = load_artifact(killed / "best.safetensors").manifest
    assert manifest.scores["r2"] == rows[0]["score"]
    assert manifest.latents == rows[0]["point"]["model.latents"]
    with (
        serving(killed / "best.safetensors") as service,
        Feeder(service.ingest, service.results) as feeder,
    ):
        feeder.subscribe("s")
        feeder.ask(open_("s", units=manifest.unit_names), messages.Opened)
        feeder.send(bin_("s", 0, np.ones(N_UNITS, dtype=np.uint16)))
        (answer,) = feeder.results(1)
        assert answer.model == manifest.model_id
    other = [*command, "--out", str(whole), "--seeds", "2"]
    capsys.readouterr()
    assert main(other) == 2
    assert "--out: expected a folder of the same sweep" in capsys.readouterr().err


def test_a_population_ends_with_a_model(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.chdir(tmp_path)
    given = [*command, "--trials", "3", "--method", "population", "--out", "out"]
    assert main(given) == 0
    (out / "sweep.json").unlink()
    assert main(given) == 0  # it was interrupted while it wrote the table
    rows = table(out)
    assert len(rows) == 3
    assert rows[0]["state"] == "done"
    assert all(1e-3 <= row["point"][RATE] <= 1e-1 for row in rows)
    assert load_artifact(out / "best.safetensors").manifest.scores["r2"] == rows[0]["score"]


def test_bayesian_search_averages_the_seeds_of_a_point(command: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = [*command, "--method", "bayesian", "--trials", "2", "--seeds", "2", "--no-early-stop"]
    assert main([*given, "--objective", "bits_per_spike", "--out", str(out)]) == 0
    rows = table(out)
    assert len({row["point"][RATE] for row in rows}) == 2
    for row in rows:
        assert 1e-3 <= row["point"][RATE] <= 1e-1
        assert len(set(row["seeds"])) == 2
        assert row["score"] == pytest.approx(np.mean(row["seeds"]))
    best = load_artifact(out / "best.safetensors").manifest
    assert best.scores["bits_per_spike"] == max(rows[0]["seeds"])


@pytest.mark.parametrize(
    ("search", "said"),
    [
        ("model.latent=[3]", "model.latent: expected a known key, did you mean model.latents"),
        ("model.latents=[3, 0]", "model.latents: expected int >= 1"),
        ("model.latents", "--search: expected KEY="),
        ("training.clip=uniform(2, 1)", "--search: expected KEY="),
        ("training.clip=log(0, 1)", "--search: expected KEY="),
        ("training.clip=normal(0, 1)", "--search: expected KEY="),
        ("training.clip=[", "--search: expected KEY="),
        ("training.learning_rate=uniform(-1, 1)", "training.learning_rate: expected"),
    ],
)
def test_a_space_that_cannot_be_is_refused(search: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse([search], TrainConfig())
    assert said in str(refused.value)


def test_a_space_knows_whole_numbers() -> None:
    texts = ["model.latents=log(4, 64)", "model.prior=['gaussian', 'student']"]
    latents, prior = parse(texts, TrainConfig())
    assert latents.whole
    drawn = {type(latents.domain.sample()) for _ in range(5)}
    assert all(issubclass(kind, int | np.integer) for kind in drawn)
    assert latents.clipped(70.2) == 64
    assert at(TrainConfig(), {"model.prior": prior.values[1]}).model.prior == "student"
    with pytest.raises(ConfigError, match="each key once"):
        parse([texts[0], texts[0]], TrainConfig())
