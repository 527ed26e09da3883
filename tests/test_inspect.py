"""``inspect`` looks into recordings, and ``train --check`` says what training would do."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from scipy import io

from ilqr_vae.artifact import read_manifest
from ilqr_vae.cli import main
from ilqr_vae.errors import RecordingError
from ilqr_vae.recordings import RecordingSpec, load_recording
from ilqr_vae.report.table import Section, lines_of
from odd_files import MOVEMENT, SPIKES, START, file, moved, saved, trials
from rig import write_recording
from tiny import config, write_config


def session(tmp_path: Path) -> Path:
    """Hand, cursor and eye velocity in one file, units of two qualities, trials."""
    nwb = file(quality=["good"] * 4 + ["mua"] * 2)
    for name in ("eye_velocity", "cursor_velocity", "hand_velocity_filtered_and_resampled"):
        moved(nwb, name, MOVEMENT)
    trials(nwb, START, START + 4, go_time=START + 1, target=["left", "right"] * 6)
    return saved(tmp_path, nwb)


def shown(*arguments: str | Path, encoding: str = "utf-8", code: int = 0) -> str:
    words = [sys.executable, "-W", "ignore", "-m", "ilqr_vae.cli", *map(str, arguments)]
    environment = {"COLUMNS": "80", "PYTHONIOENCODING": encoding}
    done = subprocess.run(words, capture_output=True, env=environment, timeout=120, check=False)
    assert done.returncode == code, done.stderr.decode()
    return done.stdout.decode(encoding)


def test_a_recording_is_shown_with_what_would_be_chosen_and_why(tmp_path: Path) -> None:
    path = session(tmp_path)
    text = shown("inspect", path, "--json", tmp_path / "i.json", encoding="ascii")
    assert max(map(len, text.splitlines())) <= 80
    whole = " ".join(text.split())
    for said in (
        "good: 4 at",
        "processing/behavior/hand_velocity_filtered_and_resampled TimeSeries, 6000 x 2, m/s, 100 "
        "Hz, 0 to 60 s, could be decoded (a velocity)",
        "trials 12, 0 to 59 s",
        "target left, right",
        "bins 1200 of 50 ms from 0 s",
        "also possible: processing/behavior/cursor_velocity, processing/behavior/eye_velocity",
    ):
        assert said in whole
    numbers = json.loads((tmp_path / "i.json").read_text())
    assert [s["name"].rpartition("/")[2] for s in numbers["series"]] == [
        "hand_velocity_filtered_and_resampled",
        "cursor_velocity",
        "eye_velocity",
    ]
    assert [(g["value"], g["units"]) for g in numbers["groups"]] == [("good", 4), ("mua", 2)]
    assert not numbers["refused"]


def test_a_recording_is_shown_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from ilqr_vae.cli import main; code = main(sys.argv[1:]); "
        "sys.exit(code or 7 * ('torch' in sys.modules))"
    )
    words = [sys.executable, "-W", "ignore", "-c", code, "inspect", str(session(tmp_path))]
    assert subprocess.run(words, capture_output=True, timeout=120, check=False).returncode == 0


def test_files_that_cannot_be_read_as_they_are_say_what_they_lack(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    io.savemat(tmp_path / "a.mat", {"spikes": np.ones((3, 40)), "trial": {"start": 1.0}})
    with h5py.File(tmp_path / "a.h5", "w") as raw:
        raw["train_spikes_heldin"] = np.ones((4, 10, 2))
    for path, lines in (
        ("a.mat", ["spikes numbers of shape (3, 40)", "trial a struct of start", "data.bin_width"]),
        ("a.h5", ["train_spikes_heldin float64, 4 x 10 x 2", "data.mode: expected 'trials'"]),
    ):
        assert main(["inspect", str(tmp_path / path)]) == 0
        text = " ".join(capsys.readouterr().out.split())
        assert all(line in text for line in lines)
    (tmp_path / "b.mat").write_bytes(b"no such thing")
    assert main(["inspect", str(tmp_path / "b.mat")]) == 2


def test_a_config_says_how_a_recording_would_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.toml").write_text('[data]\nbin_width = 0.1\n[data.units]\nquality = "good"\n')
    path = session(tmp_path)
    assert main(["inspect", str(path), "--config", str(tmp_path / "c.toml")]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "bins 600 of 100 ms" in text
    assert "Read are 4 of 6 units: quality = good." in text


def test_no_name_is_cut_and_no_word_broken() -> None:
    long = "a/very/long/path/" + "x" * 90
    made = lines_of([Section("T", (("name", f"words and {long} and more"), (long, "said")))], 80)
    assert sum(long in line for line in made) == 2
    assert " ".join(" ".join(made).split()) == f"T name words and {long} and more {long} said"


def test_check_says_what_training_would_do_and_trains_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = write_config(tmp_path / "c.toml", config(steps=2, validate_every=1))
    recording, out = write_recording(tmp_path / "r.mat", n_units=5), tmp_path / "m.safetensors"
    words = ["train", str(settings), "--recording", str(recording), "--out", str(out), "--check"]
    assert main([*words, "--json", str(tmp_path / "p.json")]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for said in ("units 5:", "of 50 ms", "train 0 to 200", "vx", "at most 2 steps", "GiB are free"):
        assert said in text
    plan: dict[str, Any] = json.loads((tmp_path / "p.json").read_text())
    assert plan["split"] == {"train": [0, 200], "validation": [200, 280], "test": [280, 400]}
    assert plan["settings"]["training"]["steps"] == 2
    assert plan["memory"] > 0
    assert plan["seconds"] is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.toml", "p.json", "r.mat"]
    assert main([*words[:2], "--out", str(out), "--check"]) == 0
    assert main([*words[:2], "--out", str(out)]) == 2
    assert main([*words[:-2], str(tmp_path / "no" / "m.safetensors"), "--check"]) == 2


# ---- own recordings ------------------------------------------------------------------------------


def late(tmp_path: Path) -> Path:
    """Behaviour stamped at 30 kHz from 812.3 s on, spikes on the same clock."""
    times = 812.3 + np.arange(300_000) / 30_000.0
    spikes = [812.3 + t[t < 10] for t in SPIKES]
    moved(nwb := file(spikes), "wheel", np.sin(times), timestamps=times)
    return saved(tmp_path, nwb)


def positions(tmp_path: Path) -> Path:
    moved(nwb := file(), "eye_position", MOVEMENT)
    return saved(tmp_path, moved(nwb, "hand_position", MOVEMENT, unit="m"))


def unknown_times(tmp_path: Path) -> Path:
    """Trials of which one has no go cue, with a column that was never filled in."""
    go = np.where(np.arange(12) == 3, np.nan, START + 1)
    nwb = trials(moved(file()), START, START + 4, go_time=go, off_time=np.full(12, np.nan))
    return saved(tmp_path, nwb)


def counts_alone(tmp_path: Path) -> Path:
    io.savemat(tmp_path / "a.mat", {"spikes": np.ones((3, 40))})
    return tmp_path / "a.mat"


CUT = {"mode": "trials", "trials": {"event": "go_time", "window": (-0.5, 1.0)}}


@pytest.mark.parametrize(
    ("made", "settings", "start", "bins", "names"),
    [
        (session, {}, 0.0, 1200, ("hand_velocity_filtered_and_resampled_x",)),
        (positions, {}, 0.0, 1200, ("hand_position_x",)),
        (positions, {"differentiate": True}, 0.0, 1200, ("dhand_position_x/dt",)),
        (late, {}, 812.3, 200, ("wheel",)),
        (unknown_times, {}, 0.0, 1200, ("hand_vel_x",)),
        (unknown_times, CUT, 0.5, 11 * 30, ("hand_vel_x",)),
        (counts_alone, {"bin_width": 0.02}, 0.0, 40, ()),
        (counts_alone, {}, None, "data.bin_width: expected the width", ()),
    ],
)
def test_own_recordings(
    made: Callable[[Path], Path],
    settings: dict[str, Any],
    start: float | None,
    bins: int | str,
    names: tuple[str, ...],
    tmp_path: Path,
) -> None:
    path = made(tmp_path)
    if isinstance(bins, str):
        with pytest.raises(RecordingError, match=bins):
            load_recording(path, **settings)
        return
    read = load_recording(path, **settings)
    assert not read.warnings
    assert read.start_time == pytest.approx(start)
    assert len(read) == bins
    assert read.kinematic_names[:1] == names


def test_units_selected_are_the_models_everywhere(tmp_path: Path) -> None:
    """Train on good units; evaluate reads the same."""
    data = RecordingSpec(bin_width=0.05, units={"quality": "good"})
    settings = write_config(tmp_path / "c.toml", config(data=data, steps=2, validate_every=1))
    path, out = session(tmp_path), tmp_path / "m.safetensors"
    words = ["train", str(settings), "--recording", str(path), "--out", str(out), "--no-baselines"]
    assert main(words) == 0
    manifest = read_manifest(out)
    assert manifest.unit_names == tuple("0123")
    assert manifest.data.units == {"quality": "good"}
    words = ["evaluate", str(out), "--recording", str(path), "--json", str(tmp_path / "e.json")]
    assert main(words) == 0
    said = json.loads((tmp_path / "e.json").read_text())
    assert any("4 of 6 units" in note for note in said["notes"])
