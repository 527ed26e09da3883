"""The backward recursion of several LQR problems at once: one problem in each lane of a vector.

At the sizes met here a problem's own matrices fill vectors badly; as many problems as a vector has
lanes fill them whole. The recursion, its letters, and the order of each number's sums are those of
`lqr.py`, so a problem's bits do not depend on whether it was solved alone or in a lane. All that is
computed stands in one scratch array S; see `lane_tiles.py`.

Only numba code lives here: it must not be wrapped by a type-checking import hook.
"""

# numba infers the types of what it compiles.
# pyright: reportMissingParameterType=false

from __future__ import annotations

import numpy as np

from ilqr_vae.kernels.cpu import lane_tiles as lane
from ilqr_vae.kernels.cpu.algebra import inner, never_inline
from ilqr_vae.kernels.cpu.tiles import ROWS


def scratch_size(n, m):
    """Numbers of scratch that ``backward`` needs."""
    wide = n + m + 4
    return 16 * (wide * (5 * n + 3 * m + 8) + n * m + 4 * m * m)


@inner
def _add_symmetric(S, V, Q, D, ld, n):
    """V = (Q + Q') / 2 + D, as ``algebra.add_symmetric``, with rows ``ld`` vectors apart."""
    never_inline()
    for i in range(n):
        block = i // ROWS * ROWS
        for j in range(block, min(block + ROWS, n)):
            lane.plus(S, D + i * ld + j, Q + i * ld + j, D + i * ld + j, 0)
    for i in range(n):
        block = i // ROWS * ROWS
        for j in range(i, n):
            up, low = i * ld + j, j * ld + i
            if j < block + ROWS:
                lane.mean(S, V + up, D + up, D + low, 0)
            else:
                lane.mean_onto(S, V + up, Q + up, Q + low, D + up)
            lane.copy(S, V + low, V + up, 0, 0)


@inner
def _eliminate(S, E, m, diagonal, spare):
    """``algebra.eliminate`` of (m, 2 m) lanes, of which only L is scaled. Returns a bit for each
    lane that was positive definite."""
    never_inline()
    tiny = m * np.finfo(S.dtype).eps
    ld, good = 2 * m, (1 << lane.lanes_of(S)) - 1
    for p in range(m):
        lane.copy(S, diagonal + p, E + p * ld + p, 0, 0)
    for p in range(m):
        row = E + p * ld
        good &= lane.positive(S, row + p, diagonal + p, tiny)
        lane.inverse(S, spare, row + p, 0, 0)
        for i in range(p + 1, m):
            at, factor = E + i * ld, spare + 1
            lane.minus_times(S, factor, row + i, spare, 0)
            for j in range(i, m):
                lane.fused(S, at + j, factor, row + j, at + j)
            for j in range(m, m + p + 1):
                lane.fused(S, at + j, factor, row + j, at + j)
    for p in range(m):
        row = E + p * ld
        lane.inverse_root(S, spare, row + p, 0, 0)
        for j in range(m, m + p + 1):
            lane.times(S, row + j, row + j, spare, 0)
    return good


