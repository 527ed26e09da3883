"""One LQR problem per program: the recursion of `reference.py` as Triton kernels.

A problem's matrices are blocks padded with zeros to powers of two (NP for n, MP for m, 16 or more,
what a tensor product needs). One launch does the whole backward and forward recursion of a batch.

Small systems are solved by Gauss-Jordan elimination, whose pivots are the squares of Cholesky's, so
the test of definiteness is the reference's. Float32 products are exact float32 ones (no TF32), and
elimination, vectors and sums over time are float64 whatever the problem's dtype.

Only Triton code lives here: it must not be wrapped by a type-checking import hook.
"""

# Triton infers the types of what it compiles, and its language is no Python a checker knows.
# pyright: basic, reportMissingParameterType=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false, reportReturnType=false

import triton
import triton.language as tl


@triton.jit
def _at(pointer, rows, columns, P: tl.constexpr, R: tl.constexpr):
    """A (rows, columns) matrix as a (P, R) block, zeros beyond."""
    i, j = tl.arange(0, P)[:, None], tl.arange(0, R)[None, :]
    return tl.load(pointer + i * columns + j, mask=(i < rows) & (j < columns), other=0.0)


@triton.jit
def _put(pointer, value, rows, columns, P: tl.constexpr, R: tl.constexpr):
    i, j = tl.arange(0, P)[:, None], tl.arange(0, R)[None, :]
    inside = (i < rows) & (j < columns)
    tl.store(pointer + i * columns + j, value.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _row_at(pointer, size, P: tl.constexpr):
    i = tl.arange(0, P)
    return tl.load(pointer + i, mask=i < size, other=0.0).to(tl.float64)


@triton.jit
def _put_row(pointer, value, size, P: tl.constexpr):
    i = tl.arange(0, P)
    tl.store(pointer + i, value.to(pointer.dtype.element_ty), mask=i < size)


@triton.jit
def _product(X, Y):
    return tl.dot(X, Y, input_precision="ieee", out_dtype=X.dtype)


@triton.jit
def _times(X, y):
    """X y for a float64 vector."""
    return tl.sum(X.to(tl.float64) * y[None, :], axis=1)


@triton.jit
def _transposed_times(X, y):
    return tl.sum(X.to(tl.float64) * y[:, None], axis=0)


@triton.jit
def _symmetric(X):
    return 0.5 * (X + tl.trans(X))


@triton.jit
def _fits(X, largest):
    """1 where every number of a block is finite and no larger than ``largest``, else 0."""
    return (tl.sum((tl.abs(X.to(tl.float64)) <= largest).to(tl.int32) - 1) == 0).to(tl.int32)


@triton.jit
def _pivot(M, p, P: tl.constexpr):
    """Pivot, row and column p of a (P, P) block."""
    i, j = tl.arange(0, P)[:, None], tl.arange(0, P)[None, :]
    row = tl.sum(tl.where(i == p, M, 0.0), axis=0)
    column = tl.sum(tl.where(j == p, M, 0.0), axis=1)
    pivot = tl.sum(tl.where(tl.arange(0, P) == p, row, 0.0))
    return pivot, row, column


@triton.jit
def _eliminate(M, X, y, size, floor, P: tl.constexpr, R: tl.constexpr):
    """M^-1 X and M^-1 y for the leading ``size`` rows, float64; 1 if M is positive definite.

    ``floor`` times a diagonal entry is what its squared pivot must exceed.
    """
    index = tl.arange(0, P)
    diagonal = tl.sum(tl.where(index[:, None] == index[None, :], M, 0.0), axis=1)
    good = 1
    for p in range(size):
        pivot, row, column = _pivot(M, p, P)
        own = tl.sum(tl.where(index == p, diagonal, 0.0))
        good = good & ((pivot > 0.0) & (pivot > floor * own)).to(tl.int32)
        at_p = index == p
        X_row = tl.sum(tl.where(at_p[:, None], X, 0.0), axis=0) / pivot
        y_at = tl.sum(tl.where(at_p, y, 0.0)) / pivot
        row = row / pivot
        M = tl.where(at_p[:, None], row[None, :], M - column[:, None] * row[None, :])
        X = tl.where(at_p[:, None], X_row[None, :], X - column[:, None] * X_row[None, :])
        y = tl.where(at_p, y_at, y - column * y_at)
    return X, y, good


@triton.jit
def solve(
    A, B, Q, q, R, r, c, S, damping, K, k, Quu_inv, V, v, dz, du, costate, model, ok,
    T, n, m, eps, largest,
    HAS_C: tl.constexpr, HAS_S: tl.constexpr, FREE: tl.constexpr,
    NP: tl.constexpr, MP: tl.constexpr,
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
    good = (tl.abs(shift) <= largest).to(tl.int32)
    in_n, in_m = tl.arange(0, NP), tl.arange(0, MP)
    eye_m = ((in_m[:, None] == in_m[None, :]) & (in_m[:, None] < m)).to(tl.float64)
    eye_n = ((in_n[:, None] == in_n[None, :]) & (in_n[:, None] < n)).to(tl.float64)

    P = _symmetric(_at(Q + T * n * n, n, n, NP, NP))
    w = _row_at(q + T * n, n, NP)
    _put(V + T * n * n, P, n, n, NP, NP)
    _put_row(v + T * n, w, n, NP)
    good = good & _fits(P, largest) & _fits(w, largest)
    for s in range(T):
        t = T - 1 - s
        A_t = _at(A + t * n * n, n, n, NP, NP)
        B_t = _at(B + t * n * m, n, m, NP, MP)
        VA, VB = _product(P, A_t), _product(P, B_t)
        slope = w
        if HAS_C:
            slope += _times(P, _row_at(c + t * n, n, NP))
        Bt = tl.trans(B_t)
        Quu = _symmetric(_at(R + t * m * m, m, m, MP, MP) + _product(Bt, VB)).to(tl.float64)
        Qux = _product(Bt, VA)
        if HAS_S:
            Qux += _at(S + t * m * n, m, n, MP, NP)
        qu = _row_at(r + t * m, m, MP) + _transposed_times(B_t, slope)
        # [Qux | I] is eliminated in two blocks against the same pivots
        Quu += shift * eye_m
        inverse, k_t, definite = _eliminate(Quu, eye_m, -qu, m, m * eps, MP, MP)
        wide, _, _ = _eliminate(Quu, -Qux.to(tl.float64), k_t, m, m * eps, MP, NP)
        K_t = wide.to(P.dtype)
        good = good & definite
        lower = _product(tl.trans(Qux), K_t)
        P = _symmetric(_at(Q + t * n * n, n, n, NP, NP) + _product(tl.trans(A_t), VA) + lower)
        w = _row_at(q + t * n, n, NP) + _transposed_times(A_t, slope) + _transposed_times(Qux, k_t)
        _put(K + t * m * n, K_t, m, n, MP, NP)
        _put_row(k + t * m, k_t, m, MP)
        _put(Quu_inv + t * m * m, inverse, m, m, MP, MP)
        _put(V + t * n * n, P, n, n, NP, NP)
        _put_row(v + t * n, w, n, NP)
        good = good & _fits(K_t, largest) & _fits(k_t, largest) & _fits(inverse, largest)
        good = good & _fits(P, largest) & _fits(w, largest)

    x = tl.zeros((NP,), tl.float64)
    if FREE:
        first = P.to(tl.float64) + shift * eye_n
        _put(V, first, n, n, NP, NP)
        good = good & _fits(first, largest)
        _, x, definite = _eliminate(first, eye_n, -w, n, n * eps, NP, NP)
        good = good & definite

    # what other threads of this program wrote is read from here on
    tl.debug_barrier()
    linear = tl.sum(0.0 * x)
    offsets = linear
    squares = tl.sum(x * x)
    for t in range(T + 1):
        lam = _row_at(v + t * n, n, NP) + _times(_at(V + t * n * n, n, n, NP, NP), x)
        _put_row(dz + t * n, x, n, NP)
        _put_row(costate + t * n, lam, n, NP)
        good = good & _fits(x, largest) & _fits(lam, largest)
        linear += tl.sum(_row_at(q + t * n, n, NP) * x)
        if HAS_C:
            before = tl.where(t > 0, t - 1, 0)
            gap = _row_at(c + before * n, n, NP)
            offsets += tl.where(t > 0, tl.sum(lam * gap), 0.0)
        if t < T:
            u = _row_at(k + t * m, m, MP) + _times(_at(K + t * m * n, m, n, MP, NP), x)
            _put_row(du + t * m, u, m, MP)
            good = good & _fits(u, largest)
            linear += tl.sum(_row_at(r + t * m, m, MP) * u)
            squares += tl.sum(u * u)
            x = _times(_at(A + t * n * n, n, n, NP, NP), x)
            x += _times(_at(B + t * n * m, n, m, NP, MP), u)
            if HAS_C:
                x += _row_at(c + t * n, n, NP)
    decrease = -linear - 0.5 * (offsets - linear - shift * squares)
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
            _put(V + t * n * n, square, n, n, NP, NP)
            _put_row(v + t * n, state, n, NP)
            _put_row(dz + t * n, state, n, NP)
            _put_row(costate + t * n, state, n, NP)
            if t < T:
                _put(K + t * m * n, gain, m, n, MP, NP)
                _put_row(k + t * m, input_, m, MP)
                _put(Quu_inv + t * m * m, small, m, m, MP, MP)
                _put_row(du + t * m, input_, m, MP)


@triton.jit
def covariance(
    A, B, K, Quu_inv, V0, Sigma, T, n, m, eps, NP: tl.constexpr, MP: tl.constexpr
):  # fmt: skip
    """`marginal_covariance_reference` of problem ``program_id(0)``."""
    b = tl.program_id(0).to(tl.int64)
    A += b * T * n * n
    B += b * T * n * m
    K += b * T * m * n
    Quu_inv += b * T * m * m
    V0 += b * n * n
    Sigma += b * (T + 1) * n * n
    in_n = tl.arange(0, NP)
    eye_n = ((in_n[:, None] == in_n[None, :]) & (in_n[:, None] < n)).to(tl.float64)
    start = _symmetric(_at(V0, n, n, NP, NP))
    inverse, _, good = _eliminate(
        start.to(tl.float64), eye_n, tl.zeros((NP,), tl.float64), n, n * eps, NP, NP
    )
    P = tl.where(good == 1, inverse, 0.0).to(start.dtype)
    _put(Sigma, P, n, n, NP, NP)
    for t in range(T):
        B_t = _at(B + t * n * m, n, m, NP, MP)
        closed = _at(A + t * n * n, n, n, NP, NP)
        closed += _product(B_t, _at(K + t * m * n, m, n, MP, NP))
        noise = _product(B_t, _at(Quu_inv + t * m * m, m, m, MP, MP))
        P = _product(_product(closed, P), tl.trans(closed)) + _product(noise, tl.trans(B_t))
        P = _symmetric(tl.where(good == 1, P, 0.0))
        _put(Sigma + (t + 1) * n * n, P, n, n, NP, NP)
