"""Rollouts: z_0, u -> z, open loop (differentiable) and closed loop (for the line search).

Notation: T steps, z (B, T+1, n), u (B, T, m). Only the recursion over time is sequential. Its
gradient needs one more recursion, the adjoint lam_k = gz_k + A_k' lam_{k+1}; all parameter
gradients then come from a single batched product over (B, T), so autograd never sees the loop.

Built-in families run compiled on the CPU (``kernels.cpu.dynamics``) and as Triton kernels on a GPU
(``kernels.gpu.dynamics``), all others in a torch loop. All have the same signature and are tested
against the loop.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ilqr_vae.kernels import backend
from ilqr_vae.kernels.cpu import dynamics as kernels
from ilqr_vae.kernels.cpu import threads
from ilqr_vae.kernels.gpu import launch
from ilqr_vae.model.dynamics import Dynamics, Linear, Weights


class _Policy(NamedTuple):
    """u = u_ref + alpha k + K (z - z_ref), per trajectory; see ``closed_loop``."""

    z_ref: Tensor
    u_ref: Tensor
    K: Tensor
    k: Tensor
    alpha: Tensor


def wanted(like: Tensor) -> bool:
    """Return whether the compiled CPU code is enabled for tensors like this one."""
    usual = like.device.type == "cpu" and like.dtype in (torch.float32, torch.float64)
    return usual and backend.current() != "reference"


def _usable(dynamics: Dynamics, like: Tensor) -> bool:
    return dynamics.kernel in kernels.FAMILIES and wanted(like)


def _gpu_kernels_for(dynamics: Dynamics, m: int, like: Tensor) -> ModuleType | None:
    if dynamics.kernel not in launch.FAMILIES:
        return None
    return _gpu_kernels(like.shape[-1], m, like)


def _arrays(*tensors: Tensor) -> tuple[Any, ...]:
    return tuple(t.detach().contiguous().numpy() for t in tensors)


def closed_loop_reference(
    dynamics: Dynamics,
    w: Weights,
    z0: Tensor,
    z_ref: Tensor,
    u_ref: Tensor,
    K: Tensor,
    k: Tensor,
    alpha: Tensor,
) -> tuple[Tensor, Tensor]:
    """Roll out as ``closed_loop``, in a torch loop: any device, differentiable."""
    each = z0.shape[0] // u_ref.shape[0]
    z_ref, u_ref, K, k = (x.repeat(each, *[1] * (x.ndim - 1)) for x in (z_ref, u_ref, K, k))
    z, zs, us = z0, [z0], []
    for t in range(u_ref.shape[1]):
        dz = (z - z_ref[:, t]).unsqueeze(-1)
        u = u_ref[:, t] + alpha.unsqueeze(-1) * k[:, t] + (K[:, t] @ dz).squeeze(-1)
        z = dynamics.step(w, z, u)
        zs.append(z)
        us.append(u)
    return torch.stack(zs, 1), torch.stack(us, 1)


def closed_loop(
    dynamics: Dynamics,
    w: Weights,
    z0: Float[Tensor, "B n"],
    z_ref: Float[Tensor, "L T1 n"],
    u_ref: Float[Tensor, "L T m"],
    K: Float[Tensor, "L T m n"],
    k: Float[Tensor, "L T m"],
    alpha: Float[Tensor, " B"],
) -> tuple[Float[Tensor, "B T1 n"], Float[Tensor, "B T m"]]:
    """Roll out from z0 under u = u_ref + alpha k + K (z - z_ref); compiled without gradients.

    B is a multiple of the number of laws L: trajectory b follows law b mod L.

    Returns:
        z (B, T+1, n) and the inputs used (B, T, m).
    """
    policy = _Policy(z_ref, u_ref, K, k, alpha)
    on_gpu = _gpu_kernels_for(dynamics, u_ref.shape[-1], z0)
    if on_gpu is not None:
        return _gpu_closed_loop(on_gpu, dynamics, w, True, z0, policy)
    if not _usable(dynamics, z0) or z0.shape[0] != u_ref.shape[0]:
        return closed_loop_reference(dynamics, w, z0, *policy)
    return _run(dynamics, w, True, z0, policy)


def _run(
    dynamics: Dynamics, w: Weights, closed: bool, z0: Tensor, policy: _Policy
) -> tuple[Tensor, Tensor]:
    """Run compiled code on the CPU; unless ``closed``, z_ref, K, k and alpha are ignored."""
    B, T, m = policy.u_ref.shape
    n = z0.shape[1]
    z, u = z0.new_empty(B, T + 1, n), z0.new_empty(B, T, m)
    weights = kernels.pack_weights(dynamics.kernel, _arrays(*w))
    threads.share_out(
        kernels.closed_loop,
        B,
        3 * T * n * (n + m),
        (
            kernels.FAMILIES[dynamics.kernel],
            weights,
            closed,
            *_arrays(z0, *policy),
            z.numpy(),
            u.numpy(),
        ),
        dtype=weights[0].dtype,
        scratch_size=kernels.closed_loop_scratch(T, n, m),
    )
    return z, u


def _open_loop(dynamics: Dynamics, w: Weights, z0: Tensor, u: Tensor) -> Tensor:
    on_gpu = _gpu_kernels_for(dynamics, u.shape[-1], z0)
    if on_gpu is not None:
        return _gpu_closed_loop(on_gpu, dynamics, w, False, z0, _Policy(z0, u, z0, z0, z0))[0]
    if not _usable(dynamics, z0):
        z, zs = z0, [z0]
        for t in range(u.shape[1]):
            z = dynamics.step(w, z, u[:, t])
            zs.append(z)
        return torch.stack(zs, 1)
    none = z0.new_zeros(1, 1, 1)
    policy = _Policy(none, u, none[None], none, none[0, 0])
    return _run(dynamics, w, False, z0, policy)[0]


def jacobians(
    dynamics: Dynamics, w: Weights, z: Float[Tensor, "B T1 n"], u: Float[Tensor, "B T m"]
) -> tuple[Float[Tensor, "B T n n"], Float[Tensor, "B T n m"]]:
    """Return A_k = df/dz and B_k = df/du at (z_k, u_k); compiled without gradients."""
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (*w, z, u))
    if wanted or not _usable(dynamics, z):
        return dynamics.jacobians(w, z[:, :-1], u)
    B, T, m = u.shape
    n = z.shape[2]
    found = z.new_empty(B, T, n, n), z.new_empty(B, T, n, m)
    weights = kernels.pack_weights(dynamics.kernel, _arrays(*w))
    threads.share_out(
        kernels.jacobians,
        B,
        2 * T * n * n * n,
        (kernels.FAMILIES[dynamics.kernel], weights, *_arrays(z, u), *(x.numpy() for x in found)),
        dtype=weights[0].dtype,
        scratch_size=kernels.closed_loop_scratch(T, n, m),
    )
    return found


def adjoint(A: Float[Tensor, "B T n n"], gz: Float[Tensor, "B T1 n"]) -> Float[Tensor, "B T1 n"]:
    """lam_T = gz_T, lam_k = gz_k + A_k' lam_{k+1}."""
    if wanted(A):
        lam = torch.empty_like(gz, memory_format=torch.contiguous_format)
        given = _arrays(A, gz)
        threads.share_out(
            kernels.adjoint,
            A.shape[0],
            A[0].numel(),
            (*given, lam.numpy()),
            dtype=given[0].dtype,
            scratch_size=kernels.scratch_size(A.shape[-1], 0),
        )
        return lam
    on_gpu = _gpu_kernels(A.shape[-1], 1, A)
    if on_gpu is not None:
        return _gpu_adjoint(on_gpu, A, gz)
    lam, lams = gz[:, -1], [gz[:, -1]]
    for t in range(A.shape[1] - 1, -1, -1):
        lam = gz[:, t] + (A[:, t].mT @ lam.unsqueeze(-1)).squeeze(-1)
        lams.append(lam)
    return torch.stack(lams[::-1], 1)


