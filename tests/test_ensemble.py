"""An ensemble in one model file: the mean of its members, and the variance within and between."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import ilqr_vae
from feeder import UNITS
from ilqr_training.fit.joint import train_sessions
from ilqr_vae.artifact import KEY, SCALED_SCHEMA, SINGLE_SCHEMA, load_artifact, save_artifact
from ilqr_vae.errors import ArtifactError, ConfigError, TrainingError
from ilqr_vae.kernels import backend
from ilqr_vae.model.intervals import SpeedScale, stated
from ilqr_vae.scoring.metrics import interval_coverage, r2
from rig import make_model, write_recording
from tiny import config, fit

COUNTS = np.random.default_rng(0).poisson(1.0, (14, len(UNITS)))
SCALE = SpeedScale(
    unit=torch.tensor([1.0, 2.0]).double(),
    knots=torch.tensor([0.0, 0.1, 0.3]).double(),
    factors=torch.tensor([[0.5, 1.0], [1.0, 2.0], [3.0, 1.0]]).double(),
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ensemble")
    made = make_model(folder / "m.safetensors", n_units=len(UNITS), names=UNITS, members=3)
    a = load_artifact(made)
    save_artifact(
        made, a.manifest, a.model, a.readout, a.mean_rate, intervals=SCALE, others=a.others
    )
    return made


def _metadata(path: Path) -> str:
    with safe_open(path, framework="pt") as f:
        return f.metadata()[KEY]


def test_what_is_streamed_is_the_members_mixture(path: Path) -> None:
    model = ilqr_vae.load(path)
    assert "3 members" in repr(model)
    streams = [member.stream() for member in (model, *model.members)]
    for bin_ in (*COUNTS, None):
        whole, *members = (stream.step(bin_) for stream in streams)
        mean, std, rates = (
            np.stack([getattr(m, name) for m in members])
            for name in ("kinematics", "kinematics_std", "rates")
        )
        np.testing.assert_allclose(whole.kinematics, mean.mean(0), rtol=1e-12)
        speed = np.hypot(*(whole.kinematics / [1.0, 2.0]))
        factor = [np.interp(speed, SCALE.knots, column) for column in SCALE.factors.mT]
        spread = np.sqrt((std**2).mean(0) + mean.var(0))
        np.testing.assert_allclose(whole.kinematics_std, spread * factor, rtol=1e-12)
        np.testing.assert_allclose(whole.rates, rates.mean(0), rtol=1e-12)
        np.testing.assert_array_equal(whole.latents, members[0].latents)
        likelihood = np.mean([2**m.bits for m in members])
        np.testing.assert_allclose(whole.bits, np.log2(likelihood), atol=1e-12)


def test_the_reference_path_answers_the_same(path: Path) -> None:
    compiled = ilqr_vae.load(path).stream()
    ours = [compiled.step(x) for x in COUNTS]
    with backend.using("reference"):
        reference = ilqr_vae.load(path).stream()
        theirs = [reference.step(x) for x in COUNTS]
    for one, other in zip(ours, theirs, strict=True):
        for name in ("latents", "kinematics", "kinematics_std", "rates", "bits"):
            np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=1e-6)
        assert (one.status, one.iterations) == (other.status, other.iterations)


def test_trials_are_inferred_and_forecast_by_every_member(path: Path) -> None:
    model = ilqr_vae.load(path)
    (found, short) = model.infer([COUNTS, COUNTS[:7]])
    ahead = model.forecast(found, 3)
    for whole in (found, short, ahead):
        assert [len(m) for m in whole.members] == [len(whole)] * 3
        mean = np.mean([m.kinematics for m in whole.members], 0)
        np.testing.assert_allclose(whole.kinematics, mean, rtol=1e-12)
        np.testing.assert_array_equal(whole.latents, whole.members[0].latents)
    alone = model.members[1].forecast(model.members[1].infer(COUNTS), 3)
    np.testing.assert_allclose(ahead.members[1].rates, alone.rates, rtol=1e-6)
    assert model.sample(found, 2).counts.shape == (2, *COUNTS.shape)


def test_a_file_of_one_model_is_as_it_was_and_a_damaged_ensemble_is_refused(
    path: Path, tmp_path: Path
) -> None:
    one = make_model(tmp_path / "one.safetensors", n_units=len(UNITS), names=UNITS)
    assert load_artifact(one).manifest.schema == SINGLE_SCHEMA
    assert '"members"' not in _metadata(one)
    a = load_artifact(path)
    assert (a.manifest.schema, len(a.others)) == (SCALED_SCHEMA, 2)
    assert a.members[0].intervals is None
    for bad in (
        SCALE._replace(knots=SCALE.knots.flip(0)),
        SCALE._replace(factors=-SCALE.factors),
        SCALE._replace(unit=torch.ones(3).double()),
    ):
        out = tmp_path / "bad.safetensors"
        save_artifact(out, a.manifest, a.model, a.readout, a.mean_rate, intervals=bad)
        with pytest.raises(ArtifactError, match="intervals"):
            load_artifact(out)


def test_members_are_trained_side_by_side_into_one_file(tmp_path: Path) -> None:
    recording = write_recording(tmp_path / "r.mat", n_units=5)
    out = tmp_path / "m.safetensors"
    done, progress = fit(recording, out, config(steps=4, members=2))
    alone, _ = fit(recording, tmp_path / "one.safetensors", config(steps=4))
    whole, one = load_artifact(out), load_artifact(tmp_path / "one.safetensors")
    assert len(whole.members) == 2
    assert done.manifest.provenance["seed"] == "5, 10012"
    assert any(line.startswith("member 2: ") for line in progress.lines)
    # the first member is what a run of one gives
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[name]), name
    assert not torch.equal(whole.model.group("spikes").C, whole.others[0].model.group("spikes").C)
    held, own = done.validation.held_out, alone.validation.held_out
    assert held is not None
    assert own is not None
    assert not np.array_equal(held.decoded, own.decoded)
    assert done.manifest.scores["r2"] == pytest.approx(r2(held.truth, held.decoded))
    if whole.intervals is not None:
        std = stated(whole.intervals, held.decoded, held.std)
        covers = interval_coverage(held.truth, held.decoded, std)
        assert covers == pytest.approx(done.manifest.scores["coverage_90"])
        assert covers > 0.88  # of few seconds, so more than 0.9
    assert sorted(p.name for p in tmp_path.glob("m.*")) == ["m.safetensors"]
    with pytest.raises(ConfigError, match=r"training\.members: expected 1 with several"):
        train_sessions(config(members=2), [recording, recording], out)


def test_an_error_of_a_member_is_the_run_s(tmp_path: Path) -> None:
    recording = write_recording(tmp_path / "r.mat", n_units=5)
    out = tmp_path / "m.safetensors"
    (tmp_path / "m.safetensors.member-2.checkpoint").write_bytes(b"no checkpoint")
    settings = config(steps=2, members=2)
    with pytest.raises(TrainingError, match="expected a readable checkpoint"):
        fit(recording, out, settings, resume=True)
    assert not out.exists()
