"""An iLQR iteration beside the LQR recursion as Triton kernels: the quadratic model, the search.

For dynamics ``mgu2`` or ``linear``, Gaussian inputs and one group of Poisson channels, with the
letters of `model`, `likelihoods` and `line_search`. Sums are float64 whatever the tensors' dtype.

Only Triton code lives here: it must not be wrapped by a type-checking import hook.
"""

# Triton infers the types of what it compiles, and its language is no Python a checker knows.
# pyright: basic, reportMissingParameterType=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false, reportReturnType=false

import triton
import triton.language as tl

from ilqr_vae.kernels.gpu.blocks import load, load_row, product, store, store_row, times
from ilqr_vae.kernels.gpu.dynamics import roll, row, times_row, weights


@triton.jit
def _channels(a, limit):
    """Rate, its slope in a, their ratio, and log rate: exponential up to ``limit``, then linear."""
    over = tl.maximum(a - limit, 0.0)
    slope = tl.exp(tl.minimum(a, limit))
    stretch = 1.0 + over
    return slope * stretch, slope, 1.0 / stretch, a - over + tl.log(stretch)


@triton.jit
def _bins(z, first, T, n, NP: tl.constexpr):
    """Which 16 bins from ``first`` on, and the states after them (the t+1 of `model`)."""
    t, in_n = first + tl.arange(0, 16), tl.arange(0, NP)
    at = (t + 1)[:, None] * n + in_n[None, :]
    return t, tl.load(z + at, mask=(t < T)[:, None] & (in_n < n)[None, :], other=0.0)


@triton.jit
def _tile(
    t, Z, start, C, bias, values, mask, T, n, N, NP: tl.constexpr, NB: tl.constexpr
):  # fmt: skip
    """C z + b, counts and mask of 16 bins and NB channels; where they stand; which exist."""
    i, in_n = start + tl.arange(0, NB), tl.arange(0, NP)
    known = (i < N)[:, None] & (in_n < n)[None, :]
    C_i = tl.load(C + i[:, None] * n + in_n[None, :], mask=known, other=0.0)
    a = product(Z, tl.trans(C_i)) + tl.load(bias + i, mask=i < N, other=0.0)[None, :]
    inside = (t < T)[:, None] & (i < N)[None, :]
    there = t[:, None] * N + i[None, :]
    y = tl.load(values + there, mask=inside, other=0.0)
    return a, y, tl.load(mask + there, mask=inside, other=0.0), there, inside


@triton.jit
def _observed_cost(z, C, bias, limit, values, mask, T, n, N, NP: tl.constexpr, NB: tl.constexpr):
    """-sum over bins and channels of log p without log y!, of states 1 to T of one trajectory."""
    total = tl.zeros((16, NB), tl.float64)
    for first in range(0, T, 16):
        t, Z = _bins(z, first, T, n, NP)
        for start in range(0, N, NB):
            a, y, seen, _, _ = _tile(t, Z, start, C, bias, values, mask, T, n, N, NP, NB)
            rate, _, _, log_rate = _channels(a, limit)
            total += tl.where(seen > 0, (rate - y * log_rate) * seen, 0.0).to(tl.float64)
    return tl.sum(total)


@triton.jit
def _initial_cost(x, mean, arrival):
    e = x.to(tl.float64) - mean
    return 0.5 * tl.sum(e * times(arrival, e))


