"""Each ready configuration on a small file of its layout: two steps of training, then evaluate."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from ilqr_training.config import load_config
from ilqr_training.fit.train import train
from ilqr_vae.artifact import load_artifact
from ilqr_vae.cli import main
from ilqr_vae.recordings import load_recording
from ilqr_vae.recordings.trials import in_course
from layouts import area2_bump, mc_maze, mc_rtt, nlb_hdf5, reaches, self_paced
from rig import serving
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


def test_a_stream_of_labelled_trials_is_scored_in_the_test_trials_alone(tmp_path: Path) -> None:
    recording = mc_maze(tmp_path / "r.nwb")
    config, model = small("mc_maze", tmp_path / "c.toml"), tmp_path / "m.safetensors"
    said = ("--recording", str(recording))
    assert main(["train", str(config), *said, "--out", str(model), "--threads", "1"]) == 0
    out = tmp_path / "r.json"
    with serving(model) as service:
        where = ("--to", service.ingest, "--speed", "max", "--json", str(out))
        assert main(["replay", str(recording), *where]) == 0
        report = json.loads(out.read_text())
        bare = tmp_path / "bare.nwb"
        shutil.copy(recording, bare)
        with h5py.File(bare, "r+") as raw:
            del raw["intervals/trials"]
        assert main(["replay", str(bare), *where]) == 0
        plain = json.loads(out.read_text())

    spec = load_config(config).data
    windows, ran = load_recording(recording, spec), load_recording(recording, spec.as_it_ran())
    begin = ran.start_time + 0.02 * np.arange(len(ran))
    tested = np.zeros(len(ran), dtype=bool)
    onsets = reaches(30, 1.2, 0.45).onset[3::6]  # those labelled val
    for onset in onsets:
        tested |= (begin > onset - 0.25 - 1e-9) & (begin + 0.02 < onset + 0.45 + 1e-9)
    part, inside = in_course(ran, windows, spec.split.occupied("test", windows))
    np.testing.assert_array_equal(inside, tested)
    np.testing.assert_array_equal(part.scored, ran.scored & tested)
    assert part.trials is not None
    moved = ran.start_time + 0.02 * part.trials.events["move_onset_time"]
    np.testing.assert_allclose(moved, onsets)
    assert report["bins"] == np.ptp(np.flatnonzero(tested)) + 1
    assert report["recording"]["bins_of_span"] == tested.sum()
    assert report["scored_bins"] == part.scored.sum()
    within = f"{tested.sum()} bins inside 5 trials of the test part"
    assert any(within in note for note in report["notes"])
    in_time = load_recording(bare, spec.as_it_ran())
    start, _ = spec.split.occupied("test", in_time)
    assert plain["recording"]["start"] == start  # no trials are there: by time
    assert any("got no trials" in note for note in plain["notes"])


def test_the_benchmarks_hdf5_trains_with_and_without_behaviour(tmp_path: Path) -> None:
    for behaviour in (True, False):
        recording = nlb_hdf5(tmp_path / f"{behaviour}.h5", behaviour=behaviour)
        data = {"mode": "trials", "bin_width": 0.02, "min_rate": 0.0, "lag": 0.0}
        config = small("mc_rtt", tmp_path / "c.toml", data=data)
        model = tmp_path / "m.safetensors"
        done = train(load_config(config), recording, model, Recorder())
        assert ("r2" in done.manifest.scores) == behaviour
        assert np.isfinite(done.manifest.scores["bits_per_spike"])
