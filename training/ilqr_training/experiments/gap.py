"""The inference gap: how far the bound lies below log p(o), for iLQR and for an amortised encoder.

Both train the same generator from the same start. The encoder is a bidirectional GRU that reads the
observations and returns the mean and standard deviation of z_0 and of each input.
"""

from __future__ import annotations

import math
import time
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from ilqr_training.experiments.driver import (
    Array,
    ExperimentResult,
    FitConfig,
    NetConfig,
    TrialBatches,
    fit,
    network,
    observed_of,
)
from ilqr_training.experiments.generators import LinearSystem, sparse_inputs
from ilqr_training.experiments.initialise import start_linear
from ilqr_training.fit.loop import Report, TrainingRun
from ilqr_vae.artifact import GroupSpec
from ilqr_vae.files import OpenShare, PositiveFloat, PositiveInt
from ilqr_vae.inference import elbo, prediction
from ilqr_vae.inference.posterior import Draw, log_q
from ilqr_vae.inference.problem import SolverConfig
from ilqr_vae.model.generative import Model
from ilqr_vae.model.likelihoods import Observed
from ilqr_vae.model.priors import LOG_2PI
from ilqr_vae.progress import Progress


class GapConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Settings of ``inference-gap``: trials of a linear system with sparse inputs.

    Attributes:
        samples: samples of the importance-weighted bound, which approximates log p(o).
        checks: number of times that the gap is measured during training.
        hidden: hidden units in each direction of the encoder.
    """

    trials: PositiveInt = 76
    bins: PositiveInt = 100
    outputs: PositiveInt = 10
    noise: PositiveFloat = 0.3
    probability: OpenShare = 0.03
    samples: PositiveInt = 1000
    checks: PositiveInt = 4
    hidden: PositiveInt = 64
    net: NetConfig = NetConfig(dynamics="linear", prior="student", latents=3, inputs=3)
    fit: FitConfig = FitConfig(steps=400, batch=19, learning_rate=0.02, iterations=4)


class Encoder(nn.Module):
    """Bidirectional GRU: (B, T, N) observations -> moments of z_0 and of each input."""

    def __init__(self, channels: int, n: int, m: int, hidden: int, *, scale: float = 0.3) -> None:
        super().__init__()
        self.n, self.m = n, m
        self.gru = nn.GRU(channels, hidden, batch_first=True, bidirectional=True)
        self.inputs = nn.Linear(2 * hidden, 2 * m)
        self.initial = nn.Linear(2 * hidden, 2 * n)
        with torch.no_grad():
            for layer, size in ((self.inputs, m), (self.initial, n)):
                layer.weight.mul_(0.1)
                layer.bias[size:] = math.log(scale)

    def forward(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return mean and log standard deviation of z_0 (B, n), then of u (B, T, m)."""
        read, _ = self.gru(values)
        u, u_log = self.inputs(read).split(self.m, -1)
        z0, z0_log = self.initial(read[:, 0]).split(self.n, -1)
        return z0, z0_log, u, u_log


def draw_of(z0_log: Tensor, u_log: Tensor, generator: torch.Generator, samples: int = 1) -> Draw:
    """Draw from the encoder's diagonal posterior; the batch is repeated for each sample."""
    z0_log, u_log = z0_log.repeat(samples, 1), u_log.repeat(samples, 1, 1)
    e0 = torch.randn(z0_log.shape, generator=generator, dtype=z0_log.dtype)
    e = torch.randn(u_log.shape, generator=generator, dtype=u_log.dtype)
    half = 0.5 * (1 + LOG_2PI)
    z0_entropy = (z0_log + half).sum(-1)
    u_entropy = (u_log + half).sum(-1)
    return Draw(
        dz0=e0 * z0_log.exp(),
        du=e * u_log.exp(),
        z0_var=(2 * z0_log).exp(),
        u_var=(2 * u_log).exp(),
        entropy=z0_entropy + u_entropy.sum(-1),
        z0_entropy=z0_entropy,
        u_entropy=u_entropy,
        z0_log_q=log_q(e0, z0_entropy),
        u_log_q=log_q(e, u_entropy),
    )


class Gap(msgspec.Struct, frozen=True):
    """One measurement in nats per bin: bound, importance-weighted bound, their difference."""

    step: int
    bound: float
    weighted: float

    @property
    def gap(self) -> float:
        return self.weighted - self.bound


def _of_ilqr(
    model: Model, observed: dict[str, Observed], trials: TrialBatches, config: GapConfig, step: int
) -> Gap:
    # start from the solutions of training: the cost under a Student prior is not convex, and inputs
    # that start at zero may stay there
    warm = trials.warm(torch.arange(trials.count))
    generator = torch.Generator().manual_seed(step)
    solver = SolverConfig(iterations=40, tolerance=1e-6)
    q = prediction.infer(model, observed, solver=solver, start=warm, generator=generator)
    bound = float(q.bound(observed, samples=50).mean()) / config.bins
    weighted = q.importance_weighted(observed, samples=config.samples, at_once=50)
    return Gap(step, bound, float(weighted.mean()) / config.bins)


