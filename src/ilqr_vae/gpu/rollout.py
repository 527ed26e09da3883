"""The torch side of the Triton rollouts: one launch for all steps of a batch, without waiting."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ilqr_vae import backend
from ilqr_vae.dynamics import Dynamics, Linear, Weights
from ilqr_vae.gpu import launch

_WHAT = "rollouts run"


def kernels(n: int, m: int, like: Tensor) -> ModuleType | None:
    """The kernels; None where ``like`` is on no GPU, torch is wanted, or problems are too large."""
    if not like.is_cuda or backend.current() == "reference":
        return None
    if not launch.fits(n, m, like.dtype, _WHAT):
        return None
    return launch.kernels("ilqr_vae.gpu.rollout_kernels", _WHAT)


def closed_loop(
    code: ModuleType,
    dynamics: Dynamics,
    w: Weights,
    closed: bool,
    z0: Tensor,
    z_ref: Tensor,
    u_ref: Tensor,
    K: Tensor,
    k: Tensor,
    alpha: Tensor,
) -> tuple[Tensor, Tensor]:
    """As `rollout.closed_loop`; where not ``closed``, z_ref, K, k and alpha are not read."""
    laws, T, m = u_ref.shape
    B, n = z0.shape
    z, u = z0.new_empty(B, T + 1, n), z0.new_empty(B, T, m)
    w = tuple(t.detach().contiguous() for t in w)
    state, drive = w[0], w[-1]
    gated = not isinstance(dynamics, Linear)
    state_bias, hidden, hidden_bias = w[1:4] if gated else (state,) * 3
    given = [t.detach().contiguous() for t in (z0, z_ref, u_ref, K, k, alpha)]
    if B:
        code.closed_loop[(B,)](
            state, state_bias, hidden, hidden_bias, drive, *given, z, u, T, n, m, laws,
            GATED=gated, CLOSED=closed, NP=launch.block(n), MP=launch.block(m),
            **launch.options(n),
        )  # fmt: skip
    return z, u


def adjoint(code: ModuleType, A: Tensor, gz: Tensor) -> Tensor:
    """As `rollout.adjoint`."""
    B, T, n, _ = A.shape
    lam = torch.empty_like(gz, memory_format=torch.contiguous_format)
    if B:
        code.adjoint[(B,)](
            A.detach().contiguous(), gz.detach().contiguous(), lam, T, n,
            NP=launch.block(n), **launch.options(n),
        )  # fmt: skip
    return lam
