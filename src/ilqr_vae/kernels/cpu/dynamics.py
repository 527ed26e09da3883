"""Compiled dynamics of the built-in families: rollouts, Jacobians along them, their adjoint.

Shapes of one problem: T steps, z (T + 1, n), u (T, m). The gate f and the candidate h of an MGU2
are kept per step, (T, n rounded up to 8), since the Jacobians need them.

A family's weights travel as one tuple, the same for every family (see ``pack_weights``), so that
each kernel is compiled once. Only numba code lives here: it must not be wrapped by a type-checking
import hook.
"""

# numba infers the types of what it compiles.
# pyright: reportMissingParameterType=false

from __future__ import annotations

import math

import numpy as np

from ilqr_vae.kernels.cpu.algebra import (
    add_product,
    add_transposed_product,
    carve,
    compiled,
    inner,
    never_inline,
)
from ilqr_vae.kernels.cpu.panels import (
    exp_inplace,
    new_panels,
    pack,
    pack_transposed,
    times_panels,
    whole,
)
from ilqr_vae.kernels.cpu.tiles import PANEL, at

# A bit for an MGU2, and for its variants.
LINEAR, MGU2, SOFT, OUTSIDE = 0, 1, 2, 4
#: Dynamics families and variants with kernels, by ``Dynamics.kernel``.
FAMILIES = {
    "linear": LINEAR,
    "mgu2": MGU2,
    "mgu2 soft-relu": MGU2 | SOFT,
    "mgu2 outside": MGU2 | OUTSIDE,
    "mgu2 soft-relu outside": MGU2 | SOFT | OUTSIDE,
}


def scratch_size(n, m):
    """Numbers of scratch that ``roll_out``, ``linearise`` and ``adjoint`` need."""
    wide = n + m + 2 * PANEL
    return 4 * wide + 2 * wide * wide


def closed_loop_scratch(T, n, m):
    """Numbers of scratch that ``closed_loop`` and ``jacobians`` need."""
    return scratch_size(n, m) + 4 * T * (n + PANEL)


def _transposed(matrix):
    panels = new_panels(matrix.shape[1], matrix.shape[0], matrix.dtype)
    pack_transposed(matrix, panels)
    return panels


def pack_weights(family, w):
    """Effective weights as the kernels take them.

    Args:
        family: its name in ``FAMILIES``.
        w: the family's weights as C-contiguous arrays.

    Returns:
        (state, state_bias, hidden, hidden_bias, input, state_rows, hidden_rows, input_rows,
        state_straight): panels of the transposes of U_f (or A), U_h and W (or B), the matrices
        themselves, and panels of U_f.
    """
    none = np.zeros(1, w[0].dtype)
    if FAMILIES[family] & MGU2:
        gate, gate_bias, hidden, hidden_bias, drive = w
        straight = new_panels(*gate.shape, gate.dtype)
        pack(gate, straight)
        return (
            _transposed(gate),
            gate_bias,
            _transposed(hidden),
            hidden_bias,
            _transposed(drive),
            gate,
            hidden,
            drive,
            straight,
        )
    A, B = w
    empty = np.zeros((1, 1, PANEL), A.dtype)
    return _transposed(A), none, empty, none, _transposed(B), A, np.zeros((1, 1), A.dtype), B, empty


@inner
def _variant(family, t, n, driven, bias, h):
    """The candidate h of an MGU2's variants, from U_h (f . z) in the same place."""
    never_inline()
    half, one, four = h.dtype.type(0.5), h.dtype.type(1.0), h.dtype.type(4.0)
    for i in range(n):
        x = h[t, i] + bias[i]
        if not family & OUTSIDE:
            x += driven[i]
        y = half * (x + math.sqrt(x * x + four)) - one if family & SOFT else math.tanh(x)
        h[t, i] = y + driven[i] if family & OUTSIDE else y


@inner
def _steepness(family, y):
    """Slope of the activation where its value is y."""
    one = type(y)(1.0)
    if family & SOFT:
        # y + 1 = r = (x + sqrt(x^2 + 4)) / 2 solves r - 1 / r = x
        square = (y + one) * (y + one)
        return square / (square + one)
    return one - y * y


