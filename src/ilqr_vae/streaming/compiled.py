"""The torch side of the compiled moving-horizon step.

A model is packed once. What a step reads is the streams' state; what it writes is rows that nobody
else has, since a ``HorizonState`` is never changed; everything between lives in work arrays that
are kept and used again, so that a steady stream allocates its answers and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from ilqr_vae.inference import compiled
from ilqr_vae.inference.compiled import (
    Array,
    Options,
    Plan,
    Stopped,
    Work,
    array,
    cost_of_iteration,
)
from ilqr_vae.kernels.cpu import threads
from ilqr_vae.model.dynamics import Weights
from ilqr_vae.model.generative import Model
from ilqr_vae.model.readout import KinematicReadout

#: Sets of work arrays kept per size, beside one for each thread.
_SPARE = 2

States = tuple[tuple[Array, ...], tuple[Array, ...]]
"""Arrays of the fields of ``HorizonState``: before the bins, and after them."""

Places = tuple[Array, Array]
"""The streams' rows in both, int64."""


class _Room:
    """Work arrays for a batch of up to so many streams: a power of two, so that batches that come
    and go in all sizes share a few sets."""

    def __init__(self, plan: Plan, streams: int, horizon: int, dtype: np.dtype[Any]) -> None:
        n, m, _ = plan.sizes
        self.size = streams
        self.work = work = Work(plan, streams, horizon, dtype)
        z0 = np.empty((streams, n), dtype)
        z = np.empty((streams, horizon + 1, n), dtype)
        u = np.empty((streams, horizon, m), dtype)
        self.arrays = ((z0, z, u), (work.state, work.kept, work.info), work.none)


def _layer(readout: KinematicReadout, n: int, units: int) -> tuple[Tensor, ...]:
    """C, A, a, P', p, G' and g of a recurrent layer, of no units where there is none."""
    if readout.shape.recurrent:
        A, a, P, p, G, g = readout.cell
        return readout.C, A, a, P.mT, p, G.mT, g
    none = readout.W.new_zeros(0)
    wide = readout.W.new_zeros(units, 0)
    out = readout.W.new_zeros(len(readout.b), 0)
    return out, none.view(0, n), none, wide, none, none.view(0, 0), none


class Estimator:
    """One model and readout, packed.

    Args:
        model: one that ``compiled.usable`` accepts for the group "spikes".
        w: its effective weights.
        readout: kinematics from latents, or None.
        mean_rate: (N,).
        horizon: H.
        options: of the solves.
    """

    def __init__(
        self,
        model: Model,
        w: Weights,
        readout: KinematicReadout | None,
        mean_rate: Tensor,
        horizon: int,
        options: Options,
    ) -> None:
        from ilqr_vae.kernels.cpu import step as steps

        self._code = steps
        self.plan = compiled.plan(model, w, ("spikes",))
        self.horizon, self.options = horizon, options
        n, m, N = self.plan.sizes
        self.dtype = array(mean_rate).dtype
        prior = array(model.initial.cost(1).precision[0])
        wide = array(model.initial.cost(1).precision[0].inverse())
        used = KinematicReadout(n, 0) if readout is None else readout
        shape = used.shape
        self.channels, self.features = used.W.shape[0], shape.features(n, N)
        self.scratch_size = steps.scratch_size(horizon, n, m, N, shape.hidden, shape.recurrent)
        U = (used.U.mT.contiguous(), used.U[:, :n].contiguous())
        maps = tuple(array(t.to(mean_rate.dtype)) for t in (used.W, used.b, *U, used.c, used.O))
        layer = _layer(used, n, N)
        spread = (used.variance, used.gain, used.kappa, used.centre, used.spread)
        self.readout = (
            (shape.lags, shape.residuals, shape.recurrent),
            maps,
            tuple(array(t.to(mean_rate.dtype).contiguous()) for t in layer),
            tuple(array(t.to(mean_rate.dtype)) for t in spread),
        )
        self.fixed = (self.plan.arrays, prior, array(mean_rate), wide, options.numbers)
        self._spare: dict[int, list[_Room]] = {}

    def _take(self, streams: int) -> _Room:
        size = 1 << max(0, streams - 1).bit_length()
        spare = self._spare.get(size)
        room = spare.pop() if spare else _Room(self.plan, size, self.horizon, self.dtype)
        room.work.batch = streams
        return room

    def _put(self, room: _Room) -> None:
        spare = self._spare.setdefault(room.size, [])
        if len(spare) < _SPARE + threads.count():
            spare.append(room)

    def step(
        self, states: States, places: Places, counts: Array, mask: Array, stopped: Stopped | None
    ) -> tuple[Array, ...]:
        """One bin of each stream.

        Args:
            states: read, and written.
            places: where; no stream's place after is anybody's place before.
            counts, mask: (S, N).
            stopped: asked between iterations with the statuses, which it may change; True ends.

        Returns:
            (window, z_cov, rates, kinematics, kinematics_std, bits, spikes, iterations, status).
        """
        S, code = len(counts), self._code
        estimate = self._fresh(S)
        given = (self.fixed, self.readout, states, places, (counts, mask), estimate)
        limit = self.options.iterations

        def parts(which: int, iterations: int, rooms: Sequence[_Room], *, shared: bool) -> None:
            self._run(
                code.step,
                [(which, iterations, *given, room.arrays, shared) for room in rooms],
            )

        workers = self._workers(S)
        if stopped is None:
            rooms = [self._take(1) for _ in range(workers)]
            parts(code.WHOLE, limit, rooms, shared=False)
        else:
            rooms = [self._take(S)]
            parts(code.ENTER | code.SOLVE, 1, rooms * workers, shared=True)
            for _ in range(1, limit):
                if stopped(rooms[0].work.status):
                    break
                parts(code.SOLVE, 1, rooms * workers, shared=True)
            parts(code.LEAVE, 0, rooms * workers, shared=True)
        for room in rooms:
            self._put(room)
        return estimate

    def pass_by(
        self, states: States, places: Places, counts: Array, mask: Array
    ) -> tuple[Array, ...]:
        """``step`` without a solve: the windows hold the bins, the answers are predictions of
        unknown covariance."""
        estimate = self._fresh(len(counts))
        given = (self.fixed, self.readout, states, places, (counts, mask), estimate)
        self._run(self._code.pass_by, [given] * self._workers(len(counts)))
        return estimate

    def _fresh(self, streams: int) -> tuple[Array, ...]:
        """Room for answers."""
        n, _, N = self.plan.sizes
        shapes = ((self.features,), (n, n), (N,), (self.channels,), (self.channels,), (), ())
        return (
            *(np.empty((streams, *shape), self.dtype) for shape in shapes),
            np.empty(streams, np.int64),
            np.empty(streams, np.int64),
        )

    def _workers(self, streams: int) -> int:
        cost = cost_of_iteration(self.plan, self.horizon)
        return threads.worth(streams, self.options.iterations * cost)

    def _run(self, kernel: Callable[..., None], arguments: Sequence[tuple[Any, ...]]) -> None:
        """The kernel once in each of as many threads, on one queue."""
        queue = np.zeros(1, np.int64)

        def call(kernel: Callable[..., None], given: tuple[Any, ...]) -> None:
            kernel(queue, *given, threads.scratch(self.dtype, self.scratch_size))

        threads.together([partial(call, kernel, given) for given in arguments])