def _pull_back(
    dynamics: Dynamics, w: Weights, z: Tensor, u: Tensor, gz: Tensor
) -> tuple[Tensor, Tensor]:
    """Return ``adjoint`` of a rollout's Jacobians, and the gradient of its inputs."""
    if not _usable(dynamics, z):
        A, B = jacobians(dynamics, w, z, u)
        lam = adjoint(A, gz)
        return lam, (B.mT @ lam[:, 1:].unsqueeze(-1)).squeeze(-1)
    B, T, m = u.shape
    n = z.shape[2]
    lam, gu = z.new_empty(B, T + 1, n), z.new_empty(B, T, m)
    weights = kernels.pack_weights(dynamics.kernel, _arrays(*w))
    threads.share_out(
        kernels.pull_back,
        B,
        6 * T * n * (n + m),
        (kernels.FAMILIES[dynamics.kernel], weights, *_arrays(z, u, gz), lam.numpy(), gu.numpy()),
        dtype=weights[0].dtype,
        scratch_size=kernels.closed_loop_scratch(T, n, m),
    )
    return lam, gu


class _Rollout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dynamics: Dynamics, z0: Tensor, u: Tensor, *w: Tensor) -> Tensor:
        z = _open_loop(dynamics, w, z0, u)
        ctx.dynamics = dynamics
        ctx.save_for_backward(z, u, *w)
        return z

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (torch passes grads in order)
        ctx: Any, gz: Tensor
    ) -> tuple[Tensor | None, ...]:
        z, u, *w = ctx.saved_tensors
        dynamics: Dynamics = ctx.dynamics
        before = z[:, :-1]
        lam, gu = _pull_back(dynamics, tuple(w), z, u, gz)
        with torch.enable_grad():
            leaves = tuple(t.detach().requires_grad_() for t in w)
            after = dynamics.step(leaves, before, u)
            gw = torch.autograd.grad(after, leaves, lam[:, 1:], allow_unused=True)
        return None, lam[:, 0], gu, *gw


