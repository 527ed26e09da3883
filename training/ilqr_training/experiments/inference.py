"""Inference beyond the training data: a sequence longer than the chunks, missing bins and units."""

from __future__ import annotations

import time
from typing import Annotated, Any

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
    poisson_network,
)
from ilqr_training.experiments.generators import (
    LinearSystem,
    lorenz_bouts,
    sparse_inputs,
    spiking,
)
from ilqr_training.experiments.initialise import start_linear
from ilqr_vae.artifact import GroupSpec
from ilqr_vae.files import NonNegativeFloat, OpenShare, PositiveFloat, PositiveInt, ShareBelowOne
from ilqr_vae.inference import prediction
from ilqr_vae.inference.problem import SolverConfig, Status
from ilqr_vae.model.dynamics import DynamicsOptions
from ilqr_vae.model.likelihoods import Observed, padded
from ilqr_vae.progress import Progress
from ilqr_vae.scoring.metrics import poisson_nll

_SOLVER = SolverConfig(iterations=60, tolerance=1e-7)


class LongConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Settings of ``long-trial``: a linear system with sparse inputs.

    Attributes:
        chunks: number of training chunks, in one padded batch.
        lengths: lengths in bins, from which each chunk's is drawn.
        chunk: bins of each chunk into which the long sequence is cut for comparison.
        times: length of the long sequence in such chunks.
        samples: posterior samples for the scores.
    """

    chunks: PositiveInt = 40
    lengths: Annotated[tuple[PositiveInt, ...], msgspec.Meta(min_length=1)] = (50, 75, 100)
    chunk: PositiveInt = 100
    times: PositiveInt = 20
    outputs: PositiveInt = 10
    noise: PositiveFloat = 0.3
    probability: OpenShare = 0.03
    samples: PositiveInt = 100
    net: NetConfig = NetConfig(dynamics="linear", prior="student", latents=3, inputs=3)
    fit: FitConfig = FitConfig(steps=300, batch=20, learning_rate=0.03, iterations=4)


def long_trial(config: LongConfig, seed: int, progress: Progress) -> ExperimentResult:
    """Train on chunks of different lengths; infer on one sequence of ``times`` chunks."""
    began = time.monotonic()
    rng = np.random.default_rng(seed)
    system = LinearSystem.draw(rng, config.net.latents, config.net.inputs, config.outputs)

    def run(trials: int, bins: int) -> Array:
        u = sparse_inputs(rng, trials, bins, config.net.inputs, config.probability)
        return system.run(rng, u, noise=config.noise).values

    longest = max(config.lengths)
    made = run(config.chunks, longest)
    lengths = rng.choice(config.lengths, size=config.chunks)
    whole = run(1, config.chunk * config.times)
    group = GroupSpec(family="gaussian", channels=config.outputs)
    model = network(config.net, group, seed=seed, dtype=config.fit.dtype)
    start_linear(model, made[:, : min(config.lengths)])
    like = model.initial.mean
    values, live = padded(
        [torch.as_tensor(x[:k]).to(like) for x, k in zip(made, lengths, strict=True)]
    )
    trials = TrialBatches(model, {"observations": values}, seed, live=live)
    f = fit(model, trials, config.fit, seed, progress, what="chunks of mixed lengths")
    model = model.double()
    generator = torch.Generator().manual_seed(seed)
    total = config.chunk * config.times

    def score(x: Array, *, joint: bool) -> dict[str, float]:
        observed = observed_of(model, x)
        if joint:
            posterior = prediction.infer_long(
                model, observed, chunk=config.chunk, solver=_SOLVER, generator=generator
            )
        else:
            posterior = prediction.infer(model, observed, solver=_SOLVER, generator=generator)
        z = posterior.sample(config.samples).states.flatten(0, 1)
        o = observed["observations"]
        tiled = Observed(*(x.repeat(config.samples, 1, 1) for x in o))
        with torch.no_grad():
            fitted = model.log_likelihood(z, {"observations": tiled})["observations"]
        return {
            "log_likelihood": float(fitted.sum()) / config.samples / total,
            "bound": float(posterior.bound(observed, samples=config.samples).sum()) / total,
            "converged": float((posterior.state.status == Status.CONVERGED).double().mean()),
        }

    long = score(whole, joint=True)
    progress("inference", 1, 2)
    chunked = score(whole.reshape(config.times, config.chunk, -1), joint=False)
    progress("inference", 2, 2)
    figures: dict[str, Any] = {f"{k}_long": v for k, v in long.items()}
    figures |= {f"{k}_chunked": v for k, v in chunked.items()}
    figures["bound_gain"] = long["bound"] - chunked["bound"]
    figures["log_likelihood_gain"] = long["log_likelihood"] - chunked["log_likelihood"]
    figures["seconds"] = time.monotonic() - began
    figures["seconds_training"] = f.seconds

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        left.plot(f.bounds)
        left.set(xlabel="step", ylabel="bound, nats per bin")
        names = ("log_likelihood", "bound")
        for i, (label, scores) in enumerate((("long", long), ("chunks", chunked))):
            right.bar(
                [x + 0.35 * i for x in range(2)], [scores[k] for k in names], 0.3, label=label
            )
        right.set_xticks([0.17, 1.17], [k.replace("_", " ") for k in names])
        right.set_ylabel("nats per bin")
        right.legend()

    return ExperimentResult(figures, draw)


class MissingConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Settings of ``missing-data``: spikes driven by the Lorenz system, some not observed.

    Attributes:
        bins_missing, units_missing: shares that are missing, drawn for each trial.
    """

    trials: PositiveInt = 80
    bins: PositiveInt = 100
    units: PositiveInt = 60
    mean_rate: PositiveFloat = 0.3
    gain: NonNegativeFloat = 0.8
    bins_missing: ShareBelowOne = 0.3
    units_missing: ShareBelowOne = 0.2
    net: NetConfig = NetConfig(
        dynamics="mgu2", latents=12, inputs=4, options=DynamicsOptions(forget_bias=-1.0)
    )
    fit: FitConfig = FitConfig(steps=300, batch=20, learning_rate=0.02, iterations=4)