@triton.jit
def search(
    state, state_bias, hidden, hidden_bias, drive, C, bias, centre, precision, values, mask,
    numbers, mean, arrival, zb, ub, K, k, dz0, before, promise, seeking, z, u, cost, taken,
    T, n, m, N, armijo, slack, tries,
    GATED: tl.constexpr, CLOSED: tl.constexpr,
    NP: tl.constexpr, MP: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """Problem ``program_id(0)``: halve the step until J falls enough, at most ``tries`` times.

    Where not CLOSED, one rollout of ub from zb and its J; K, k and what follows is not read.
    """
    b = tl.program_id(0).to(tl.int64)
    limit, constant = tl.load(numbers).to(state.dtype.element_ty), tl.load(numbers + 1)
    values += b * T * N
    mask += b * T * N
    ub += b * T * m
    u += b * T * m
    z += b * (T + 1) * n
    W_z, b_z, W_h, b_h, W_u = weights(
        state, state_bias, hidden, hidden_bias, drive, n, m, GATED, NP, MP
    )
    mu, weight = load_row(centre, m, MP), load_row(precision, m, MP)
    start, arrive = load_row(mean + b * n, n, NP), load(arrival + b * n * n, n, n, NP, NP)
    if CLOSED:
        zb += b * (T + 1) * n
        K += b * T * m * n
        k += b * T * m
        x0, along = row(zb, n, NP), row(dz0 + b * n, n, NP)
        J, least = tl.load(before + b).to(tl.float64), tl.load(promise + b).to(tl.float64)
        alpha = tl.full((), 1.0, tl.float64)
        found = tl.full((), 0.0, tl.float64)
        best = J
        left = tl.where(tl.load(seeking + b) != 0, tries, 0)
        while left > 0:
            step = alpha.to(x0.dtype)
            x = x0 + step * along
            trial = T * constant + roll(
                x, zb, ub, K, k, step, z, u, W_z, b_z, W_h, b_h, W_u, mu, weight, T, n, m,
                GATED, CLOSED, NP, MP,
            )  # fmt: skip
            # what other threads of this program wrote is read from here on
            tl.debug_barrier()
            trial += _initial_cost(x, start, arrive)
            trial += _observed_cost(z, C, bias, limit, values, mask, T, n, N, NP, NB)
            lowered = trial <= J - armijo * alpha * (2.0 - alpha) * least + slack * tl.abs(J)
            found = tl.where(lowered, alpha, found)
            best = tl.where(lowered, trial, best)
            left = tl.where(lowered, 0, left - 1)
            alpha = 0.5 * alpha
            tl.debug_barrier()
        if found == 0.0:
            for t in range(T + 1):
                store_row(z + t * n, row(zb + t * n, n, NP), n, NP)
                if t < T:
                    store_row(u + t * m, row(ub + t * m, m, MP), m, MP)
        tl.store(taken + b, found.to(taken.dtype.element_ty))
        tl.store(cost + b, best.to(cost.dtype.element_ty))
    else:
        x = row(zb + b * n, n, NP)
        trial = T * constant + roll(
            x, zb, ub, K, k, 0.0, z, u, W_z, b_z, W_h, b_h, W_u, mu, weight, T, n, m,
            GATED, CLOSED, NP, MP,
        )  # fmt: skip
        tl.debug_barrier()
        trial += _initial_cost(x, start, arrive)
        trial += _observed_cost(z, C, bias, limit, values, mask, T, n, N, NP, NB)
        tl.store(cost + b, trial.to(cost.dtype.element_ty))


@triton.jit
def _jacobians(
    x, u_t, state, state_bias, hidden, hidden_bias, drive, n, m,
    GATED: tl.constexpr, NP: tl.constexpr, MP: tl.constexpr,
):  # fmt: skip
    """df/dz and df/du at one state and input."""
    A, B = load(state, n, n, NP, NP), load(drive, n, m, NP, MP)
    if GATED:
        W_h = load(hidden, n, n, NP, NP)
        in_n = tl.arange(0, NP)
        f = 1.0 / (1.0 + tl.exp(-(times_row(A, x) + row(state_bias, n, NP))))
        h = times_row(W_h, f * x) + times_row(B, u_t) + row(hidden_bias, n, NP)
        h = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * h))
        steep = f * (1.0 - h * h)
        F = (f * (1.0 - f))[:, None] * A
        through = W_h * f[None, :] + product(W_h * x[None, :], F)
        kept = ((in_n[:, None] == in_n[None, :]) & (in_n[:, None] < n)).to(x.dtype)
        A = (h - x)[:, None] * F + steep[:, None] * through + kept * (1.0 - f)[:, None]
        B = steep[:, None] * B
    return A, B


@triton.jit
def derivatives(
    C, bias, numbers, values, mask, z, d, w, T, n, N, tiles, NP: tl.constexpr, NB: tl.constexpr
):  # fmt: skip
    """First and second derivative of -log p in each channel's C z + b, 16 bins per program."""
    b, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    limit = tl.load(numbers).to(C.dtype.element_ty)
    values += b * T * N
    mask += b * T * N
    d += b * T * N
    w += b * T * N
    t, Z = _bins(z + b * (T + 1) * n, tile * 16, T, n, NP)
    for start in range(0, N, NB):
        a, y, seen, there, inside = _tile(t, Z, start, C, bias, values, mask, T, n, N, NP, NB)
        _, slope, share, _ = _channels(a, limit)
        tl.store(d + there, tl.where(seen > 0, (slope - y * share) * seen, 0.0), mask=inside)
        tl.store(w + there, tl.where(seen > 0, slope * share * seen, 0.0), mask=inside)


@triton.jit
def linearise(
    state, state_bias, hidden, hidden_bias, drive, centre, precision, z, u, A, B, R, r, T, n, m,
    GATED: tl.constexpr, NP: tl.constexpr, MP: tl.constexpr,
):  # fmt: skip
    """Jacobians and the inputs' own cost at transition t of problem b, in program b T + t."""
    b, t = (tl.program_id(0) // T).to(tl.int64), tl.program_id(0) % T
    at = b * T + t
    x, u_t = row(z + (at + b) * n, n, NP), row(u + at * m, m, MP)
    A_t, B_t = _jacobians(
        x, u_t, state, state_bias, hidden, hidden_bias, drive, n, m, GATED, NP, MP
    )  # fmt: skip
    store(A + at * n * n, A_t, n, n, NP, NP)
    store(B + at * n * m, B_t, n, m, NP, MP)
    in_m = tl.arange(0, MP)
    weight = row(precision, m, MP)
    square = tl.where(in_m[:, None] == in_m[None, :], weight[:, None], 0.0)
    store(R + at * m * m, square, m, m, MP, MP)
    store_row(r + at * m, (u_t - row(centre, m, MP)) * weight, m, MP)
