"""One LQR problem per program: the recursion of `reference.py` as Triton kernels.

One launch does the whole backward and forward recursion of a batch. Quu and V_0 are inverted with
Cholesky's pivots, so the test of definiteness is the reference's; what is solved with an inverse is
refined once. Inverses, vectors and sums over
time are float64 whatever the problem's dtype.

Only Triton code lives here: it must not be wrapped by a type-checking import hook.
"""

# Triton infers the types of what it compiles, and its language is no Python a checker knows.
# pyright: basic, reportMissingParameterType=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false, reportReturnType=false

import triton
import triton.language as tl

from ilqr_vae.kernels.gpu.blocks import (
    beyond,
    inverse,
    load,
    load_row,
    product,
    refined,
    store,
    store_row,
    symmetric,
    times,
    transposed_times,
)


@triton.jit
def solve(
    A, B, Q, q, R, r, c, S, damping, K, k, Quu_inv, V, v, dz, du, costate, model, ok,
    T, n, m, eps, largest,
    HAS_C: tl.constexpr, HAS_S: tl.constexpr, FREE: tl.constexpr,
    NP: tl.constexpr, MP: tl.constexpr, HOW: tl.constexpr,
):  # fmt: skip
    """Problem ``program_id(0)`` of a batch; pointers and meaning as in `lqr.kernels.solve`."""
    b = tl.program_id(0).to(tl.int64)
    A += b * T * n * n
    B += b * T * n * m
    Q += b * (T + 1) * n * n
    q += b * (T + 1) * n
    R += b * T * m * m
    r += b * T * m
    K += b * T * m * n
    k += b * T * m
    Quu_inv += b * T * m * m
    V += b * (T + 1) * n * n
    v += b * (T + 1) * n
    dz += b * (T + 1) * n
    du += b * T * m
    costate += b * (T + 1) * n
    if HAS_C:
        c += b * T * n
    if HAS_S:
        S += b * T * m * n
    shift = tl.load(damping + b).to(tl.float64)
    in_n, in_m = tl.arange(0, NP), tl.arange(0, MP)
    eye_m = ((in_m[:, None] == in_m[None, :]) & (in_m[:, None] < m)).to(tl.float64)
    eye_n = ((in_n[:, None] == in_n[None, :]) & (in_n[:, None] < n)).to(tl.float64)
    # numbers that do not fit, counted where they stand: looking at the sum waits for every thread
    odd_n = tl.zeros((NP,), tl.int32)
    odd_m = tl.zeros((MP,), tl.int32)
    odd_mm = tl.zeros((MP, MP), tl.int32)
    good = (tl.abs(shift) <= largest).to(tl.int32)

    P = symmetric(load(Q + T * n * n, n, n, NP, NP))
    w = load_row(q + T * n, n, NP)
    store(V + T * n * n, P, n, n, NP, NP)
    store_row(v + T * n, w, n, NP)
    odd_n |= beyond(w, largest)
    for s in range(T):
        t = T - 1 - s
        A_t = load(A + t * n * n, n, n, NP, NP)
        B_t = load(B + t * n * m, n, m, NP, MP)
        Q_t = load(Q + t * n * n, n, n, NP, NP)
        q_t, r_t = load_row(q + t * n, n, NP), load_row(r + t * m, m, MP)
        VA, VB = product(P, A_t, HOW), product(P, B_t, HOW)
        slope = w
        if HAS_C:
            slope += times(P, load_row(c + t * n, n, NP))
        Bt = tl.trans(B_t)
        Quu = symmetric(load(R + t * m * m, m, m, MP, MP) + product(Bt, VB, HOW)).to(tl.float64)
        Qux = product(Bt, VA, HOW)
        if HAS_S:
            Qux += load(S + t * m * n, m, n, MP, NP)
        qu = r_t + transposed_times(B_t, slope)
        Quu += shift * eye_m
        Quu_t, definite = inverse(Quu, m, m * eps, MP)
        # a product with an inverse, refined once, is as exact as a solve by substitution
        k_t = -refined(Quu, Quu_t, qu)
        Qux_t = Qux.to(tl.float64)
        K_t = -product(Quu_t, Qux_t)
        K_t = (K_t - product(Quu_t, Qux_t + product(Quu, K_t))).to(P.dtype)
        good = good & definite
        # a P that is not finite never becomes finite again: it is looked at once, at the end
        P = symmetric(Q_t + product(tl.trans(A_t), VA, HOW) + product(tl.trans(Qux), K_t, HOW))
        w = q_t + transposed_times(A_t, slope) + transposed_times(Qux, k_t)
        store(K + t * m * n, K_t, m, n, MP, NP)
        store_row(k + t * m, k_t, m, MP)
        store(Quu_inv + t * m * m, Quu_t, m, m, MP, MP)
        store(V + t * n * n, P, n, n, NP, NP)
        store_row(v + t * n, w, n, NP)
        odd_n |= beyond(w, largest)
        odd_m |= beyond(k_t, largest)
        odd_mm |= beyond(Quu_t, largest)
    good = good & (tl.sum(beyond(P, largest)) + tl.sum(odd_mm) == 0).to(tl.int32)

    x = tl.zeros((NP,), tl.float64)
    if FREE:
        first = P.to(tl.float64) + shift * eye_n
        store(V, first, n, n, NP, NP)
        V0_inv, definite = inverse(first, n, n * eps, NP)
        x = -refined(first, V0_inv, w)
        good = good & definite & (tl.sum(beyond(first, largest)) == 0).to(tl.int32)

    # what other threads of this program wrote is read from here on
    tl.debug_barrier()
    along_z, along_u = tl.zeros((NP,), tl.float64), tl.zeros((MP,), tl.float64)
    offsets, squares_z = tl.zeros((NP,), tl.float64), x * x
    squares_u = tl.zeros((MP,), tl.float64)
    for t in range(T + 1):
        lam = load_row(v + t * n, n, NP) + times(load(V + t * n * n, n, n, NP, NP), x)
        store_row(dz + t * n, x, n, NP)
        store_row(costate + t * n, lam, n, NP)
        odd_n |= beyond(x, largest) | beyond(lam, largest)
        along_z += load_row(q + t * n, n, NP) * x
        if HAS_C:
            before = tl.where(t > 0, t - 1, 0)
            offsets += tl.where(t > 0, lam * load_row(c + before * n, n, NP), 0.0)
        if t < T:
            u = load_row(k + t * m, m, MP) + times(load(K + t * m * n, m, n, MP, NP), x)
            store_row(du + t * m, u, m, MP)
            odd_m |= beyond(u, largest)
            along_u += load_row(r + t * m, m, MP) * u
            squares_u += u * u
            x = times(load(A + t * n * n, n, n, NP, NP), x)
            x += times(load(B + t * n * m, n, m, NP, MP), u)
            if HAS_C:
                x += load_row(c + t * n, n, NP)
    good = good & (tl.sum(odd_n) + tl.sum(odd_m) == 0).to(tl.int32)
    linear = tl.sum(along_z) + tl.sum(along_u)
    squares = tl.sum(squares_z) + tl.sum(squares_u)
    decrease = -linear - 0.5 * (tl.sum(offsets) - linear - shift * squares)
    good = good & (tl.abs(decrease) <= largest).to(tl.int32)
    good = good & (tl.abs(linear) <= largest).to(tl.int32)
    kind = model.dtype.element_ty
    tl.store(model + 2 * b, tl.where(good == 1, decrease, 0.0).to(kind))
    tl.store(model + 2 * b + 1, tl.where(good == 1, linear, 0.0).to(kind))
    tl.store(ok + b, good.to(tl.int8))
    if good == 0:
        tl.debug_barrier()
        square, gain = tl.zeros((NP, NP), tl.float32), tl.zeros((MP, NP), tl.float32)
        small = tl.zeros((MP, MP), tl.float32)
        state, input_ = tl.zeros((NP,), tl.float32), tl.zeros((MP,), tl.float32)
        for t in range(T + 1):
            store(V + t * n * n, square, n, n, NP, NP)
            store_row(v + t * n, state, n, NP)
            store_row(dz + t * n, state, n, NP)
            store_row(costate + t * n, state, n, NP)
            if t < T:
                store(K + t * m * n, gain, m, n, MP, NP)
                store_row(k + t * m, input_, m, MP)
                store(Quu_inv + t * m * m, small, m, m, MP, MP)
                store_row(du + t * m, input_, m, MP)


