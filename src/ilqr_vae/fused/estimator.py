"""The torch side of the compiled moving-horizon step.

A model is packed once. What a step reads is the streams' state; what it writes is fresh, since
``HorizonState`` is never changed; everything between lives in work arrays that are kept and used
again, so that a steady stream allocates its answers and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ilqr_vae import threads
from ilqr_vae.dynamics import Weights
from ilqr_vae.fused import solver
from ilqr_vae.fused.solver import Array, Options, Plan, Stopped, Work, array, cost_of_iteration
from ilqr_vae.model import Model
from ilqr_vae.readout import KinematicReadout

#: Sets of work arrays kept per size.
_SPARE = 2


class _Room:
    """Work arrays for a batch of up to so many streams: a power of two, so that batches that come
    and go in all sizes share a few sets."""

    def __init__(self, plan: Plan, streams: int, horizon: int, dtype: np.dtype[Any]) -> None:
        n, m, _ = plan.sizes
        self.size = streams
        self.work = Work(plan, streams, horizon, dtype)
        z0 = np.empty((streams, n), dtype)
        z = np.empty((streams, horizon + 1, n), dtype)
        u = np.empty((streams, horizon, m), dtype)
        self.predicted = (z0, z, u)


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
        model: one that ``solver.usable`` accepts for the group "spikes".
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
        from ilqr_vae.fused import window

        self._code = window
        self.plan = solver.plan(model, w, ("spikes",))
        self.horizon, self.options = horizon, options
        n, m, N = self.plan.sizes
        self.dtype = array(mean_rate).dtype
        prior = array(model.initial.cost(1).precision[0])
        self.wide = array(model.initial.cost(1).precision[0].inverse())
        used = KinematicReadout(n, 0) if readout is None else readout
        shape = used.shape
        self.channels, self.features = used.W.shape[0], shape.features(n, N)
        self.scratch_size = window.scratch_size(horizon, n, m, N, shape.hidden, shape.recurrent)
        U = (used.U.mT.contiguous(), used.U[:, :n].contiguous())
        maps = tuple(array(t.to(mean_rate.dtype)) for t in (used.W, used.b, *U, used.c, used.O))
        layer = _layer(used, n, N)
        spread = (used.variance, used.gain, used.kappa, used.centre, used.spread)
        affine = (
            (shape.lags, shape.residuals, shape.recurrent),
            maps,
            tuple(array(t.to(mean_rate.dtype).contiguous()) for t in layer),
            tuple(array(t.to(mean_rate.dtype)) for t in spread),
        )
        self.fixed = (self.plan.arrays, prior, array(mean_rate))
        self.readout = affine
        self._spare: dict[int, list[_Room]] = {}

    def _take(self, streams: int) -> _Room:
        size = 1 << max(0, streams - 1).bit_length()
        spare = self._spare.get(size)
        room = spare.pop() if spare else _Room(self.plan, size, self.horizon, self.dtype)
        room.work.batch = streams
        return room

    def _put(self, room: _Room) -> None:
        spare = self._spare.setdefault(room.size, [])
        if len(spare) < _SPARE:
            spare.append(room)

    def step(
        self, state: Sequence[Tensor], counts: Tensor, mask: Tensor, stopped: Stopped | None
    ) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        """One bin of each stream.

        Args:
            state: the fields of ``HorizonState``.
            counts, mask: (S, N).
            stopped: asked between iterations with the statuses, which it may change; True ends.

        Returns:
            the fields of the next state, and (window, z_cov, rates, kinematics, kinematics_std,
            bits, spikes, iterations, status).
        """
        S, code = counts.shape[0], self._code
        room = self._take(S)
        after, estimate = self._enter(room, state, counts, mask)
        inputs = (
            (after[5], after[6]),
            (after[1], after[2]),
            (room.predicted[0], room.predicted[2]),
        )
        solver.iterate(self.plan, room.work, 1, inputs, self.options, stopped)
        work = (room.work.state, room.work.info)
        self._share(
            S, code.leave, self.plan.arrays[2], self.wide, self.readout, work, after,
            room.predicted, estimate,
        )  # fmt: skip
        self._put(room)
        return after, estimate

    def pass_by(
        self, state: Sequence[Tensor], counts: Tensor, mask: Tensor
    ) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        """``step`` without a solve: the windows hold the bins, the answers are predictions of
        unknown covariance."""
        before, after, estimate = self._fresh(state, counts)
        self._share(
            counts.shape[0], self._code.pass_by, self.fixed, self.readout, before, after,
            (array(counts), array(mask)), estimate,
        )  # fmt: skip
        return after, estimate

    def _enter(
        self, room: _Room, state: Sequence[Tensor], counts: Tensor, mask: Tensor
    ) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        """Move the windows and take the bins in: the next states, but for the room's predicted
        trajectories; and the answers, as far as they are known."""
        before, after, estimate = self._fresh(state, counts)
        self._share(
            counts.shape[0], self._code.enter, self.fixed, before, after,
            (array(counts), array(mask)), room.predicted, estimate,
        )  # fmt: skip
        return after, estimate

    def _fresh(
        self, state: Sequence[Tensor], counts: Tensor
    ) -> tuple[tuple[Array, ...], tuple[Array, ...], tuple[Array, ...]]:
        """The fields of the states, and room for those of the next and for the answers."""
        before = tuple(array(t) for t in state)
        S, N = counts.shape
        n = self.plan.sizes[0]
        after = tuple(np.empty_like(x) for x in before)
        shapes = ((self.features,), (n, n), (N,), (self.channels,), (self.channels,), (), ())
        estimate = (
            *(np.empty((S, *shape), self.dtype) for shape in shapes),
            np.empty(S, np.int64),
            np.empty(S, np.int64),
        )
        return before, after, estimate

    def _share(self, streams: int, kernel: Callable[..., None], *arguments: Any) -> None:
        threads.share_out(
            kernel,
            streams,
            cost_of_iteration(self.plan, self.horizon) // 4,
            arguments,
            dtype=self.dtype,
            scratch_size=self.scratch_size,
        )
