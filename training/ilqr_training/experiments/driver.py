"""Shared by the experiments: whole trials as training batches, new models, and a fit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ilqr_training.config import LoopConfig
from ilqr_training.fit.loop import Report, TrainingRun, start, train_steps
from ilqr_vae.artifact import GroupSpec, ModelSpec, build
from ilqr_vae.errors import ShapeError
from ilqr_vae.files import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from ilqr_vae.model.dynamics import DynamicsOptions
from ilqr_vae.model.generative import Model
from ilqr_vae.model.likelihoods import Gaussian, Observed
from ilqr_vae.progress import Progress

Array = NDArray[np.float64]


class FitConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How a model is fitted to trials.

    Attributes:
        steps, batch: gradient steps, and trials per step (at most all trials).
        learning_rate, final_rate: first and last learning rate of Adam, along a half cosine.
        scale_rate: learning rate of scales, as a multiple of the other parameters', see
            ``loop.start``.
        clip: largest norm of the gradient of the bound per bin.
        kl_warmup: steps over which the KL's weight grows to one.
        posterior: per-trial Laplace approximation, or the paper's Kronecker form.
        iterations, tolerance: limits of the iLQR solves.
        exact_gradient: implicit gradient with all curvature; else Gauss-Newton.
        dtype: floating-point type of training.
    """

    steps: PositiveInt = 500
    batch: PositiveInt = 32
    learning_rate: PositiveFloat = 0.02
    final_rate: NonNegativeFloat = 0.001
    scale_rate: PositiveFloat = 1.0
    clip: PositiveFloat = 5.0
    kl_warmup: NonNegativeInt = 50
    posterior: Literal["laplace", "kronecker"] = "laplace"
    iterations: PositiveInt = 6
    tolerance: PositiveFloat = 1e-4
    exact_gradient: bool = False
    dtype: Literal["float32", "float64"] = "float32"

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from zero."""
        share = 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, self.steps))))
        return self.final_rate + (self.learning_rate - self.final_rate) * share


class NetConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The generative model of an experiment: families and sizes, see ``artifact.ModelSpec``."""

    dynamics: str = "mgu2"
    prior: str = "gaussian"
    latents: PositiveInt = 20
    inputs: PositiveInt = 5
    options: DynamicsOptions = DynamicsOptions()


@dataclass(frozen=True)
class ExperimentResult:
    """The result of an experiment.

    Attributes:
        figures: plain numbers, lists and names, ready for JSON.
        draw: draws the picture on a matplotlib figure; None if there is no picture.
    """

    figures: dict[str, Any]
    draw: Callable[[Any], None] | None = None


def observed_of(
    model: Model, values: Array, mask: Array | None = None, *, group: str = "observations"
) -> dict[str, Observed]:
    """Return one group of observations in the model's dtype, all observed unless masked."""
    v = torch.as_tensor(values).to(model.initial.mean)
    seen = torch.ones_like(v) if mask is None else torch.as_tensor(mask).to(v)
    return {group: Observed(v * seen, seen)}


class TrialBatches:
    """Whole trials as ``loop.Batches``, each starting warm from its own last solution."""

    def __init__(
        self,
        model: Model,
        observed: Mapping[str, Observed],
        seed: int,
        *,
        live: Tensor | None = None,
    ) -> None:
        model.check(observed)
        first = next(iter(observed.values())).values
        K, self.chunk = first.shape[:2]
        self.count = K
        self._observed, self._live = observed, live
        self.z = first.new_zeros(K, model.n)
        self.u = first.new_zeros(K, self.chunk, model.m)
        self.rng = np.random.default_rng(seed)
        self._order = np.zeros(0, dtype=np.int64)

    def draw(self, batch: int) -> Tensor:
        """Return the next ``batch`` trials of a random order, which is redrawn once exhausted."""
        while len(self._order) < batch:
            self._order = np.concatenate([self._order, self.rng.permutation(self.count)])
        chosen, self._order = self._order[:batch], self._order[batch:]
        return torch.as_tensor(chosen).to(self.z.device)

    def observed(self, index: Tensor) -> Mapping[str, Observed]:
        return {k: Observed(o.values[index], o.mask[index]) for k, o in self._observed.items()}

    def live(self, index: Tensor) -> Tensor | None:
        return None if self._live is None else self._live[index]

    def warm(self, index: Tensor) -> tuple[Tensor, Tensor]:
        return self.z[index], self.u[index]

    def remember(self, index: Tensor, z: Tensor, u: Tensor) -> None:
        self.z[index], self.u[index] = z[:, 0], u


def network(net: NetConfig, group: GroupSpec, *, seed: int, dtype: str) -> Model:
    """Return a new model with one observation group, ``observations``."""
    torch.manual_seed(seed)
    spec = ModelSpec(
        dynamics=net.dynamics,
        prior=net.prior,
        latents=net.latents,
        inputs=net.inputs,
        groups={"observations": group},
        options=net.options,
    )
    return build(spec).to(getattr(torch, dtype))


def poisson_network(net: NetConfig, counts: Array, *, seed: int, dtype: str) -> Model:
    """Return a new model of Poisson counts (K, T, N) whose rates start at the mean rates."""
    log_rate_max = float(np.log(10 * (1 + counts.max())))
    group = GroupSpec(family="poisson", channels=counts.shape[-1], log_rate_max=log_rate_max)
    model = network(net, group, seed=seed, dtype=dtype)
    spikes = model.group("observations")
    spikes.start_at(torch.as_tensor(counts.mean((0, 1))).to(spikes.b))
    with torch.no_grad():
        spikes.C.mul_(0.5)
    return model


def start_noise(model: Model, values: Array, share: float = 0.3) -> None:
    """Initialise a Gaussian readout: offset at the mean, noise at a share of the deviation."""
    family = model.group("observations")
    if not isinstance(family, Gaussian):
        raise ShapeError("observations", expected="a Gaussian group", got=family.family)
    with torch.no_grad():
        family.b.copy_(torch.as_tensor(values.mean((0, 1))))
        family.log_scale.copy_(torch.as_tensor(np.log(share * values.std((0, 1)))))


@dataclass(frozen=True)
class Fit:
    """A fitted model.

    Attributes:
        run: model, posterior and warm starts after training.
        bounds: bound at each step in nats per bin (noisy: one sample of one batch).
        seconds: wall-clock time.
    """

    run: TrainingRun
    bounds: list[float]
    seconds: float


def fit(
    model: Model,
    trials: TrialBatches,
    config: FitConfig,
    seed: int,
    progress: Progress,
    *,
    what: str = "training",
    after: Callable[[TrainingRun, Report], None] | None = None,
) -> Fit:
    """Train on trials.

    Args:
        after: called after each step, e.g. to evaluate.

    Raises:
        TrainingError: a bound or gradient is not finite.
    """
    began = time.monotonic()
    own: dict[str, Any] = msgspec.structs.asdict(config) | {
        "batch": min(config.batch, trials.count)
    }
    shared = {name: own[name] for name in LoopConfig.__struct_fields__ if name in own}
    loop = LoopConfig(chunk=trials.chunk, seed=seed, **shared)
    run = start(model, trials, loop, scale_rate=config.scale_rate)
    run.condition = tuple(model.groups)
    run.rate = config.rate
    bounds: list[float] = []
    for report in train_steps(run, loop):
        bounds.append(report.bound)
        note = f"bound {report.bound:.3f} nats/bin, KL {report.kl:.3f}"
        progress(what, report.step, config.steps, note)
        if after is not None:
            after(run, report)
    return Fit(run, bounds, time.monotonic() - began)
