"""An ensemble in one model file: the mean of its members, and the variance within and between."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import ilqr_vae
from feeder import UNITS
from ilqr_vae.artifact import KEY, SCHEMA, SINGLE_SCHEMA, load_artifact, save_artifact
from ilqr_vae.errors import ArtifactError
from ilqr_vae.kernels import backend
from ilqr_vae.model.intervals import SpeedScale
from rig import make_model

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
    assert (a.manifest.schema, len(a.others)) == (SCHEMA, 2)
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
