"""Training on a tiny recording: it learns, repeats itself, resumes, and fails cleanly."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy import io
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from ilqr_training.fit.build import build_model
from ilqr_training.fit.crops import Crops, prepare
from ilqr_training.fit.train import checkpoint_path
from ilqr_vae.artifact import load_artifact
from ilqr_vae.cli import main
from ilqr_vae.errors import RecordingError, TrainingError
from ilqr_vae.model.generative import Model
from ilqr_vae.recordings import Recording, load_recording
from rig import N_BINS, SPLIT, write_recording
from tiny import Recorder, config, fit, same_tensors, write_config


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recording") / "reach.mat"
    return write_recording(path, n_units=6)


@pytest.fixture(scope="module")
def whole(recording: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run's model."""
    out = tmp_path_factory.mktemp("whole") / "m.safetensors"
    fit(recording, out)
    return out


def test_the_bound_rises(recording: Path, tmp_path: Path) -> None:
    settings = config(steps=50, batch=8, validate_every=0, learning_rate=0.02)
    done, _ = fit(recording, tmp_path / "m.safetensors", settings)
    bounds = [r.bound for r in done.reports]
    assert [r.step for r in done.reports] == list(range(1, 51))
    assert np.mean(bounds[-10:]) > np.mean(bounds[:10]) + 0.5
    assert all(np.isfinite(list(vars(r).values())).all() for r in done.reports)
    assert done.steps == 50
    assert done.best_step == 50
    for r in done.reports:
        assert r.bound == pytest.approx(r.spikes + r.kinematics - r.kl)


