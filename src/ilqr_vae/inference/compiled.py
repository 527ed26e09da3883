"""The torch side of the compiled solve: supported models, and the calls to the kernels.

It solves the problem of ``inference.ilqr``, with the same letters: J(z_0, u) over T steps, n
latents, m inputs, and the N channels of all groups concatenated, Poisson channels first. Tensors
are read in place; outputs are new arrays, which a caller may keep. If there is no compiled code for
a model's families, torch solves instead, which is logged once.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ilqr_vae.kernels.cpu import iteration, lqr, threads
from ilqr_vae.kernels.cpu.dynamics import FAMILIES, pack_weights
from ilqr_vae.kernels.cpu.observations import pack_channels
from ilqr_vae.kernels.cpu.tiles import PANEL
from ilqr_vae.lqr import LQRProblem, LQRSolution
from ilqr_vae.lqr.on_cpu import array
from ilqr_vae.model.dynamics import Weights
from ilqr_vae.model.generative import Model
from ilqr_vae.model.likelihoods import (
    Counts,
    Gaussian,
    Likelihood,
    Observations,
    Poisson,
    SoftplusPoisson,
)
from ilqr_vae.model.priors import LOG_2PI, GaussianPrior, InitialCost, StudentPrior
from ilqr_vae.model.rollout import wanted

_log = logging.getLogger(__name__)

Array = NDArray[Any]


@cache
def _say(reason: str) -> None:
    _log.warning("no compiled iLQR for %s: it runs in torch", reason)


def unsupported(
    model: Model,
    names: Iterable[str],
    families: Container[str],
    priors: Container[type] = (GaussianPrior, StudentPrior),
    likelihoods: Container[type] = (Poisson, SoftplusPoisson, Gaussian),
) -> str | None:
    """Return the part of a model without compiled code; None if all of it has.

    It may be the dynamics (other than ``families``, by kernel name), a prior or a likelihood.
    """
    dynamics = model.dynamics
    if dynamics.kernel not in families:
        return f"the dynamics {dynamics.kernel or dynamics.family!r}"
    if type(model.prior) not in priors:
        return f"the prior {model.prior.family!r}"
    for name in names:
        for part in model.group(name).parts:
            if type(part) not in likelihoods:
                return f"the likelihood {part.family!r}"
    return None


def usable(model: Model, names: Iterable[str], like: Tensor) -> bool:
    """Return whether the compiled solve is enabled and supports this model, groups and tensor."""
    if not wanted(like):
        return False
    reason = unsupported(model, names, FAMILIES)
    if reason is not None:
        _say(reason)
    return reason is None


@dataclass(frozen=True)
class PackedModel:
    """A model for the kernels: (family, weights, channels, prior), order of the groups, n, m and
    N.
    """

    arrays: tuple[Any, ...]
    names: tuple[str, ...]
    sizes: tuple[int, int, int]


class ChannelArrays(NamedTuple):
    """The N channels of all groups, concatenated.

    Attributes:
        tensors: C (N, n), b, and per channel: limit of an exponential link, inverse variance of a
            Gaussian, and gain, floor and a softplus flag of a rate gain (link(a) + floor).
        poisson: number of Poisson channels, which are the first ones.
        linked: whether any rate differs from exp(a).
    """

    tensors: tuple[Tensor, ...]
    poisson: int
    linked: bool


def channel_arrays(families: Sequence[Likelihood], n: int, dtype: torch.dtype) -> ChannelArrays:
    """Return the concatenated groups, counts first."""
    empty = torch.zeros(0, n, dtype=dtype, device=families[0].C.device if families else None)
    C = torch.cat([empty, *(f.C.detach() for f in families)])
    b = torch.cat([empty[:, 0], *(f.b.detach() for f in families)])
    limit, precision = torch.zeros_like(b), torch.ones_like(b)
    gain, floor, soft = torch.ones_like(b), torch.zeros_like(b), torch.zeros_like(b)
    at, poisson, linked = 0, 0, False
    for f in families:
        channels = slice(at, at + f.b.shape[0])
        at = channels.stop
        if isinstance(f, Counts):
            poisson, linked = at, linked or not f.plain or not isinstance(f, Poisson)
            floor[channels], soft[channels] = f.floor, float(isinstance(f, SoftplusPoisson))
            if f.log_gain is not None:
                gain[channels] = torch.exp(f.log_gain.detach())
            if isinstance(f, Poisson):
                limit[channels] = f.log_rate_max
        elif isinstance(f, Gaussian):
            precision[channels] = torch.exp(-2 * f.log_scale.detach())
    return ChannelArrays((C, b, limit, precision, gain, floor, soft), poisson, linked)


def channels_of(families: Sequence[Likelihood], n: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """Return the concatenated groups for the kernels."""
    parts = [part for family in families for part in family.parts]
    tensors, poisson, linked = channel_arrays(parts, n, dtype)
    C, b, limit, precision, *rates = (array(x) for x in tensors)
    return pack_channels(C, b, limit, precision, poisson, linked, *rates)


class PriorArrays(NamedTuple):
    """The prior of the inputs: mean and precision (m,), negative log density at the peak, and nu.

    nu is the degrees of freedom of a Student, zero for a Gaussian.
    """

    mean: Tensor
    precision: Tensor
    constant: float
    nu: float


def prior_arrays(model: Model) -> PriorArrays:
    """Return the prior of a ``usable`` model."""
    with torch.no_grad():
        scale, m, nu = model.prior.log_scale, model.m, 0.0
        constant = float(scale.double().sum()) + 0.5 * m * LOG_2PI
        if isinstance(model.prior, StudentPrior):
            nu = float(model.prior.nu)
            scale = scale + 0.5 * math.log((nu - 2) / nu)
            constant = float(scale.double().sum()) + 0.5 * m * math.log(math.pi * nu)
            constant += math.lgamma(0.5 * nu) - math.lgamma(0.5 * (nu + m))
        return PriorArrays(model.prior.mean, torch.exp(-2 * scale), constant, nu)


def plan(model: Model, w: Weights, names: Iterable[str]) -> PackedModel:
    """Pack a ``usable`` model."""
    family = model.dynamics.kernel
    # Poisson channels come first
    order = tuple(
        sorted(names, key=lambda name: not isinstance(model.group(name).parts[0], Counts))
    )
    dtype = w[0].dtype
    with torch.no_grad():
        mean, precision, constant, nu = prior_arrays(model)
        prior = (array(mean), array(precision), constant, nu)
        channels = channels_of([model.group(name) for name in order], model.n, dtype)
    weights = pack_weights(family, tuple(array(t) for t in w))
    N = int(channels[5].shape[1])
    return PackedModel((FAMILIES[family], weights, channels, prior), order, (model.n, model.m, N))


def observations(plan: PackedModel, observed: Observations) -> tuple[Array, Array]:
    """Return values and masks (B, T, N) of a plan's groups, concatenated."""
    groups = [observed[name] for name in plan.names]
    if len(groups) == 1:
        return array(groups[0].values), array(groups[0].mask)
    return (
        array(torch.cat([o.values for o in groups], -1)),
        array(torch.cat([o.mask for o in groups], -1)),
    )


