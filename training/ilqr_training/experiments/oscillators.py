"""Nonlinear oscillators: forecasts of the Lorenz attractor, and a Duffing oscillator in spikes."""

from __future__ import annotations

import time
from typing import Annotated, Any

import msgspec
import numpy as np
import torch

from ilqr_training.experiments.driver import (
    Array,
    ExperimentResult,
    FitConfig,
    NetConfig,
    TrialBatches,
    fit,
    network,
    observed_of,
    poisson_network,
)
from ilqr_training.experiments.generators import (
    duffing_trials,
    lorenz_bouts,
    spiking,
    tuning,
)
from ilqr_training.experiments.initialise import StartConfig, start_residual
from ilqr_vae.artifact import GroupSpec
from ilqr_vae.files import NonNegativeFloat, PositiveFloat, PositiveInt
from ilqr_vae.inference import prediction
from ilqr_vae.inference.problem import SolverConfig, Status
from ilqr_vae.model.dynamics import DynamicsOptions
from ilqr_vae.model.generative import Model
from ilqr_vae.progress import Progress
from ilqr_vae.scoring.metrics import r2


class Piece(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A stage of training, on bouts cut into windows of ``bins`` bins."""

    bins: PositiveInt
    fit: FitConfig


_PIECES: dict[str, Any] = {
    "batch": 64,
    "scale_rate": 10.0,
    "kl_warmup": 1,
    "iterations": 2,
    "tolerance": 1e-3,
}


class LorenzConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Settings of ``lorenz``; dt and noise are in units of the Lorenz system.

    Attributes:
        test_bouts: further bouts, which are not trained on; all scores are on these.
        pieces: stages of training, the shortest windows first.
        start: initial parameters, see ``initialise.start_residual``.
        horizons: numbers of steps ahead to score.
        autonomous: number of steps of the free run.
        chunk: bins of each chunk that inference on test bouts solves before the whole bout.
    """

    bouts: PositiveInt = 112
    bins: PositiveInt = 100
    dt: PositiveFloat = 0.01
    noise: PositiveFloat = 0.1
    test_bouts: PositiveInt = 112
    horizons: Annotated[tuple[PositiveInt, ...], msgspec.Meta(min_length=1)] = (1, 10, 30, 50)
    autonomous: PositiveInt = 10_000
    chunk: PositiveInt = 25
    net: NetConfig = NetConfig(
        dynamics="mlp", prior="student", latents=20, inputs=5, options=DynamicsOptions(step=0.1)
    )
    start: StartConfig = StartConfig()
    pieces: Annotated[tuple[Piece, ...], msgspec.Meta(min_length=1)] = (
        Piece(25, FitConfig(steps=300, learning_rate=0.002, final_rate=0.001, **_PIECES)),
        Piece(50, FitConfig(steps=400, learning_rate=0.001, final_rate=0.00005, **_PIECES)),
    )

    def __post_init__(self) -> None:
        longest = max(p.bins for p in self.pieces)
        if longest > self.bins:
            raise ValueError(f"pieces: expected at most {self.bins} bins, got {longest}")
        if max(self.horizons) >= self.bins:
            raise ValueError(f"horizons: expected below {self.bins}, got {max(self.horizons)}")


def ahead_r2(values: Array, forecasts: Array, step: int) -> float:
    """Return the mean over trials of R2 of the bins ``step`` ahead, with channels pooled.

    Args:
        values: (K, T, N).
        forecasts: (K, T, steps, N), see ``prediction.forecasts``.
    """
    truth, guess = values[:, step:], forecasts[:, : values.shape[1] - step, step - 1]
    error = ((truth - guess) ** 2).sum((1, 2))
    total = ((truth - truth.mean(1, keepdims=True)) ** 2).sum((1, 2))
    return float((1 - error / total).mean())


def _free_run(
    model: Model, z: torch.Tensor, steps: int, values: Array
) -> tuple[Array, dict[str, Any]]:
    """Run the model without inputs from one state; check that it stays on the attractor."""
    states = prediction.extrapolate(model, z, steps)
    path = model.group("observations").mean(states).detach().double().numpy()
    flat = values.reshape(-1, values.shape[-1])
    low, high = flat.min(0), flat.max(0)
    margin = 0.15 * (high - low)
    late = path[steps // 2 :]
    inside = ((path > low - margin) & (path < high + margin)).all(-1)
    spread = late.std(0) / flat.std(0)
    # x and y are positive in one lobe and negative in the other
    wings = float((late[:, 0] > 0).mean())
    on = bool(inside.mean() > 0.99 and (np.abs(np.log(spread)) < np.log(1.5)).all())
    figures = {
        "on_attractor": on and 0.1 < wings < 0.9,
        "autonomous_inside": float(inside.mean()),
        "autonomous_spread": [float(s) for s in spread],
        "autonomous_right_wing": wings,
    }
    return path, figures


def lorenz(config: LorenzConfig, seed: int, progress: Progress) -> ExperimentResult:
    """Fit, infer test bouts, forecast them without inputs, then let the model run freely."""
    rng = np.random.default_rng(seed)
    clean = lorenz_bouts(rng, config.bouts + config.test_bouts, config.bins, dt=config.dt)
    noisy = clean + config.noise * rng.normal(size=clean.shape)
    scale = noisy[: config.bouts].std((0, 1))
    train, values = np.split(noisy / scale, [config.bouts])
    clean = clean[config.bouts :]
    began = time.monotonic(), time.process_time()
    dtype = config.pieces[0].fit.dtype
    model = network(config.net, GroupSpec(family="gaussian", channels=3), seed=seed, dtype=dtype)
    start_residual(model, train, config.start)
    bounds: list[float] = []
    for bins, how in ((p.bins, p.fit) for p in config.pieces):
        windows = train[:, : config.bins // bins * bins].reshape(-1, bins, 3)
        trials = TrialBatches(model, observed_of(model, windows), seed)
        bounds += fit(model, trials, how, seed, progress, what=f"windows of {bins} bins").bounds
    trained = time.monotonic() - began[0]
    observed = observed_of(model, values)
    solver = SolverConfig(iterations=50, tolerance=1e-6)
    # the inputs have nearly vanished by now, and a rollout from the prior mean without them is a
    # chaotic path, a poor start: solve chunks first
    posterior = prediction.infer_long(model, observed, chunk=config.chunk, solver=solver)
    steps = max(config.horizons)
    ahead = prediction.forecasts(model, posterior.z, steps, "observations").double().numpy()
    scores = {f"r2_{k}": ahead_r2(values, ahead, k) for k in config.horizons}
    clean_scores = {f"clean_r2_{k}": ahead_r2(clean / scale, ahead, k) for k in config.horizons}
    # the scores of the noise-free paths: in a bout that hardly moves, most variance is noise
    perfect = np.stack([np.roll(clean / scale, -k, axis=1) for k in range(1, steps + 1)], 2)
    ceiling = {f"ceiling_r2_{k}": ahead_r2(values, perfect, k) for k in config.horizons}
    seconds, cpu = time.monotonic() - began[0], time.process_time() - began[1]
    path, free = _free_run(model, posterior.z[0, -1], config.autonomous, values)
    noise = model.group("observations").get_parameter("log_scale").detach().exp().double().numpy()
    figures = {
        **scores,
        **clean_scores,
        **ceiling,
        **free,
        "seconds": seconds,
        "seconds_training": trained,
        "seconds_cpu": cpu,
        "bound": float(np.mean(bounds[-20:])),
        "noise": [float(s) for s in noise * scale],
        "converged": float((posterior.state.status == Status.CONVERGED).double().mean()),
    }

    def draw(figure: Any) -> None:
        left = figure.add_subplot(131)
        left.plot([ahead_r2(values, ahead, k) for k in range(1, steps + 1)])
        left.set(xlabel="steps ahead", ylabel="R2, inputs zeroed")
        middle = figure.add_subplot(132, projection="3d")
        for bout in clean[:40]:
            middle.plot(*bout.T, lw=0.5)
        middle.set_title("bouts")
        right = figure.add_subplot(133, projection="3d")
        right.plot(*(path * scale).T, lw=0.3)
        right.set_title(f"model alone, {len(path)} steps")

    return ExperimentResult(figures, draw)


class DuffingConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Settings of ``duffing``: a damped oscillator with two wells observed by Poisson units.

    Attributes:
        mean_rate: expected counts per bin and unit; gain: scale of the variation of log rates.
    """

    trials: PositiveInt = 112
    test_trials: PositiveInt = 112
    bins: PositiveInt = 200
    units: PositiveInt = 200
    mean_rate: PositiveFloat = 0.2
    gain: NonNegativeFloat = 0.8
    net: NetConfig = NetConfig(
        dynamics="mgu2", latents=20, inputs=4, options=DynamicsOptions(forget_bias=-1.0)
    )
    fit: FitConfig = FitConfig(steps=300, batch=16, learning_rate=0.02, iterations=4)


def duffing(config: DuffingConfig, seed: int, progress: Progress) -> ExperimentResult:
    """Fit on training trials; score the rates and the phase portrait of test trials."""
    rng = np.random.default_rng(seed)
    both = duffing_trials(rng, config.trials + config.test_trials, config.bins)
    weights = tuning(rng, config.units, 2)
    made = spiking(
        rng, both, config.units, mean_rate=config.mean_rate, gain=config.gain, weights=weights
    )
    model = poisson_network(config.net, made.counts, seed=seed, dtype=config.fit.dtype)
    train, test = made.counts[: config.trials], made.counts[config.trials :]
    f = fit(model, TrialBatches(model, observed_of(model, train), seed), config.fit, seed, progress)
    posterior = prediction.infer(
        model,
        observed_of(model, test),
        solver=SolverConfig(iterations=30, tolerance=1e-5),
    )
    rates = posterior.rates()["observations"].detach().double().numpy()
    truth = made.rates[config.trials :]
    z = posterior.z[:, 1:].double().numpy()
    flat, hidden = z.reshape(-1, z.shape[-1]), both[config.trials :].reshape(-1, 2)
    design = np.concatenate([flat, np.ones((len(flat), 1))], 1)
    portrait = design @ np.linalg.lstsq(design, hidden, rcond=None)[0]
    n_bins = rates.shape[0] * rates.shape[1]
    figures = {
        "rate_r2": r2(truth.reshape(n_bins, -1), rates.reshape(n_bins, -1)),
        "state_r2": r2(hidden, portrait),
        "seconds": f.seconds,
        "bound": float(np.mean(f.bounds[-20:])),
    }

    def draw(figure: Any) -> None:
        axes = figure.subplots(1, 2, sharex=True, sharey=True)
        shown = portrait.reshape(config.test_trials, config.bins, 2)
        for ax, paths, title in (
            (axes[0], both[config.trials :], "true"),
            (axes[1], shown, "inferred, linear readout"),
        ):
            for path in paths[:60]:
                ax.plot(path[:, 0], path[:, 1], lw=0.5)
            ax.set(title=title, xlabel="position")
        axes[0].set_ylabel("velocity")

    return ExperimentResult(figures, draw)
