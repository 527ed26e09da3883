"""Training on a tiny recording: it learns, repeats itself, resumes, and fails cleanly."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy import io
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor

from ilqr_training.config import TrainConfig
from ilqr_training.fit.build import build_model
from ilqr_training.fit.checkpoint import EarlyStopping
from ilqr_training.fit.crops import Crops, prepare
from ilqr_training.fit.loop import Run, gradient_step, start
from ilqr_training.fit.not_finite import find_not_finite
from ilqr_training.fit.train import Trained, checkpoint_path, train
from ilqr_vae.artifact import load_artifact
from ilqr_vae.cli import main
from ilqr_vae.errors import ConfigError, RecordingError, TrainingError
from ilqr_vae.inference.elbo import Bound
from ilqr_vae.model.generative import Model
from ilqr_vae.recordings import Recording, load_recording
from rig import N_BINS, SPLIT, write_recording
from tiny import Recorder, config, write_config

N_UNITS = 6


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recording") / "reach.mat"
    return write_recording(path, n_units=N_UNITS)


def fit(
    recording: Path, out: Path, settings: TrainConfig | None = None, **options: Any
) -> tuple[Trained, Recorder]:
    progress = options.pop("progress", Recorder())
    return train(settings or config(), recording, out, progress, **options), progress


def same_tensors(one: Path, other: Path) -> None:
    a, b = load_file(one), load_file(other)
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


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
    validated = [line for line in progress.lines if line.startswith("step ")]
    for (step, score), line in zip(done.history, validated, strict=True):
        assert line.startswith(f"step {step}: causal R2 {score:.4f}, ")
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


def fresh_run(recording: Path) -> tuple[Run, TrainConfig]:
    settings = config()
    data = prepare(load_recording(recording, settings.data), settings.data, chunk=15)
    model = build_model(settings.model, data)
    return start(model, Crops(data, model, 15, 0), settings.training), settings


@pytest.mark.parametrize(
    "name", ["groups.spikes.b", "dynamics.gate", "initial.log_scale", "groups.kinematics.C"]
)
def test_a_parameter_that_is_not_finite_is_named(recording: Path, name: str) -> None:
    run, settings = fresh_run(recording)
    gradient_step(run, settings.training)
    with torch.no_grad():
        dict(run.model.named_parameters())[name].view(-1)[0] = float("nan")
    said = rf"training step 2: .*parameter {name}\[0.*\] not finite"
    with pytest.raises(TrainingError, match=said):
        gradient_step(run, settings.training)
    assert run.step == 1


def test_a_bin_that_is_not_finite_is_named_with_its_group(recording: Path) -> None:
    run, settings = fresh_run(recording)
    crops = run.crops
    assert isinstance(crops, Crops)
    assert crops.kinematics is not None
    crops.kinematics[:, 1] = float("inf")
    said = r"data of group kinematics at bin \d+ of the training part not finite"
    with pytest.raises(TrainingError, match=said):
        gradient_step(run, settings.training)
    run, settings = fresh_run(recording)
    assert isinstance(run.crops, Crops)
    assert run.crops.kinematics is not None
    run.crops.kinematics[37] = 1e30  # finite, but its square is not
    named: list[str] = []
    for _ in range(60):  # until a crop holds it
        try:
            gradient_step(run, settings.training)
        except TrainingError as error:
            named.append(error.got)
            break
    assert named == ["likelihood of group kinematics at bin 37 of the training part not finite"]


def test_what_else_is_not_finite_is_named_too(recording: Path) -> None:
    run, _ = fresh_run(recording)
    model, crops = run.model, run.crops
    index = torch.arange(15)[None] + torch.tensor([[3], [9]])
    observed = crops.observed(index)
    z = torch.zeros(2, 16, model.n)
    fine = Bound(groups={}, kl=torch.zeros(2), z=z)
    assert find_not_finite(model, None, index, observed, fine) == "the bound"
    lost = z.clone()
    lost[1, 4, 0] = torch.nan
    said = find_not_finite(model, None, index, observed, replace(fine, z=lost))
    assert said == "state before bin 12 of the training part"
    said = find_not_finite(model, None, torch.tensor([5, 7]), observed, replace(fine, z=lost))
    assert said == "state before bin 3 of trial 7"
    kl = torch.tensor([0.0, torch.inf])
    said = find_not_finite(model, None, index, observed, replace(fine, kl=kl))
    assert said == "divergence from the prior of the crop from bin 9"
    assert run.posterior is not None
    gradient = next(iter(run.posterior.parameters()))
    gradient.grad = torch.full_like(gradient, torch.nan)
    said = find_not_finite(model, run.posterior, index, observed, fine)
    assert said.startswith("gradient of posterior.")


def test_a_run_that_blows_up_leaves_no_model(recording: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    with pytest.raises(TrainingError, match="not finite"):
        fit(recording, out, config(learning_rate=1e30, validate_every=0))
    assert list(tmp_path.iterdir()) == []


def test_a_score_that_is_no_number_is_an_error() -> None:
    with pytest.raises(TrainingError, match="validation at step 3: expected a score"):
        EarlyStopping().offer(3, float("nan"), torch.nn.Linear(1, 1))


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


def limited(monkeypatch: pytest.MonkeyPatch, largest: int, *, from_write: int = 0) -> list[Path]:
    """Files beyond ``largest`` bytes meet a full disk, from a write on; returns what was tried.

    At the one place where files are written; the kernel's own limit is in the test below.
    """
    tried: list[Path] = []
    write = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        tried.append(path)
        if len(tried) > from_write and len(data) > largest:
            write(path, data[:largest])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    return tried


def test_a_full_disk_at_a_checkpoint_ends_neither_the_run_nor_the_last_checkpoint(
    recording: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "m.safetensors"
    with monkeypatch.context() as patch:
        limited(patch, 100, from_write=1)
        progress = Recorder(interrupt_after=12)
        with pytest.raises(KeyboardInterrupt):
            fit(recording, out, progress=progress)
    assert [p.name for p in tmp_path.iterdir()] == [checkpoint_path(out).name]
    (warning,) = [line for line in progress.lines if line.startswith("warning")]
    assert "step 8: checkpoint: expected a file that can be written" in warning
    assert "the last one is kept, training goes on" in warning
    done, _ = fit(recording, out, resume=True)
    assert done.reports[0].step == 5  # from step 4's
    same_tensors(whole, out)


def test_a_model_that_cannot_be_written_is_saved_elsewhere_and_the_error_says_where(
    recording: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out" / "m.safetensors"
    out.parent.mkdir()
    elsewhere = tmp_path / "tmp"
    elsewhere.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    write = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if path.parent == out.parent and "checkpoint" not in path.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(TrainingError, match=r"saved as .* instead") as caught:
            fit(recording, out)
    (saved,) = elsewhere.glob("*/m.safetensors")
    assert str(saved) in str(caught.value)
    same_tensors(whole, saved)
    assert checkpoint_path(out).exists()  # to continue from


def test_a_disk_that_is_full_for_good_is_an_error_that_says_how_to_go_on(
    recording: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "m.safetensors"
    with monkeypatch.context() as patch:
        limited(patch, 100, from_write=3)
        with pytest.raises(TrainingError, match="free some space and continue with --resume"):
            fit(recording, out)
    assert [p.name for p in tmp_path.iterdir()] == [checkpoint_path(out).name]
    done, _ = fit(recording, out, resume=True)
    assert done.reports == ()
    same_tensors(whole, out)


def test_a_full_disk_ends_the_log_alone(
    recording: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out, progress = tmp_path / "m.safetensors", Recorder()
    monkeypatch.setattr(RecordWriter, "write", full)
    fit(recording, out, progress=progress, log_dir=tmp_path / "log")
    (warning,) = [line for line in progress.lines if line.startswith("warning")]
    assert warning.startswith("warning: the TensorBoard log ends here: ")
    same_tensors(whole, out)


def test_a_disk_without_room_is_refused_before_the_first_step(
    recording: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    with pytest.raises(ConfigError, match=r"--out: expected \d+ MiB free on the disk of"):
        fit(recording, tmp_path / "m.safetensors")


LIMITED = """
import resource, signal, sys
from ilqr_vae.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
sys.exit(main(sys.argv[1:]))
"""


def test_a_process_that_may_write_only_small_files(recording: Path, tmp_path: Path) -> None:
    """The kernel refuses what goes beyond: the model, the checkpoints and the log."""
    out = tmp_path / "m.safetensors"
    settings = write_config(tmp_path / "c.toml", config())
    ended = subprocess.run(
        [
            *(sys.executable, "-c", LIMITED, "train", str(settings), "--no-baselines"),
            *("--recording", str(recording), "--out", str(out), "--threads", "1"),
        ],
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"HOME": str(tmp_path), "TMPDIR": str(tmp_path)},
    )
    assert ended.returncode == 4
    assert "Traceback" not in ended.stderr
    assert "training goes on" in ended.stderr
    assert "error: --out: expected a model file that can be written" in ended.stderr
    assert not out.exists()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".m")]
