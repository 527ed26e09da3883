"""Other units of the same brain: rows fitted again without labels, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import io, optimize
from torch import Tensor

from ilqr_training.adaptation.adapt import Adaptation, adapt
from ilqr_training.adaptation.rows import RowPrior, fit_rows
from ilqr_training.adaptation.units import UnitVerdict, family_of
from ilqr_vae.artifact import (
    Artifact,
    GroupSpec,
    Manifest,
    ModelSpec,
    build,
    load_artifact,
    save_artifact,
)
from ilqr_vae.cli import main
from ilqr_vae.errors import ConfigError
from ilqr_vae.kernels import backend
from ilqr_vae.model.dynamics.linear import Linear
from ilqr_vae.model.generative import Model
from ilqr_vae.model.intervals import SpeedScale
from ilqr_vae.model.likelihoods import Counts
from ilqr_vae.model.readout import KinematicReadout, ReadoutShape
from ilqr_vae.recordings import MatSpec, Recording, RecordingSpec
from ilqr_vae.streaming.bounds import TrainingRange
from ilqr_vae.streaming.horizon import HorizonConfig

N, T, LATENTS = 24, 1400, 2
CHANGED = np.arange(0, N, 4)  # a quarter of the units
LOUDER = 1  # one that fires twice as much
BINS = (0, T)


@pytest.mark.parametrize(("family", "gain"), [("poisson", False), ("poisson-softplus", True)])
def test_rows_are_the_maximum(family: str, gain: bool) -> None:
    """scipy's minimiser on the same objective, one unit at a time."""
    g = torch.Generator().manual_seed(1)
    spec = GroupSpec(family=family, channels=3, gain=gain)
    groups = build(ModelSpec(dynamics="linear", latents=2, inputs=1, groups={"spikes": spec}))
    spikes = groups.double().group("spikes")
    assert isinstance(spikes, Counts)
    if spikes.log_gain is not None:
        spikes.log_gain.data.copy_(torch.tensor([-0.5, 0.0, 0.5]))
    z = torch.randn(2, 60, 2, generator=g).double()
    y = torch.poisson(torch.full((60, 3), 1.5), generator=g).double()
    mask = (torch.rand(60, 3, generator=g) < 0.9).double()
    prior = RowPrior.of(torch.zeros(3, 3).double(), 2 * torch.eye(2).double(), 3.0)
    w = fit_rows(spikes, z, y, mask, prior)
    x = torch.cat([z, torch.ones(2, 60, 1).double()], -1)
    for unit in range(3):
        one = family_of(spikes, torch.tensor([unit]))

        def cost(v: NDArray[np.float64], unit: int = unit, one: Counts = one) -> float:
            row = torch.as_tensor(v)
            rate = one.expected((x @ row).unsqueeze(-1)).squeeze(-1)
            fit = ((rate - y[:, unit] * rate.log()) * mask[:, unit]).sum().item() / 2
            return float(fit + row[:2] @ row[:2] + row[2] ** 2 / 18)

        found = optimize.minimize(cost, np.zeros(3), tol=1e-12).x
        np.testing.assert_allclose(w[unit].numpy(), found, atol=1e-4)


# ---- a brain whose units change ----------------------------------------------------------------


def true_model(C: Tensor, b: Tensor) -> Model:
    """A slow rotation driven by noise."""
    spec = ModelSpec(
        dynamics="linear",
        latents=LATENTS,
        inputs=LATENTS,
        groups={"spikes": GroupSpec(family="poisson", channels=len(b))},
        initial_mean=False,
    )
    model = build(spec).double()
    assert isinstance(model.dynamics, Linear)
    with torch.no_grad():
        for parameter in model.dynamics.parameters():
            parameter.zero_()
        model.dynamics.skew_left[1, 0] = 0.2
        model.dynamics.raw_gain.fill_(np.log(0.97 / 0.03))
        model.dynamics.input.copy_(torch.eye(LATENTS))
        model.prior.log_scale.fill_(np.log(0.25))
        spikes = model.group("spikes")
        spikes.C.copy_(C)
        spikes.b.copy_(b)
    return model