@torch.no_grad()
def _of_encoder(
    model: Model, encoder: Encoder, observed: dict[str, Observed], config: GapConfig, step: int
) -> Gap:
    generator = torch.Generator().manual_seed(step)
    w = tuple(t.detach() for t in model.dynamics.weights())
    z0, z0_log, u, u_log = encoder(observed["observations"].values)

    def sampler(k: int) -> Draw:
        return draw_of(z0_log, u_log, generator, k)

    bounds = [elbo.bound(model, w, z0, u, sampler(1), observed).value().mean() for _ in range(50)]
    weighted = elbo.importance_weighted(
        model, w, z0, u, sampler, observed, samples=config.samples, at_once=50
    )
    mean = float(torch.stack(bounds).mean())
    return Gap(step, mean / config.bins, float(weighted.mean()) / config.bins)


def _train_encoder(
    model: Model, values: Array, config: GapConfig, seed: int, progress: Progress
) -> list[Gap]:
    how = config.fit
    observed = observed_of(model, values)
    encoder = Encoder(values.shape[-1], model.n, model.m, config.hidden).to(model.initial.mean)
    parameters = [p for p in (*model.parameters(), *encoder.parameters()) if p.requires_grad]
    optimiser = torch.optim.Adam(parameters, how.learning_rate)
    trials = TrialBatches(model, observed, seed)
    generator = torch.Generator().manual_seed(seed)
    batch = min(how.batch, trials.count)
    gaps: list[Gap] = []
    for step in range(how.steps):
        part = trials.observed(trials.draw(batch))
        z0, z0_log, u, u_log = encoder(part["observations"].values)
        draw = draw_of(z0_log, u_log, generator)
        parts = elbo.bound(model, model.dynamics.weights(), z0, u, draw, part)
        weight = min(1.0, (step + 1) / max(1, how.kl_warmup))
        loss = -parts.value(kl_weight=weight).mean() / config.bins
        for group in optimiser.param_groups:
            # the encoder diverges at the learning rate of the generator
            group["lr"] = 0.3 * how.rate(step)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, how.clip)
        optimiser.step()
        progress(
            "bidirectional encoder",
            step + 1,
            how.steps,
            f"bound {-float(loss.detach()):.3f} nats/bin",
        )
        if (step + 1) % max(1, how.steps // config.checks) == 0:
            gaps.append(_of_encoder(model, encoder, observed, config, step + 1))
    return gaps


def inference_gap(config: GapConfig, seed: int, progress: Progress) -> ExperimentResult:
    """Train both ways from the same start; measure both gaps during training."""
    began = time.monotonic()
    rng = np.random.default_rng(seed)
    system = LinearSystem.draw(rng, config.net.latents, config.net.inputs, config.outputs)
    u = sparse_inputs(rng, config.trials, config.bins, config.net.inputs, config.probability)
    values = system.run(rng, u, noise=config.noise).values

    def fresh() -> Model:
        group = GroupSpec(family="gaussian", channels=config.outputs)
        model = network(config.net, group, seed=seed, dtype=config.fit.dtype)
        start_linear(model, values)
        return model

    ours: list[Gap] = []
    model = fresh()
    observed = observed_of(model, values)

    def check(run: TrainingRun, report: Report) -> None:
        if report.step % max(1, config.fit.steps // config.checks) == 0:
            ours.append(_of_ilqr(run.model, observed, trials, config, report.step))

    trials = TrialBatches(model, observed, seed)
    fit(model, trials, config.fit, seed, progress, what="iLQR", after=check)
    theirs = _train_encoder(fresh(), values, config, seed, progress)
    figures: dict[str, Any] = {
        "gap_ilqr": [g.gap for g in ours],
        "gap_encoder": [g.gap for g in theirs],
        "steps": [g.step for g in ours],
        "bound_ilqr": ours[-1].bound,
        "bound_encoder": theirs[-1].bound,
        "importance_weighted_ilqr": ours[-1].weighted,
        "importance_weighted_encoder": theirs[-1].weighted,
        "smaller_throughout": all(a.gap < b.gap for a, b in zip(ours, theirs, strict=True)),
        "seconds": time.monotonic() - began,
    }

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        for name, gaps, colour in (("iLQR", ours, "C0"), ("bidirectional GRU", theirs, "C1")):
            steps = [g.step for g in gaps]
            left.plot(steps, [g.bound for g in gaps], colour, label=name)
            left.plot(steps, [g.weighted for g in gaps], colour, ls="--")
            right.semilogy(steps, [max(g.gap, 1e-6) for g in gaps], colour, marker="o")
        left.set(xlabel="step", ylabel="nats per bin", title="bound, and importance-weighted (--)")
        left.legend()
        right.set(xlabel="step", ylabel="gap, nats per bin")

    return ExperimentResult(figures, draw)
