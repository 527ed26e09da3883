"""The torch side of the compiled moving-horizon step.

It takes one bin of each of S streams as ``streaming.horizon`` does, with the same letters: windows
of H bins, N units, n latents, m inputs. A model is packed once. A step reads the streams' states
and writes new rows: a ``HorizonState`` is never changed. Everything in between lives in work arrays
that are reused, so that a steady stream allocates its answers and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

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

#: Sets of work arrays kept per size, beside one for each thread.
_SPARE = 2

States: TypeAlias = tuple[Streams, Streams]
"""Arrays of the fields of ``HorizonState``: before the bins, and after them."""

Rows: TypeAlias = tuple[Array, Array]
"""The streams' rows in both, int64."""


class _Workspace:
    """Work arrays for a batch of up to ``streams`` streams: a power of two, so that batches of all
    sizes share a few sets."""

    def __init__(self, plan: PackedModel, streams: int, horizon: int, dtype: np.dtype[Any]) -> None:
        n, m, _ = plan.sizes
        self.size = streams
        self.work = work = SolveArrays(plan, streams, horizon, dtype)
        z0 = np.empty((streams, n), dtype)
        z = np.empty((streams, horizon + 1, n), dtype)
        u = np.empty((streams, horizon, m), dtype)
        self.arrays = ((z0, z, u), (tuple(work.state), work.kept, work.info), work.none)


def recurrent_layer(readout: KinematicReadout, n: int, units: int) -> tuple[Tensor, ...]:
    """C, A, a, P', p, G' and g of a recurrent layer, of no units where there is none."""
    if readout.shape.recurrent:
        A, a, P, p, G, g = readout.cell
        return readout.C, A, a, P.mT, p, G.mT, g
    none = readout.W.new_zeros(0)
    inputs = readout.W.new_zeros(units, 0)
    out = readout.W.new_zeros(len(readout.b), 0)
    return out, none.view(0, n), none, inputs, none, none.view(0, 0), none


class Estimator:
    """One model and readout, packed.

    Args:
        model: one that ``compiled.usable`` accepts for the group "spikes".
        w: its effective weights.
        readout: kinematics from latents, or None.
        mean_rate: (N,).
        bounds: what is believable.
        initial: the state of one stream that begins.
        options: of the solves.
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
        self._spare: dict[int, list[_Workspace]] = {}

    def _reads(self, model: Model, readout: KinematicReadout, mean_rate: Tensor) -> tuple[Any, ...]:
        """The channels whose rates the readout reads, and which units it reads."""
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
        """One bin of each stream; see ``step_together``."""
        return step_together((self,), (states,), (rows,), (counts, mask), stopped)[0]

    def predict_only(self, states: States, rows: Rows, counts: Array, mask: Array) -> Estimates:
        """``step`` without a solve; see ``predict_together``."""
        return predict_together((self,), (states,), (rows,), (counts, mask))[0]

    def given(
        self, states: States, rows: Rows, bins: tuple[Array, Array], estimates: Estimates
    ) -> tuple[Any, ...]:
        """Arguments of the kernels."""
        before, after = (tuple(state) for state in states)
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
        """Multiply-adds of a stream's step, roughly."""
        return self.options.iterations * cost_of_iteration(self.plan, self.horizon)


def step_together(
    members: Sequence[Estimator],
    states: Sequence[States],
    rows: Sequence[Rows],
    bins: tuple[Array, Array],
    stopped: Stopped | None,
) -> list[Estimates]:
    """One bin of each stream, by each member.

    The members' solves are iterated side by side, so that what ends one after so many iterations
    ends all of them after as many.

    Args:
        members: with the same options.
        states: of each member; read, and written.
        rows: of the streams in both, for each member; no row written is one that is read.
        bins: counts and mask, (S, N).
        stopped: asked between iterations with the statuses, (members, S), which it may change;
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

        run(kernels.ENTER | kernels.SOLVE, 1)
        for _ in range(1, limit):
            statuses = np.stack([space.work.status for (space,) in spaces])
            ended = stopped(statuses)
            for (space,), status in zip(spaces, statuses, strict=True):
                space.work.status[:] = status
            if ended:
                break
            run(kernels.SOLVE, 1)
        run(kernels.LEAVE, 0)
    for member, own in zip(members, spaces, strict=True):
        for space in own:
            member.put(space)
    return _scaled(members, estimates)


def predict_together(
    members: Sequence[Estimator],
    states: Sequence[States],
    rows: Sequence[Rows],
    bins: tuple[Array, Array],
) -> list[Estimates]:
    """``step_together`` without a solve: the windows hold the bins, the answers are predictions of
    unknown covariance."""
    S = len(bins[0])
    estimates = [member.empty(S) for member in members]
    given = [
        [member.given(state, row, bins, estimate)] * _workers(members, S)
        for member, state, row, estimate in zip(members, states, rows, estimates, strict=True)
    ]
    _run(kernels.predict_only, members, given)
    return _scaled(members, estimates)


def _scaled(members: Sequence[Estimator], estimates: list[Estimates]) -> list[Estimates]:
    """With the deviations that are stated."""
    return [
        e._replace(kinematics_std=stated(member.intervals, e.kinematics, e.kinematics_std))
        for member, e in zip(members, estimates, strict=True)
    ]


def _workers(members: Sequence[Estimator], streams: int) -> int:
    return threads.worth(len(members) * streams, members[0].cost)


def _run(
    kernel: Callable[..., None],
    members: Sequence[Estimator],
    arguments: Sequence[Sequence[tuple[Any, ...]]],
) -> None:
    """The kernel of each member, in as many threads as it has arguments; each member's streams are
    one queue, and each thread begins with another member's."""
    queues = [np.zeros(1, np.int64) for _ in members]

    def call(worker: int) -> None:
        for i in range(len(members)):
            k = (i + worker) % len(members)
            buffer = threads.scratch(members[k].dtype, members[k].scratch_size)
            kernel(queues[k], *arguments[k][worker], buffer)

    threads.together([partial(call, worker) for worker in range(len(arguments[0]))])


def on_tensors(
    state: HorizonState, n: int, step: Callable[[States, Rows], Estimates]
) -> tuple[HorizonState, Estimate]:
    """A compiled step on a state's tensors, as arrays on the CPU and as they are on a GPU; n
    latents."""
    device, rows = state.z.device, np.arange(len(state.age))
    tensors = tuple(t.detach().contiguous() for t in state.tensors())
    written = tuple(torch.empty_like(t) for t in tensors)
    before, after = (
        Streams(*(t.numpy() if device.type == "cpu" else t for t in these))
        for these in (tensors, written)
    )
    made = [torch.as_tensor(x, device=device) for x in step((before, after), (rows, rows))]
    return HorizonState(*written), Estimate(made[0][:, :n], *made)