@inner
def roll_out(family, weights, closed, z0, zb, ub, K, k, alpha, z, u, f, h, scratch):
    """z_0 = z0; z_{k+1} = f(z_k, u_k); u_k = ub_k, or if ``closed`` ub_k + alpha k_k + K_k (z_k -
    zb_k). Writes z, u, and for an MGU2 f and h."""
    never_inline()
    state, state_bias, hidden, hidden_bias, drive, _, _, _, _ = weights
    T, m = ub.shape
    n = z0.size
    n8 = whole(n)
    zero, one, two = z.dtype.type(0.0), z.dtype.type(1.0), z.dtype.type(2.0)
    deviation = scratch[:n8]
    gated = scratch[n8 : 2 * n8]
    driven = scratch[2 * n8 : 3 * n8]
    moved = scratch[3 * n8 : 4 * n8]
    pushed = scratch[4 * n8 : 4 * n8 + whole(m)]
    for i in range(n8):
        deviation[i] = zero
    for i in range(n):
        z[0, i] = z0[i]
    for t in range(T):
        for a in range(m):
            u[t, a] = ub[t, a]
        if closed:
            for a in range(m):
                u[t, a] += alpha * k[t, a]
            for i in range(n):
                deviation[i] = z[t, i] - zb[t, i]
            for a in range(m):
                pushed[a] = zero
            add_product(at(pushed, 0), at(K, t * m * n), n, at(deviation, 0), m, n)
            for a in range(m):
                u[t, a] += pushed[a]
        times_panels(at(u, t * m), m, 1, drive, at(driven, 0), n8)
        if family == LINEAR:
            times_panels(at(z, t * n), n, 1, state, at(moved, 0), n8)
            for i in range(n):
                z[t + 1, i] = moved[i] + driven[i]
        else:
            times_panels(at(z, t * n), n, 1, state, at(f, t * n8), n8)
            for i in range(n):
                f[t, i] = -(f[t, i] + state_bias[i])
            exp_inplace(f, t * n8, n)
            for i in range(n):
                f[t, i] = one / (one + f[t, i])
                gated[i] = f[t, i] * z[t, i]
            times_panels(at(gated, 0), n, 1, hidden, at(h, t * n8), n8)
            if family == MGU2:
                for i in range(n):
                    h[t, i] = two * (h[t, i] + driven[i] + hidden_bias[i])
                exp_inplace(h, t * n8, n)
                for i in range(n):
                    h[t, i] = one - two / (one + h[t, i])
            else:
                _variant(family, t, n, driven, hidden_bias, h)
            for i in range(n):
                z[t + 1, i] = z[t, i] + f[t, i] * (h[t, i] - z[t, i])


@inner
def linearise(family, weights, z, u, f, h, A, B, scratch):
    """Jacobians A (T, n, n), B (T, n, m) along a rollout of inputs u that left f and h."""
    never_inline()
    _, _, _, _, drive_panels, state, hidden, drive, straight = weights
    T, n, m = B.shape
    n8 = whole(n)
    one = z.dtype.type(1.0)
    if family == LINEAR:
        for t in range(T):
            for i in range(n):
                for j in range(n):
                    A[t, i, j] = state[i, j]
                for j in range(m):
                    B[t, i, j] = drive[i, j]
        return
    slope, driven = scratch[:n], scratch[n8 : 2 * n8]
    X, end = carve(scratch, 2 * n8, n, n)
    M, end = carve(scratch, end, n, n8)
    for t in range(T):
        for i in range(n):
            slope[i] = f[t, i] * (one - f[t, i])
        for i in range(n):
            for j in range(n):
                X[i, j] = hidden[i, j] * z[t, j] * slope[j]
        times_panels(at(X, 0), n, n, straight, at(M, 0), n8)
        if family & OUTSIDE:
            times_panels(at(u, t * m), m, 1, drive_panels, at(driven, 0), n8)
        for i in range(n):
            y = h[t, i] - driven[i] if family & OUTSIDE else h[t, i]
            steep = f[t, i] * _steepness(family, y)
            entering = f[t, i] if family & OUTSIDE else steep
            through_gate = (h[t, i] - z[t, i]) * slope[i]
            for j in range(n):
                A[t, i, j] = through_gate * state[i, j] + steep * (hidden[i, j] * f[t, j] + M[i, j])
            A[t, i, i] += one - f[t, i]
            for j in range(m):
                B[t, i, j] = entering * drive[i, j]


@compiled
def closed_loop(first, last, family, weights, closed, z0, zb, ub, K, k, alpha, z, u, scratch):
    """``roll_out`` of problems ``first`` to ``last`` of a batch, f and h thrown away.

    Where not ``closed``, zb, K and k have one problem and are not read.
    """
    T = ub.shape[1]
    n, m = z0.shape[1], ub.shape[2]
    base = 4 * whole(n + m)
    f, end = carve(scratch, base, T, whole(n))
    h, end = carve(scratch, end, T, whole(n))
    for b in range(first, last):
        law = b if closed else 0
        roll_out(
            family, weights, closed, z0[b], zb[law], ub[b], K[law], k[law], alpha[law], z[b], u[b],
            f, h, scratch,
        )  # fmt: skip


