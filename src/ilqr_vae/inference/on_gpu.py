"""The torch side of the Triton iteration: one launch for the quadratic model, one for the search.

It does one iteration of ``inference.ilqr``, with the same letters, without synchronisation. Models
without kernels run in torch, which is logged once.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from ilqr_vae.inference.compiled import unsupported
from ilqr_vae.kernels import backend
from ilqr_vae.kernels.gpu import launch
from ilqr_vae.lqr import LQRProblem, LQRSolution
from ilqr_vae.model.dynamics import MGU2, Weights
from ilqr_vae.model.generative import Model
from ilqr_vae.model.likelihoods import Observations, Observed, Poisson
from ilqr_vae.model.priors import LOG_2PI, GaussianPrior, InitialCost

_log = logging.getLogger(__name__)

_WHAT = "iterations run"
#: Channels per block.
_CHANNELS = 64


@cache
def _say(reason: str) -> None:
    _log.warning("no GPU iteration for %s: it runs in torch", reason)


def _unsupported(model: Model, names: tuple[str, ...]) -> str | None:
    group = model.group(names[0]) if len(names) == 1 else None
    if type(group) is not Poisson or not group.plain:
        return "other than one group of Poisson counts of a rate exp(a)"
    return unsupported(model, names, launch.FAMILIES, (GaussianPrior,))


def iteration(model: Model, w: Weights, names: tuple[str, ...], like: Tensor) -> Iteration | None:
    """Return the kernels for a model conditioned on groups, if enabled and supported.

    Args:
        w: the model's effective weights.
        like: a tensor with the device and dtype of the problem.
    """
    if not like.is_cuda or backend.current() == "reference":
        return None
    reason = _unsupported(model, names)
    if reason is not None:
        _say(reason)
        return None
    if not launch.fits(model.n, model.m, like.dtype, _WHAT):
        return None
    code = launch.kernels("ilqr_vae.kernels.gpu.iteration", _WHAT)
    return None if code is None else packed(code, model, w, names[0])


def packed(code: ModuleType, model: Model, w: Weights, name: str) -> Iteration:
    """Return the kernels with a packed, supported model."""
    family = model.group(name)
    assert isinstance(family, Poisson)
    weights = tuple(t.detach().contiguous() for t in w)
    gated = isinstance(model.dynamics, MGU2)
    if not gated:
        weights = (weights[0], *(weights[0],) * 3, weights[-1])
    scale = model.prior.log_scale.detach()
    # tensors of a CUDA graph must not depend on values read on the host
    limit = torch.full_like(scale[0], family.log_rate_max, dtype=torch.float64)
    constant = scale.double().sum() + 0.5 * model.m * LOG_2PI
    return Iteration(
        code,
        (
            *weights,
            family.C.detach().contiguous(),
            family.b.detach().contiguous(),
            model.prior.mean.detach().contiguous(),
            torch.exp(-2 * scale),
            torch.stack([limit, constant]),
        ),
        name,
        gated,
    )


@dataclass(frozen=True)
class Iteration:
    """A model packed for launches.

    Attributes:
        code: the kernels.
        model: weights of the dynamics, C, b, mean and precision of the inputs, and the two numbers
            (log_rate_max, -log of the inputs' density at its peak).
        name: name of the observed group.
        gated: whether the dynamics are an MGU2.
    """

    code: ModuleType
    model: tuple[Tensor, ...]
    name: str
    gated: bool

    def _sizes(self) -> dict[str, int]:
        n, m = self.model[4].shape
        return {"NP": launch.block(n), "MP": launch.block(m), "NB": _CHANNELS}

    def _given(self, o: Observed, initial: InitialCost) -> tuple[Tensor, ...]:
        data = (o.values, o.mask, self.model[-1], initial.mean, initial.precision)
        return (*self.model[:-1], *(t.detach().contiguous() for t in data))

    def begin(
        self, z0: Tensor, u: Tensor, observed: Observations, initial: InitialCost
    ) -> tuple[Tensor, Tensor]:
        """Return the rollout z (B, T+1, n) of inputs u (B, T, m) from z_0 (B, n), and J (B,)."""
        B, T, m = u.shape
        n = z0.shape[1]
        z, rolled, cost = z0.new_empty(B, T + 1, n), torch.empty_like(u), z0.new_empty(B)
        start, inputs = z0.detach().contiguous(), u.detach().contiguous()
        o = observed[self.name]
        if B:
            self.code.search[(B,)](
                *self._given(o, initial), start, inputs, *(start,) * 6, z, rolled, cost, cost,
                T, n, m, o.values.shape[-1], 0.0, 0.0, 1,
                GATED=self.gated, CLOSED=False, **self._sizes(), **launch.options(n),
            )  # fmt: skip
        return z, cost

    def quadratise(
        self, z: Tensor, u: Tensor, observed: Observations, initial: InitialCost
    ) -> LQRProblem:
        """Compute the same as ``Model.lqr_problem``."""
        S, T, m = u.shape
        n, o = z.shape[-1], observed[self.name]
        *dynamics, C, b, centre, precision, numbers = self.model
        z, u = z.detach().contiguous(), u.detach().contiguous()
        new = z.new_empty
        A, B, R, r = new(S, T, n, n), new(S, T, n, m), new(S, T, m, m), torch.empty_like(u)
        d, w = (torch.empty_like(o.values, memory_format=torch.contiguous_format) for _ in range(2))
        sizes, tiles = self._sizes(), -(-T // 16)
        if S:
            self.code.linearise[(S * T,)](
                *dynamics, centre, precision, z, u, A, B, R, r, T, n, m,
                GATED=self.gated, NP=sizes["NP"], MP=sizes["MP"], **launch.options(n),
            )  # fmt: skip
            self.code.derivatives[(S * tiles,)](
                C, b, numbers, o.values.detach().contiguous(), o.mask.detach().contiguous(), z,
                d, w, T, n, C.shape[0], tiles,
                NP=sizes["NP"], NB=sizes["NB"], **launch.options(n),
            )  # fmt: skip
        # one matrix product over (batch x time), as ``Likelihood.quadratise``
        outer = (C.unsqueeze(-1) * C.unsqueeze(-2)).reshape(-1, n * n)
        q, Q = d @ C, (w @ outer).reshape(S, T, n, n)
        q = torch.cat([initial.gradient(z[:, 0]).unsqueeze(1), q], 1)
        Q = torch.cat([initial.precision.unsqueeze(1), Q], 1)
        return LQRProblem(A=A, B=B, Q=Q, q=q, R=R, r=r, c=None, S=None)

    def search(
        self,
        z: Tensor,
        u: Tensor,
        cost: Tensor,
        lqr: LQRSolution,
        seeking: Tensor,
        observed: Observations,
        initial: InitialCost,
        *,
        armijo: float,
        tries: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Do ``line_search.Search.backtrack``; return z, u, cost, and the step size."""
        B, T, m = u.shape
        n = z.shape[-1]
        z_new, u_new = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (z, u))
        cost_new, taken = torch.empty_like(cost), torch.empty_like(cost)
        around = (z, u, lqr.K, lqr.k, lqr.dz0, cost, lqr.decrease, seeking.to(torch.int8))
        o = observed[self.name]
        if B:
            self.code.search[(B,)](
                *self._given(o, initial), *(t.detach().contiguous() for t in around),
                z_new, u_new, cost_new, taken,
                T, n, m, o.values.shape[-1], armijo, 10 * torch.finfo(z.dtype).eps, tries,
                GATED=self.gated, CLOSED=True, **self._sizes(), **launch.options(n),
            )  # fmt: skip
        return z_new, u_new, cost_new, taken