def rows(seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return 0.5 * torch.randn(N, LATENTS, generator=g).double(), torch.full((N,), -0.5).double()


def spikes_of(C: Tensor, b: Tensor, seed: int) -> tuple[NDArray[np.float64], NDArray[np.uint16]]:
    """Latents and counts."""
    rng = np.random.default_rng(seed)
    model = true_model(C, b)
    u = torch.as_tensor(rng.normal(size=(1, T, LATENTS)) * 0.25)
    w = tuple(t.contiguous() for t in model.dynamics.weights())
    z = model.rollout(w, torch.zeros(1, LATENTS).double(), u)[0, 1:].detach()
    rate = (z @ C.mT + b).exp().numpy()
    return z.numpy(), rng.poisson(rate).astype(np.uint16)


def recorded(counts: NDArray[np.uint16], names: tuple[str, ...]) -> Recording:
    return Recording(name="made up", bin_width=0.05, counts=counts, unit_names=names)


NAMES = tuple(f"unit{i}" for i in range(N))


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    """The true model of the first day, with a readout that reads latents and counts."""
    C, b = rows(0)
    model = true_model(C, b)
    shape = ReadoutShape(lags=2, residuals=2, recurrent=3)
    readout = KinematicReadout(LATENTS, 1, shape, units=N).double()
    g = torch.Generator().manual_seed(2)
    for name, buffer in readout.named_buffers():
        if buffer.ndim == 2 or name in ("b", "a", "p", "g"):
            buffer.copy_(0.1 * torch.randn(buffer.shape, generator=g))
    latents, counts = spikes_of(C, b, 5)
    seen = TrainingRange(
        torch.as_tensor(counts.max(0).astype(np.float64)),
        torch.as_tensor(np.stack([latents.min(0), latents.max(0)])),
        torch.tensor([[-9.0], [9.0]]).double(),
    )
    manifest = Manifest(
        bin_width=0.05,
        unit_names=NAMES,
        kinematic_names=("x",),
        kinematic_units=("m",),
        data=RecordingSpec(bin_width=0.05, mat=MatSpec(spikes="spikes")),
        horizon=HorizonConfig(horizon=10, iterations=2),
        model=ModelSpec(
            dynamics="linear",
            latents=LATENTS,
            inputs=LATENTS,
            groups={"spikes": GroupSpec(family="poisson", channels=N)},
            initial_mean=False,
        ),
        readout=shape,
    )
    return Artifact(manifest, model, readout, torch.as_tensor(counts.mean(0)), seen)


@pytest.fixture(scope="module")
def changed(artifact: Artifact) -> tuple[Tensor, Recording, Adaptation]:
    """Another day: a quarter of the units are others, under the same names."""
    C, b = rows(0)
    C = C.clone()
    # a unit of like tuning would be taken for its predecessor, as it may be
    C[CHANGED] = C[CHANGED] @ torch.tensor([[-0.8, 0.6], [-0.6, -0.8]]).double()
    b[LOUDER] += np.log(2)
    recording = recorded(spikes_of(C, b, 6)[1], NAMES)
    return C, recording, adapt(artifact, recording, BINS)


def test_units_that_changed_are_found_and_learnt(
    changed: tuple[Tensor, Recording, Adaptation],
) -> None:
    C, _, made = changed
    assert made.refused == ""
    assert made.bits[1] > max(0.0, made.bits[0])
    verdicts = np.array(list(made.verdicts.values()))
    same = np.setdiff1d(np.arange(N), CHANGED)
    kept = np.isin(verdicts, [UnitVerdict.KEPT, UnitVerdict.MOVED])
    assert kept[same].mean() > 0.9
    assert not kept[CHANGED].any()
    learnt = CHANGED[verdicts[CHANGED] == UnitVerdict.LEARNT]
    assert len(learnt) >= len(CHANGED) - 1
    ours = made.artifact.model.group("spikes").C.detach()
    for unit in learnt:  # in the frame that the others hold
        cosine = torch.nn.functional.cosine_similarity(ours[unit], C[unit], dim=0)
        assert cosine > 0.9, unit


def test_an_adapted_model_streams_and_is_saved(
    artifact: Artifact, changed: tuple[Tensor, Recording, Adaptation], tmp_path: Path
) -> None:
    """Compiled and in torch; the readout reads of a changed unit what it would of a missing one."""
    _, recording, made = changed
    a = made.artifact
    save_artifact(tmp_path / "a", a.manifest, a.model, a.readout, a.mean_rate, a.seen)
    loaded = load_artifact(tmp_path / "a")
    estimator = loaded.estimator()
    states = {kind: estimator.init(1) for kind in ("auto", "reference")}
    missing = torch.ones(1, N).double()
    missing[0, CHANGED] = 0
    for t in range(25):
        counts = torch.as_tensor(recording.counts[t : t + 1].astype(np.float64))
        answers = {}
        for kind in states:
            with backend.using(kind):
                states[kind], answers[kind] = estimator.step(
                    states[kind], counts, torch.ones_like(missing)
                )
        for name in ("z", "window", "kinematics", "kinematics_std"):
            one, other = (getattr(answers[kind], name) for kind in states)
            torch.testing.assert_close(one, other, rtol=0, atol=1e-9)
    assert loaded.readout is not None
    torch.testing.assert_close((loaded.readout.reads > 0).double(), missing[0])
    assert artifact.readout is not None
    now, before = (r.P for r in (loaded.readout, artifact.readout))
    torch.testing.assert_close(now[:, LOUDER], 0.5 * before[:, LOUDER], rtol=0.2, atol=0)
    rows_kept = [NAMES.index(u) for u, v in made.verdicts.items() if v is UnitVerdict.KEPT]
    assert torch.equal(now[:, rows_kept], before[:, rows_kept])
    counts[0, CHANGED] = 7.0  # a window of residuals does not notice
    with backend.using("reference"):
        _, answer = estimator.step(states["reference"], counts, torch.ones_like(missing))
    residuals = answer.window[0, 3 * LATENTS : 3 * LATENTS + 2 * N].view(2, N)
    assert not residuals[:, CHANGED].any()
    assert residuals[:, 1].all()


def test_every_member_of_an_ensemble_is_adapted(
    artifact: Artifact, changed: tuple[Tensor, Recording, Adaptation], tmp_path: Path
) -> None:
    _, recording, alone = changed
    scale = SpeedScale(torch.ones(1), torch.tensor([0.0, 1.0]), torch.ones(2, 1))
    a = adapt(replace(artifact, intervals=scale, others=(artifact,)), recording, BINS).artifact
    given = (a.manifest, a.model, a.readout, a.mean_rate, a.seen, a.intervals, a.others)
    save_artifact(tmp_path / "a", *given)
    loaded = load_artifact(tmp_path / "a")
    assert loaded.intervals is not None
    for member in loaded.members:
        for name, value in alone.artifact.model.state_dict().items():
            assert torch.equal(member.model.state_dict()[name], value), name


def test_units_come_and_go(artifact: Artifact) -> None:
    """Two units are gone, one is new; the adapted model's units are those that there are."""
    C, b = rows(0)
    counts = spikes_of(C, b, 7)[1]
    names = ("new", *NAMES[1:-1])  # in the place of the first
    made = adapt(artifact, recorded(counts[:, :-1], names), BINS)
    assert made.refused == ""
    assert made.artifact.manifest.unit_names == names
    assert made.gone == (NAMES[0], NAMES[-1])
    assert made.verdicts["new"] is UnitVerdict.LEARNT
    ours = made.artifact.model.group("spikes").C.detach()
    assert torch.nn.functional.cosine_similarity(ours[0], C[0], dim=0) > 0.9
    assert made.artifact.readout is not None
    assert made.artifact.readout.reads[0] == 0
    again = adapt(made.artifact, recorded(counts[:, :-1], names), BINS)
    assert again.artifact.readout is not None
    assert again.artifact.readout.reads[0] == 0  # its readout never knew that unit


def shuffled(counts: NDArray[np.uint16]) -> NDArray[np.uint16]:
    rng = np.random.default_rng(0)
    return np.stack([rng.permutation(unit) for unit in counts.T], 1)


def test_what_does_not_fit_is_refused(artifact: Artifact) -> None:
    counts = spikes_of(*rows(0), 8)[1]
    others = spikes_of(*rows(9), 8)[1]
    for odd in (shuffled(counts), np.zeros_like(counts), shuffled(others)):
        made = adapt(artifact, recorded(odd, NAMES), BINS)
        assert made.refused, made


def test_the_verb_writes_a_model_or_says_why_not(
    artifact: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = artifact
    save_artifact(tmp_path / "m", a.manifest, a.model, a.readout, a.mean_rate, a.seen)
    C, b = rows(0)
    C = C.clone()
    C[CHANGED] *= -1
    counts = spikes_of(C, b, 10)[1]
    args = ["adapt", str(tmp_path / "m"), "--out", str(tmp_path / "new"), "--recording"]
    for name, saved, rc in (("other", counts, 0), ("odd", shuffled(counts), 4)):
        io.savemat(tmp_path / f"{name}.mat", {"spikes": saved.T})
        (tmp_path / "new").unlink(missing_ok=True)
        assert main([*args, str(tmp_path / f"{name}.mat")]) == rc
        assert (tmp_path / "new").exists() is (rc == 0)
    assert "adapt: expected rows that fit, got none:" in capsys.readouterr().err
    assert main([*args, str(tmp_path / "other.mat"), "--seconds", "60", "30"]) == 2
    assert "--seconds" in capsys.readouterr().err


def test_a_part_too_short_is_refused(artifact: Artifact) -> None:
    counts = spikes_of(*rows(0), 11)[1]
    with pytest.raises(ConfigError, match="bins: expected at least"):
        adapt(artifact, recorded(counts, NAMES), (0, 100))
