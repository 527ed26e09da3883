"""One LQR problem solved by compiled code: the recursion of `reference.py`, arranged for a CPU.

A backward step is a product G = V [B | A], its product B' G = [Quu | Qux], one elimination of the
small matrix [Quu | I], which gives L = U^{-T} with Quu = U'U, and products with W = L Qux:

    V = Q + A' V A - W' W,    K = -L' W,    Quu^{-1} = L' L.

Of symmetric ones half is computed. Scratch matrices are padded with zeros to whole tiles (see
`algebra.py`). Letters and signs are those of `ilqr_vae.lqr.problem`. Of a batch of small problems
the recursion is done for several at once (see `lanes.py`), with the same bits.

Only numba code lives here: it must not be wrapped by a type-checking import hook.
"""

# numba infers the types of what it compiles.
# pyright: reportMissingParameterType=false

from __future__ import annotations

from ilqr_vae.kernels.cpu import lane_tiles, lanes
from ilqr_vae.kernels.cpu.algebra import (
    COLUMNS,
    add_product,
    add_row_product,
    add_symmetric,
    all_finite,
    back_substitute,
    carve,
    compiled,
    eliminate,
    inner,
    inverse_of_symmetric,
    move_rows,
    multiply,
    multiply_across,
    never_inline,
    part,
    round_up,
    scale_rows,
    subtract_row_product,
    subtract_square,
)

#: Latents up to which a batch is solved a problem a lane: beyond, a group's matrices leave the
#: nearest cache, and one problem's fill vectors well enough.
LANES_UP_TO = 32


def group(n, itemsize):
    """How many problems with ``n`` latents are solved at once, in numbers of ``itemsize`` bytes."""
    return lane_tiles.VECTOR_BYTES // itemsize if n <= LANES_UP_TO else 1


def scratch_size(n, m):
    """Numbers of scratch that one problem's solution or covariance needs."""
    wide, narrow = n + COLUMNS, m + COLUMNS
    both = n + m + 2 * COLUMNS
    one = 6 * both * both + 4 * wide * wide + 4 * narrow * both
    return max(one, lanes.scratch_size(n, m) if n <= LANES_UP_TO else 0)


