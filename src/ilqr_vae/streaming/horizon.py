"""Moving-horizon estimation: iLQR over a sliding window of spike bins.

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

The window always has H slots. In a young window the later slots are future bins without a
likelihood term, which change nothing. A missing bin is treated in the same way: its mask is zero.

Pure: ``step(state, bin) -> (state, estimate)``. Streams do not affect each other.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Annotated, NamedTuple

import msgspec
import torch
from jaxtyping import Float
from torch import Tensor

from ilqr_vae.files import unit
from ilqr_vae.inference import compiled as solver
from ilqr_vae.inference import ilqr
from ilqr_vae.lqr import marginal_covariance, solve_lqr
from ilqr_vae.lqr.on_cpu import array
from ilqr_vae.model.generative import Model
from ilqr_vae.model.intervals import SpeedScale, stated
from ilqr_vae.model.likelihoods import Observed
from ilqr_vae.model.priors import GaussianPrior, InitialCost
from ilqr_vae.model.readout import KinematicReadout, read_window
from ilqr_vae.model.rollout import wanted
from ilqr_vae.streaming import on_gpu
from ilqr_vae.streaming.bounds import TrainingRange, bounds_of, check_bin
from ilqr_vae.streaming.compiled import Estimator, on_tensors
from ilqr_vae.streaming.on_gpu import GpuEstimator
from ilqr_vae.streaming.state import Estimate, HorizonState


class HorizonConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The ``[estimator]`` part of a config.

    Attributes:
        horizon: H, number of bins in the window.
        iterations: iLQR iterations per bin; fixed, so that answers do not depend on the clock.
        tolerance: relative expected decrease below which a solve ends.
    """

    horizon: Annotated[int, msgspec.Meta(ge=1, le=10_000), unit("bins")] = 10
    iterations: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 2
    tolerance: Annotated[float, msgspec.Meta(ge=0, le=1)] = 1e-10


class _Entered(NamedTuple):
    """A bin that entered the window: predicted counts, and the counts and mask (S, N) to use.

    Also, per stream, whether a count was not finite, how many were ignored, and whether the stream
    restarted.
    """

    predicted: Tensor
    counts: Tensor
    used: Tensor
    bad: Tensor
    ignored: Tensor
    restarted: Tensor


def _spd_inverse(M: Tensor) -> Tensor:
    return torch.cholesky_inverse(torch.linalg.cholesky_ex(M)[0])


