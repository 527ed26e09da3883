"""Several models streamed as one: the mean of their decodes, and the variance between them.

K members, trained from different seeds on one recording, each with its own state (``HorizonState``
with (S, K) in place of S). With y_k and s_k the decodes of the members and their stated deviations,

    y = 1/K sum_k y_k,      s^2 = 1/K sum_k s_k^2 + 1/K sum_k (y_k - y)^2.

Rates are means too. The latents of members have different coordinates: those of the first are
published, and ``window`` is the concatenation of the members' windows. ``bits`` is the
log-likelihood of the equal mixture of the members: log2 of the mean of their one-step-ahead
likelihoods of the newest bin, relative to the likelihood of the mean rates.

The reported iterations are the maximum over the members, the status the one with the largest
``_WEIGHT``. An answer is beyond the training range, or restarted, if it is so for any member.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ilqr_vae.arrays import mixture
from ilqr_vae.inference import ilqr
from ilqr_vae.inference.compiled import Array, Stopped
from ilqr_vae.inference.problem import Status
from ilqr_vae.kernels.cpu.arguments import Estimates, Streams
from ilqr_vae.lqr.on_cpu import array
from ilqr_vae.model.intervals import SpeedScale, stated
from ilqr_vae.model.readout import ReadoutShape
from ilqr_vae.streaming import on_gpu
from ilqr_vae.streaming.bounds import check_bin
from ilqr_vae.streaming.compiled import (
    Estimator,
    Rows,
    States,
    on_tensors,
    predict_together,
    step_together,
)
from ilqr_vae.streaming.horizon import MovingHorizon
from ilqr_vae.streaming.on_gpu import GpuEstimator
from ilqr_vae.streaming.state import Estimate, HorizonState

_WEIGHT = np.empty(len(Status), dtype=np.int64)
"""Rank of a member's status. STOPPED is highest, since a replay needs its iterations."""
_WEIGHT[
    [
        Status.CONVERGED,
        Status.RUNNING,
        Status.ITERATION_LIMIT,
        Status.STALLED,
        Status.NOT_FINITE,
        Status.STOPPED,
    ]
] = np.arange(len(Status))


def combined(members: Sequence[Estimates], intervals: SpeedScale | None) -> Estimates:
    """Combine the estimates of the members."""
    mean, std = mixture([e.kinematics for e in members], [e.kinematics_std for e in members])
    bits = np.stack([e.bits for e in members])
    most = bits.max(0)
    statuses = np.stack([e.status for e in members])
    worst = _WEIGHT[statuses].argmax(0)
    return members[0]._replace(
        window=np.concatenate([e.window for e in members], axis=1),
        rates=np.stack([e.rates for e in members]).mean(0),
        kinematics=mean,
        kinematics_std=stated(intervals, mean, std),
        bits=most + np.log2(np.exp2(bits - most).mean(0)),
        iterations=np.stack([e.iterations for e in members]).max(0),
        status=np.take_along_axis(statuses, worst[None], 0)[0],
        ignored=np.stack([e.ignored for e in members]).max(0),
        beyond=np.stack([e.beyond for e in members]).any(0),
        restarted=np.stack([e.restarted for e in members]).any(0),
    )


class CompiledEnsemble:
    """The compiled steps of the members as one; see ``compiled.Estimator``.

    Args:
        members: estimators on one device, with the same options.
        intervals: scale of the combined deviations.
    """

    def __init__(
        self, members: Sequence[Estimator | GpuEstimator], intervals: SpeedScale | None
    ) -> None:
        self._members, self._intervals = tuple(members), intervals
        there = isinstance(self._members[0], GpuEstimator)
        self._step: Callable[..., list[Estimates]]
        self._predict: Callable[..., list[Estimates]]
        self._step = on_gpu.step_together if there else step_together
        self._predict = on_gpu.predict_together if there else predict_together

    def step(
        self, states: States, rows: Rows, counts: Array, mask: Array, stopped: Stopped | None
    ) -> Estimates:
        """Process one bin of each stream; ``stopped`` receives the statuses (K, S)."""
        given = (*self._apart(states, rows), (counts, mask), stopped)
        return combined(self._step(self._members, *given), self._intervals)

    def predict_only(self, states: States, rows: Rows, counts: Array, mask: Array) -> Estimates:
        """Process one bin of each stream without a solve."""
        given = (*self._apart(states, rows), (counts, mask))
        return combined(self._predict(self._members, *given), self._intervals)

    def _apart(self, states: States, rows: Rows) -> tuple[list[States], list[Rows]]:
        """Return the states, which all members share, and the rows of each member."""
        before, after = (Streams(*(x.reshape(-1, *x.shape[2:]) for x in s)) for s in states)
        K = len(self._members)
        return [(before, after)] * K, [(K * rows[0] + k, K * rows[1] + k) for k in range(K)]