@part
def _backward(problem, has_c, has_S, damping, law, cost, scratch):
    """Fill K, k, V, v and Quu_inv of one problem; False where some Quu is not positive definite."""
    A, B, Q, q, R, r, c, S = problem
    K, k, Quu_inv = law
    V, v = cost
    T, n, m = B.shape
    dtype = A.dtype
    half, one, zero = dtype.type(0.5), dtype.type(1.0), dtype.type(0.0)
    n8, m8 = round_up(n, COLUMNS), round_up(m, COLUMNS)
    ld = m8 + n8
    G, end = carve(scratch, 0, n8, ld)  # [V B | V A]
    H, end = carve(scratch, end, m8, ld)  # B' G = [Quu | Qux]
    D, end = carve(scratch, end, n8, n8)  # A' V A - W' W, its upper triangle
    E, end = carve(scratch, end, m8, 2 * m8)  # [Quu | I], later [U | L]
    W, end = carve(scratch, end, m8, n8)  # L Qux
    gain, end = carve(scratch, end, m8, n8)
    inverse, end = carve(scratch, end, m8, m8)
    gx, gu = scratch[end : end + n8], scratch[end + n8 : end + ld]
    w = scratch[end + ld : end + ld + m8]  # L qu
    slope = scratch[end + ld + m8 : end + 2 * ld]
    # Matrices are used as they stand, with whole vectors read beyond the ends of rows, which spoils
    # only padding. Near an array's end, where that would leave the array, they are copied. V is
    # written in whole blocks: where its rows are not whole vectors, into scratch.
    wide_rows = n == n8
    padded = scratch[end + 2 * ld : end + 2 * ld + 2 * n8 * n8 + n8 * m8]
    end += 2 * ld + 2 * n8 * n8 + n8 * m8
    diagonal = scratch[end : end + m]
    scratch[:end] = zero
    given_A, given_B, given_Q = A.reshape(A.size), B.reshape(B.size), Q.reshape(Q.size)
    values = V.reshape(V.size)
    value = values if wide_rows else padded
    p0 = n8 * n8

    for i in range(n):
        v[T, i] = q[T, i]
        for j in range(n):
            values[T * n * n + i * n + j] = half * (Q[T, i, j] + Q[T, j, i])
    if not wide_rows:
        move_rows(padded, p0, n8, values, T * n * n, n, n, n)

    for t in range(T - 1, -1, -1):
        at = t * n * n
        if wide_rows:
            p0 = at + n * n
        transition, a0, lda = given_A, at, n
        if given_A.size - at < n * n + n8 - n:
            move_rows(padded, 0, n8, given_A, at, n, n, n)
            transition, a0, lda = padded, 0, n8
        drive, b0, ldb = given_B, t * n * m, m
        if given_B.size - b0 < n * m + m8 - m:
            move_rows(padded, 2 * n8 * n8, m8, given_B, b0, m, n, m)
            drive, b0, ldb = padded, 2 * n8 * n8, m8
        for i in range(n):
            slope[i] = v[t + 1, i]
            gx[i] = q[t, i]
        for a in range(m):
            gu[a] = r[t, a]
        if has_c:
            add_product(slope, 0, value, p0, n8, c, t * n, n, n)
        add_row_product(gu, 0, slope, 0, drive, b0, ldb, n, m)
        add_row_product(gx, 0, slope, 0, transition, a0, lda, n, n)
        multiply(value, p0, n8, drive, b0, ldb, G, 0, ld, n, n, m, False)
        multiply(value, p0, n8, transition, a0, lda, G, m8, ld, n, n, n, False)
        multiply(drive, b0, ldb, G, 0, ld, H, 0, ld, n, m, ld, False)
        multiply(transition, a0, lda, G, m8, ld, D, 0, n8, n, n, n, True)

        for a in range(m):
            for b in range(a, m):
                E[a, b] = H[a, b] + half * (R[t, a, b] + R[t, b, a])
            for b in range(m):
                E[a, m8 + b] = zero
            E[a, a] += damping
            E[a, m8 + a] = one
            if has_S:
                for j in range(n):
                    H[a, m8 + j] += S[t, a, j]
        if not eliminate(E, m, 2 * m8, diagonal):
            return False

        multiply_across(E, m8, 2 * m8, H, m8, ld, W, 0, n8, m, m, n)
        subtract_square(W, 0, n8, D, 0, n8, m, n)
        if wide_rows:
            add_symmetric(values, at, given_Q, at, n, D, 0, n8, n)
        elif given_Q.size - at < n8 * n + n8 - n:
            move_rows(padded, p0, n8, given_Q, at, n, n, n)
            add_symmetric(padded, p0, padded, p0, n8, D, 0, n8, n)
        else:
            add_symmetric(padded, p0, given_Q, at, n, D, 0, n8, n)
        if not wide_rows:
            move_rows(values, at, n, padded, p0, n8, n, n)

        multiply(E, m8, 2 * m8, W, 0, n8, gain, 0, n8, m, m, n, False)
        multiply(E, m8, 2 * m8, E, m8, 2 * m8, inverse, 0, m8, m, m, m, True)
        for a in range(m):
            total = zero
            for b in range(a + 1):
                total += E[a, m8 + b] * gu[b]
            w[a] = total
        subtract_row_product(gx, 0, w, 0, W, 0, n8, m, n)
        scale_rows(K, t * m * n, n, gain, 0, n8, m, n, -one)
        for i in range(n):
            v[t, i] = gx[i]
        for a in range(m):
            total = zero
            for b in range(a, m):
                total += E[b, m8 + a] * w[b]
                Quu_inv[t, a, b] = inverse[a, b]
                Quu_inv[t, b, a] = inverse[a, b]
            k[t, a] = -total
    return True


@part
def _initial(V, v, damping, dz, scratch):
    """dz = -V^{-1} v after adding the damping to V; False where V is not positive definite."""
    n = v.size
    E, end = carve(scratch, 0, n, n + 1)
    for i in range(n):
        V[i, i] += damping
        for j in range(n):
            E[i, j] = V[i, j]
        E[i, n] = v[i]
    if not eliminate(E, n, n + 1, scratch[end:]):
        return False
    back_substitute(E, n, n, n + 1)
    for i in range(n):
        dz[i] = -E[i, n]
    return True


