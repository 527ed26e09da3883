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


def scratch_size(n, m):
    """Numbers of scratch that ``backward`` needs."""
    wide = n + 2 * m + 5
    return 16 * (wide * (5 * n + 2 * m) + n * m + m * m + m + 2 * n + 3)


@inner
def _add_symmetric(S, V, P, Q, ld, n):
    """V = P + Q, as ``algebra.add_symmetric``, of which rows are ``ld`` vectors apart."""
    never_inline()
    for i in range(n):
        for j in range(i, n):
            up, low = i * ld + j, j * ld + i
            lane.plus(S, V + up, P + up, Q + up, 0)
            lane.copy(S, V + low, V + up, 0, 0)


@inner
def _eliminate(S, E, L, m, width, ld, diagonal, spare):
    """``algebra.eliminate`` of m rows of ``width`` lanes, of which the last m columns are an
    identity. Returns a bit for each lane that was positive definite."""
    never_inline()
    tiny = m * np.finfo(S.dtype).eps
    good = (1 << lane.lanes_of(S)) - 1
    for p in range(m):
        lane.copy(S, diagonal + p, E + p * ld + p, 0, 0)
    for p in range(m):
        row, used = E + p * ld, width - m + p + 1
        good &= lane.positive(S, row + p, diagonal + p, tiny)
        lane.inverse(S, spare, row + p, 0, 0)
        for i in range(p + 1, m):
            at, factor = E + i * ld, spare + 1
            lane.minus_times(S, factor, row + i, spare, 0)
            for j in range(i, used):
                lane.fused(S, at + j, factor, row + j, at + j)
        for j in range(p, used):
            lane.times(S, L + p * ld + j, row + j, spare, 0)
        for j in range(used, width):
            lane.zero(S, L + p * ld + j, 0, 0, 0)
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
    first_I = m + n + 1  # columns of H: Quu, Qux, qu and I
    ln, ld = lane.spaced(n), lane.spaced(first_I + m)
    a, b = 0, n * ln
    given = b + nm
    value = given + n * ln
    G = value + n * ln  # V [B A] and the slope v
    H = G + n * ld  # [Quu Qux qu I], eliminated
    L = H + m * ld  # its rows divided by the pivots, later Quu^{-1} H
    P = L + m * ld  # the upper triangle of V while it is made
    gx = P + n * ln  # v while it is made
    small = gx + n
    diagonal, cost_x, spare = small + m * m, small + m * m + m, small + m * m + m + n
    shift = spare + 2
    good = (1 << lanes) - 1
    for i in range(lanes):
        S[shift * lanes + i] = damping[which[i]]

    lane.gather_rows(S, value, ln, Q, T * nn, which, (T + 1) * nn, n, n)
    lane.gather(S, gx, q, T * n, which, (T + 1) * n, n)
    for i in range(n):
        for j in range(i):
            lane.copy(S, value + i * ln + j, value + j * ln + i, 0, 0)
    lane.scatter_rows(S, value, ln, V, T * nn, which, (T + 1) * nn, n, n)
    lane.scatter(S, gx, v, T * n, which, (T + 1) * n, n)

    for t in range(T - 1, -1, -1):
        lane.gather_rows(S, a, ln, A, t * nn, which, T * nn, n, n)
        lane.gather(S, b, B, t * nm, which, T * nm, nm)
        lane.gather_rows(S, given, ln, Q, t * nn, which, (T + 1) * nn, n, n)
        lane.gather(S, small, R, t * mm, which, T * mm, mm)
        for i in range(m):
            row = H + i * ld
            for j in range(m):
                lane.copy(S, row + j, small + i * m + j, 0, 0)
                lane.zero(S, row + first_I + j, 0, 0, 0)
            for j in range(m, m + n):
                lane.zero(S, row + j, 0, 0, 0)
            lane.plus(S, row + i, row + i, shift, 0)
            lane.one(S, row + first_I + i, 0, 0, 0)
        lane.gather(S, small, r, t * m, which, T * m, m)
        for i in range(m):
            lane.copy(S, H + i * ld + m + n, small + i, 0, 0)
        lane.multiply(S, value, ln, b, m, G, ld, n, n, m, False)
        lane.multiply(S, value, ln, a, ln, G + m, ld, n, n, n, False)
        for i in range(n):
            lane.copy(S, G + i * ld + m + n, gx + i, 0, 0)
        lane.add_product(S, b, m, G, ld, H, ld, n, m, first_I, False)
        lane.multiply(S, a, ln, G + m, ld, P, ln, n, n, n, True)
        lane.multiply(S, a, ln, G + m + n, ld, gx, 1, n, n, 1, False)
        good &= _eliminate(S, H, L, m, first_I + m, ld, diagonal, spare)

        lane.subtract_product(S, H + m, ld, L + m, ld, P, ln, m, n, n, True)
        lane.subtract_product(S, H + m, ld, L + m + n, ld, gx, 1, m, n, 1, False)
        lane.gather(S, cost_x, q, t * n, which, (T + 1) * n, n)
        for i in range(n):
            lane.plus(S, gx + i, gx + i, cost_x + i, 0)
        _add_symmetric(S, value, P, given, ln, n)
        lane.scatter_rows(S, value, ln, V, t * nn, which, (T + 1) * nn, n, n)
        lane.scatter(S, gx, v, t * n, which, (T + 1) * n, n)

        for i in range(m - 2, -1, -1):
            row, below = L + i * ld, L + (i + 1) * ld + m
            left, columns = m - 1 - i, n + 1 + m
            lane.subtract_product(
                S, row + i + 1, 1, below, ld, row + m, ld, left, 1, columns, False
            )
        for i in range(m):
            for j in range(m, m + n + 1):
                lane.minus(S, L + i * ld + j, L + i * ld + j, 0, 0)
            lane.scatter(S, L + i * ld + m, K, t * nm + i * n, which, T * nm, n)
            lane.copy(S, small + i, L + i * ld + m + n, 0, 0)
        lane.scatter(S, small, k, t * m, which, T * m, m)
        for i in range(m):
            for j in range(i, m):
                lane.copy(S, small + i * m + j, L + i * ld + first_I + j, 0, 0)
                lane.copy(S, small + j * m + i, L + i * ld + first_I + j, 0, 0)
        lane.scatter(S, small, Quu_inv, t * mm, which, T * mm, mm)
    return good
