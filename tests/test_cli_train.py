"""The verbs train, evaluate and inspect: what they write, and what they say to bad input."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import io

from ilqr_vae.artifact import load_artifact
from ilqr_vae.cli import main
from ilqr_vae.recordings import MatSpec, RecordingSpec
from ilqr_vae.recordings.split import plan_drops, warmup_start
from rig import N_BINS, SPLIT, make_model, write_recording
from tiny import config, write_config

N_UNITS = 5


@dataclass(frozen=True)
class Rig:
    recording: Path
    config: Path
    model: Path

    def train(self, out: Path, *options: str, **changed: Path) -> int:
        recording, settings = (changed.get(k, getattr(self, k)) for k in ("recording", "config"))
        return main(
            ["train", str(settings), "--recording", str(recording), "--out", str(out), *options]
        )

    def evaluate(self, *options: str | Path, **changed: Path) -> int:
        recording, model = (changed.get(k, getattr(self, k)) for k in ("recording", "model"))
        return main(["evaluate", str(model), "--recording", str(recording), *map(str, options)])


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Rig:
    folder = tmp_path_factory.mktemp("rig")
    return Rig(
        write_recording(folder / "reach.mat", n_units=N_UNITS),
        write_config(folder / "c.toml", config(steps=4, validate_every=2)),
        make_model(folder / "m.safetensors", n_units=N_UNITS),
    )


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """The last line on stderr, which must be the error."""
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert ": expected " in last
    assert ", got " in last
    return last


def test_train_then_inspect_then_evaluate(
    rig: Rig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, scores = tmp_path / "m.safetensors", tmp_path / "s.json"
    assert rig.train(out, "--json", str(scores), "--seed", "3", "--threads", "1") == 0
    written = json.loads(scores.read_text())
    manifest = load_artifact(out).manifest
    assert written["model"] == manifest.model_id
    assert written["scores"] == manifest.scores
    assert written["steps"] == 4
    assert list(written["baselines"]) == ["Wiener filter", "Kalman filter"]
    assert [step for step, _ in written["history"]] == [2, 4]
    assert manifest.provenance["seed"] == "3"
    printed = capsys.readouterr()
    assert manifest.model_id in printed.out
    wiener = written["baselines"]["Wiener filter"]["r2"]
    assert f"Wiener filter    {wiener:.3f}" in printed.out
    assert "step 2: causal R2" in printed.err
    assert "left in all" in next(s for s in printed.err.splitlines() if s.startswith("step 2"))
    assert "memory: about" in printed.err
    assert [step for step, _ in manifest.history] == [2, 4]
    assert f"{N_BINS} bins of 50 ms, {N_UNITS} units" in printed.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m-log", "m.safetensors", "s.json"]

    assert main(["inspect", str(out), "--json", str(tmp_path / "i.json")]) == 0
    table = capsys.readouterr().out
    for what in (manifest.model_id, "mgu2, n = 4, m = 2", "vx (m/s), vy (m/s)", "50 ms"):
        assert what in table
    # what was set on those bins is not shown as a score of them
    assert "\n  causal R2, mean  " in table.partition("Scores")[2]
    assert "coverage_90" in manifest.scores
    assert "coverage" not in table + printed.out
    assert json.loads((tmp_path / "i.json").read_text())["model_id"] == manifest.model_id
    assert main(["inspect", str(out), "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["model_id"] == manifest.model_id

    assert rig.evaluate("--span", "validation", "--json", "-", model=out) == 0
    report = json.loads(capsys.readouterr().out)
    # the scores inside the file are those of the same stream over the same bins
    start, stop = SPLIT.bins("validation", N_BINS)
    assert report["bins"] == stop - start
    assert report["bits_per_spike"] == pytest.approx(manifest.scores["bits_per_spike"], rel=1e-9)
    followed = report["learning"]  # from the model file, and from the log beside it
    assert followed["causal R2, validation"] == [list(point) for point in manifest.history]
    assert [step for step, _ in followed["bound (nats per bin)"]] == [1, 2, 3, 4]

    # for another session's units: one more, and another one under an old name
    next_day = write_recording(tmp_path / "next.mat", n_units=N_UNITS + 1, seed=1)
    new, again = tmp_path / "new.safetensors", ("--from", str(out), "--no-baselines")
    assert rig.train(new, *again, "--steps", "2", recording=next_day) == 0
    before, after = load_artifact(out), load_artifact(new)
    assert after.manifest.provenance["trained_from"] == manifest.model_id
    assert after.manifest.provenance["steps"] == "2"
    assert len(after.manifest.unit_names) == N_UNITS + 1
    for name, value in before.model.named_parameters():
        other = after.model.get_parameter(name)
        assert name.startswith("groups.") or torch.equal(value, other), name
    assert after.model.group("spikes").C[-1].any()
    capsys.readouterr()
    assert main(["train", str(rig.config), "--from", str(out), "--out", str(new), "--recording",
                 str(next_day), "--recording", str(rig.recording)]) == 2  # fmt: skip
    assert "--from: expected one --recording, got 2" in capsys.readouterr().err


def test_steps_on_the_command_line_win(
    rig: Rig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rig.train(tmp_path / "m.safetensors", "--steps", "1", "--json", "-") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["steps"] == 1  # alone on its stream
    assert "wrote " in printed.err
    assert load_artifact(tmp_path / "m.safetensors").manifest.provenance["steps"] == "1"


def test_evaluate_writes_every_answer(rig: Rig, tmp_path: Path) -> None:
    arrays, page = tmp_path / "a.npz", tmp_path / "e.html"
    options = ("--drop", "0.2", "--seed", "4", "--arrays", arrays, "--html", page)
    assert rig.evaluate(*options, "--json", tmp_path / "e.json") == 0
    report = json.loads((tmp_path / "e.json").read_text())
    start, stop = SPLIT.bins("test", N_BINS)
    with np.load(arrays) as a:
        assert a["index"].tolist() == list(range(start, stop))
        assert a["kinematics"].shape == a["kinematics_std"].shape == (stop - start, 2)
        assert a["latents"].shape == (stop - start, 4)
        first = warmup_start(start)
        dropped = plan_drops(stop - first, 0.2, 4)[start - first :]
        assert (a["spikes"][dropped] == 0).all()
        assert dropped.any()
    assert report["statuses"] == {"ok": int((~dropped).sum()), "missing": int(dropped.sum())}
    assert page.read_text().startswith("<!doctype html>")


def spikes(
    value: float | None = None, shape: tuple[int, int] = (N_UNITS, N_BINS)
) -> NDArray[np.float64]:
    counts = np.random.default_rng(0).poisson(1.0, shape).astype(np.float64)
    if value is not None:
        counts[1, 7] = value
    return counts


def mat(path: Path, counts: NDArray[np.float64], **variables: object) -> Path:
    velocity = np.random.default_rng(1).normal(size=(2, counts.shape[-1]))
    io.savemat(path, {"spikes": counts, "velocity": velocity} | variables)
    return path


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        (spikes(0.5), "spikes: expected whole numbers, got 1 that are not, the first 0.5"),
        (spikes(-1.0), "spikes: expected counts of zero or more, got 1 that are not"),
        (spikes(np.nan), "spikes: expected finite whole numbers"),
        (spikes(1e6), "spikes: expected counts up to 65535"),
        (np.zeros((N_UNITS, 0)), "spikes: expected at least one bin"),
        (np.zeros((0, N_BINS)), "spikes: expected at least one bin"),
        (spikes(shape=(N_UNITS, 10)), "recording: expected at least 15 bins of training"),
        (np.zeros((N_UNITS, N_BINS)), "data.min_rate: expected a rate that leaves at least one"),
    ],
    ids=["fraction", "negative", "nan", "huge", "no bins", "no units", "short", "silent"],
)
def test_bad_recordings_end_training_with_their_field(
    rig: Rig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    counts: NDArray[np.float64],
    expected: str,
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    recording = mat(tmp_path / "r.mat", counts)
    assert rig.train(folder / "m.safetensors", recording=recording) == 2
    assert expected in said(capsys)
    assert list(folder.iterdir()) == []


def test_a_wrong_bin_width_is_named(
    rig: Rig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recording = mat(tmp_path / "r.mat", spikes(), dt=0.01)
    named = RecordingSpec(bin_width=0.05, mat=MatSpec(spikes="spikes", bin_width="dt"))
    settings = write_config(tmp_path / "c.toml", config(data=named))
    assert rig.train(tmp_path / "m.safetensors", recording=recording, config=settings) == 2
    assert "data.bin_width: expected the file's 0.01 s (dt), got 0.05 s" in said(capsys)
    # and a model of one bin width refuses a recording of another
    model = tmp_path / "m.safetensors"
    right = mat(tmp_path / "right.mat", spikes(), dt=0.05)
    assert rig.train(model, "--steps", "1", recording=right, config=settings) == 0
    assert rig.evaluate(recording=recording, model=model) == 2
    assert "data.bin_width: expected the file's 0.01 s (dt), got 0.05 s" in said(capsys)


def test_training_does_not_begin_with_bad_options(
    rig: Rig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "m.safetensors"
    folder = tmp_path / "folder.safetensors"
    folder.mkdir()
    unknown = write_config(tmp_path / "u.toml", config(), model={"latent_size": 3})
    wrong = write_config(tmp_path / "w.toml", config(), training={"batch": 0})
    text = tmp_path / "r.txt"
    text.write_text("no recording")
    broken = tmp_path / "b.mat"
    broken.write_bytes(b"no recording either" * 20)
    absent = tmp_path / "absent"
    for place, expected in [
        (tmp_path / "m.pt", "--out: expected a name ending in .safetensors"),
        (absent / "m.safetensors", "--out: expected a file in a folder"),
        (folder, "--out: expected a file to write"),
    ]:
        assert rig.train(place) == 2
        assert expected in said(capsys)
    for options, changed, expected in [
        ([], {"config": absent}, "config absent: expected a readable TOML file"),
        ([], {"config": unknown}, "model.latent_size: expected one of the keys"),
        ([], {"config": wrong}, "training.batch: expected int >= 1, got 0"),
        ([], {"recording": absent}, "recording: expected a file, got no such file"),
        ([], {"recording": tmp_path}, "recording: expected a file, got a directory"),
        ([], {"recording": text}, "recording: expected a .nwb, .mat or .h5 file, got r.txt"),
        ([], {"recording": broken}, "recording: expected a MAT file"),
        (["--seed", "-1"], {}, "training.seed: expected int >= 0, got -1"),
        (["--steps", "0"], {}, "training.steps: expected int >= 1, got 0"),
        (["--json", str(absent / "s.json")], {}, "--json: expected a file in a folder"),
        (["--log-dir", str(text)], {}, "--log-dir: expected a folder that can be written"),
        (["--log-dir", str(text / "log")], {}, "r.txt is no folder"),
    ]:
        assert rig.train(out, *options, **changed) == 2
        assert expected in said(capsys)
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {"folder.safetensors", "u.toml", "w.toml", "r.txt", "b.mat"}


def test_a_variable_that_is_not_there_lists_those_that_are(
    rig: Rig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recording = tmp_path / "r.mat"
    io.savemat(recording, {"counts": spikes()})
    assert rig.train(tmp_path / "m.safetensors", recording=recording) == 2
    assert "data.mat.spikes: expected one of r.mat's variables: counts" in said(capsys)


def test_training_that_cannot_go_on_exits_with_4(
    rig: Rig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "m.safetensors"
    exploding = write_config(tmp_path / "c.toml", config(learning_rate=1e30))
    assert rig.train(out, config=exploding) == 4
    assert "not finite" in said(capsys)
    assert not out.exists()


def test_bad_model_files_end_evaluate_and_inspect(
    rig: Rig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flipped, cut = tmp_path / "flipped.safetensors", tmp_path / "cut.safetensors"
    whole = bytearray(rig.model.read_bytes())
    cut.write_bytes(whole[: len(whole) // 2])
    whole[-5] ^= 1
    flipped.write_bytes(whole)
    for path, expected in [
        (flipped, "model file flipped.safetensors: expected tensors with hash"),
        (cut, "model file cut.safetensors: expected a readable .safetensors file"),
        (tmp_path / "absent.safetensors", "model file absent.safetensors"),
    ]:
        assert rig.evaluate("--json", tmp_path / "e.json", model=path) == 2
        assert expected in said(capsys)
        assert main(["inspect", str(path), "--json", str(tmp_path / "i.json")]) == 2
        assert expected in said(capsys)
    assert {p.name for p in tmp_path.iterdir()} == {flipped.name, cut.name}


def test_bad_options_and_recordings_end_evaluate(
    rig: Rig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = write_recording(tmp_path / "few.mat", n_units=N_UNITS - 1)
    fraction = mat(tmp_path / "fraction.mat", spikes(0.5))
    short = mat(tmp_path / "short.mat", spikes(shape=(N_UNITS, 1)))
    one = ("--json", tmp_path / "e.json")
    for (options, changed), expected in [
        ((("--span", "tests"), {}), "--span: expected train, validation, test or all"),
        ((("--html", tmp_path / "no" / "e.html"), {}), "--html: expected"),
        ((("--arrays", tmp_path / "no" / "a.npz"), {}), "--arrays: expected"),
        (((), {"recording": few}), f"unit_names: expected the model's {N_UNITS} units"),
        (((), {"recording": fraction}), "spikes: expected whole numbers"),
        (((), {"recording": short}), "recording: expected at least one bin in the test span"),
        (((), {"recording": tmp_path / "absent.mat"}), "recording: expected a file"),
    ]:
        assert rig.evaluate(*one, *options, **changed) == 2
        assert expected in said(capsys)
    for options in (("--drop", "1.5"), ("--seed", "-1"), ("--nonsense",)):
        assert rig.evaluate(*options) == 2
    assert {p.suffix for p in tmp_path.iterdir()} == {".mat"}


def test_a_model_that_decodes_nothing_is_scored_on_spikes_alone(rig: Rig, tmp_path: Path) -> None:
    blind = make_model(tmp_path / "blind.safetensors", n_units=N_UNITS, kinematics=False)
    assert rig.evaluate("--json", tmp_path / "e.json", model=blind) == 0
    report = json.loads((tmp_path / "e.json").read_text())
    assert report["scores"] == {}
    assert np.isfinite(report["bits_per_spike"])


@pytest.mark.parametrize("verb", ["train", "evaluate", "inspect"])
def test_help_has_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    assert f"Example: ilqr-vae {verb}" in " ".join(capsys.readouterr().out.split())


def test_unknown_verbs_and_missing_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert "error: verb: expected one of" in capsys.readouterr().err
    assert main(["trian"]) == 2
    assert "got 'trian' (did you mean 'train'?)" in capsys.readouterr().err
    for verb in ("train", "evaluate", "inspect"):
        assert main([verb]) == 2
    assert main(["--help"]) == main([]) == main(["--version"]) == 0


def test_warnings_stand_wherever_the_recording_is_reported(
    rig: Rig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No unit fires in the last eighth of the recording."""
    contents = io.loadmat(rig.recording)
    contents["spikes"][:, -N_BINS // 8 :] = 0
    odd = tmp_path / "odd.mat"
    io.savemat(odd, {k: v for k, v in contents.items() if not k.startswith("__")})
    out, summary = tmp_path / "m.safetensors", tmp_path / "s.json"
    scores, page = tmp_path / "e.json", tmp_path / "e.html"
    assert rig.train(out, "--json", str(summary), "--threads", "1", recording=odd) == 0
    assert "Warning [spikes-cover]: No spikes in the last" in capsys.readouterr().err
    assert [w["name"] for w in json.loads(summary.read_text())["warnings"]] == ["spikes-cover"]
    assert main(["inspect", str(out)]) == 0
    assert "spikes-cover" in capsys.readouterr().out
    options = ["--span", "test", "--json", scores, "--html", page]
    assert rig.evaluate(*options, model=out, recording=odd) == 0
    assert "Warning [spikes-cover]" in capsys.readouterr().out
    (warning,) = json.loads(scores.read_text())["warnings"]
    assert warning["name"] == "spikes-cover"
    assert "spikes-cover" in page.read_text()
    assert warning["text"] in page.read_text()
