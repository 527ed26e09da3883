"""The torch side of the compiled moving-horizon step.

It processes one bin of each of S streams as ``streaming.horizon`` does, with the same letters:
windows of H bins, N units, n latents, m inputs. A model is packed once. A step reads the states of
the streams and writes new rows: a ``HorizonState`` is never modified. Intermediate results are in
reused work arrays, so that a steady stream allocates only its answers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ilqr_vae import machine
from ilqr_vae.inference import compiled
from ilqr_vae.inference.compiled import (
    Array,
    Options,
    PackedModel,
    SolveArrays,
    Stopped,
    cost_of_iteration,
)
from ilqr_vae.kernels.cpu import arguments, threads
from ilqr_vae.kernels.cpu import step as kernels
from ilqr_vae.kernels.cpu.arguments import Estimates, Fixed, Streams
from ilqr_vae.lqr.on_cpu import array
from ilqr_vae.model.dynamics import Weights
from ilqr_vae.model.generative import Model
from ilqr_vae.model.intervals import SpeedScale, stated
from ilqr_vae.model.readout import KinematicReadout
from ilqr_vae.streaming.bounds import PlausibleBounds
from ilqr_vae.streaming.state import Estimate, HorizonState

#: Work arrays kept per size, besides one for each thread.
_SPARE = 2

#: The core where each helping thread was last.
_helpers: dict[threading.Thread, int] = {}

States: TypeAlias = tuple[Streams, Streams]
"""Arrays of the fields of ``HorizonState`` before and after the bins."""

Rows: TypeAlias = tuple[Array, Array]
"""Rows of the streams in both, int64."""


class _Workspace:
    """Work arrays for a batch of up to ``streams`` streams, a power of two.

    So batches of all sizes share a few workspaces.
    """

    def __init__(self, plan: PackedModel, streams: int, horizon: int, dtype: np.dtype[Any]) -> None:
        n, m, _ = plan.sizes
        self.size = streams
        self.work = work = SolveArrays(plan, streams, horizon, dtype)
        z0 = np.empty((streams, n), dtype)
        z = np.empty((streams, horizon + 1, n), dtype)
        u = np.empty((streams, horizon, m), dtype)
        self.arrays = ((z0, z, u), (tuple(work.state), work.kept, work.info), work.none)


def recurrent_layer(readout: KinematicReadout, n: int, units: int) -> tuple[Tensor, ...]:
    """Return C, A, a, P', p, G' and g of a recurrent layer, with no units if there is none."""
    if readout.shape.recurrent:
        A, a, P, p, G, g = readout.cell
        return readout.C, A, a, P.mT, p, G.mT, g
    none = readout.W.new_zeros(0)
    inputs = readout.W.new_zeros(units, 0)
    out = readout.W.new_zeros(len(readout.b), 0)
    return out, none.view(0, n), none, inputs, none, none.view(0, 0), none


class Estimator:
    """A packed model and readout.

    Args:
        model: a model that ``compiled.usable`` accepts for the group "spikes".
        w: its effective weights.
        readout: kinematics from latents, or None.
        mean_rate: (N,).
        bounds: plausible ranges.
        initial: initial state of a stream.
        options: settings of the solves.
        intervals: scales the stated deviations of the kinematics; None leaves them as they are.
    """

    def __init__(
        self,
        model: Model,
        w: Weights,
        readout: KinematicReadout | None,
        mean_rate: Tensor,
        bounds: PlausibleBounds,
        initial: HorizonState,
        options: Options,
        intervals: SpeedScale | None = None,
    ) -> None:
        self.plan = compiled.plan(model, w, ("spikes",))
        self.horizon, self.options = horizon, options = initial.u.shape[1], options
        self.intervals = intervals
        n, m, N = self.plan.sizes
        self.dtype = array(mean_rate).dtype
        used = KinematicReadout(n, 0) if readout is None else readout
        shape = used.shape
        self.channels, self.features = used.W.shape[0], shape.features(n, N)
        self.scratch_size = kernels.scratch_size(horizon, n, m, N, shape.hidden, shape.recurrent)
        U = (used.U.mT.contiguous(), used.U[:, :n].contiguous())
        maps = tuple(array(t.to(mean_rate.dtype)) for t in (used.W, used.b, *U, used.c, used.O))
        layer = recurrent_layer(used, n, N)
        spread = (used.variance, used.gain, used.kappa, used.centre, used.spread)
        self.readout = (
            (shape.lags, shape.residuals, shape.recurrent),
            maps,
            tuple(array(t.to(mean_rate.dtype).contiguous()) for t in layer),
            tuple(array(t.to(mean_rate.dtype)) for t in spread),
            self._reads(model, used, mean_rate),
        )
        precision = model.initial.cost(1).precision[0]
        fixed = Fixed(
            model=self.plan.arrays,
            prior_precision=array(precision),
            prior_covariance=array(precision.inverse()),
            mean_rates=array(mean_rate),
            options=options.numbers,
            bounds=arguments.Bounds(*(array(x) for x in bounds)),
            initial=Streams(*(array(x) for x in initial.tensors())),
        )
        self.fixed = (*fixed[:-2], tuple(fixed.bounds), tuple(fixed.initial))  # see ``step``
        scaling = model.group("spikes").scaling
        self.scaling = scaling and tuple(array(t.to(mean_rate.dtype)) for t in scaling)
        self.units = N - model.group("spikes").features
        self._spare: dict[int, list[_Workspace]] = {}

    def _reads(self, model: Model, readout: KinematicReadout, mean_rate: Tensor) -> tuple[Any, ...]:
        """Return the channels whose rates the readout reads, and which units it reads."""
        spikes = model.group("spikes")
        own = readout.expects(spikes)
        channels = self.plan.arrays[2]
        if own is not spikes:
            channels = compiled.channels_of([own], model.n, mean_rate.dtype)
        return channels, array(readout.believed(torch.ones_like(mean_rate)))

    def take(self, streams: int) -> _Workspace:
        size = 1 << max(0, streams - 1).bit_length()
        spare = self._spare.get(size)
        made = spare.pop() if spare else _Workspace(self.plan, size, self.horizon, self.dtype)
        made.work.batch = streams
        return made

    def put(self, workspace: _Workspace) -> None:
        spare = self._spare.setdefault(workspace.size, [])
        if len(spare) < _SPARE + threads.count():
            spare.append(workspace)

    def step(
        self, states: States, rows: Rows, counts: Array, mask: Array, stopped: Stopped | None
    ) -> Estimates:
        """Process one bin of each stream; see ``step_together``."""
        return step_together((self,), (states,), (rows,), (counts, mask), stopped)[0]

    def predict_only(self, states: States, rows: Rows, counts: Array, mask: Array) -> Estimates:
        """Process one bin without a solve; see ``predict_together``."""
        return predict_together((self,), (states,), (rows,), (counts, mask))[0]

    def given(
        self, states: States, rows: Rows, bins: tuple[Array, Array], estimates: Estimates
    ) -> tuple[Any, ...]:
        """Return the arguments of the kernels."""
        before, after = (tuple(state) for state in states)
        if self.scaling:
            centre, scale = self.scaling
            bins = (bins[0] - centre) / scale, bins[1]
        return self.fixed, self.readout, (before, after), rows, bins, tuple(estimates)

    def empty(self, streams: int) -> Estimates:
        n, _, N = self.plan.sizes
        shapes = ((self.features,), (n, n), (N,), (self.channels,), (self.channels,), (), ())
        return Estimates(
            *(np.empty((streams, *shape), self.dtype) for shape in shapes),
            *(np.empty(streams, np.int64) for _ in range(3)),
            *(np.empty(streams, np.bool_) for _ in range(2)),
        )

    @property
    def cost(self) -> int:
        """Approximate multiply-adds of a step of one stream."""
        return self.options.iterations * cost_of_iteration(self.plan, self.horizon)


def step_together(
    members: Sequence[Estimator],
    states: Sequence[States],
    rows: Sequence[Rows],
    bins: tuple[Array, Array],
    stopped: Stopped | None,
) -> list[Estimates]:
    """Process one bin of each stream by each member.

    The members are iterated together, so that a stop ends all of them after the same number of
    iterations.

    Args:
        members: estimators with the same options.
        states: states of each member, to read and to write.
        rows: rows of the streams in both, for each member; written rows differ from those read.
        bins: counts and mask, (S, N).
        stopped: called between iterations with the statuses, (members, S), which it may change;
            True ends.
    """
    S, limit = len(bins[0]), members[0].options.iterations
    estimates = [member.empty(S) for member in members]
    given = [
        member.given(state, row, bins, estimate)
        for member, state, row, estimate in zip(members, states, rows, estimates, strict=True)
    ]
    workers = _workers(members, S)
    if stopped is None:
        spaces = [[member.take(1) for _ in range(workers)] for member in members]
        _run(
            kernels.step,
            members,
            [
                [(kernels.WHOLE, limit, *args, space.arrays, False) for space in own]
                for args, own in zip(given, spaces, strict=True)
            ],
        )
    else:
        spaces = [[member.take(S)] for member in members]

        def run(parts: int, iterations: int) -> None:
            calls = [
                [(parts, iterations, *args, space.arrays, True)] * workers
                for args, (space,) in zip(given, spaces, strict=True)
            ]
            _run(kernels.step, members, calls)

        # the last iteration and what follows it are one call, while a stream's arrays are near
        last = kernels.SOLVE | kernels.LEAVE
        run(kernels.ENTER | (last if limit == 1 else kernels.SOLVE), 1)
        for done in range(1, limit):
            statuses = np.stack([space.work.status for (space,) in spaces])
            ended = stopped(statuses)
            for (space,), status in zip(spaces, statuses, strict=True):
                space.work.status[:] = status
            if ended:
                run(kernels.LEAVE, 0)
                break
            run(last if done == limit - 1 else kernels.SOLVE, 1)
    for member, own in zip(members, spaces, strict=True):
        for space in own:
            member.put(space)
    return _finished(members, states, rows, estimates)


def predict_together(
    members: Sequence[Estimator],
    states: Sequence[States],
    rows: Sequence[Rows],
    bins: tuple[Array, Array],
) -> list[Estimates]:
    """Process one bin without a solve; otherwise as ``step_together``.

    The windows take the bins; the answers are predictions without covariance.
    """
    S = len(bins[0])
    estimates = [member.empty(S) for member in members]
    given = [
        [member.given(state, row, bins, estimate)] * _workers(members, S)
        for member, state, row, estimate in zip(members, states, rows, estimates, strict=True)
    ]
    _run(kernels.predict_only, members, given)
    return _finished(members, states, rows, estimates)


def _finished(
    members: Sequence[Estimator],
    states: Sequence[States],
    rows: Sequence[Rows],
    estimates: list[Estimates],
) -> list[Estimates]:
    """Scale the deviations for publication; with features, return expected values in their units
    and count the spikes of the units alone, since the kernels sum all channels."""
    made: list[Estimates] = []
    for member, (_, after), (_, at), e in zip(members, states, rows, estimates, strict=True):
        std = stated(member.intervals, e.kinematics, e.kinematics_std)
        e = e._replace(kinematics_std=std)
        if member.scaling:
            centre, scale = member.scaling
            newest = after.counts[at, after.age[at] - 1, : member.units]
            e = e._replace(rates=e.rates * scale + centre, spikes=newest.sum(-1))
        made.append(e)
    return made


def _workers(members: Sequence[Estimator], streams: int) -> int:
    return threads.worth(len(members) * streams, members[0].cost)


def _run(
    kernel: Callable[..., None],
    members: Sequence[Estimator],
    arguments: Sequence[Sequence[tuple[Any, ...]]],
) -> None:
    """Run the kernel of each member, in as many threads as it has arguments.

    Each member's streams form a queue; each thread starts with that of another member. Threads
    that last ran on the core of the calling one leave it.
    """
    queues = [np.zeros(1, np.int64) for _ in members]

    def work(worker: int) -> None:
        for i in range(len(members)):
            k = (i + worker) % len(members)
            buffer = threads.scratch(members[k].dtype, members[k].scratch_size)
            kernel(queues[k], *arguments[k][worker], buffer)

    def help_out(worker: int) -> None:
        work(worker)
        _helpers[threading.current_thread()] = machine.core()

    def lead() -> None:
        core = machine.core()
        beside = [thread for thread, last in list(_helpers.items()) if last == core >= 0]
        with machine.own_core(beside):
            work(0)

    others = [partial(help_out, worker) for worker in range(1, len(arguments[0]))]
    threads.together([lead if others else partial(work, 0), *others])


def on_tensors(
    state: HorizonState, n: int, step: Callable[[States, Rows], Estimates]
) -> tuple[HorizonState, Estimate]:
    """Run a compiled step on the tensors of a state, as arrays on the CPU."""
    device, rows = state.z.device, np.arange(len(state.age))
    tensors = tuple(t.detach().contiguous() for t in state.tensors())
    written = tuple(torch.empty_like(t) for t in tensors)
    before, after = (
        Streams(*(t.numpy() if device.type == "cpu" else t for t in these))
        for these in (tensors, written)
    )
    made = [torch.as_tensor(x, device=device) for x in step((before, after), (rows, rows))]
    return HorizonState(*written), Estimate(made[0][:, :n], *made)