@triton.jit
def covariance(
    A, B, K, Quu_inv, V0, Sigma, T, n, m, eps,
    NP: tl.constexpr, MP: tl.constexpr, HOW: tl.constexpr,
):  # fmt: skip
    """`marginal_covariance_reference` of problem ``program_id(0)``."""
    b = tl.program_id(0).to(tl.int64)
    A += b * T * n * n
    B += b * T * n * m
    K += b * T * m * n
    Quu_inv += b * T * m * m
    V0 += b * n * n
    Sigma += b * (T + 1) * n * n
    start = symmetric(load(V0, n, n, NP, NP))
    found, good = inverse(start.to(tl.float64), n, n * eps, NP)
    P = tl.where(good == 1, found, 0.0).to(start.dtype)
    store(Sigma, P, n, n, NP, NP)
    for t in range(T):
        B_t = load(B + t * n * m, n, m, NP, MP)
        closed = load(A + t * n * n, n, n, NP, NP)
        closed += product(B_t, load(K + t * m * n, m, n, MP, NP), HOW)
        noise = product(B_t, load(Quu_inv + t * m * m, m, m, MP, MP), HOW)
        P = product(product(closed, P, HOW), tl.trans(closed), HOW) + product(
            noise, tl.trans(B_t), HOW
        )
        P = symmetric(tl.where(good == 1, P, 0.0))
        store(Sigma + (t + 1) * n * n, P, n, n, NP, NP)