def masks(
    rng: np.random.Generator, shape: tuple[int, int, int], bins: float, units: float
) -> tuple[Array, Array]:
    """Draw the bins and the units that are observed in each trial.

    Returns:
        Ones and zeros, (K, T, 1) and (K, 1, N), with the exact share of zeros in each trial.
    """
    K, T, N = shape

    def pick(size: int, share: float) -> Array:
        order = np.argsort(rng.random((K, size)), axis=1)
        return (order >= round(share * size)).astype(np.float64)

    return pick(T, bins)[:, :, None], pick(N, units)[:, None, :]


def bits_where(rates: Array, counts: Array, where: Array) -> float:
    """Return bits per spike on the chosen entries, relative to each unit's mean count.

    Args:
        rates, counts: (K, T, N); where: the same shape, positive for entries to score.
    """
    keep = where > 0
    null = np.broadcast_to(counts.mean((0, 1)), counts.shape)
    gain = poisson_nll(null[keep], counts[keep]) - poisson_nll(rates[keep], counts[keep])
    return gain / max(1.0, float(counts[keep].sum())) / float(np.log(2))


def missing_data(config: MissingConfig, seed: int, progress: Progress) -> ExperimentResult:
    """Fit and infer with entries masked, and score the imputed rates beside an unmasked fit."""
    rng = np.random.default_rng(seed)
    bouts = lorenz_bouts(rng, config.trials, config.bins, dt=0.02)
    made = spiking(rng, bouts, config.units, mean_rate=config.mean_rate, gain=config.gain)
    bins, units = masks(rng, made.counts.shape, config.bins_missing, config.units_missing)
    seen = bins * units
    parts = {
        "observed": seen,
        "missing_bins": (1 - bins) * units,
        "missing_units": bins * (1 - units),
        "missing": 1 - seen,
    }
    figures: dict[str, Any] = {"share_missing": float(1 - seen.mean())}
    fits: dict[str, Fit] = {}
    shown: dict[str, Array] = {}
    for name, mask in (("masked", seen), ("unmasked", np.ones_like(seen))):
        model = poisson_network(config.net, made.counts, seed=seed, dtype=config.fit.dtype)
        observed = observed_of(model, made.counts, mask)
        f = fit(model, TrialBatches(model, observed, seed), config.fit, seed, progress, what=name)
        posterior = prediction.infer(model, observed, solver=_SOLVER)
        rates = posterior.rates()["observations"].detach().double().numpy()
        for part, where in parts.items():
            figures[f"bps_{part}_{name}"] = bits_where(rates, made.counts, where)
        fits[name], shown[name] = f, rates
    figures["bps_missing_true_rates"] = bits_where(made.rates, made.counts, parts["missing"])
    figures["seconds"] = sum(f.seconds for f in fits.values())

    def draw(figure: Any) -> None:
        axes = figure.subplots(1, 3)
        for ax, (title, x) in zip(
            axes,
            (("true", made.rates), ("all seen", shown["unmasked"]), ("masked", shown["masked"])),
            strict=True,
        ):
            ax.imshow(np.log(x[0].T), aspect="auto", interpolation="none")
            ax.set(title=f"log rates of one trial: {title}", xlabel="bin")
        hidden = np.ma.masked_where(seen[0].T > 0, np.ones_like(seen[0].T))
        axes[2].imshow(hidden, aspect="auto", interpolation="none", cmap="gray", alpha=0.35)

    return ExperimentResult(figures, draw)