class Iterates(NamedTuple):
    """The arrays of ``problem.State``: z (B, T+1, n), u (B, T, m), and (B,) for the others."""

    z: Array
    u: Array
    cost: Array
    regularisation: Array
    status: Array
    iterations: Array


class Inputs(NamedTuple):
    """The inputs of a batch of solves.

    Attributes:
        observed: values and masks (B, T, N).
        initial: mean (B, n) and precision (B, n, n) of the initial cost.
        start: z_0 (B, n) and u (B, T, m).
    """

    observed: tuple[Array, Array]
    initial: tuple[Array, Array]
    start: tuple[Array, Array]


class SolveArrays:
    """The arrays of a batch of solves: state, workspace and results of iterations.

    Attributes:
        batch: number of problems to solve; may be set to fewer than allocated.
    """

    def __init__(self, plan: PackedModel, batch: int, steps: int, dtype: np.dtype[Any]) -> None:
        n, m, N = plan.sizes
        self.batch, self.steps, self.dtype = batch, steps, dtype
        T = steps

        n8, N8 = (-(-size // PANEL) * PANEL for size in (n, N))
        status, iterations = (np.zeros(batch, np.int64) for _ in range(2))
        states, inputs, kept = (batch, T + 1, n), (batch, T, m), (batch, 2, T)
        # allocated separately, so that keeping a trajectory does not keep the matrices
        z, u, cost, damping, self.taken = threads.arrays(
            dtype, states, inputs, (batch,), (batch,), (batch,)
        )
        made = threads.arrays(
            dtype,
            (*kept, n8), (*kept, n8), (*kept, N8), (*kept, N8),
            (batch, T, n, n), (batch, T, n, m), (*states, n), states, (*inputs, m), inputs,
            (*inputs, n), inputs, (*inputs, m), (*states, n), states,
            states, inputs, states, (batch, 2),
        )  # fmt: skip
        f, h, d, w, A, B, Q, q, R, r, K, k, Quu_inv, V, v, dz, du, costate, decrease = made
        self.state = Iterates(z, u, cost, damping, status, iterations)
        self.kept = (f, h, d, w, np.zeros(batch, np.int64))
        none = np.zeros((1, 1, 1), dtype)
        self.problem = (A, B, Q, q, R, r, none, none[None])
        self.law, self.value = (K, k, Quu_inv), (V, v)
        self.found = (dz, du, costate, decrease)
        self.ok = np.zeros(batch, np.bool_)
        self.info = (self.problem, self.law, self.value, self.found, self.ok, self.taken)
        self.none = (none[0], none)

    @property
    def status(self) -> NDArray[np.int64]:
        return self.state.status[: self.batch]

    def lqr(self) -> tuple[LQRProblem, LQRSolution]:
        """The LQR problems and solutions of the last iteration, as tensors over these arrays."""
        t = torch.from_numpy
        A, B, Q, q, R, r, _, _ = (t(x) for x in self.problem)
        K, k, Quu_inv = (t(x) for x in self.law)
        V, v = (t(x) for x in self.value)
        dz, du, costate, model = (t(x) for x in self.found)
        solution = LQRSolution(
            dz=dz, du=du, K=K, k=k, dz0=dz[:, 0], V=V, v=v, costate=costate, Quu_inv=Quu_inv,
            decrease=model[:, 0], linear=model[:, 1], ok=t(self.ok),
        )  # fmt: skip
        return LQRProblem(A=A, B=B, Q=Q, q=q, R=R, r=r), solution


def cost_of_iteration(plan: PackedModel, steps: int) -> int:
    """Return the approximate multiply-adds of an iteration."""
    n, m, N = plan.sizes
    return steps * (2 * n * n * n + n * (n + m) ** 2 + N * n * (n // 2 + 3) + 20 * N)


def run(
    plan: PackedModel,
    work: SolveArrays,
    limit: int,
    entry: int,
    inputs: Inputs,
    options: tuple[float, float, int, float, float],
) -> None:
    """Run at most ``limit`` further iterations of each running problem."""
    n, m, _ = plan.sizes
    group = lqr.group(n, work.dtype.itemsize)
    threads.share_out(
        iteration.solve,
        work.batch,
        limit * cost_of_iteration(plan, work.steps),
        (
            limit,
            entry,
            plan.arrays,
            inputs.observed,
            inputs.initial,
            (*inputs.start, *work.none),
            tuple(work.state),
            work.kept,
            work.info,
            options,
            np.empty((2, work.batch), np.int64),
        ),
        dtype=work.dtype,
        scratch_size=iteration.scratch_size(work.steps, n, m),
        # a thread without work costs more than problems that are solved one by one
        group=group if work.batch >= group * threads.count() else 1,
    )


@dataclass(frozen=True)
class Options:
    """The settings of a ``SolverConfig`` for the kernels."""

    iterations: int
    numbers: tuple[float, float, int, float, float]


Stopped = Callable[[NDArray[np.int64]], bool]


def iterate(
    packed: PackedModel,
    work: SolveArrays,
    entry: int,
    inputs: Inputs,
    options: Options,
    stopped: Stopped | None,
) -> None:
    """Iterate until every problem has stopped, or up to the limit.

    Args:
        stopped: called between iterations with the statuses, which it may change; True ends.
    """
    if stopped is None:
        run(packed, work, options.iterations, entry, inputs, options.numbers)
        return
    run(packed, work, 1, entry, inputs, options.numbers)
    for _ in range(1, options.iterations):
        if stopped(work.status):
            break
        run(packed, work, 1, 0, inputs, options.numbers)


class PackedProblem(NamedTuple):
    """A batch of problems for the kernels; ``observed`` and ``initial`` as of ``Inputs``."""

    model: PackedModel
    observed: tuple[Array, Array]
    initial: tuple[Array, Array]

    def arrays(self, u: Tensor) -> SolveArrays:
        """Return new arrays for solves with inputs like u."""
        return SolveArrays(self.model, u.shape[0], u.shape[1], self.observed[0].dtype)


def pack(model: Model, w: Weights, observed: Observations, initial: InitialCost) -> PackedProblem:
    """Pack a ``usable`` model and its data."""
    packed = plan(model, w, observed)
    cost = (array(initial.mean), array(initial.precision))
    return PackedProblem(packed, observations(packed, observed), cost)


def solve(
    problem: PackedProblem,
    start: tuple[Tensor, Tensor],
    options: Options,
    stopped: Stopped | None,
) -> SolveArrays:
    """Solve a batch from (z0, u); see ``iterate``."""
    z0, u = start
    packed, data, cost = problem
    work = problem.arrays(u)
    iterate(packed, work, 1, Inputs(data, cost, (array(z0), array(u))), options, stopped)
    return work


def quadratise(problem: PackedProblem, z: Tensor, u: Tensor) -> LQRProblem:
    """Compute ``Model.lqr_problem`` around rollouts z (B, T+1, n) of inputs u (B, T, m)."""
    packed, data, cost = problem
    n, m, _ = packed.sizes
    work = problem.arrays(u)
    work.state.z[...], work.state.u[...] = array(z), array(u)
    start = (array(z[:, 0]), array(u), *work.none)
    threads.share_out(
        iteration.quadratise,
        work.batch,
        cost_of_iteration(packed, work.steps) // 2,
        (packed.arrays, data, cost, start, tuple(work.state), work.kept, work.problem),
        dtype=work.dtype,
        scratch_size=iteration.scratch_size(work.steps, n, m),
    )
    return work.lqr()[0]
