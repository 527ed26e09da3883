"""The experiments, in small: each runs end to end, says what the table asks, and draws."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from ilqr_training.experiment_cli import settings_of
from ilqr_training.experiments import NAMES, find
from ilqr_training.experiments.driver import (
    FitConfig,
    NetConfig,
    TrialBatches,
    network,
    observed_of,
)
from ilqr_training.experiments.generators import (
    LinearSystem,
    duffing_trials,
    lorenz_bouts,
    sparse_inputs,
    stable_matrix,
)
from ilqr_training.experiments.inference import masks
from ilqr_training.experiments.linear import eigenvalue_error, input_r2
from ilqr_training.experiments.maze import read_layout
from ilqr_training.experiments.oscillators import ahead_r2
from ilqr_vae.artifact import GroupSpec
from ilqr_vae.cli import SUMMARIES, main
from ilqr_vae.errors import ConfigError, RecordingError
from ilqr_vae.progress import SILENT
from tiny import Recorder

CONFIGS = Path(__file__).parents[1] / "configs" / "experiments"

SMALL: dict[str, dict[str, Any]] = {
    "autonomous-linear": {
        "trials": 6,
        "bins": 20,
        "fit": {"steps": 3},
        "bound_samples": 2,
    },
    "lorenz": {
        "bouts": 6,
        "bins": 60,
        "autonomous": 50,
        "net": {"latents": 4, "inputs": 2},
        "test_bouts": 3,
        "pieces": [
            {"bins": 25, "fit": {"steps": 2, "batch": 4}},
            {"bins": 50, "fit": {"steps": 1, "batch": 3}},
        ],
    },
    "sparse-inputs": {
        "bins": 60,
        "probability": 0.2,
        "seeds": 2,
        "fit": {"steps": 3},
        "variants": [{"trials": 3, "bins": 20, "kind": "autoregressive"}],
    },
    "duffing": {
        "trials": 5,
        "test_trials": 4,
        "bins": 30,
        "units": 12,
        "net": {"latents": 4, "inputs": 2},
        "fit": {"steps": 2, "batch": 3},
    },
    "inference-gap": {
        "trials": 6,
        "bins": 20,
        "samples": 20,
        "checks": 2,
        "hidden": 4,
        "fit": {"steps": 4, "batch": 3},
    },
    "long-trial": {
        "chunks": 6,
        "lengths": [10, 20],
        "chunk": 20,
        "times": 3,
        "samples": 4,
        "fit": {"steps": 3, "batch": 3},
    },
    "missing-data": {
        "trials": 5,
        "bins": 30,
        "units": 10,
        "net": {"latents": 4, "inputs": 2},
        "fit": {"steps": 2, "batch": 3},
    },
    "maze-size": {
        "trials": 6,
        "bins": 10,
        "held_in": 6,
        "held_out": 3,
        "net": {"latents": 4, "inputs": 2},
        "fit": {"steps": 2, "batch": 3},
    },
}

KEYS = {
    "autonomous-linear": ("bound_free", "bound_forced", "initial_energy_share"),
    "lorenz": ("r2_30", "r2_50", "seconds", "on_attractor"),
    "sparse-inputs": ("input_r2", "eigenvalue_error", "input_r2_3x20_autoregressive"),
    "duffing": ("rate_r2",),
    "inference-gap": ("gap_ilqr", "gap_encoder", "smaller_throughout"),
    "long-trial": ("log_likelihood_long", "log_likelihood_chunked", "bound_gain"),
    "missing-data": ("bps_missing_masked", "bps_missing_unmasked", "bps_observed_masked"),
    "maze-size": ("seconds_per_step", "peak_memory_gb"),
}


def small(name: str) -> msgspec.Struct:
    """The experiment's own defaults, with sizes overridden at any depth."""

    def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
        return base | {k: merge(base[k], v) if isinstance(v, dict) else v for k, v in over.items()}

    kind = find(name).settings
    return msgspec.convert(merge(msgspec.to_builtins(kind()), SMALL[name]), kind)