class _Recorded:
    """Records the decisions of a stop, to repeat them for each member.

    So the solves of all members end after the same number of iterations.
    """

    def __init__(self, stop: ilqr.Stop) -> None:
        self._stop, self._said = stop, list[Any]()

    def of_member(self) -> ilqr.Stop:
        """Replay the decisions for another member."""
        asked = 0

        def stop() -> Any:
            nonlocal asked
            if asked == len(self._said):
                self._said.append(self._stop())
            asked += 1
            return self._said[asked - 1]

        return stop


class EnsembleHorizon:
    """The estimators of the members as one, with the methods of ``MovingHorizon``.

    Args:
        members: estimators with the same units, sizes and horizon.
        intervals: scale of the combined deviations; None leaves s unscaled.

    Attributes:
        model, readout, bounds, spikes: those of the first member.
        mean_rate, config: common to all.
    """

    def __init__(
        self, members: Sequence[MovingHorizon], intervals: SpeedScale | None = None
    ) -> None:
        self.members, self.intervals = tuple(members), intervals
        first = self.members[0]
        self.model, self.readout, self.config = first.model, first.readout, first.config
        self.spikes, self.mean_rate, self.bounds = first.spikes, first.mean_rate, first.bounds

    def init(self, batch: int = 1) -> HorizonState:
        """Return the initial state of streams."""
        return _together([member.init(batch) for member in self.members])

    def compiled(self, like: Tensor) -> CompiledEnsemble | None:
        """Return the compiled step; None if a member has none."""
        made = [member.compiled(like) for member in self.members]
        found = [one for one in made if one is not None]
        return CompiledEnsemble(found, self.intervals) if len(found) == len(made) else None

    @torch.no_grad()
    def step(
        self,
        state: HorizonState,
        counts: Float[Tensor, "S N"],
        mask: Float[Tensor, "S N"],
        stop: ilqr.Stop | None = None,
    ) -> tuple[HorizonState, Estimate]:
        """Process one bin of each stream; see ``MovingHorizon.step``."""
        check_bin(self.spikes, counts, mask)
        compiled = self.compiled(state.z)
        if compiled is None:
            recorded = None if stop is None else _Recorded(stop)
            return self._one_by_one(
                state,
                lambda m, s: m.step(s, counts, mask, recorded and recorded.of_member()),
            )
        given = array(counts.cpu()), array(mask.cpu()), ilqr.stopping(stop)
        return on_tensors(state, self.model.n, lambda s, rows: compiled.step(s, rows, *given))

    @torch.no_grad()
    def predict_only(
        self, state: HorizonState, counts: Float[Tensor, "S N"], mask: Float[Tensor, "S N"]
    ) -> tuple[HorizonState, Estimate]:
        """Process one bin of each stream without a solve; see ``MovingHorizon.predict_only``."""
        check_bin(self.spikes, counts, mask)
        compiled = self.compiled(state.z)
        if compiled is None:
            return self._one_by_one(state, lambda m, s: m.predict_only(s, counts, mask))
        given = array(counts.cpu()), array(mask.cpu())
        return on_tensors(
            state, self.model.n, lambda s, rows: compiled.predict_only(s, rows, *given)
        )

    def _one_by_one(
        self,
        state: HorizonState,
        step: Callable[[MovingHorizon, HorizonState], tuple[HorizonState, Estimate]],
    ) -> tuple[HorizonState, Estimate]:
        """Step the members one by one, without a compiled step."""
        made = [
            step(member, HorizonState(*(t[:, k] for t in state.tensors())))
            for k, member in enumerate(self.members)
        ]
        estimates = [
            Estimates(*(getattr(e, name).cpu().numpy() for name in Estimates._fields))
            for _, e in made
        ]
        found = [torch.as_tensor(x).to(state.z.device) for x in combined(estimates, self.intervals)]
        return _together([s for s, _ in made]), Estimate(found[0][:, : self.model.n], *found)


def _together(states: Sequence[HorizonState]) -> HorizonState:
    """Combine the states of the members."""
    fields = zip(*(state.tensors() for state in states), strict=True)
    return HorizonState(*(torch.stack(same, 1) for same in fields))


Horizon: TypeAlias = MovingHorizon | EnsembleHorizon
"""An estimator of a model file."""


def windows_of(estimator: Horizon) -> list[slice]:
    """Return the window of each member in an estimate; the whole window for a single model."""
    members = estimator.members if isinstance(estimator, EnsembleHorizon) else (estimator,)
    parts: list[slice] = []
    for member in members:
        shape = ReadoutShape() if member.readout is None else member.readout.shape
        start = parts[-1].stop if parts else 0
        size = shape.features(member.model.n, len(member.mean_rate))
        parts.append(slice(start, start + size))
    return parts
