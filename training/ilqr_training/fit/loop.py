"""The training loop: solve, attach the implicit gradient, evaluate the bound, step.

``TrainingRun`` holds the state that changes. ``train_steps`` is the loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ilqr_training.config import LoopConfig
from ilqr_training.fit.not_finite import find_not_finite
from ilqr_vae.errors import TrainingError
from ilqr_vae.inference import elbo, ilqr, implicit
from ilqr_vae.inference.posterior import Draw, Kronecker, laplace_draw
from ilqr_vae.inference.problem import Problem, SolverConfig, State, Status
from ilqr_vae.lqr import solve_lqr
from ilqr_vae.machine import keep_freed_memory
from ilqr_vae.model.generative import Model, conditioned_on
from ilqr_vae.model.likelihoods import Observed

_KEPT_BYTES = 256 << 20  # of one step's arrays, for the next


class Batches(Protocol):
    """Source of batches: random crops of a recording, or whole trials.

    Attributes:
        chunk: bins per batch member.
        z, u: solutions kept as warm starts.
        rng: generator that draws the members.
    """

    chunk: int
    z: Tensor
    u: Tensor
    rng: np.random.Generator

    def draw(self, batch: int) -> Tensor:
        """Draw the index of ``batch`` members, for the methods below."""
        ...

    def observed(self, index: Tensor) -> Mapping[str, Observed]:
        """Return the values and masks of all groups."""
        ...

    def live(self, index: Tensor) -> Tensor | None:
        """Return (B, chunk) ones within each member; None if all have the same length."""
        ...

    def warm(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the initial state and inputs to start from."""
        ...

    def remember(self, index: Tensor, z: Tensor, u: Tensor) -> None:
        """Store a solution."""
        ...


@dataclass
class TrainingRun:
    """The state of training.

    ``condition`` names the groups that inference observes. ``rate`` (step -> learning rate), if
    given, replaces the configured schedule.
    """

    model: Model
    posterior: Kronecker | None
    crops: Batches
    optimiser: torch.optim.Adam
    generator: torch.Generator
    step: int = 0
    condition: tuple[str, ...] = ("spikes",)
    rate: Callable[[int], float] | None = None


@dataclass(frozen=True)
class Report:
    """Result of one gradient step.

    Attributes:
        step: counted from one.
        bound: unweighted bound, nats per bin.
        spikes, kinematics: expected log-likelihood of each group, nats per bin.
        kl: KL divergence from the prior, nats per bin.
        gradient_norm: norm before clipping.
        iterations: mean iLQR iterations per crop.
        unsolved: share of crops whose solve did not converge.
    """

    step: int
    bound: float
    spikes: float
    kinematics: float
    kl: float
    gradient_norm: float
    iterations: float
    unsolved: float


def start(
    model: Model, crops: Batches, config: LoopConfig, *, scale_rate: float = 1.0
) -> TrainingRun:
    """Create the optimiser and posterior of a new run.

    Args:
        scale_rate: learning rate of scales (of priors and noise, and the degrees of freedom), as a
            multiple of the other parameters'. Adam moves a log scale by about one learning rate per
            step, so scales that start far off need a higher one than weights.
    """
    with suppress(OSError, AttributeError):
        keep_freed_memory(_KEPT_BYTES)
    like = model.initial.mean
    posterior = None
    if config.posterior == "kronecker":
        posterior = Kronecker(model.n, model.m, config.chunk).to(like)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    scales = [p for name, p in named if scale_rate != 1 and name.endswith(("log_scale", "raw_nu"))]
    parameters = [p for _, p in named if all(p is not q for q in scales)]
    if posterior is not None:
        parameters += list(posterior.parameters())
    groups: list[dict[str, Any]] = [{"params": parameters, "factor": 1.0}]
    if scales:
        groups.append({"params": scales, "factor": scale_rate})
    generator = torch.Generator(device=like.device).manual_seed(config.seed)
    optimiser = torch.optim.Adam(groups, config.learning_rate, fused=True)
    return TrainingRun(model, posterior, crops, optimiser, generator)


def _draw(run: TrainingRun, problem: Problem, state: State) -> Draw:
    if run.posterior is not None:
        return run.posterior.draw(state.z.shape[0], run.generator)
    with torch.no_grad():
        at = run.model.lqr_problem(problem.w, state.z, state.u, problem.observed, problem.initial)
        return laplace_draw(at, solve_lqr(at, free_initial=True), run.generator)


def gradient_step(run: TrainingRun, config: LoopConfig) -> Report:
    """Draw a batch, solve it, and take one gradient step.

    Raises:
        TrainingError: the bound or a gradient is not finite. The message names the parameter, group
            or bin that caused it.
    """
    model, crops = run.model, run.crops
    index = crops.draw(config.batch)
    observed = crops.observed(index)
    w = model.dynamics.weights()
    problem = Problem(
        model, w, conditioned_on(observed, run.condition), model.initial.cost(config.batch)
    )
    solver = SolverConfig(iterations=config.iterations, tolerance=config.tolerance)
    state, _ = ilqr.solve(problem, *crops.warm(index), solver)
    crops.remember(index, state.z, state.u)

    z0, u = implicit.attach_gradient(problem, state, exact=config.exact_gradient)
    parts = elbo.bound(
        model, w, z0, u, _draw(run, problem, state), observed, live=crops.live(index)
    )
    kl_weight = min(1.0, (run.step + 1) / max(1, config.kl_warmup))
    weighted = parts.value(
        kl_weight=kl_weight, group_weights={"kinematics": config.kinematic_weight}
    )
    loss = -weighted.mean() / config.chunk

    rate = config.learning_rate / math.sqrt(1 + run.step / config.decay)
    if run.rate is not None:
        rate = run.rate(run.step)
    for group in run.optimiser.param_groups:
        # older checkpoints have no factors
        group["lr"] = rate * group.get("factor", 1.0)
    run.optimiser.zero_grad(set_to_none=True)
    loss.backward()
    parameters: list[Tensor] = [p for g in run.optimiser.param_groups for p in g["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip)
    if not bool(norm.isfinite()) or not bool(loss.isfinite()):
        raise TrainingError(
            f"training step {run.step + 1}",
            expected="a finite bound and gradient",
            got=f"{find_not_finite(model, run.posterior, index, observed, parts)} not finite",
        )
    run.optimiser.step()
    run.step += 1
    per_bin = {k: float(v.detach().mean()) / config.chunk for k, v in parts.groups.items()}
    kl = float(parts.kl.detach().mean()) / config.chunk
    return Report(
        step=run.step,
        bound=sum(per_bin.values()) - kl,
        spikes=per_bin.get("spikes", 0.0),
        kinematics=per_bin.get("kinematics", 0.0),
        kl=kl,
        gradient_norm=float(norm),
        iterations=float(state.iterations.double().mean()),
        unsolved=float((state.status != Status.CONVERGED).double().mean()),
    )


def train_steps(run: TrainingRun, config: LoopConfig) -> Iterator[Report]:
    """Yield the report of each gradient step up to the configured number."""
    while run.step < config.steps:
        yield gradient_step(run, config)