@inner
def _gates(family, weights, z, u, f, h, scratch):
    """f and h of an MGU2 in each step of a trajectory, which need not be a rollout."""
    never_inline()
    state, state_bias, hidden, hidden_bias, drive, _, _, _, _ = weights
    T, m = u.shape
    n = z.shape[1]
    n8 = whole(n)
    one, two = z.dtype.type(1.0), z.dtype.type(2.0)
    gated, end = carve(scratch, 0, T, n8)
    driven, end = carve(scratch, end, T, n8)
    times_panels(at(z, 0), n, T, state, at(f, 0), n8)
    for t in range(T):
        for i in range(n):
            f[t, i] = -(f[t, i] + state_bias[i])
    exp_inplace(f, 0, T * n8)
    for t in range(T):
        for i in range(n):
            f[t, i] = one / (one + f[t, i])
            gated[t, i] = f[t, i] * z[t, i]
    times_panels(at(gated, 0), n8, T, hidden, at(h, 0), n8)
    times_panels(at(u, 0), m, T, drive, at(driven, 0), n8)
    if family != MGU2:
        for t in range(T):
            _variant(family, t, n, driven[t], hidden_bias, h)
        return
    for t in range(T):
        for i in range(n):
            h[t, i] = two * (h[t, i] + driven[t, i] + hidden_bias[i])
    exp_inplace(h, 0, T * n8)
    for t in range(T):
        for i in range(n):
            h[t, i] = one - two / (one + h[t, i])


@compiled
def jacobians(first, last, family, weights, z, u, A, B, scratch):
    """``linearise`` along the trajectories z (T + 1) and u of problems ``first`` to ``last``, which
    need not be rollouts."""
    T = u.shape[1]
    n = z.shape[2]
    f, end = carve(scratch, 0, T, whole(n))
    h, end = carve(scratch, end, T, whole(n))
    rest = scratch[end:]
    for b in range(first, last):
        if family != LINEAR:
            _gates(family, weights, z[b], u[b], f, h, rest)
        linearise(family, weights, z[b], u[b], f, h, A[b], B[b], rest)


@compiled
def pull_back(first, last, family, weights, z, u, gz, lam, gu, scratch):
    """``adjoint`` with the Jacobians A, B at z and u, which are never made; gu_k = B_k' lam_{k+1}.

    Arguments as of ``jacobians`` and ``adjoint``.
    """
    _, _, _, _, drive_panels, state, hidden, drive, _ = weights
    T, m = u.shape[1:]
    n = z.shape[2]
    n8 = whole(n)
    f, end = carve(scratch, 0, T, n8)
    h, end = carve(scratch, end, T, n8)
    rest = scratch[end:]
    driven, inside, entering = rest[:n8], rest[n8 : 2 * n8], rest[2 * n8 : 3 * n8]
    through, total, pushed = rest[3 * n8 : 4 * n8], rest[4 * n8 : 5 * n8], rest[5 * n8 :]
    zero, one = z.dtype.type(0.0), z.dtype.type(1.0)
    for b in range(first, last):
        for i in range(n):
            lam[b, T, i] = gz[b, T, i]
        if family != LINEAR:
            _gates(family, weights, z[b], u[b], f, h, rest)
        for t in range(T - 1, -1, -1):
            if family & OUTSIDE:
                times_panels(at(u[b], t * m), m, 1, drive_panels, at(driven, 0), n8)
            for i in range(n):
                after = lam[b, t + 1, i]
                total[i] = gz[b, t, i]
                through[i] = zero
                if family == LINEAR:
                    inside[i] = after
                    entering[i] = after
                    continue
                y = h[t, i] - driven[i] if family & OUTSIDE else h[t, i]
                entering[i] = after * f[t, i]
                inside[i] = entering[i] * _steepness(family, y)
                if not family & OUTSIDE:
                    entering[i] = inside[i]
            if family != LINEAR:
                add_transposed_product(at(through, 0), at(hidden, 0), at(inside, 0), n, n)
                for i in range(n):
                    after, gate = lam[b, t + 1, i], f[t, i]
                    total[i] += after * (one - gate) + through[i] * gate
                    moved = through[i] * z[b, t, i] + after * (h[t, i] - z[b, t, i])
                    inside[i] = moved * gate * (one - gate)
            add_transposed_product(at(total, 0), at(state, 0), at(inside, 0), n, n)
            for a in range(m):
                pushed[a] = zero
            add_transposed_product(at(pushed, 0), at(drive, 0), at(entering, 0), n, m)
            for i in range(n):
                lam[b, t, i] = total[i]
            for a in range(m):
                gu[b, t, a] = pushed[a]


@compiled
def adjoint(first, last, A, gz, lam, scratch):
    """lam_T = gz_T; lam_k = gz_k + A_k' lam_{k+1}; for problems ``first`` to ``last``."""
    T, n = A.shape[1], A.shape[2]
    for b in range(first, last):
        for i in range(n):
            lam[b, T, i] = gz[b, T, i]
        for t in range(T - 1, -1, -1):
            for i in range(n):
                scratch[i] = gz[b, t, i]
            add_transposed_product(
                at(scratch, 0), at(A, (b * T + t) * n * n), at(lam[b, t + 1], 0), n, n
            )
            for i in range(n):
                lam[b, t, i] = scratch[i]
