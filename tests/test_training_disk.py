"""Training on a disk that is full: what is lost, what is kept, and what the error says."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from tensorboard.summary.writer.record_writer import RecordWriter

from ilqr_training.fit.train import checkpoint_path
from ilqr_vae.errors import ConfigError, TrainingError
from rig import write_recording
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