def test_what_is_written_is_what_was_scored(recording: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    done, progress = fit(recording, out)
    artifact = load_artifact(out)
    manifest = artifact.manifest
    assert msgspec.json.encode(manifest) == msgspec.json.encode(done.manifest)
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]  # no checkpoint is left
    assert {"r2", "r2.vx", "r2.vy", "coverage_90", "bits_per_spike"} <= manifest.scores.keys()
    assert manifest.kinematic_names == ("vx", "vy")
    assert manifest.data.split == SPLIT
    assert manifest.provenance["recording"] == "reach.mat"
    assert manifest.provenance["seed"] == "5"
    assert manifest.config["training"]["steps"] == 12
    assert done.best_step == max(done.history, key=lambda point: point[1])[0]
    assert [step for step, _ in done.history] == [4, 8, 12]
    validated = [line for line in progress.lines if "causal R2" in line]
    for (step, score), line in zip(done.history, validated, strict=True):
        assert line.startswith(f"step {step}: causal R2 {score:.3f}, ")
    assert done.data.train == (0, N_BINS // 2)


def test_the_same_seed_is_the_same_model_and_another_is_not(
    recording: Path, whole: Path, tmp_path: Path
) -> None:
    fit(recording, tmp_path / "same.safetensors")
    same_tensors(whole, tmp_path / "same.safetensors")
    fit(recording, tmp_path / "other.safetensors", config(seed=6))
    a, b = load_file(whole), load_file(tmp_path / "other.safetensors")
    assert not torch.equal(a["model.dynamics.hidden"], b["model.dynamics.hidden"])


@pytest.mark.parametrize("after", [1, 4, 7])
def test_an_interrupted_run_resumes_to_the_same_bits(
    recording: Path, whole: Path, tmp_path: Path, after: int
) -> None:
    out = tmp_path / "m.safetensors"
    with pytest.raises(KeyboardInterrupt):
        fit(recording, out, progress=Recorder(interrupt_after=after))
    assert not out.exists()
    assert checkpoint_path(out).exists() == (after > 4)
    done, _ = fit(recording, out, resume=True)
    assert done.reports[0].step == (5 if after > 4 else 1)
    same_tensors(whole, out)
    assert not checkpoint_path(out).exists()


def test_a_killed_process_resumes_to_the_same_bits(
    recording: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "m.safetensors"
    settings = write_config(tmp_path / "c.toml", config())
    command = [
        *(sys.executable, "-m", "ilqr_vae.cli", "train", str(settings)),
        *("--recording", str(recording), "--out", str(out), "--threads", "1"),
    ]
    killed = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    with killed:
        assert killed.stderr is not None
        for line in killed.stderr:
            if line.startswith("step 8"):  # step 4's checkpoint is written, step 8's perhaps
                break
        killed.send_signal(signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    assert checkpoint_path(out).exists()
    assert main([*command[3:], "--resume"]) == 0
    same_tensors(whole, out)


def test_a_checkpoint_of_another_run_or_of_nothing_is_refused(
    recording: Path, tmp_path: Path
) -> None:
    out = tmp_path / "m.safetensors"
    with pytest.raises(KeyboardInterrupt):
        fit(recording, out, progress=Recorder(interrupt_after=5))
    kept = checkpoint_path(out).read_bytes()
    with pytest.raises(TrainingError, match="of this run, got another's"):
        fit(recording, out, config(seed=6), resume=True)
    assert checkpoint_path(out).read_bytes() == kept
    for content in (b"", b"not a checkpoint", kept[: len(kept) // 2]):
        checkpoint_path(out).write_bytes(content)
        with pytest.raises(TrainingError, match="a readable checkpoint"):
            fit(recording, out, resume=True)
    for other in ({"weights": torch.zeros(2)}, torch.zeros(2)):
        torch.save(other, checkpoint_path(out))
        with pytest.raises(TrainingError, match="a checkpoint of train, got something else"):
            fit(recording, out, resume=True)
    assert not out.exists()


def test_without_resume_a_checkpoint_is_not_read(
    recording: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "m.safetensors"
    checkpoint_path(out).write_bytes(b"left over")
    fit(recording, out)
    same_tensors(whole, out)


def test_training_stops_early_and_keeps_the_best(recording: Path, tmp_path: Path) -> None:
    settings = config(steps=10, validate_every=1, patience=2, learning_rate=1e-12)
    done, _ = fit(recording, tmp_path / "m.safetensors", settings)
    scores = [score for _, score in done.history]
    best = int(np.argmax(scores))
    assert done.best_step == best + 1
    assert done.steps == min(best + 3, 10)


@pytest.mark.parametrize("posterior", ["kronecker", "laplace"])
def test_without_kinematics(recording: Path, tmp_path: Path, posterior: str) -> None:
    out = tmp_path / "m.safetensors"
    fit(recording, out, config(kinematics=False, posterior=posterior, steps=4))
    artifact = load_artifact(out)
    assert artifact.readout is None
    assert set(artifact.manifest.scores) == {"bits_per_spike", "iterations"}
    assert artifact.manifest.kinematic_names == ()
    assert set(artifact.manifest.model.groups) == {"spikes"}


@pytest.mark.parametrize("changes", [{"exact_gradient": True}, {"dtype": "float64"}])
def test_other_ways_to_train(recording: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    out = tmp_path / "m.safetensors"
    done, _ = fit(recording, out, config(steps=4, **changes))
    assert all(np.isfinite(r.bound) for r in done.reports)
    tensors = load_file(out)
    stored = torch.float64 if "dtype" in changes else torch.float32
    assert tensors["model.dynamics.hidden"].dtype == stored


def scalars(folder: Path) -> dict[str, list[int]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: [e.step for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_the_log_has_every_step_once(recording: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "m.safetensors", tmp_path / "log"
    with pytest.raises(KeyboardInterrupt):
        fit(recording, out, progress=Recorder(interrupt_after=6), log_dir=log)
    fit(recording, out, resume=True, log_dir=log)
    logged = scalars(log)
    for name in ("train/bound", "train/spikes", "train/kl", "train/gradient_norm"):
        assert logged[name] == list(range(1, 13)), name
    assert logged["validation/r2"] == [4, 8, 12]


def test_units_are_chosen_on_the_training_part(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    spikes = rng.poisson(1.0, (5, N_BINS))
    spikes[1] = 0
    spikes[3, : N_BINS // 2] = 0  # fires only after training ends
    io.savemat(tmp_path / "r.mat", {"spikes": spikes, "velocity": rng.normal(size=(2, N_BINS))})
    settings = config()
    made = load_recording(tmp_path / "r.mat", settings.data)
    data = prepare(made, settings.data, chunk=15)
    assert data.recording.unit_names == ("unit0", "unit2", "unit4")
    with pytest.raises(RecordingError, match=r"data.min_rate: .*the fastest unit has"):
        prepare(made, msgspec.structs.replace(settings.data, min_rate=1e4), chunk=15)
    with pytest.raises(RecordingError, match="at least 500 bins of training"):
        prepare(made, settings.data, chunk=500)


def test_kinematics_that_never_move_are_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    velocity = np.full((2, N_BINS), 3.0)
    io.savemat(tmp_path / "r.mat", {"spikes": rng.poisson(1.0, (3, N_BINS)), "velocity": velocity})
    with pytest.raises(RecordingError, match=r"kinematics"):
        fit(tmp_path / "r.mat", tmp_path / "m.safetensors")


def crops_of(*, gap: slice | None = None) -> tuple[Model, Crops]:
    """Crops of three bins from a recording of noise."""
    settings = config(kinematics=False)
    counts = np.random.default_rng(0).poisson(1.0, (100, 4)).astype(np.uint16)
    valid = np.ones(100, dtype=bool)
    if gap is not None:
        valid[gap] = False
    made = Recording(counts=counts, bin_width=0.05, unit_names=tuple("abcd"), valid=valid)
    data = prepare(made, settings.data, chunk=3)
    model = build_model(settings.model, data)
    return model, Crops(data, model, 3, 0)


def test_warm_starts_are_per_bin() -> None:
    """A crop starts where its own bins were last solved, whatever crop they were in."""
    model, crops = crops_of()
    z, u = torch.randn(2, 4, model.n), torch.randn(2, 3, model.m)
    crops.remember(torch.tensor([[3, 4, 5], [10, 11, 12]]), z, u)
    z0, warm = crops.warm(torch.tensor([[4, 5, 6]]))
    assert torch.equal(z0[0], z[0, 1])
    assert torch.equal(warm[0, :2], u[0, 1:])
    assert not bool(warm[0, 2].any())


def test_gaps_of_the_recording_are_masked() -> None:
    _, crops = crops_of(gap=slice(5, 9))
    seen: Tensor = crops.observed(torch.tensor([[4, 5, 6], [8, 9, 10]]))["spikes"].mask
    assert seen[:, :, 0].tolist() == [[1, 0, 0], [0, 1, 1]]
