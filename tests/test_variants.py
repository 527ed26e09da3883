"""Every variant of the model that a configuration can ask for: trained, saved, streamed, served."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from scipy import special, stats

from feeder import Feeder, bin_, open_
from ilqr_training.config import ModelConfig, ReadoutConfig, check
from ilqr_training.fit.build import model_spec
from ilqr_training.fit.crops import prepare
from ilqr_training.fit.train import train
from ilqr_vae.artifact import GroupSpec, ModelSpec, build, load_artifact
from ilqr_vae.inference import compiled, ilqr, on_gpu
from ilqr_vae.model.dynamics import DynamicsOptions
from ilqr_vae.model.generative import Model
from ilqr_vae.protocol import messages
from ilqr_vae.recordings import load_recording
from ilqr_vae.streaming.horizon import HorizonConfig, MovingHorizon
from kernel_rig import assert_same
from rig import serving, write_recording
from small import TIGHT, as_problem, draw_data, perturb, rest
from test_families import Kronecker, worst_gradient_error
from tiny import config

#: The authors' model of the maze recording: MGU2 with a soft ReLU and the input outside it,
#: Student inputs, exp link with a gain for each unit and a floor, spikes alone.
AUTHORS = {
    "activation": "soft-relu",
    "input": "outside",
    "normalise_input": True,
    "prior": "student",
    "nu": 20.0,
    "initial_mean": False,
    "gain": True,
    "floor": 1e-3,
    "kinematics": False,
}

VARIANTS: dict[str, dict[str, Any]] = {
    "authors": AUTHORS,
    "gaussian": {"likelihood": "gaussian", "dynamics": "linear"},
    "gain and floor": {"gain": True, "floor": 0.01},
    "linear": {"dynamics": "linear"},
    "mgu": {"dynamics": "mgu", "activation": "soft-relu"},
    "mlp": {"dynamics": "mlp", "activation": "silu", "expansion": 2, "step": 0.3},
    "outside": {"activation": "soft-relu", "input": "outside"},
    "rnn": {"dynamics": "rnn"},
    "softplus": {"link": "softplus", "gain": True},
    "spikes only": {"kinematics": False},
    "student": {"prior": "student"},
}
IN_TORCH = {"mgu", "mlp", "rnn"}


def model_of(name: str, *, n: int = 3, m: int = 2, units: int = 4) -> Model:
    """In general position, float64."""
    made = ModelConfig(latents=n, inputs=m, **VARIANTS[name])
    family = "gaussian" if made.likelihood == "gaussian" else "poisson"
    if made.link == "softplus":
        family = "poisson-softplus"
    group = GroupSpec(family=family, channels=units, gain=made.gain, floor=made.floor)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = build(
            ModelSpec(
                dynamics=made.dynamics,
                prior=made.prior,
                latents=n,
                inputs=m,
                groups={"spikes": group},
                options=made.options,
                nu=made.nu,
            )
        ).double()
        perturb(model, 0.15, torch.Generator().manual_seed(5))
    return model


@pytest.mark.parametrize("name", ["authors", "gain and floor", "outside", "softplus", "mgu"])
def test_exact_gradient_is_finite_differences(name: str) -> None:
    errors = worst_gradient_error(model_of(name), Kronecker(3, 2, 4).double())
    assert max(errors.values()) < 1e-5, errors


def test_the_soft_relu_is_the_papers() -> None:
    x = torch.linspace(-30, 30, 61, dtype=torch.float64)
    d = build(
        ModelSpec(
            dynamics="rnn",
            latents=1,
            inputs=1,
            groups={},
            options=DynamicsOptions(activation="soft-relu"),
        )
    ).dynamics
    one, zero = torch.ones(1, 1, dtype=x.dtype), torch.zeros(1, dtype=x.dtype)
    got = d.step((one, zero, one), x.unsqueeze(-1), torch.zeros(61, 1, dtype=x.dtype))
    expected = 0.5 * (x + (x**2 + 4).sqrt()) - 1
    torch.testing.assert_close(got[:, 0], expected, rtol=0, atol=1e-14)
    assert float(got[30, 0]) == 0.0


def test_the_authors_model_is_their_equations() -> None:
    """Appendix C, eqs. 1, 5 and S11 in numpy and scipy, against the built-in parts."""
    model = model_of("authors")
    p = {k: v.detach().numpy() for k, v in model.named_parameters()}
    observed = draw_data(model, 1, 6)
    rng = np.random.default_rng(2)
    z, u = rng.normal(size=3), rng.normal(size=(6, 2))
    nu = float(model.prior.nu.detach())  # pyright: ignore
    shape = np.diag(np.exp(2 * p["prior.log_scale"]) * (nu - 2) / nu)
    total = stats.norm(p["initial.mean"], np.exp(p["initial.log_scale"])).logpdf(z).sum()
    total += stats.multivariate_t(p["prior.mean"], shape, nu).logpdf(u).sum()
    W = p["dynamics.input"] / np.linalg.norm(p["dynamics.input"], axis=0)
    start = torch.as_tensor(z)[None]
    for k in range(6):
        f = special.expit(p["dynamics.gate"] @ z + p["dynamics.gate_bias"])
        x = p["dynamics.hidden"] @ (f * z) + p["dynamics.hidden_bias"]
        z = (1 - f) * z + f * ((x + np.sqrt(x**2 + 4)) / 2 - 1 + W @ u[k])
        a = p["groups.spikes.C"] @ z + p["groups.spikes.b"]
        rate = np.exp(p["groups.spikes.log_gain"]) * (np.exp(a) + 1e-3)
        total += stats.poisson(rate).logpmf(observed["spikes"].values[0, k].numpy()).sum()
    with torch.no_grad():
        inputs = torch.as_tensor(u)[None]
        path = model.rollout(model.dynamics.weights(), start, inputs)
        np.testing.assert_allclose(path[0, -1].numpy(), z, atol=1e-12)
        ours = model.initial.log_prob(start).sum() + model.prior.log_prob(inputs).sum()
        ours = ours + model.log_likelihood(path, observed)["spikes"].sum()
    assert float(ours) == pytest.approx(float(total), abs=1e-9)


def test_a_floor_and_a_gain_are_in_the_rate() -> None:
    model = model_of("gain and floor")
    spikes = model.group("spikes")
    z = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rate = spikes.log_gain.exp() * (spikes.affine(z).exp() + 0.01)  # pyright: ignore
    torch.testing.assert_close(spikes.mean(z), rate)


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_a_solve_from_cold_reaches_a_stationary_point(name: str) -> None:
    model = model_of(name).requires_grad_(False)
    problem = as_problem(model, draw_data(model, 3, 12, missing=0.2))
    state, _ = ilqr.solve(problem, *rest(problem), TIGHT)
    z0, u = state.z[:, :1, :].clone(), state.u.clone()
    z0.requires_grad_(True)
    u.requires_grad_(True)
    z = model.rollout(problem.w, z0[:, 0], u)
    cost = model.cost(z, u, problem.observed, problem.initial)
    slopes = torch.autograd.grad(cost.sum(), (z0, u))
    assert max(float(g.abs().max()) for g in slopes) < 1e-6 * float(1 + cost.detach().abs().max())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", sorted(set(VARIANTS) - IN_TORCH))
def test_a_compiled_stream_is_the_one_torch_defines(name: str, dtype: torch.dtype) -> None:
    model = model_of(name, n=5, m=2, units=9).to(dtype)
    data = draw_data(model.double(), 3, 20, missing=0.1)["spikes"]
    model = model.to(dtype)
    values, mask = (x.to(dtype) for x in data)
    estimator = MovingHorizon(model, None, values.mean((0, 1)), HorizonConfig(horizon=6))
    assert compiled.usable(model, ("spikes",), values)
    tolerance = 1e-10 if dtype == torch.float64 else 2e-3
    state = estimator.init(3)
    for t in range(20):
        after, answer = estimator.step(state, values[:, t], mask[:, t])
        reference = estimator.step_reference(state, values[:, t], mask[:, t])
        assert_same(answer, reference[1], tolerance)
        assert_same(after, reference[0], tolerance)
        state = after


def test_fused_gpu_kernels_are_for_the_default_model_alone() -> None:
    fused = {name for name in VARIANTS if on_gpu._unsupported(model_of(name), ("spikes",)) is None}  # pyright: ignore
    assert fused == {"linear", "spikes only"}
    assert on_gpu._unsupported(model_of("authors"), ("spikes",)) == (  # pyright: ignore
        "other than one group of Poisson counts of a rate exp(a)"
    )


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recording(tmp_path_factory.mktemp("variants") / "r.mat", n_units=7)


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_trained_saved_streamed_and_served(
    name: str, recording: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = config(steps=3, validate_every=0)
    model = ModelConfig(latents=4, inputs=2, **VARIANTS[name])
    reads = ReadoutConfig(lags=1, residuals=0, hidden=0, recurrent=0, lost=())
    settings = check(msgspec.structs.replace(settings, model=model, readout=reads))
    out = tmp_path / "m.safetensors"
    data = prepare(load_recording(recording, settings.data), settings.data, chunk=15)
    compiled._say.cache_clear()  # pyright: ignore[reportPrivateUsage]
    with caplog.at_level(logging.WARNING):
        manifest = train(settings, recording, out).manifest
        assert manifest.model == model_spec(model, data)
        assert ("kinematics" in manifest.model.groups) == model.kinematics
        assert manifest.kinematic_names == ("vx", "vy")  # read out in any case
        assert np.isfinite(list(manifest.scores.values())).all()
        assert abs(manifest.scores["bits_per_spike"]) < 2.0

        estimator = load_artifact(out).estimator()
        counts = data.recording.counts[:12]
        state, own = estimator.init(1), []
        for y in torch.as_tensor(counts.astype(np.float64)):
            state, answer = estimator.step(state, y[None], torch.ones(1, 7, dtype=torch.float64))
            own.append(torch.cat([answer.z, answer.z_std, answer.rates, answer.kinematics], 1))
        with serving(out) as service, Feeder(service.ingest, service.results) as feeder:
            feeder.subscribe("s")
            feeder.ask(open_("s", units=manifest.unit_names), messages.Opened)
            feeder.send(*(bin_("s", i, x) for i, x in enumerate(counts)))
            served = feeder.results(len(counts))
    for mine, theirs in zip(own, served, strict=True):
        assert theirs.status == "ok"
        parts = (theirs.latent, theirs.latent_std, theirs.rates, theirs.kinematics)
        numbers = np.concatenate([messages.unpack(p, "result") for p in parts])
        assert numbers.tobytes() == mine[0].numpy().tobytes()
    said = [r.message for r in caplog.records if "compiled iLQR" in r.message]
    assert len(said) == (name in IN_TORCH), said


def test_kinematics_can_be_left_out_of_the_model_alone(recording: Path, tmp_path: Path) -> None:
    settings = config(steps=1, validate_every=0)
    for kinematics in (True, False):
        model = msgspec.structs.replace(settings.model, kinematics=kinematics)
        out = tmp_path / f"{kinematics}.safetensors"
        chosen = msgspec.structs.replace(settings, model=model)
        manifest = train(chosen, recording, out).manifest
        assert ("kinematics" in manifest.model.groups) == kinematics
        assert "r2" in manifest.scores
