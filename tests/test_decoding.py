"""The whole comparison on one recording: pieces there are kept, the test part is not seen."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from scipy import io

from ilqr_training.evaluation.cosmoothing import OURS_REGRESSED
from ilqr_training.evaluation.tables import rows_of, tables
from ilqr_vae.cli import main
from ilqr_vae.scoring.score import OURS, WIENER
from rig import N_BINS, SPLIT, write_recording
from tiny import config, write_config


@dataclass(frozen=True)
class Rig:
    config: Path
    recording: Path
    out: Path

    def run(self, *options: str) -> int:
        said = ["experiment", "decode", str(self.config), "--recording", str(self.recording)]
        quick = ["--no-gru", "--draws", "1", "--lost", "0.3", "--fraction", "0.3"]
        return main([*said, "--out", str(self.out), "--seeds", "2", *quick, *options])

    def pieces(self) -> dict[str, int]:
        return {p.name: p.stat().st_mtime_ns for p in self.out.iterdir() if p.suffix != ".png"}


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Rig:
    folder = tmp_path_factory.mktemp("rig")
    settings = write_config(folder / "c.toml", config(steps=2, validate_every=2))
    recording = write_recording(folder / "r.mat", n_units=8)
    made = Rig(settings, recording, folder / "out")
    assert made.run() == 0
    return made


def test_every_row_is_there_with_its_mean_and_each_seed(
    rig: Rig, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rig.run("--json", "-") == 0
    result = json.loads(capsys.readouterr().out)
    rows = {(r["what"], r["decoder"], r["measure"]): r for r in result["rows"]}
    less = "first 30 % of the recording"
    for what in ("full training part", less):
        for decoder in (OURS, WIENER, "Kalman filter"):
            assert len(rows[what, decoder, "R2"]["seeds"]) == 2
        assert rows[what, OURS, "coverage of 90 %"]["mean"] <= 1
        assert (what, OURS, "coverage, speed quarter 4") in rows
        assert rows[what, OURS, "training, s"]["mean"] > 0
    assert ("co-smoothing", OURS_REGRESSED, "bits per spike") in rows
    wrong = {(r["condition"], r["decoder"], r["given"]): r for r in result["stress"]}
    ours = wrong["30 % of bins lost", OURS, "missing bins"]["loss"]
    held = wrong["30 % of bins lost", WIENER, "last value"]
    assert ours["mean"] == pytest.approx(float(np.mean(ours["seeds"])))
    assert len(set(ours["seeds"])) == 2
    if held["loss"]["mean"] > 0:
        share = ours["mean"] / held["loss"]["mean"]
        assert held["our_loss_of_its"] == pytest.approx(share)
    main, stress = tables(result)
    assert main.columns[-2:] == stress.columns[-2:] == ("seed 5", "seed 6")
    assert len(main.rows) == len(rows_of(result))
    assert len(stress.rows) == len(result["stress"])
    # as much as elsewhere is learnt from, though the nested split's recording is shorter
    less_bins = result["seeds"][0]["less"]["train"]["validation_bins"].split(":")[1]
    assert int(less_bins) == round(0.3 * N_BINS)
    start, stop = SPLIT.bins("validation", N_BINS)
    assert result["seeds"][0]["full"]["decode"]["bins"] == [start, stop]


def test_what_is_there_is_not_done_again(rig: Rig, capsys: pytest.CaptureFixture[str]) -> None:
    before = rig.pieces()
    (rig.out / "seed6-full-stress.json").unlink()
    assert rig.run() == 0
    after = rig.pieces()
    changed = {name for name, when in after.items() if before[name] != when}
    assert changed == {"seed6-full-stress.json", "decode.json"}
    assert "seed5-full-train: there already" in capsys.readouterr().err
    # the same numbers, though the rivals had to be fitted again
    assert set(after) == set(before)
    # of something else it is: everything anew
    assert rig.run("--silent", "0.5", "--seeds", "1") == 0
    assert "there already" not in capsys.readouterr().err


def test_a_nested_split_does_not_depend_on_the_test_part(rig: Rig, tmp_path: Path) -> None:
    content = io.loadmat(rig.recording)
    start = SPLIT.bins("test", N_BINS)[0]
    content["spikes"][:, start:] = 9
    content["velocity"][:, start:] = 1e3
    spoiled = tmp_path / "r.mat"
    io.savemat(spoiled, {k: content[k] for k in ("spikes", "velocity")})
    other = Rig(rig.config, spoiled, tmp_path / "out")
    clean = Rig(rig.config, rig.recording, tmp_path / "clean")
    results = []
    for one in (clean, other):
        assert one.run("--seeds", "1", "--held-out", "0") == 0
        seed = json.loads((one.out / "decode.json").read_text())["seeds"][0]
        results.append([seed["full"]["decode"], seed["less"]["decode"], seed["full"]["stress"]])
        for piece in results[-1]:
            piece.pop("identity")
    assert results[0] == results[1]


def test_options_out_of_range(rig: Rig, capsys: pytest.CaptureFixture[str]) -> None:
    for options, named in (
        (["--span", "train"], "--span: expected validation or test"),
        (["--fraction", "1"], "--fraction"),
        (["--seeds", "0"], "--seeds"),
        (["--out", str(rig.config)], "--out: expected a folder that can be written"),
    ):
        assert rig.run(*options) == 2
        assert named in capsys.readouterr().err
