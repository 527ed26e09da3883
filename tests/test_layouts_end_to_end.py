"""Each ready configuration on a small file of its layout: two steps of training, then evaluate."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ilqr_training.config import load_config
from ilqr_training.train import train
from ilqr_vae.artifact import load_artifact
from ilqr_vae.cli import main
from layouts import area2_bump, mc_maze, mc_rtt, nlb_hdf5, self_paced
from tiny import Recorder, write_config

CONFIGS = Path(__file__).parent.parent / "configs"
MAKERS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "mc_maze": ("nwb", mc_maze),
    "mc_rtt": ("nwb", mc_rtt),
    "area2_bump": ("nwb", area2_bump),
    "self_paced": ("mat", self_paced),
}


def small(name: str, path: Path, **sections: dict[str, object]) -> Path:
    """The shipped configuration, its sizes and lengths made small."""
    sizes = {
        "model": {"latents": 4, "inputs": 2},
        "training": {"steps": 2, "batch": 4, "iterations": 3, "validate_every": 0},
        "readout": {"hidden": 16, "steps": 120, "recurrent": 8, "recurrent_steps": 60},
    }
    for section, keys in sections.items():
        sizes[section] = sizes.get(section, {}) | keys
    return write_config(path, load_config(CONFIGS / f"{name}.toml"), **sizes)


@pytest.mark.parametrize("name", list(MAKERS))
def test_a_ready_configuration_trains_and_evaluates(name: str, tmp_path: Path) -> None:
    suffix, make = MAKERS[name]
    recording = make(tmp_path / f"r.{suffix}")
    config = small(name, tmp_path / "c.toml")
    model, out = tmp_path / "m.safetensors", tmp_path / "e.json"
    page = tmp_path / "e.html"
    said = ("--recording", str(recording))
    assert main(["train", str(config), *said, "--out", str(model), "--threads", "1"]) == 0
    options = ("--json", str(out), "--html", str(page))
    assert main(["evaluate", str(model), *said, *options]) == 0
    report = json.loads(out.read_text())
    assert np.isfinite(report["scores"]["iLQR-VAE"]["r2"])
    assert report["bins"] > 50
    assert load_artifact(model).manifest.data == load_config(config).data


def test_the_benchmarks_hdf5_trains_with_and_without_behaviour(tmp_path: Path) -> None:
    for behaviour in (True, False):
        recording = nlb_hdf5(tmp_path / f"{behaviour}.h5", behaviour=behaviour)
        data = {"mode": "trials", "bin_width": 0.02, "min_rate": 0.0, "lag": 0.0}
        config = small("mc_rtt", tmp_path / "c.toml", data=data)
        model = tmp_path / "m.safetensors"
        done = train(load_config(config), recording, model, Recorder())
        assert ("r2" in done.manifest.scores) == behaviour
        assert np.isfinite(done.manifest.scores["bits_per_spike"])
