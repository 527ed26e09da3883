"""Linear systems: autonomous data fitted with free inputs, and sparse inputs recovered."""

from __future__ import annotations

import time
from itertools import permutations
from typing import Any, Literal

import msgspec
import numpy as np
import torch

from ilqr_training.experiments.driver import (
    Array,
    ExperimentResult,
    Fit,
    FitConfig,
    NetConfig,
    TrialBatches,
    fit,
    network,
    observed_of,
    start_noise,
)
from ilqr_training.experiments.generators import (
    START,
    LinearData,
    LinearSystem,
    autoregressive_inputs,
    sparse_inputs,
    stable_matrix,
)
from ilqr_training.experiments.initialise import start_linear
from ilqr_training.experiments.oracle import oracle_scores
from ilqr_vae.artifact import GroupSpec
from ilqr_vae.files import OpenShare, PositiveFloat, PositiveInt, ShareBelowOne
from ilqr_vae.inference import prediction
from ilqr_vae.model.dynamics import Linear
from ilqr_vae.model.generative import Model
from ilqr_vae.progress import Progress


class AutonomousConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Settings of ``autonomous-linear``: a linear system without inputs.

    Attributes:
        noise: standard deviation of the noise; that of the signal is about one.
        bound_samples: number of posterior samples in the final bounds.
    """

    trials: PositiveInt = 56
    bins: PositiveInt = 100
    outputs: PositiveInt = 8
    noise: PositiveFloat = 0.1
    bound_samples: PositiveInt = 20
    net: NetConfig = NetConfig(dynamics="linear", latents=8, inputs=3)
    fit: FitConfig = FitConfig(steps=1200, batch=56, learning_rate=0.03, iterations=2)


def _autonomous_data(config: AutonomousConfig, rng: np.random.Generator) -> LinearData:
    n = config.net.latents
    A = stable_matrix(n, rng, slowest=0.995, fastest=0.95)
    C = rng.normal(size=(config.outputs, n)) / np.sqrt(n)
    start = rng.normal(size=(config.trials, n))
    none = np.zeros((config.trials, config.bins, config.net.inputs))
    B = np.zeros((n, config.net.inputs))
    return LinearSystem(A, B, C).run(rng, none, noise=config.noise, start=start)


def _fit_linear(
    values: Array,
    net: NetConfig,
    how: FitConfig,
    seed: int,
    progress: Progress,
    what: str,
    *,
    free: bool = True,
    regress: bool = False,
) -> tuple[Fit, TrialBatches]:
    group = GroupSpec(family="gaussian", channels=values.shape[-1])
    model = network(net, group, seed=seed, dtype=how.dtype)
    if regress:
        start_linear(model, values)
    else:
        start_noise(model, values)
    if not free and isinstance(model.dynamics, Linear):
        with torch.no_grad():
            model.dynamics.input.zero_()
        model.dynamics.input.requires_grad_(False)
    trials = TrialBatches(model, observed_of(model, values), seed)
    return fit(model, trials, how, seed, progress, what=what), trials


def initial_share(model: Model, z: torch.Tensor, u: torch.Tensor) -> float:
    """Return the share of the energy put into the state that is put in at the start.

    |z_0|^2 + |B u_0|^2 divided by the same plus all later |B u_k|^2, summed over trials.
    """
    dynamics = model.dynamics
    _, B = dynamics.jacobians(dynamics.weights(), z[:, :-1], u)
    energy = ((B @ u.unsqueeze(-1)).squeeze(-1) ** 2).sum(-1).sum(0)
    start = (z[:, 0] ** 2).sum() + energy[0]
    return float((start / (start + energy[1:].sum())).detach())


def autonomous(config: AutonomousConfig, seed: int, progress: Progress) -> ExperimentResult:
    """Fit with free inputs and with none; compare the bounds and locate the inferred inputs."""
    data = _autonomous_data(config, np.random.default_rng(seed))
    fits: dict[str, Fit] = {}
    figures: dict[str, Any] = {}
    energy = np.zeros(config.bins)
    for name in ("free", "forced"):
        f, _ = _fit_linear(
            data.values,
            config.net,
            config.fit,
            seed,
            progress,
            f"inputs {name}",
            free=name == "free",
        )
        fits[name] = f
        model = f.run.model
        observed = observed_of(model, data.values)
        posterior = prediction.infer(model, observed, generator=f.run.generator)
        bound = posterior.bound(observed, samples=config.bound_samples).mean() / config.bins
        figures[f"bound_{name}"] = float(bound)
        figures[f"seconds_{name}"] = f.seconds
        if name == "free":
            figures["initial_energy_share"] = initial_share(model, posterior.z, posterior.u)
            energy = (posterior.u**2).sum(-1).mean(0).numpy()
    figures["gain"] = figures["bound_free"] - figures["bound_forced"]

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        for name, f in fits.items():
            left.plot(f.bounds, label=f"inputs {name}")
        low = min(np.quantile(f.bounds, 0.1) for f in fits.values())
        left.set(xlabel="step", ylabel="bound, nats per bin", ylim=(low, None))
        left.legend()
        right.semilogy(energy)
        right.set(xlabel="bin", ylabel="mean squared input")

    return ExperimentResult(figures, draw)


class Variant(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Another size of the sparse-input data set."""

    trials: PositiveInt
    bins: PositiveInt
    kind: Literal["sparse", "autoregressive"] = "sparse"

    @property
    def key(self) -> str:
        kind = "" if self.kind == "sparse" else "_autoregressive"
        return f"input_r2_{self.trials}x{self.bins}{kind}"


class SparseConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Settings of ``sparse-inputs``: a linear system with sparse inputs.

    Attributes:
        probability: probability of an event in a bin; it sets all inputs, N(0, 1) each.
        noise: standard deviation of the noise of the observations.
        start: initial parameters, from a regression of the observations on their past
            (``initialise.start_linear``) or random.
        memory: correlation of autoregressive inputs from one bin to the next.
        seeds: number of data sets, with consecutive seeds.
        variants: other sizes, one data set each.
    """

    trials: PositiveInt = 1
    bins: PositiveInt = 1000
    outputs: PositiveInt = 10
    probability: OpenShare = 0.03
    noise: PositiveFloat = 0.1
    start: Literal["regression", "random"] = "regression"
    memory: ShareBelowOne = 0.5
    seeds: PositiveInt = 5
    variants: tuple[Variant, ...] = ()
    net: NetConfig = NetConfig(dynamics="linear", prior="student", latents=3, inputs=3)
    fit: FitConfig = FitConfig(
        steps=300, batch=8, learning_rate=0.01, iterations=4, kl_warmup=20, dtype="float64"
    )


def input_r2(truth: Array, found: Array) -> float:
    """Return R2 of the true inputs from the inferred ones through the best linear map.

    Inputs are identifiable only up to such a map. NaN if the true inputs are all zero.

    Args:
        truth, found: (K, T, m).
    """
    x, y = found.reshape(-1, found.shape[-1]), truth.reshape(-1, truth.shape[-1])
    M = np.linalg.lstsq(x, y, rcond=None)[0]
    total = ((y - y.mean(0)) ** 2).sum()
    return float(1 - ((y - x @ M) ** 2).sum() / total) if total > 0 else float("nan")


def eigenvalue_error(A: Array, found: Array) -> float:
    """Return the largest distance between eigenvalues under their best matching."""
    a, b = np.linalg.eigvals(A), np.linalg.eigvals(found)
    return float(min(np.abs(a - b[list(p)]).max() for p in permutations(range(len(b)))))


def _sparse_one(
    config: SparseConfig, size: Variant, seed: int, progress: Progress, what: str
) -> tuple[dict[str, float], LinearData, Array, Array]:
    rng = np.random.default_rng(seed)
    m = config.net.inputs
    system = LinearSystem.draw(rng, config.net.latents, m, config.outputs)
    if size.kind == "sparse":
        u = sparse_inputs(rng, size.trials, size.bins, m, config.probability)
    else:
        u = autoregressive_inputs(rng, size.trials, size.bins, m, memory=config.memory)
    data = system.run(rng, u, noise=config.noise)
    regress = config.start == "regression"
    f, trials = _fit_linear(
        data.values, config.net, config.fit, seed, progress, what, regress=regress
    )
    model = f.run.model
    # the cost under a Student prior is not convex, and a narrow prior keeps inputs that start at
    # zero near zero: start from the solutions of training
    warm = trials.warm(torch.arange(trials.count))
    posterior = prediction.infer(model, observed_of(model, data.values), start=warm)
    found = posterior.u.double().numpy()
    A_found = model.dynamics.weights()[0].detach().double().numpy()
    oracle = oracle_scores(data, noise=config.noise, start=START)
    scores = {
        "input_r2": input_r2(u, found),
        "oracle_r2_white": oracle["white"],
        "oracle_r2_events": oracle["events"],
        "eigenvalue_error": eigenvalue_error(system.A, A_found),
        "seconds": f.seconds,
    }
    return scores, data, found, A_found


def sparse(config: SparseConfig, seed: int, progress: Progress) -> ExperimentResult:
    """Recover inputs and eigenvalues for several seeds, and for the variants."""
    began = time.monotonic()
    size = Variant(config.trials, config.bins)
    seeds = range(seed, seed + config.seeds)
    runs = [_sparse_one(config, size, s, progress, f"seed {s}") for s in seeds]
    figures: dict[str, Any] = {
        name: float(np.mean([scores[name] for scores, *_ in runs]))
        for name in ("input_r2", "eigenvalue_error", "oracle_r2_white", "oracle_r2_events")
    }
    figures["input_r2_per_seed"] = [scores["input_r2"] for scores, *_ in runs]
    for variant in config.variants:
        scores, *_ = _sparse_one(config, variant, seed, progress, variant.key)
        figures[variant.key] = scores["input_r2"]
        oracle = {k: scores[f"oracle_r2_{k}"] for k in ("white", "events")}
        figures[variant.key.replace("input_r2", "oracle_r2")] = oracle
        progress.log(f"{variant.key} {scores['input_r2']:.4f}")
    figures["seconds"] = time.monotonic() - began
    _, data, found, A_found = runs[0]

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2, width_ratios=(3, 1))
        x, y = found[0], data.inputs[0]
        M = np.linalg.lstsq(x, y, rcond=None)[0]
        for i in range(y.shape[-1]):
            left.plot(y[:300, i] + 4 * i, color="k", lw=1.5)
            left.plot((x @ M)[:300, i] + 4 * i, color="C1", lw=0.8)
        left.set(xlabel="bin", title="inputs: true (black), inferred", yticks=[])
        for eig, mark in ((np.linalg.eigvals(data.A), "ko"), (np.linalg.eigvals(A_found), "C1x")):
            right.plot(eig.real, eig.imag, mark)
        right.set(title="eigenvalues", xlabel="real", ylabel="imaginary")

    return ExperimentResult(figures, draw)
