"""Nonlinear oscillators: the Lorenz attractor forecast ahead, Duffing wells seen through spikes."""

from __future__ import annotations

import time
from typing import Any

import msgspec
import numpy as np
import torch

from ilqr_training.experiments.driver import (
    Array,
    FitConfig,
    NetConfig,
    Outcome,
    Trials,
    Watch,
    fit,
    network,
    observed_of,
    start_noise,
)
from ilqr_training.experiments.generators import (
    duffing_trials,
    lorenz_bouts,
    spiking,
    tuning,
)
from ilqr_vae import ilqr, prediction
from ilqr_vae.artifact import GroupSpec
from ilqr_vae.dynamics import DynamicsOptions
from ilqr_vae.metrics import r2
from ilqr_vae.model import Model


class LorenzConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """112 bouts of 100 steps, dt 0.01, noise 0.1 in the Lorenz system's own units.

    Attributes:
        piece: bins of the windows trained on first; bouts are cut into windows of this length.
        input_scale: where the prior's standard deviation starts.
        pieces, whole: training on windows, then on whole bouts.
        horizons: steps ahead to score.
        autonomous: steps of the free run.
    """

    bouts: int = 112
    bins: int = 100
    dt: float = 0.01
    noise: float = 0.1
    piece: int = 25
    input_scale: float = 0.135
    horizons: tuple[int, ...] = (1, 10, 30, 50)
    autonomous: int = 10_000
    net: NetConfig = NetConfig(
        dynamics="mlp", prior="student", latents=20, inputs=5, options=DynamicsOptions(step=0.1)
    )
    pieces: FitConfig = FitConfig(
        steps=1200, batch=64, learning_rate=0.005, final_rate=0.0005, iterations=8
    )
    whole: FitConfig = FitConfig(
        steps=200, batch=28, learning_rate=0.001, final_rate=0.0002, iterations=4, kl_warmup=0
    )


def ahead_r2(values: Array, forecasts: Array, step: int) -> float:
    """Mean over trials of 1 - SSE/SST of the bins ``step`` ahead, channels pooled.

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
    """The model alone for many steps from one state; is it still on the attractor?"""
    states = prediction.extrapolate(model, z, steps)
    path = model.group("observations").mean(states).detach().double().numpy()
    flat = values.reshape(-1, values.shape[-1])
    low, high = flat.min(0), flat.max(0)
    margin = 0.15 * (high - low)
    late = path[steps // 2 :]
    inside = ((path > low - margin) & (path < high + margin)).all(-1)
    spread = late.std(0) / flat.std(0)
    # the lobes of x and y lie left and right of zero
    wings = float((late[:, 0] > 0).mean())
    on = bool(inside.mean() > 0.99 and (np.abs(np.log(spread)) < np.log(1.5)).all())
    figures = {
        "on_attractor": on and 0.1 < wings < 0.9,
        "autonomous_inside": float(inside.mean()),
        "autonomous_spread": [float(s) for s in spread],
        "autonomous_right_wing": wings,
    }
    return path, figures


def lorenz(config: LorenzConfig, seed: int, watch: Watch) -> Outcome:
    """Fit, infer, forecast with inputs zeroed, then let the model run on its own."""
    rng = np.random.default_rng(seed)
    clean = lorenz_bouts(rng, config.bouts, config.bins, dt=config.dt)
    noisy = clean + config.noise * rng.normal(size=clean.shape)
    scale = noisy.std((0, 1))
    values = noisy / scale
    began = time.monotonic()
    group = GroupSpec(family="gaussian", channels=3)
    model = network(config.net, group, seed=seed, dtype=config.pieces.dtype)
    start_noise(model, values)
    with torch.no_grad():
        model.prior.log_scale.fill_(float(np.log(config.input_scale)))
    cut = config.bins // config.piece * config.piece
    windows = values[:, :cut].reshape(-1, config.piece, 3)
    first = fit(
        model,
        Trials(model, observed_of(model, windows), seed),
        config.pieces,
        seed,
        watch,
        what=f"windows of {config.piece} bins",
    )
    observed = observed_of(model, values)
    bounds = list(first.bounds)
    if config.whole.steps:
        bounds += fit(
            model, Trials(model, observed, seed), config.whole, seed, watch, what="whole bouts"
        ).bounds
    trained = time.monotonic() - began
    solver = ilqr.SolverConfig(iterations=50, tolerance=1e-6)
    posterior = prediction.infer(model, observed, solver=solver)
    steps = max(config.horizons)
    ahead = prediction.forecasts(model, posterior.z, steps, "observations").double().numpy()
    scores = {f"r2_{k}": ahead_r2(values, ahead, k) for k in config.horizons}
    clean_scores = {f"clean_r2_{k}": ahead_r2(clean / scale, ahead, k) for k in config.horizons}
    seconds = time.monotonic() - began
    path, free = _free_run(model, posterior.z[0, -1], config.autonomous, values)
    noise = model.group("observations").get_parameter("log_scale").detach().exp().double().numpy()
    figures = {
        **scores,
        **clean_scores,
        **free,
        "seconds": seconds,
        "seconds_training": trained,
        "bound": float(np.mean(bounds[-20:])),
        "noise": [float(s) for s in noise * scale],
        "converged": float((posterior.state.status == ilqr.Status.CONVERGED).double().mean()),
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

    return Outcome(figures, draw)


class DuffingConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A damped oscillator with two wells seen through 200 Poisson units; 112 + 112 trials.

    Attributes:
        mean_rate: expected counts per bin and unit; gain: how far log rates swing.
    """

    trials: int = 112
    test_trials: int = 112
    bins: int = 200
    units: int = 200
    mean_rate: float = 0.2
    gain: float = 0.8
    net: NetConfig = NetConfig(
        dynamics="mgu2", latents=20, inputs=4, options=DynamicsOptions(forget_bias=-1.0)
    )
    fit: FitConfig = FitConfig(steps=300, batch=16, learning_rate=0.02, iterations=4)


def duffing(config: DuffingConfig, seed: int, watch: Watch) -> Outcome:
    """Fit on training trials; rates and phase portrait of test trials."""
    rng = np.random.default_rng(seed)
    both = duffing_trials(rng, config.trials + config.test_trials, config.bins)
    weights = tuning(rng, config.units, 2)
    made = spiking(
        rng, both, config.units, mean_rate=config.mean_rate, gain=config.gain, weights=weights
    )
    group = GroupSpec(
        family="poisson",
        channels=config.units,
        log_rate_max=float(np.log(10 * (1 + made.counts.max()))),
    )
    model = network(config.net, group, seed=seed, dtype=config.fit.dtype)
    spikes = model.group("observations")
    spikes.start_at(torch.as_tensor(made.counts.mean((0, 1))).to(spikes.b))
    with torch.no_grad():
        spikes.C.mul_(0.5)
    train, test = made.counts[: config.trials], made.counts[config.trials :]
    f = fit(model, Trials(model, observed_of(model, train), seed), config.fit, seed, watch)
    posterior = prediction.infer(
        model,
        observed_of(model, test),
        solver=ilqr.SolverConfig(iterations=30, tolerance=1e-5),
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

    return Outcome(figures, draw)