@inner
def backward(which, problem, damping, law, cost, S):
    """Fill K, k, V, v and Quu_inv of L problems; no offsets, no cross curvature. Returns a bit for
    each lane: whether every Quu was positive definite.

    Args:
        which: (L,) the problem in each lane; one may be in several.
        problem, damping, law, cost: of the whole batch; see ``lqr.solve``.
        S: ``scratch_size(n, m)`` numbers.
    """
    never_inline()
    A, B, Q, q, R, r, _c, _S = problem
    K, k, Quu_inv = law
    V, v = cost
    _, T, n, m = B.shape
    A, B, Q, q = A.reshape(A.size), B.reshape(B.size), Q.reshape(Q.size), q.reshape(q.size)
    R, r, K, k = R.reshape(R.size), r.reshape(r.size), K.reshape(K.size), k.reshape(k.size)
    Quu_inv, V, v = Quu_inv.reshape(Quu_inv.size), V.reshape(V.size), v.reshape(v.size)
    lanes, nn, mm, nm = lane.lanes_of(S), n * n, m * m, n * m
    ln, ld = lane.spaced(n), lane.spaced(m + n)
    a, b = 0, n * ln
    given = b + nm
    value = given + n * ln
    cost_u = value + n * ln  # R
    G = cost_u + mm  # [V B | V A]
    H = G + n * ld  # B' G = [Quu | Qux]
    D = H + m * ld  # A' V A - W' W, its upper triangle
    E = D + n * ln  # [Quu | I], later [U | L]
    W = E + 2 * mm
    gain = W + m * ln
    inverse = gain + m * ln
    gx = inverse + mm
    slope, gu, w = gx + n, gx + 2 * n, gx + 2 * n + m
    kk, diagonal = w + m, w + 2 * m
    shift, spare = diagonal + m, diagonal + m + 1
    good = (1 << lanes) - 1
    for i in range(lanes):
        S[shift * lanes + i] = damping[which[i]]

    lane.gather_rows(S, given, ln, Q, T * nn, which, (T + 1) * nn, n, n)
    lane.gather(S, slope, q, T * n, which, (T + 1) * n, n)
    for i in range(n):
        for j in range(n):
            lane.mean(S, value + i * ln + j, given + i * ln + j, given + j * ln + i, 0)
    lane.scatter_rows(S, value, ln, V, T * nn, which, (T + 1) * nn, n, n)
    lane.scatter(S, slope, v, T * n, which, (T + 1) * n, n)

    for t in range(T - 1, -1, -1):
        lane.gather_rows(S, a, ln, A, t * nn, which, T * nn, n, n)
        lane.gather(S, b, B, t * nm, which, T * nm, nm)
        lane.gather_rows(S, given, ln, Q, t * nn, which, (T + 1) * nn, n, n)
        lane.gather(S, cost_u, R, t * mm, which, T * mm, mm)
        lane.gather(S, gx, q, t * n, which, (T + 1) * n, n)
        lane.gather(S, gu, r, t * m, which, T * m, m)
        lane.add_product(S, slope, 1, b, m, gu, m, n, 1, m, False)
        lane.add_product(S, slope, 1, a, ln, gx, n, n, 1, n, False)
        lane.multiply(S, value, ln, b, m, G, ld, n, n, m, False)
        lane.multiply(S, value, ln, a, ln, G + m, ld, n, n, n, False)
        lane.multiply(S, b, m, G, ld, H, ld, n, m, m + n, False)
        lane.multiply(S, a, ln, G + m, ld, D, ln, n, n, n, True)

        for i in range(m):
            for j in range(i, m):
                up, low = cost_u + i * m + j, cost_u + j * m + i
                lane.mean_more(S, E + i * 2 * m + j, up, low, H + i * ld + j)
            for j in range(m):
                lane.zero(S, E + i * 2 * m + m + j, 0, 0, 0)
            lane.plus(S, E + i * 2 * m + i, E + i * 2 * m + i, shift, 0)
            lane.one(S, E + i * 2 * m + m + i, 0, 0, 0)
        good &= _eliminate(S, E, m, diagonal, spare)

        L = E + m
        lane.multiply_across(S, L, 2 * m, H + m, ld, W, ln, m, m, n, False)
        lane.subtract_product(S, W, ln, W, ln, D, ln, m, n, n, True)
        _add_symmetric(S, value, given, D, ln, n)
        lane.multiply(S, L, 2 * m, W, ln, gain, ln, m, m, n, False)
        lane.multiply(S, L, 2 * m, L, 2 * m, inverse, m, m, m, m, False)
        for i in range(m):
            lane.zero(S, w + i, 0, 0, 0)
            for j in range(i + 1):
                lane.rounded(S, w + i, L + i * 2 * m + j, gu + j, w + i)
        lane.subtract_product(S, w, 1, W, ln, gx, n, m, 1, n, False)
        for i in range(m):
            lane.zero(S, kk + i, 0, 0, 0)
            for j in range(i, m):
                lane.rounded(S, kk + i, L + j * 2 * m + i, w + j, kk + i)
                lane.copy(S, inverse + j * m + i, inverse + i * m + j, 0, 0)
            lane.minus(S, kk + i, kk + i, 0, 0)
        for i in range(m):
            for j in range(n):
                lane.minus(S, gain + i * ln + j, gain + i * ln + j, 0, 0)
        lane.scatter_rows(S, value, ln, V, t * nn, which, (T + 1) * nn, n, n)
        lane.scatter(S, gx, v, t * n, which, (T + 1) * n, n)
        lane.scatter_rows(S, gain, ln, K, t * nm, which, T * nm, m, n)
        lane.scatter(S, kk, k, t * m, which, T * m, m)
        lane.scatter(S, inverse, Quu_inv, t * mm, which, T * mm, mm)
        gx, slope = slope, gx
    return good