@part
def _forward(problem, has_c, damping, law, cost, step):
    """Roll the rest of the step out from dz[0]; model = (decrease, linear).

    The curvature of J along the step follows from stationarity: the gradient of the Lagrangian is
    zero at (dz, du), so is its product with them, and only the offsets' and damping's work is left.
    """
    A, B, _Q, q, _R, r, c, _S = problem
    K, k, _Quu_inv = law
    V, v = cost
    dz, du, costate, model = step
    T, n, m = B.shape
    linear, squares, offsets = 0.0, 0.0, 0.0
    for i in range(n):
        squares += dz[0, i] * dz[0, i]
    for t in range(T + 1):
        for i in range(n):
            linear += q[t, i] * dz[t, i]
            costate[t, i] = v[t, i]
        add_product(costate, t * n, V, t * n * n, n, dz, t * n, n, n)
        if has_c and t > 0:
            for i in range(n):
                offsets += costate[t, i] * c[t - 1, i]
        if t == T:
            break
        for a in range(m):
            du[t, a] = k[t, a]
        add_product(du, t * m, K, t * m * n, n, dz, t * n, m, n)
        for a in range(m):
            linear += r[t, a] * du[t, a]
            squares += du[t, a] * du[t, a]
        for i in range(n):
            dz[t + 1, i] = c[t, i] if has_c else 0.0
        add_product(dz, (t + 1) * n, A, t * n * n, n, dz, t * n, n, n)
        add_product(dz, (t + 1) * n, B, t * n * m, m, du, t * m, n, m)
    model[0] = -linear - 0.5 * (offsets - linear - damping * squares)
    model[1] = linear


@part
def flat(array, b):
    """Everything that an array holds for problem ``b``."""
    part = array[b]
    return part.reshape(part.size)


@part
def _of(b, problem, has_c, has_S, law, cost):
    """Problem ``b``, its law and its cost."""
    A, B, Q, q, R, r, c, S = problem
    K, k, Quu_inv = law
    V, v = cost
    one, cross = (b if has_c else 0), (b if has_S else 0)
    problem_b = (A[b], B[b], Q[b], q[b], R[b], r[b], c[one], S[cross])
    return problem_b, (K[b], k[b], Quu_inv[b]), (V[b], v[b])


@inner
def solve_one(b, problem, has_c, has_S, damping, free, law, cost, step, scratch):
    """Solve problem ``b`` of a batch; the arguments of ``solve``. Returns whether it is ok."""
    never_inline()
    problem_b, law_b, cost_b = _of(b, problem, has_c, has_S, law, cost)
    good = _backward(problem_b, has_c, has_S, damping[b], law_b, cost_b, scratch)
    return finish_one(b, good, problem, has_c, damping, free, law, cost, step, scratch)


@inner
def finish_one(b, good, problem, has_c, damping, free, law, cost, step, scratch):
    """The rest of a solution whose backward recursion is done, ``good`` or not."""
    never_inline()
    K, k, Quu_inv = law
    V, v = cost
    dz, du, costate, model = step
    problem_b, law_b, cost_b = _of(b, problem, has_c, False, law, cost)
    step_b = (dz[b], du[b], costate[b], model[b])
    for i in range(dz.shape[2]):
        dz[b, 0, i] = 0.0
    if good and free:
        good = _initial(V[b, 0], v[b, 0], damping[b], dz[b, 0], scratch)
    if good:
        _forward(problem_b, has_c, damping[b], law_b, cost_b, step_b)
    # what is not finite in one V makes the earlier ones so, in every place: the first will do
    good = good and all_finite(flat(V[b], 0))
    rest = (
        flat(K, b), flat(k, b), flat(Quu_inv, b), flat(v, b), flat(dz, b), flat(du, b),
        flat(costate, b), flat(model, b),
    )  # fmt: skip
    for values in rest:
        good = good and all_finite(values)
    if not good:
        for values in (flat(V, b), *rest):
            values[:] = values.dtype.type(0.0)
    return good