@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_in_small(name: str, tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    progress = Recorder()
    outcome = find(name).run(small(name), 0, progress)
    assert progress.done
    for key in KEYS[name]:
        assert key in outcome.figures
        value = outcome.figures[key]
        assert np.isfinite(np.asarray(value, dtype=float)).all(), key
    json.dumps(outcome.figures)  # plain numbers all through
    assert outcome.draw is not None
    figure = Figure(figsize=(8, 3), layout="constrained")
    outcome.draw(figure)
    figure.savefig(tmp_path / "picture.png")


def test_same_seed_same_figures() -> None:
    runs = [find("sparse-inputs").run(small("sparse-inputs"), 3, SILENT) for _ in range(2)]
    assert runs[0].figures["input_r2_per_seed"] == runs[1].figures["input_r2_per_seed"]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda p: p.stem)
def test_configs_are_read(path: Path) -> None:
    name = next(n for n in sorted(NAMES, key=len, reverse=True) if path.stem.startswith(n))
    settings = settings_of(name, path)
    if path.stem == name:  # the file spells out the defaults
        assert settings == find(name).settings()


@pytest.mark.parametrize(
    ("name", "text", "field"),
    [
        ("sparse-inputs", "seeds = 0", "seeds"),
        ("sparse-inputs", "probability = 1.5", "probability"),
        ("sparse-inputs", "noise = -0.1", "noise"),
        ("sparse-inputs", "memory = nan", "memory"),
        ("sparse-inputs", "[[variants]]\ntrials = 0\nbins = 3", "variants.trials"),
        ("inference-gap", "[fit]\nsteps = 0", "fit.steps"),
        ("inference-gap", "[fit]\nlearning_rate = inf", "fit.learning_rate"),
        ("inference-gap", "[net]\nlatents = 0", "net.latents"),
        ("long-trial", "lengths = []", "lengths"),
        ("long-trial", "lengths = [50, 0]", "lengths"),
        ("lorenz", "pieces = []", "pieces"),
        ("lorenz", "bins = 40", "pieces"),
        ("lorenz", "horizons = [100]", "horizons"),
        ("lorenz", "[start]\nwindow = 3", "start.degree"),
        ("missing-data", "bins_missing = 1.0", "bins_missing"),
        ("duffing", "units = 0", "units"),
        ("maze-size", "trials = -1", "trials"),
        ("autonomous-linear", "bound_samples = 0", "bound_samples"),
    ],
)
def test_impossible_settings_are_named(tmp_path: Path, name: str, text: str, field: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        settings_of(name, path)
    assert caught.value.field == field


def test_every_experiment_has_a_config() -> None:
    assert {p.stem for p in CONFIGS.glob("*.toml")} >= set(NAMES)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "experiment" in SUMMARIES
    assert main(["experiment", "lorentz"]) == 2
    assert "experiment: expected one of autonomous-linear, lorenz" in capsys.readouterr().err
    bad = tmp_path / "bad.toml"
    bad.write_text("bouts = 'many'\n")
    assert main(["experiment", "lorenz", "--config", str(bad)]) == 2
    assert "bouts" in capsys.readouterr().err
    good = tmp_path / "small.toml"
    good.write_text(
        "trials = 4\nbins = 12\nbound_samples = 1\n[fit]\nsteps = 2\n"
        '[net]\ndynamics = "linear"\nlatents = 4\n'
    )
    out = tmp_path / "autonomous.json"
    command = [sys.executable, "-m", "ilqr_vae.cli", "experiment", "autonomous-linear"]
    options = ["--seed", "2", "--config", str(good), "--json", str(out), "--threads", "1"]
    done = subprocess.run(
        [*command, *options],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text())
    assert figures["seed"] == 2
    assert figures["settings"]["trials"] == 4
    assert out.with_suffix(".png").stat().st_size > 1000
    assert "bound free" in done.stdout


# ---- generators and scores ----------------------------------------------------------------------


def test_lorenz_bouts_lie_on_the_attractor() -> None:
    x = lorenz_bouts(np.random.default_rng(0), 50, 100)
    assert x.shape == (50, 100, 3)
    assert 20 < x[..., 2].mean() < 27
    assert 7 < x[..., 0].std() < 9
    assert np.abs(x).max() < 60


def test_duffing_falls_into_both_wells() -> None:
    x = duffing_trials(np.random.default_rng(0), 60, 1500)
    end = x[:, -1, 0]
    assert 0.2 < (end > 0).mean() < 0.8
    assert np.abs(np.abs(end) - 1).max() < 0.2


def test_linear_data_and_input_recovery_scores() -> None:
    rng = np.random.default_rng(0)
    A = stable_matrix(3, rng, slowest=0.97, fastest=0.9)
    moduli = np.abs(np.linalg.eigvals(A))
    assert moduli.min() >= 0.9 - 1e-9
    assert moduli.max() <= 0.97 + 1e-9
    u = sparse_inputs(rng, 4, 2000, 3, 0.03)
    active = (np.abs(u) > 0).all(-1)
    assert 0.02 < active.mean() < 0.04
    data = LinearSystem(A, np.eye(3), np.eye(3)).run(rng, u, noise=0.0, start=np.zeros((4, 3)))
    np.testing.assert_allclose(data.values, data.states[:, 1:])
    M = rng.normal(size=(3, 3))
    assert input_r2(u, u @ M) == pytest.approx(1.0)
    assert input_r2(u, rng.normal(size=u.shape)) < 0.05
    T = rng.normal(size=(3, 3))
    assert eigenvalue_error(A, T @ A @ np.linalg.inv(T)) < 1e-8


def test_ahead_r2_of_a_perfect_forecast_is_one() -> None:
    y = np.random.default_rng(0).normal(size=(3, 20, 2))
    f = np.zeros((3, 20, 5, 2))
    for k in range(1, 6):
        f[:, : 20 - k, k - 1] = y[:, k:]
    assert ahead_r2(y, f, 5) == 1.0
    f[:, :, 4] = y[:, 5:].mean(1, keepdims=True)
    assert ahead_r2(y, f, 5) == pytest.approx(0.0)


def test_masks_have_the_shares_asked_for() -> None:
    bins, units = masks(np.random.default_rng(0), (4, 50, 20), 0.3, 0.2)
    assert (bins.sum(1) == 35).all()
    assert (units.sum(2) == 16).all()


def test_trials_pass_through_every_one_before_repeating() -> None:
    model = network(
        NetConfig(dynamics="linear", latents=2, inputs=1),
        GroupSpec(family="gaussian", channels=1),
        seed=0,
        dtype="float64",
    )
    trials = TrialBatches(model, observed_of(model, np.zeros((6, 4, 1))), 0)
    seen = torch.cat([trials.draw(3), trials.draw(3)])
    assert sorted(seen.tolist()) == list(range(6))
    z, u = torch.randn(2, 5, 2).double(), torch.randn(2, 4, 1).double()
    index = torch.tensor([1, 4])
    trials.remember(index, z, u)
    z0, warm = trials.warm(index)
    torch.testing.assert_close(z0, z[:, 0])
    torch.testing.assert_close(warm, u)


def test_learning_rate_falls_from_one_end_to_the_other() -> None:
    config = FitConfig(steps=100, learning_rate=0.1, final_rate=0.01)
    rates = [config.rate(k) for k in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[-1] == pytest.approx(0.01)
    assert (np.diff(rates) <= 0).all()


def test_maze_file_must_have_the_layout(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="train_spikes_heldin"):
        read_layout(tmp_path / "absent.h5")


def test_unknown_experiment() -> None:
    with pytest.raises(ConfigError, match="experiment: expected one of"):
        find("maze")
