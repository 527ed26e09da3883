"""An archive of recordings as Ray tasks: results, failures by name, and only what is missing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from scipy import io

from ilqr_training.distributed.archive import recordings_in
from ilqr_vae import cluster
from ilqr_vae.artifact import load_artifact
from ilqr_vae.cli import main
from ilqr_vae.errors import ConfigError
from rig import make_model, write_recording
from tiny import config, write_config

N_UNITS = 5


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve recordings, one of them torn and one without spikes."""
    made = tmp_path / "archive"
    (made / "monday").mkdir(parents=True)
    for k in range(10):
        write_recording(made / f"monday/{k}.mat", n_units=N_UNITS, seed=k)
    (made / "torn.mat").write_bytes(b"MATLAB 5.0")
    io.savemat(made / "empty.mat", {"rates": [[1.0, 2.0]]})
    return made


def test_an_archive_of_twelve_two_broken(
    ray_cluster: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = make_model(tmp_path / "m.safetensors", n_units=N_UNITS), tmp_path / "out"
    command = ["archive", str(folder), "--model", str(model), "--out", str(out)]
    command += ["--address", ray_cluster]
    assert main(command) == 1
    said = capsys.readouterr()
    assert "10 of 12 recordings done, 2 failed" in said.out
    assert "torn.mat: " in said.err
    assert "empty.mat: " in said.err
    summary = json.loads((out / "summary.json").read_text())
    failed = {o["recording"]: o["error"] for o in summary if o["error"]}
    assert sorted(failed) == ["empty.mat", "torn.mat"]
    assert all("expected" in why for why in failed.values())
    assert all(-5 < o["scores"]["r2"] < 1 for o in summary if not o["error"])
    page = (out / "summary.html").read_text()
    assert "monday/3.mat" in page
    assert "empty.mat" in page
    results = sorted(out.rglob("*.mat.json"))
    assert len(results) == 12

    # again: only what is missing
    whole = {p: p.stat().st_mtime_ns for p in results}
    (out / "monday/4.mat.json").unlink()
    (out / "monday/5.mat.json").write_text('{"task": "eval')
    write_recording(folder / "empty.mat", n_units=N_UNITS)
    assert main(command) == 1
    assert "11 of 12" in capsys.readouterr().out
    again = {p for p in results if p.stat().st_mtime_ns != whole[p]}
    assert {p.name for p in again} == {
        "4.mat.json",
        "5.mat.json",
        "torn.mat.json",
        "empty.mat.json",
    }


def test_models_of_an_archive_decode_it(ray_cluster: str, tmp_path: Path) -> None:
    archive, models, out = tmp_path / "a", tmp_path / "models", tmp_path / "decodes"
    archive.mkdir()
    write_recording(archive / "x.mat", n_units=N_UNITS)
    settings = write_config(tmp_path / "c.toml", config(steps=2, validate_every=2))
    train = ["archive", str(archive), "--task", "train", "--config", str(settings)]
    assert main([*train, "--out", str(models), "--address", ray_cluster]) == 0
    outcome = json.loads((models / "x.mat.json").read_text())
    assert outcome["scores"]["r2"] == outcome["report"]["scores"]["r2"]
    decode = ["archive", str(archive), "--task", "decode", "--model", str(models)]
    assert main([*decode, "--out", str(out), "--address", ray_cluster]) == 0
    assert json.loads((out / "x.mat.json").read_text())["model"] == outcome["model"]
    assert (out / "x.mat.npz").stat().st_size > 0
    assert not list(models.rglob("*.checkpoint"))


def test_members_of_an_ensemble_are_trained_as_tasks(ray_cluster: str, tmp_path: Path) -> None:
    recording = write_recording(tmp_path / "r.mat", n_units=N_UNITS)
    settings = write_config(tmp_path / "c.toml", config(steps=2, validate_every=2, members=2))
    out = tmp_path / "m.safetensors"
    command = ["train", str(settings), "--recording", str(recording), "--out", str(out)]
    assert main([*command, "--no-baselines", "--address", ray_cluster]) == 0
    first, second = load_artifact(out).members
    assert not torch.equal(first.model.group("spikes").C, second.model.group("spikes").C)
    assert not list(tmp_path.glob("*.member-*"))
    (tmp_path / "m.safetensors.member-2.checkpoint").write_bytes(b"no checkpoint")
    assert main([*command, "--no-baselines", "--address", ray_cluster, "--resume"]) == 4


def test_a_text_file_lists_recordings(tmp_path: Path) -> None:
    write_recording(tmp_path / "a.mat", n_units=2)
    listed = tmp_path / "list.txt"
    listed.write_text("# mine\na.mat\n\nsub/b.nwb\n/elsewhere/c.nwb\n")
    found = recordings_in(listed)
    assert found["a.mat"] == tmp_path / "a.mat"
    assert found["sub/b.nwb"] == tmp_path / "sub/b.nwb"
    assert found["c.nwb"] == Path("/elsewhere/c.nwb")
    listed.write_text("a.mat\na.mat\n")
    with pytest.raises(ConfigError, match="mat twice"):
        recordings_in(listed)
    (tmp_path / "none").mkdir()
    with pytest.raises(ConfigError, match="none in"):
        recordings_in(tmp_path / "none")


def test_without_ray_the_verbs_say_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cluster, "find_spec", lambda _: None)
    assert main(["archive", str(tmp_path), "--out", str(tmp_path / "o")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == ("error: archive: expected the package ray; try: pip install '.[ray]', got none")
    assert os.listdir(tmp_path) == []
