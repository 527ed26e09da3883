"""Moving-horizon estimation: receding-horizon iLQR on a stream of spike bins.

At bin t, over the window of the last H bins (s = t - H + 1 its first),

    minimise over (z_s, u)   arrival(z_s) + sum_{k=s}^{t} [ -log p(u_k) - log p(o_k | z_{k+1}) ]
    arrival(z) = 1/2 (z - zbar)' P^-1 (z - zbar)

Until the window is full this is the exact full-history problem with the model's own prior on z_0.
Then the bin that leaves is absorbed into (zbar, P) by one information-filter step linearised on the
current trajectory, so that its data is counted once: with A, B, r, R, q, Q the model's terms there,

    P- = A P A' + B R^-1 B'          m- = z_{s+1} + A (zbar - z_s) - B R^-1 r
    P'^-1 = P-^-1 + Q                P'^-1 (zbar' - z_{s+1}) = P-^-1 (m- - z_{s+1}) - q

The solution is shifted and warm-starts the next bin. For a linear-Gaussian model this is the Kalman
filter for every H.

The window always has H slots. A young window's later slots are bins that have not come: they have
no likelihood term, so they change nothing, and every stream of a batch has the same shapes whatever
its age. A missing bin is the same thing: a mask of zeros.

Pure: ``step(state, bin) -> (state, estimate)``; S streams, one never changing another's answer.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Annotated

import msgspec
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ilqr_vae.inference import compiled as solver
from ilqr_vae.inference import ilqr
from ilqr_vae.inference.compiled import Array, array
from ilqr_vae.inference.on_gpu import iteration
from ilqr_vae.kernels import backend
from ilqr_vae.lqr import marginal_covariance
from ilqr_vae.model.generative import Model
from ilqr_vae.model.likelihoods import Observed
from ilqr_vae.model.priors import InitialCost
from ilqr_vae.model.readout import KinematicReadout, ReadoutShape, read_window
from ilqr_vae.streaming.compiled import Estimator, Places, States
from ilqr_vae.streaming.graphs import Graphs, Record, record_cuda
from ilqr_vae.streaming.state import Estimate, HorizonState

LOG_2 = 0.6931471805599453


class HorizonConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The ``[estimator]`` part of a config.

    Attributes:
        horizon: H, bins in the window.
        iterations: iLQR iterations per bin; fixed, so that answers do not depend on the clock.
        tolerance: relative expected decrease under which iterating is pointless.
    """

    horizon: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 10
    iterations: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 2
    tolerance: Annotated[float, msgspec.Meta(ge=0, le=1)] = 1e-10


def _spd_inverse(M: Tensor) -> Tensor:
    return torch.cholesky_inverse(torch.linalg.cholesky_ex(M)[0])


