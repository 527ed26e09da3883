"""Several sessions with different units: joined, trained together, each with a model of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ilqr_training.fit.joint import session_path, train_sessions
from ilqr_training.readout.causal import causal_pass
from ilqr_vae.artifact import load_artifact
from ilqr_vae.cli import main
from ilqr_vae.errors import RecordingError
from ilqr_vae.recordings import SplitSpec, load_recording
from ilqr_vae.recordings.joined import join
from rig import N_BINS, SPLIT, write_recording
from test_segments import pieces
from tiny import Recorder, config, write_config


def test_parts_lie_together_and_nothing_is_lost() -> None:
    one, two = pieces(), replace(pieces((30, 20, 15, 15)), unit_names=tuple("vwxyz"))
    joined = join({"mon": one, "tue": two}, SplitSpec())
    assert joined.n_units == 10
    assert joined.unit_names[:2] == ("mon/a", "mon/b")
    assert joined.unit_names[-5:] == tuple(f"tue/{unit}" for unit in "vwxyz")
    split = SplitSpec()
    at = 0
    edges: list[int] = []
    for span in ("train", "validation", "test"):
        for recording, columns in ((one, slice(0, 5)), (two, slice(5, 10))):
            a, b = split.span(span, recording)
            rows = slice(at, at + b - a)
            assert np.array_equal(joined.counts[rows, columns], recording.counts[a:b])
            assert joined.observed is not None
            assert joined.observed[rows, columns].all()
            assert joined.observed[rows].sum() == 5 * (b - a)
            assert joined.kinematics is not None
            assert recording.kinematics is not None
            assert np.array_equal(joined.kinematics[rows], recording.kinematics[a:b])
            edges += [at, *(at + recording.slice(a, b).breaks).tolist()]
            at += b - a
        assert split.span(span, joined)[1] == at
    assert at == len(joined)
    assert joined.breaks.tolist() == edges[1:]
    assert joined.trials is not None
    assert len(joined.trials) == len(LENGTHS_OF_BOTH)
    assert joined.trials.start.tolist() == edges


LENGTHS_OF_BOTH = (20, 6, 30, 9, 25, 12, 18, 30, 20, 15, 15)


def test_sessions_that_differ_are_told() -> None:
    one = pieces()
    with pytest.raises(
        RecordingError, match=r"recording.bin_width: .*a's, 0.05 s.*got 0.02 s in b"
    ):
        join({"a": one, "b": replace(one, bin_width=0.02)}, SplitSpec())
    with pytest.raises(RecordingError, match=r"recording.kinematics: .*got vx, y in b"):
        join({"a": one, "b": replace(one, kinematic_names=("vx", "y"))}, SplitSpec())
    with pytest.raises(RecordingError, match="two or more sessions, got 1"):
        join({"a": one}, SplitSpec())


def test_a_session_s_own_model_is_the_joint_one_with_its_units(tmp_path: Path) -> None:
    files = [
        write_recording(tmp_path / f"{name}.mat", n_units=n, seed=n)
        for name, n in (("mon", 5), ("tue", 7))
    ]
    settings, out = config(steps=4, validate_every=0), tmp_path / "m.safetensors"
    _, made = train_sessions(settings, files, out, Recorder())
    assert set(made) == {"mon", "tue"}
    joint = load_artifact(out)
    assert len(joint.manifest.unit_names) == 12
    read = load_recording(files[1], settings.data)
    own = load_artifact(session_path(out, "tue"))
    assert own.manifest.unit_names == read.unit_names
    assert own.manifest.provenance["session"] == "tue"
    assert own.manifest.provenance["trained_with"] == joint.manifest.model_id
    assert "r2" in own.manifest.scores
    for name, value in joint.model.state_dict().items():
        same = own.model.state_dict()[name]
        assert torch.equal(same, value[5:] if name.startswith("groups.spikes.") else value), name
    # streaming the session through its own model, or through the joint one with the other
    # session's units masked, gives the same latents
    counts = np.zeros((len(read), 12), dtype=np.uint16)
    counts[:, 5:] = read.counts
    seen = np.zeros(counts.shape, dtype=bool)
    seen[:, 5:] = True
    padded = replace(read, counts=counts, unit_names=joint.manifest.unit_names, observed=seen)
    a = causal_pass(own.estimator(), read, 0, 60)
    b = causal_pass(joint.estimator(), padded, 0, 60)
    assert np.allclose(a.window[:, :4], b.window[:, :4], atol=1e-8)
    assert N_BINS >= 60
    assert own.manifest.data.split == SPLIT


def test_two_recordings_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [write_recording(tmp_path / f"{n}.mat", n_units=4, seed=i) for i, n in enumerate("ab")]
    settings = write_config(tmp_path / "c.toml", config(steps=2, validate_every=0))
    given = [word for path in files for word in ("--recording", str(path))]
    out = tmp_path / "m.safetensors"
    assert main(["train", str(settings), *given, "--out", str(out), "--threads", "1"]) == 0
    assert f"wrote {session_path(out, 'b')}" in capsys.readouterr().out
    again = ["evaluate", str(session_path(out, "b")), "--recording", str(files[1])]
    assert main(again) == 0
    twice = ["--recording", str(files[0]), "--recording", str(files[0])]
    assert main(["train", str(settings), *twice, "--out", str(out)]) == 2
    assert "--recording: expected files of different names" in capsys.readouterr().err


def test_an_interrupted_joint_run_resumes_to_the_same_bits(tmp_path: Path) -> None:
    files = [write_recording(tmp_path / f"{n}.mat", n_units=4, seed=i) for i, n in enumerate("ab")]
    settings = config(steps=6, validate_every=3)
    whole, again = tmp_path / "w.safetensors", tmp_path / "m.safetensors"
    train_sessions(settings, files, whole, Recorder())
    with pytest.raises(KeyboardInterrupt):
        train_sessions(settings, files, again, Recorder(interrupt_after=5))
    train_sessions(settings, files, again, Recorder(), resume=True)
    for one, other in ((whole, again), (session_path(whole, "b"), session_path(again, "b"))):
        a, b = load_file(one), load_file(other)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
