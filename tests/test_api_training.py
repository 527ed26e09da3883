"""The public API: recordings by keywords, settings, and training."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ilqr_vae
from ilqr_training.config import ModelConfig, TrainConfig
from ilqr_vae.errors import ConfigError, RecordingError
from ilqr_vae.files import with_settings
from ilqr_vae.recordings import BehaviourSeries, write_nwb
from rig import make_model, write_recording
from test_api import DOCS, UNITS
from test_clients_import import run
from tiny import Recorder, config


def test_a_recording_is_read_by_keywords_and_inferred(tmp_path: Path) -> None:
    model = ilqr_vae.load(make_model(tmp_path / "m.safetensors", n_units=7, names=UNITS))
    path = write_recording(tmp_path / "r.mat", n_units=7)
    plain = ilqr_vae.load_recording(path, bin_width=0.05)
    assert plain.kinematics is None
    recording = ilqr_vae.load_recording(
        path, bin_width=0.05, kinematics="velocity", mat={"kinematic_rows": [1]}
    )
    assert recording.kinematics is not None
    assert recording.kinematics.shape[1] == 1
    with pytest.raises(
        ConfigError, match="bin_widht: expected a known key, did you mean bin_width"
    ):
        ilqr_vae.load_recording(path, bin_widht=0.02)
    with pytest.raises(RecordingError, match="model's 7 units"):
        model.infer(recording)  # whose units are called otherwise
    with pytest.raises(RecordingError, match=r"the model's 0.05 s, got 0.1 s"):
        model.infer(ilqr_vae.load_recording(path, bin_width=0.1))


def test_settings_go_by_path_by_name_or_by_section() -> None:
    made = with_settings(
        TrainConfig(),
        {
            "latents": 3,
            "bin_width": 0.02,
            "training.steps": 7,
            "readout": {"hidden": 0},
            "data": {"nwb": {"rate": 50.0}, "min_rate": 1.0},
        },
    )
    assert (made.model.latents, made.data.bin_width, made.training.steps) == (3, 0.02, 7)
    assert (made.readout.hidden, made.readout.lags) == (0, TrainConfig().readout.lags)
    assert (made.data.nwb.rate, made.data.min_rate) == (50.0, 1.0)
    for given, said in (
        ({"latens": 3}, "latens: expected a known key, did you mean latents"),
        ({"steps": 3}, r"steps: expected one of training.steps, readout.steps, got steps = 3"),
        ({"training": {"stepz": 3}}, "stepz: expected a known key, did you mean steps"),
        ({"latents": {"n": 3}}, "model.latents: expected a value, not a section"),
        ({"latents": "many"}, r"model\.latents: expected int, got str"),
        ({"training": 3}, "training: expected object, got int"),
    ):
        with pytest.raises(ConfigError, match=said):
            with_settings(TrainConfig(), given)


def test_training_from_python(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_recording(tmp_path / "r.mat", n_units=7)
    out = tmp_path / "m.safetensors"
    threads = torch.get_num_threads()
    given: dict[str, Any] = {"config": config(steps=3, validate_every=2), "readout": {"hidden": 0}}
    model = ilqr_vae.train(path, out=out, latents=3, recurrent=0, **given)
    assert torch.get_num_threads() == threads
    assert "step 2: causal R2" in capsys.readouterr().err
    assert (model.latents, model.kinematic_names) == (3, ("vx", "vy"))
    assert set(model.scores) >= {"r2", "bits_per_spike"}
    assert "r2" in repr(model)
    r = model.infer(ilqr_vae.load_recording(path, config().data))
    assert r.kinematics.shape == (400, 2)
    assert np.isfinite(r.kinematics_std).all()

    # the same again, silent, on a recording that is read already
    recording = ilqr_vae.load_recording(path, config().data)
    more: dict[str, Any] = given | {"latents": 3, "recurrent": 0}
    again = ilqr_vae.train(recording, out=tmp_path / "n.safetensors", progress=False, **more)
    assert again.scores == model.scores
    assert capsys.readouterr().err == ""
    recorder = Recorder()
    ilqr_vae.train(path, out=out, progress=recorder, **more)
    assert recorder.done["training"] == 3
    with pytest.raises(ConfigError, match="did you mean latents"):
        ilqr_vae.train(path, out=out, latent=3)
    with pytest.raises(ConfigError, match="out: expected a file in a folder"):
        ilqr_vae.train(path, out=tmp_path / "none" / "m.safetensors")


def test_without_the_trainer_training_says_what_to_install() -> None:
    code = """
import ilqr_vae
from ilqr_vae.errors import ConfigError
try:
    ilqr_vae.train("r.mat", out="m.safetensors")
except ConfigError as error:
    assert "pip install '.[engine]'" in str(error), error
else:
    raise AssertionError
"""
    done = run(("ilqr_training",), code)
    assert done.returncode == 0, done.stderr


def test_the_references_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    time = np.arange(0, 20, 0.01)
    hand = np.stack([np.cos(time), np.sin(2 * time)], 1)
    spikes = [np.sort(rng.uniform(0, 20, 200)) for _ in range(7)]
    series = BehaviourSeries("hand_vel", hand, "m/s", 100.0, ("vx", "vy"))
    write_nwb(tmp_path / "lab.nwb", spikes, series=[series])
    text = (DOCS / "reference" / "python.md").read_text()
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    assert 'training={"steps": 500}' in code  # as many as a test has time for
    small: dict[str, Any] = {"steps": 2, "batch": 4, "chunk": 15, "validate_every": 0}
    code = code.replace('training={"steps": 500}', "**quick")
    quick = {
        "training": small,
        "model": {"latents": 4, "inputs": 2},
        "readout": {"hidden": 0, "recurrent": 0, "lost": []},
    }
    space: dict[str, Any] = {"quick": quick}
    exec(code, space)
    assert isinstance(space["model"], ilqr_vae.TrainedModel)
    assert len(space["ahead"]) == 10
    assert "TrainedModel m.safetensors: 7 units" in capsys.readouterr().out


def test_every_model_key_is_documented() -> None:
    text = (DOCS / "method.md").read_text()
    for key in ModelConfig.__struct_fields__:
        assert f"`{key}`" in text, key