def rollout(
    dynamics: Dynamics, w: Weights, z0: Float[Tensor, "B n"], u: Float[Tensor, "B T m"]
) -> Float[Tensor, "B T1 n"]:
    """z (B, T+1, n) from z_0 and inputs; first-order differentiable in z0, u and w."""
    return _Rollout.apply(dynamics, z0, u, *w)  # pyright: ignore[reportReturnType]


_WHAT = "rollouts run"


def _gpu_kernels(n: int, m: int, like: Tensor) -> ModuleType | None:
    """Return the kernels; None if not on a GPU, disabled, or problems are too large."""
    if not like.is_cuda or backend.current() == "reference":
        return None
    if not launch.fits(n, m, like.dtype, _WHAT):
        return None
    return launch.kernels("ilqr_vae.kernels.gpu.dynamics", _WHAT)


def _gpu_closed_loop(
    code: ModuleType,
    dynamics: Dynamics,
    w: Weights,
    closed: bool,
    z0: Tensor,
    policy: _Policy,
) -> tuple[Tensor, Tensor]:
    """As ``_run``, on a GPU."""
    laws, T, m = policy.u_ref.shape
    B, n = z0.shape
    z, u = z0.new_empty(B, T + 1, n), z0.new_empty(B, T, m)
    w = tuple(t.detach().contiguous() for t in w)
    state, drive = w[0], w[-1]
    gated = not isinstance(dynamics, Linear)
    state_bias, hidden, hidden_bias = w[1:4] if gated else (state,) * 3
    given = [t.detach().contiguous() for t in (z0, *policy)]
    if B:
        code.closed_loop[(B,)](
            state, state_bias, hidden, hidden_bias, drive, *given, z, u, T, n, m, laws,
            GATED=gated, CLOSED=closed, NP=launch.block(n), MP=launch.block(m),
            **launch.options(n),
        )  # fmt: skip
    return z, u


def _gpu_adjoint(code: ModuleType, A: Tensor, gz: Tensor) -> Tensor:
    """As `rollout.adjoint`."""
    B, T, n, _ = A.shape
    lam = torch.empty_like(gz, memory_format=torch.contiguous_format)
    if B:
        code.adjoint[(B,)](
            A.detach().contiguous(), gz.detach().contiguous(), lam, T, n,
            NP=launch.block(n), **launch.options(n),
        )  # fmt: skip
    return lam
