"""A training run with values that are not finite ends with an error that names them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ilqr_training.config import TrainConfig
from ilqr_training.fit.build import build_model
from ilqr_training.fit.checkpoint import EarlyStopping
from ilqr_training.fit.crops import Crops, prepare
from ilqr_training.fit.loop import TrainingRun, gradient_step, start
from ilqr_training.fit.not_finite import find_not_finite
from ilqr_vae.errors import TrainingError
from ilqr_vae.inference.elbo import Bound
from ilqr_vae.recordings import load_recording
from rig import write_recording
from tiny import config, fit


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recording") / "reach.mat"
    return write_recording(path, n_units=6)


def fresh_run(recording: Path) -> tuple[TrainingRun, TrainConfig]:
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