class MovingHorizon:
    """The estimator: a model, a readout and a horizon, without state.

    Args:
        model: model on the device and in the dtype of the computation; it is copied.
        readout: kinematics from latents, or None.
        mean_rate: (N,) mean counts per bin in the training part, the baseline of ``bits``; features
            in standard units, see ``Likelihood.standard``.
        config: horizon and iterations.
        seen: ranges in the training part; None gives wider bounds.
        intervals: scales the stated deviations of the kinematics; None leaves them as they are.

    Attributes:
        bounds: plausible ranges.
    """

    def __init__(
        self,
        model: Model,
        readout: KinematicReadout | None,
        mean_rate: Float[Tensor, " N"],
        config: HorizonConfig,
        seen: TrainingRange | None = None,
        intervals: SpeedScale | None = None,
    ) -> None:
        self.model = model = copy.deepcopy(model).requires_grad_(False).eval()
        self.readout = readout
        self.mean_rate = mean_rate
        self.intervals = intervals
        self.config = config
        self.spikes = model.group("spikes")
        self._blank = KinematicReadout(model.n, 0)
        self._expects = (readout or self._blank).expects(self.spikes)
        self._w = tuple(t.contiguous() for t in model.dynamics.weights())
        self._solver = ilqr.SolverConfig(iterations=config.iterations, tolerance=config.tolerance)
        self.bounds = bounds_of(model, readout, mean_rate, seen)
        self._prior_covariance = model.initial.cost(1).precision[0].inverse()
        self._initial = self.init()
        self._packed: Estimator | GpuEstimator | None = None
        self._refused = False

    def init(self, batch: int = 1) -> HorizonState:
        """Return the initial state of streams: the model's prior and an empty window."""
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
        """Return the arrival mean and precision one bin later (see the module)."""
        model = self.model
        z, z_next, u = s.z[:, 0], s.z[:, 1], s.u[:, 0]
        A, B = model.dynamics.jacobians(self._w, z, u)
        r, R = model.prior.quadratise(u)
        q, Q = model.observation_terms(z_next, {"spikes": Observed(s.counts[:, 0], s.mask[:, 0])})
        R_inv = torch.linalg.inv_ex(R)[0]
        spread = torch.linalg.inv_ex(model.prior.stated_precision(u))[0]
        P_minus = A @ _spd_inverse(s.precision) @ A.mT + B @ spread @ B.mT
        # a direction with zero variance from both dynamics and inputs would have no inverse
        trace = P_minus.diagonal(dim1=-2, dim2=-1).mean(-1)
        P_minus = P_minus + torch.diag_embed((1e-10 * trace).unsqueeze(-1).expand_as(z))
        shift = A @ (s.mean - z).unsqueeze(-1) - B @ R_inv @ r.unsqueeze(-1)
        information = _spd_inverse(P_minus)
        precision = information + Q
        rhs = information @ shift - q.unsqueeze(-1)
        factor = torch.linalg.cholesky_ex(precision)[0]
        mean = z_next + torch.cholesky_solve(rhs, factor).squeeze(-1)
        # if rounding destroyed positive definiteness, use the model's own uncertainty of a state
        sound = mean.isfinite().all(-1) & precision.isfinite().all(-1).all(-1)
        own = model.initial.cost(z.shape[0]).precision
        return torch.where(sound[:, None], mean, z_next), torch.where(
            sound[:, None, None], precision, own
        )

    def _shift(self, s: HorizonState, sync_free: bool, absorbs: bool) -> HorizonState:
        """Shift the window by one bin, with an empty newest slot; young windows do not shift."""
        model, full = self.model, s.age == self.config.horizon
        if not sync_free and not bool(full.any()):
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
        if not sync_free and bool(full.all()):
            return moved
        return s.replaced(full, moved)

    @torch.no_grad()
    def step(
        self,
        state: HorizonState,
        counts: Float[Tensor, "S N"],
        mask: Float[Tensor, "S N"],
        stop: ilqr.Stop | None = None,
    ) -> tuple[HorizonState, Estimate]:
        """Process one bin of each stream.

        Args:
            counts: spike counts, then features in the recording's units; any finite number where
                the mask is zero. What is beyond the bounds is ignored.
            mask: one where observed; a row of zeros is a missing bin (the answer is a prediction).
            stop: called before every iteration after the first; True ends the solve (anytime). One
                truth value, or one per stream. On a GPU all calls come before the solve.

        Raises:
            ShapeError: an observed count is negative or not finite.
        """
        check_bin(self.spikes, counts, mask)
        compiled = self.compiled(state.z)
        if compiled is None:
            return self.step_reference(state, counts, mask, stop)
        given = array(counts.cpu()), array(mask.cpu()), ilqr.stopping(stop)
        return on_tensors(state, self.model.n, lambda s, rows: compiled.step(s, rows, *given))

    @torch.no_grad()
    def predict_only(
        self, state: HorizonState, counts: Float[Tensor, "S N"], mask: Float[Tensor, "S N"]
    ) -> tuple[HorizonState, Estimate]:
        """Process one bin of each stream without a solve, at negligible cost.

        The bin enters the window and is part of the next solve. The answer is a prediction without
        covariance (NaN). If the window moves, the bin that leaves is not absorbed: the arrival cost
        is centred on the current trajectory and forgets half of its information beyond the model's
        prior.

        Raises:
            ShapeError: as for ``step``.
        """
        check_bin(self.spikes, counts, mask)
        compiled = self.compiled(state.z)
        if compiled is not None:
            given = array(counts.cpu()), array(mask.cpu())
            return on_tensors(
                state, self.model.n, lambda s, rows: compiled.predict_only(s, rows, *given)
            )
        after, entered = self._enter(state, counts, mask, absorbs=False)
        unknown = torch.full_like(after.precision, torch.nan)
        none = torch.zeros_like(after.age)  # no iterations; RUNNING
        return after, self._answer(after, unknown, entered, none, none)

    def compiled(self, like: Tensor) -> Estimator | GpuEstimator | None:
        """Return the compiled step; None if the model or the tensor type has none."""
        there = on_gpu.usable(self.model, like)
        fits = self._packed is not None and like.dtype == self.mean_rate.dtype
        if not fits or not (there or wanted(like)):
            if self._refused or not (there or solver.usable(self.model, ("spikes",), like)):
                return None
            about = (self.readout, self.mean_rate, self.bounds, self._initial)
            given = (self.model, self._w, *about, ilqr.options(self._solver), self.intervals)
            self._packed = on_gpu.estimator(*given) if there else Estimator(*given)
            self._refused = self._packed is None
        return self._packed

    @torch.no_grad()
    def step_reference(
        self,
        state: HorizonState,
        counts: Float[Tensor, "S N"],
        mask: Float[Tensor, "S N"],
        stop: ilqr.Stop | None = None,
        *,
        sync_free: bool = False,
    ) -> tuple[HorizonState, Estimate]:
        """Step in torch: the reference for the compiled step.

        With ``sync_free`` and without ``stop`` it never synchronises with the device.
        """
        s, entered = self._enter(state, counts, mask, sync_free=sync_free)
        row, newest = torch.arange(s.z.shape[0], device=s.z.device), s.age
        problem = ilqr.Problem(
            self.model,
            self._w,
            {"spikes": Observed(s.counts, s.mask)},
            InitialCost(s.mean, s.precision),
        )
        solved, info = ilqr.solve_reference(
            problem, s.z[:, 0], s.u, self._solver, stop, sync_free=sync_free
        )
        # a failed solve keeps the prediction instead of spreading non-finite values
        broken = (solved.status == int(ilqr.Status.NOT_FINITE)).view(-1, 1, 1)
        z, u = torch.where(broken, s.z, solved.z), torch.where(broken, s.u, solved.u)
        quadratic, lqr = info.problem, info.lqr
        if type(self.model.prior) is not GaussianPrior:
            quadratic = replace(quadratic, R=self.model.prior.stated_precision(u).contiguous())
            lqr = solve_lqr(quadratic, free_initial=True)
        Sigma = marginal_covariance(quadratic, lqr)[row, newest]
        # after a failed solve only the prior uncertainty is known
        unknown = broken | ~(Sigma.diagonal(dim1=-2, dim2=-1) > 0).all(-1).view(-1, 1, 1)
        Sigma = torch.where(unknown, self._prior_covariance, Sigma)
        after = replace(s, z=z, u=u)
        return after, self._answer(after, Sigma, entered, solved.iterations, solved.status)

    def _enter(
        self,
        state: HorizonState,
        counts: Tensor,
        mask: Tensor,
        *,
        sync_free: bool = False,
        absorbs: bool = True,
    ) -> tuple[HorizonState, _Entered]:
        """Enter the new bin into the window."""
        counts = self.spikes.standard(counts)
        restarted = self.bounds.lost(state.mean, state.z, state.u)
        if sync_free or bool(restarted.any()):
            state = state.replaced(restarted, self._initial)
        finite, within = counts.isfinite(), counts.abs() <= self.bounds.counts
        used = mask * (finite & within)
        ignored = ((mask > 0) & finite & ~within).sum(-1)
        counts = torch.where(used > 0, counts, torch.zeros_like(counts))
        s = self._shift(state, sync_free, absorbs)
        row = torch.arange(s.z.shape[0], device=s.z.device)
        window_counts, window_mask = s.counts.clone(), s.mask.clone()
        window_counts[row, s.age] = counts
        window_mask[row, s.age] = used
        predicted = self.spikes.mean(s.z[row, s.age + 1])
        bad = (~finite & (mask > 0)).any(-1)
        entered = _Entered(predicted, counts, used, bad, ignored, restarted)
        return replace(s, age=s.age + 1, counts=window_counts, mask=window_mask), entered

    def _answer(
        self,
        s: HorizonState,
        Sigma: Tensor,
        entered: _Entered,
        iterations: Tensor,
        status: Tensor,
    ) -> Estimate:
        readout = self._blank if self.readout is None else self.readout
        mask = readout.believed(s.mask)
        window = read_window(readout.shape, s.age, s.z, s.counts, mask, self._expects.mean)
        z = window[:, : self.model.n]
        if self.readout is None:
            kinematics = kinematics_std = z.new_zeros(len(z), 0)
        else:
            kinematics, kinematics_std = self.readout(window, Sigma)
            kinematics_std = stated(self.intervals, kinematics, kinematics_std)
        rates, counts, used = self.spikes.mean(z), entered.counts, entered.used
        gain = self.spikes.evidence(entered.predicted, self.mean_rate, counts)
        blind = (entered.ignored > 0) & (used == 0).all(-1)
        spikes = (counts * used)[:, : counts.shape[-1] - self.spikes.features].sum(-1)
        return Estimate(
            z=z,
            z_cov=Sigma,
            window=window,
            rates=self.spikes.restored(rates),
            kinematics=kinematics,
            kinematics_std=kinematics_std,
            bits=(gain * used).sum(-1) / math.log(2),
            spikes=spikes,
            iterations=iterations,
            status=torch.where(entered.bad, int(ilqr.Status.NOT_FINITE), status),
            ignored=entered.ignored,
            beyond=blind | self.bounds.beyond(z, rates, kinematics),
            restarted=entered.restarted,
        )