@compiled
def solve(first, last, problem, has_c, has_S, damping, free, law, cost, step, ok, each, scratch):
    """Solve problems ``first`` to ``last`` of a batch.

    Args:
        first, last: a range of the batch.
        problem: (A, B, Q, q, R, r, c, S), C-contiguous, with the shapes of `ilqr_vae.lqr.problem`.
        has_c, has_S: whether c and S are there; else they are (1, 0, 0) and (1, 0, 0, 0).
        damping: (B,).
        free: whether dz_0 is optimised.
        law: (K, k, Quu_inv), written.
        cost: (V, v), written.
        step: (dz, du, costate, model), written; model is (B, 2), decrease and linear.
        ok: (B,) bool, written. What is written for a problem that is not ok is zeros.
        each: (B,) the numbers 0 to B - 1.
        scratch: flat, ``scratch_size(n, m)`` numbers.
    """
    n, width = problem[0].shape[2], lane_tiles.lanes_of(scratch)
    b = first
    if not (has_c or has_S) and n <= LANES_UP_TO:
        while last - b >= width:
            good = lanes.backward(each[b : b + width], problem, damping, law, cost, scratch)
            for lane in range(width):
                ok[b] = finish_one(
                    b, (good >> lane) & 1 == 1, problem, has_c, damping, free, law, cost, step,
                    scratch,
                )  # fmt: skip
                b += 1
    while b < last:
        ok[b] = solve_one(b, problem, has_c, has_S, damping, free, law, cost, step, scratch)
        b += 1


@inner
def covariance_of_one(A, B, K, Quu_inv, V0, Sigma, scratch):
    """Fill Sigma of one problem; False where V0 is not positive definite.

    With C = A + B K a step is Sigma' = C Sigma C' + B Quu_inv B', one product X' Y of stacked rows.
    """
    never_inline()
    T, n, m = B.shape
    n8, m8 = round_up(n, COLUMNS), round_up(m, COLUMNS)
    P, end = carve(scratch, 0, n8, n8)  # the current Sigma
    if not inverse_of_symmetric(V0, P, n, scratch[end:]):
        return False
    start = end
    X, end = carve(scratch, end, n + m8, n8)  # [C'; B']
    Y, end = carve(scratch, end, n + m8, n8)  # [Sigma C'; Quu_inv B']
    D, end = carve(scratch, end, n8, n8)
    gain, end = carve(scratch, end, m8, n8)
    inverse, end = carve(scratch, end, m8, m8)
    zero = scratch.dtype.type(0.0)
    scratch[start:end] = zero
    below = n * n8
    for t in range(T):
        move_rows(Sigma, t * n * n, n, P, 0, n8, n, n)
        move_rows(gain, 0, n8, K, t * m * n, n, m, n)
        move_rows(inverse, 0, m8, Quu_inv, t * m * m, m, m, m)
        for a in range(m):
            for j in range(n):
                X[n + a, j] = B[t, j, a]
        multiply(gain, 0, n8, X, below, n8, X, 0, n8, m, n, n, False)
        for a in range(m):
            for j in range(n):
                X[n + a, j] = B[t, j, a]
        for i in range(n):
            for j in range(n):
                X[i, j] += A[t, j, i]
        multiply(P, 0, n8, X, 0, n8, Y, 0, n8, n, n, n, False)
        multiply(inverse, 0, m8, X, below, n8, Y, below, n8, m, m, n, False)
        multiply(X, 0, n8, Y, 0, n8, D, 0, n8, n + m, n, n, True)
        P[:] = zero
        add_symmetric(P, 0, P, 0, n8, D, 0, n8, n)
    move_rows(Sigma, T * n * n, n, P, 0, n8, n, n)
    return True


@compiled
def covariance(first, last, A, B, K, Quu_inv, V0, Sigma, ok, scratch):
    """`marginal_covariance_reference` for problems ``first`` to ``last`` of a batch, into Sigma."""
    for b in range(first, last):
        ok[b] = covariance_of_one(A[b], B[b], K[b], Quu_inv[b], V0[b], Sigma[b], scratch)