class MovingHorizon:
    """The estimator: a model, a readout and a horizon, without memory of its own.

    Args:
        model: on the device and in the dtype to compute in; not changed.
        readout: kinematics from latents, or None.
        mean_rate: (N,) expected counts per bin over the training part (the null model of ``bits``).
        config: horizon and iteration budget.
    """

    def __init__(
        self,
        model: Model,
        readout: KinematicReadout | None,
        mean_rate: Float[Tensor, " N"],
        config: HorizonConfig,
    ) -> None:
        self.model = model.requires_grad_(False).eval()
        self.readout = readout
        self.mean_rate = mean_rate
        self.config = config
        self.spikes = model.group("spikes")
        self._w = tuple(t.contiguous() for t in model.dynamics.weights())
        self._solver = ilqr.SolverConfig(iterations=config.iterations, tolerance=config.tolerance)
        self._wide = model.initial.cost(1).precision[0].inverse()
        self._packed: Estimator | None = None
        self._graphs: Graphs | None = None

    def init(self, batch: int = 1) -> HorizonState:
        """Fresh streams: the model's own prior, an empty window."""
        model, H, N = self.model, self.config.horizon, self.mean_rate.shape[0]
        like = self.mean_rate
        prior = model.initial.cost(batch)
        u = like.new_zeros(batch, H, model.m) + model.prior.mean
        z0 = prior.mean.clone()
        return HorizonState(
            age=torch.zeros(batch, dtype=torch.int64, device=like.device),
            mean=prior.mean.clone(),
            precision=prior.precision.clone(),
            z=model.rollout(self._w, z0, u),
            u=u,
            counts=like.new_zeros(batch, H, N),
            mask=like.new_zeros(batch, H, N),
        )

    def _absorb(self, s: HorizonState) -> tuple[Tensor, Tensor]:
        """Arrival mean and precision one bin later (see the module's docstring)."""
        model = self.model
        on_gpu = iteration(model, self._w, ("spikes",), s.u)
        if on_gpu is not None:
            own = model.initial.cost(1).precision[0]
            data = {"spikes": Observed(s.counts, s.mask)}
            found = on_gpu.absorb(s.z, s.u, data, InitialCost(s.mean, s.precision), own)
            if found is not None:
                return found
        z, z_next, u = s.z[:, 0], s.z[:, 1], s.u[:, 0]
        A, B = model.dynamics.jacobians(self._w, z, u)
        r, R = model.prior.quadratise(u)
        q, Q = model.observation_terms(z_next, {"spikes": Observed(s.counts[:, 0], s.mask[:, 0])})
        R_inv = torch.linalg.inv_ex(R)[0]
        P_minus = A @ _spd_inverse(s.precision) @ A.mT + B @ R_inv @ B.mT
        # a direction that dynamics and inputs both leave at zero variance would have no inverse
        trace = P_minus.diagonal(dim1=-2, dim2=-1).mean(-1)
        P_minus = P_minus + torch.diag_embed((1e-10 * trace).unsqueeze(-1).expand_as(z))
        shift = A @ (s.mean - z).unsqueeze(-1) - B @ R_inv @ r.unsqueeze(-1)
        information = _spd_inverse(P_minus)
        precision = information + Q
        rhs = information @ shift - q.unsqueeze(-1)
        factor = torch.linalg.cholesky_ex(precision)[0]
        mean = z_next + torch.cholesky_solve(rhs, factor).squeeze(-1)
        # where rounding left nothing positive definite, the model's own uncertainty of a state
        sound = mean.isfinite().all(-1) & precision.isfinite().all(-1).all(-1)
        own = model.initial.cost(z.shape[0]).precision
        return torch.where(sound[:, None], mean, z_next), torch.where(
            sound[:, None, None], precision, own
        )

    def _shift(self, s: HorizonState, waitless: bool, absorbs: bool) -> HorizonState:
        """The window one bin later, its newest slot empty; streams not yet full stay."""
        model, full = self.model, s.age == self.config.horizon
        if not waitless and not bool(full.any()):
            return s
        if absorbs:
            mean, precision = self._absorb(s)
        else:
            mean, precision = (
                s.z[:, 1],
                (s.precision + model.initial.cost(len(s.age)).precision) / 2,
            )
        rest = model.prior.mean.expand(s.z.shape[0], model.m)
        z_next = model.dynamics.step(self._w, s.z[:, -1], rest)

        def roll(x: Tensor, last: Tensor) -> Tensor:
            return torch.cat([x[:, 1:], last.unsqueeze(1)], 1)

        empty = torch.zeros_like(s.counts[:, 0])
        moved = HorizonState(
            age=s.age - 1,
            mean=mean,
            precision=precision,
            z=roll(s.z, z_next),
            u=roll(s.u, rest),
            counts=roll(s.counts, empty),
            mask=roll(s.mask, empty),
        )
        if not waitless and bool(full.all()):
            return moved
        pairs = zip(moved.tensors(), s.tensors(), strict=True)
        return HorizonState(*(ilqr.where(full, new, old) for new, old in pairs))

    def _bits(self, predicted: Tensor, counts: Tensor, mask: Tensor) -> Tensor:
        """Log-likelihood ratio of predicted to mean rates, in bits."""
        gain = self.spikes.evidence(predicted, self.mean_rate, counts)
        return (gain * mask).sum(-1) / LOG_2

    @torch.no_grad()
    def step(
        self,
        state: HorizonState,
        counts: Float[Tensor, "S N"],
        mask: Float[Tensor, "S N"],
        stop: ilqr.Stop | None = None,
    ) -> tuple[HorizonState, Estimate]:
        """Take one bin of each stream.

        Args:
            counts: spikes per unit; where mask is zero, any number. One that is not finite counts
                as not observed, and its stream's status is NOT_FINITE.
            mask: one where observed; a row of zeros is a missing bin (the answer is a prediction).
            stop: asked before every iteration after the first; True ends the solve (anytime). One
                truth value, or one per stream.
        """
        if not solver.usable(self.model, ("spikes",), state.z):
            if state.z.device.type == "cuda" and stop is None and backend.current() != "reference":
                return self._graphed(state, counts, mask)
            return self.step_reference(state, counts, mask, stop)
        step, stopped = self._estimator().step, ilqr.stopping(stop)
        given = array(counts), array(mask)
        return self._compiled(state, lambda s, at: step(s, at, *given, stopped))

    def _compiled(
        self, state: HorizonState, step: Callable[[States, Places], tuple[Array, ...]]
    ) -> tuple[HorizonState, Estimate]:
        """A compiled step on a state's tensors."""
        before = tuple(array(t) for t in state.tensors())
        after = tuple(np.empty_like(x) for x in before)
        rows = np.arange(len(before[0]))
        window, *rest = (torch.from_numpy(x) for x in step((before, after), (rows, rows)))
        moved = HorizonState(*(torch.from_numpy(x) for x in after))
        return moved, Estimate(window[:, : self.model.n], rest[0], window, *rest[1:])

    @torch.no_grad()
    def pass_by(
        self, state: HorizonState, counts: Float[Tensor, "S N"], mask: Float[Tensor, "S N"]
    ) -> tuple[HorizonState, Estimate]:
        """Take one bin of each stream as ``step`` does, but at next to no cost: without a solve.

        The bin is in the window and counts in the next solve. The answer is its prediction, the
        covariance not known (NaN). Where the window moves, the bin that leaves is not absorbed:
        the arrival cost is put around the current trajectory and forgets half of what it knew
        beyond the model's prior, so that after a few such bins the window's data decide.
        """
        if solver.usable(self.model, ("spikes",), state.z):
            step, given = self._estimator().pass_by, (array(counts), array(mask))
            return self._compiled(state, lambda s, at: step(s, at, *given))
        after, predicted, bad = self._enter(state, counts, mask, absorbs=False)
        newest = torch.arange(len(bad), device=bad.device), after.age - 1
        unknown = torch.full_like(after.precision, torch.nan)
        status = torch.where(bad, int(ilqr.Status.NOT_FINITE), int(ilqr.Status.RUNNING))
        solve = (torch.zeros_like(status), status)
        return after, self._answer(
            after, unknown, predicted, after.counts[newest], after.mask[newest], solve
        )

    def _graphed(
        self, state: HorizonState, counts: Tensor, mask: Tensor
    ) -> tuple[HorizonState, Estimate]:
        """The step as a recorded CUDA graph."""
        if self._graphs is None:
            self._graphs = self.graphs()
        given = (*state.tensors(), counts, mask)
        out = self._graphs(given)
        held = len(given) - 2  # as many fields as the state has
        return HorizonState(*out[:held]), Estimate(*out[held:])

    def graphs(self, record: Record = record_cuda) -> Graphs:
        """The step without waiting, to be recorded for each batch size that comes."""
        estimator = weakref.proxy(self)  # it holds the graphs: no cycle, both are freed at once

        def step(given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            after, answer = estimator.step_reference(
                HorizonState(*given[:-2]), given[-2], given[-1], waitless=True
            )
            return (*after.tensors(), *(getattr(answer, f.name) for f in fields(Estimate)))

        fresh = self.init(1)
        missing = torch.zeros_like(fresh.counts[:, 0])
        blank = (*fresh.tensors(), missing, missing)
        return Graphs(step, blank, record)

    def compiled(self, like: Tensor) -> Estimator | None:
        """The compiled step by itself, on rows of arrays, where there is one for this model and for
        tensors like this one; what ``step`` and ``pass_by`` then do."""
        return self._estimator() if solver.usable(self.model, ("spikes",), like) else None

    def _estimator(self) -> Estimator:
        """The model packed for the compiled step, once."""
        if self._packed is None:
            about = (self.readout, self.mean_rate, self.config.horizon)
            self._packed = Estimator(self.model, self._w, *about, ilqr.options(self._solver))
        return self._packed

    @torch.no_grad()
    def step_reference(
        self,
        state: HorizonState,
        counts: Float[Tensor, "S N"],
        mask: Float[Tensor, "S N"],
        stop: ilqr.Stop | None = None,
        *,
        waitless: bool = False,
    ) -> tuple[HorizonState, Estimate]:
        """``step`` in torch: what the compiled one must do.

        Args:
            waitless: never look at a number, so that the device need not be waited for; without
                ``stop``.
        """
        s, predicted, bad = self._enter(state, counts, mask, waitless=waitless)
        row, newest = torch.arange(s.z.shape[0], device=s.z.device), s.age
        problem = ilqr.Problem(
            self.model,
            self._w,
            {"spikes": Observed(s.counts, s.mask)},
            InitialCost(s.mean, s.precision),
        )
        solved, info = ilqr.solve_reference(
            problem, s.z[:, 0], s.u, self._solver, stop, waitless=waitless
        )
        # a solve that broke down keeps the prediction rather than spreading what is not finite
        broken = (solved.status == ilqr.Status.NOT_FINITE).view(-1, 1, 1)
        z, u = torch.where(broken, s.z, solved.z), torch.where(broken, s.u, solved.u)
        Sigma = marginal_covariance(
            info.problem.A, info.problem.B, info.lqr.K, info.lqr.Quu_inv, info.lqr.V[:, 0]
        )[row, newest]
        # of a solve that broke down nothing is known but what was known before any bin came
        unknown = broken | ~(Sigma.diagonal(dim1=-2, dim2=-1) > 0).all(-1).view(-1, 1, 1)
        Sigma = torch.where(unknown, self._wide, Sigma)
        after, at = replace(s, z=z, u=u), (row, newest - 1)
        status = torch.where(bad, int(ilqr.Status.NOT_FINITE), solved.status)
        solve = (solved.iterations, status)
        return after, self._answer(after, Sigma, predicted, s.counts[at], s.mask[at], solve)

    def _enter(
        self,
        state: HorizonState,
        counts: Tensor,
        mask: Tensor,
        *,
        waitless: bool = False,
        absorbs: bool = True,
    ) -> tuple[HorizonState, Tensor, Tensor]:
        """The window with the new bin in it, that bin as predicted, and which streams' counts had a
        number that is not finite."""
        finite = counts.isfinite()
        bad = (~finite & (mask > 0)).any(-1)
        mask = mask * finite
        counts = torch.where(mask > 0, counts, torch.zeros_like(counts))
        s = self._shift(state, waitless, absorbs)
        row = torch.arange(s.z.shape[0], device=s.z.device)
        window_counts, window_mask = s.counts.clone(), s.mask.clone()
        window_counts[row, s.age] = counts
        window_mask[row, s.age] = mask
        predicted = self.spikes.mean(s.z[row, s.age + 1])
        return replace(s, age=s.age + 1, counts=window_counts, mask=window_mask), predicted, bad

    def features(self, s: HorizonState) -> Float[Tensor, "S F"]:
        """What the readout reads of a window (``readout``); the newest estimate first."""
        shape = ReadoutShape() if self.readout is None else self.readout.shape
        return read_window(shape, s.age, s.z, s.counts, s.mask, self.spikes.mean)

    def _answer(
        self,
        s: HorizonState,
        Sigma: Tensor,
        predicted: Tensor,
        counts: Tensor,
        mask: Tensor,
        solve: tuple[Tensor, Tensor],
    ) -> Estimate:
        window = self.features(s)
        z = window[:, : self.model.n]
        if self.readout is None:
            kinematics = kinematics_std = z.new_zeros(len(z), 0)
        else:
            kinematics, kinematics_std = self.readout(window, Sigma)
        return Estimate(
            z=z,
            z_cov=Sigma,
            window=window,
            rates=self.spikes.mean(z),
            kinematics=kinematics,
            kinematics_std=kinematics_std,
            bits=self._bits(predicted, counts, mask),
            spikes=(counts * mask).sum(-1),
            iterations=solve[0],
            status=solve[1],
        )
