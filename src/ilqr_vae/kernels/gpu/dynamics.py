"""Rollouts and their adjoint as Triton kernels: one trajectory per program, one launch.

The recursions of `rollout_kernels`, computed in the tensors' own dtype. What a step reads is
fetched during the step before, so that only arithmetic is waited for.

Only Triton code lives here: it must not be wrapped by a type-checking import hook.
"""

# Triton infers the types of what it compiles, and its language is no Python a checker knows.
# pyright: basic, reportMissingParameterType=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false, reportReturnType=false

import triton
import triton.language as tl

from ilqr_vae.kernels.gpu.blocks import load, store_row


@triton.jit
def row(pointer, size, P: tl.constexpr):
    i = tl.arange(0, P)
    return tl.load(pointer + i, mask=i < size, other=0.0)


@triton.jit
def times_row(X, y):
    return tl.sum(X * y[None, :], axis=1)


@triton.jit
def weights(
    state, state_bias, hidden, hidden_bias, drive, n, m,
    GATED: tl.constexpr, NP: tl.constexpr, MP: tl.constexpr,
):  # fmt: skip
    """Blocks of the dynamics' weights; what linear dynamics have not is not read."""
    W_z, W_u = load(state, n, n, NP, NP), load(drive, n, m, NP, MP)
    W_h, b_z = W_z, row(state, n, NP)
    b_h = b_z
    if GATED:
        W_h = load(hidden, n, n, NP, NP)
        b_z, b_h = row(state_bias, n, NP), row(hidden_bias, n, NP)
    return W_z, b_z, W_h, b_h, W_u


@triton.jit
def roll(
    x, zb, ub, K, k, alpha, z, u, W_z, b_z, W_h, b_h, W_u, centre, precision, T, n, m,
    GATED: tl.constexpr, CLOSED: tl.constexpr, NP: tl.constexpr, MP: tl.constexpr,
):  # fmt: skip
    """Write z (its first row too) and u of one trajectory from x on; returns the inputs' cost."""
    store_row(z, x, n, NP)
    cost = tl.zeros((MP,), tl.float64)
    u_next = row(ub, m, MP)
    if CLOSED:
        K_next, k_next, z_next = load(K, m, n, MP, NP), row(k, m, MP), row(zb, n, NP)
    for t in range(T):
        u_t = u_next
        after = tl.where(t + 1 < T, t + 1, t)
        u_next = row(ub + after * m, m, MP)
        if CLOSED:
            u_t += alpha * k_next + times_row(K_next, x - z_next)
            K_next = load(K + after * m * n, m, n, MP, NP)
            k_next, z_next = row(k + after * m, m, MP), row(zb + after * n, n, NP)
        e = u_t.to(tl.float64) - centre
        cost += 0.5 * e * e * precision
        driven = times_row(W_u, u_t)
        if GATED:
            f = 1.0 / (1.0 + tl.exp(-(times_row(W_z, x) + b_z)))
            h = times_row(W_h, f * x) + driven + b_h
            h = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * h))
            x = x + f * (h - x)
        else:
            x = times_row(W_z, x) + driven
        store_row(u + t * m, u_t, m, MP)
        store_row(z + (t + 1) * n, x, n, NP)
    return tl.sum(cost)


@triton.jit
def closed_loop(
    state, state_bias, hidden, hidden_bias, drive, z0, zb, ub, K, k, alpha, z, u, T, n, m, laws,
    GATED: tl.constexpr, CLOSED: tl.constexpr, NP: tl.constexpr, MP: tl.constexpr,
):  # fmt: skip
    """Trajectory ``program_id(0)`` of an MGU2 if GATED, else of linear dynamics.

    Where there are more trajectories than laws (zb, ub, K, k), b takes law b mod ``laws``.
    """
    b = tl.program_id(0).to(tl.int64)
    law = b % laws
    z0 += b * n
    z += b * (T + 1) * n
    u += b * T * m
    zb += law * (T + 1) * n
    ub += law * T * m
    K += law * T * m * n
    k += law * T * m
    W_z, b_z, W_h, b_h, W_u = weights(
        state, state_bias, hidden, hidden_bias, drive, n, m, GATED, NP, MP
    )
    a = 0.0
    if CLOSED:
        a = tl.load(alpha + b)
    free = tl.zeros((MP,), tl.float64)
    roll(
        row(z0, n, NP), zb, ub, K, k, a, z, u, W_z, b_z, W_h, b_h, W_u, free, free, T, n, m,
        GATED, CLOSED, NP, MP,
    )  # fmt: skip


@triton.jit
def adjoint(A, gz, lam, T, n, NP: tl.constexpr):
    """lam_T = gz_T; lam_k = gz_k + A_k' lam_{k+1}; for problem ``program_id(0)``."""
    b = tl.program_id(0).to(tl.int64)
    A += b * T * n * n
    gz += b * (T + 1) * n
    lam += b * (T + 1) * n
    x = row(gz + T * n, n, NP)
    store_row(lam + T * n, x, n, NP)
    A_next = load(A + (T - 1) * n * n, n, n, NP, NP)
    g_next = row(gz + (T - 1) * n, n, NP)
    for s in range(T):
        t = T - 1 - s
        x = g_next + tl.sum(A_next * x[:, None], axis=0)
        before = tl.where(t > 0, t - 1, 0)
        A_next = load(A + before * n * n, n, n, NP, NP)
        g_next = row(gz + before * n, n, NP)
        store_row(lam + t * n, x, n, NP)
