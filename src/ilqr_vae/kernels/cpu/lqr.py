"""One LQR problem solved by compiled code: the recursion of `reference.py`, arranged for a CPU.

A backward step is a product G = V [B A], with the slope of the cost v + V c as a further column, so
that vectors ride along with matrices; the products H = [B' G  I] + [R S r 0] = [Quu Qux qu I] and
A' G; and the elimination of Quu from H. That leaves the rows U of Quu = U' D^{-1} U, D the diagonal
of U, and h = D U'^{-1} [Qux qu I]. Then

    V = Q + A' V A - h' D^{-1} h,    [-K  -k  Quu^{-1}] = U^{-1} h.

Of symmetric matrices the upper triangle is read and computed. Scratch matrices are padded with
zeros to whole tiles (see `algebra.py`). Letters and signs are those of `ilqr_vae.lqr.problem`. Of a
batch of small problems the recursion is done for several at once (see `lanes.py`), with the same
bits.

Only numba code lives here: it must not be wrapped by a type-checking import hook.
"""

# numba infers the types of what it compiles.
# pyright: reportMissingParameterType=false

from __future__ import annotations

from ilqr_vae.kernels.cpu import lane_tiles, lanes
from ilqr_vae.kernels.cpu.algebra import (
    COLUMNS,
    add_product,
    add_symmetric,
    all_finite,
    back_substitute,
    carve,
    compiled,
    eliminate,
    inner,
    inverse_of_symmetric,
    move_row,
    move_rows,
    multiply,
    multiply_add,
    multiply_subtract,
    never_inline,
    pad_row,
    pad_rows,
    part,
    round_up,
)
from ilqr_vae.kernels.cpu.tiles import at

#: Latents up to which a batch is solved a problem a lane: beyond, a group's matrices leave the
#: nearest cache, and one problem's fill vectors well enough.
LANES_UP_TO = 32


def group(n, itemsize):
    """How many problems with ``n`` latents are solved at once, in numbers of ``itemsize`` bytes."""
    return lane_tiles.VECTOR_BYTES // itemsize if n <= LANES_UP_TO else 1


def scratch_size(n, m):
    """Numbers of scratch that one problem's solution or covariance needs."""
    one = 6 * (n + m + 2 * COLUMNS) ** 2
    return max(one, lanes.scratch_size(n, m) if n <= LANES_UP_TO else 0)


@part
def _backward(problem, has_c, has_S, damping, law, cost, scratch):
    """Fill K, k, V, v and Quu_inv of one problem; False where some Quu is not positive definite."""
    A, B, Q, q, R, r, c, S = problem
    K, k, Quu_inv = law
    V, v = cost
    T, n, m = B.shape
    dtype = A.dtype
    one, zero = dtype.type(1.0), dtype.type(0.0)
    n8, m8 = round_up(n + 1, COLUMNS), round_up(m, COLUMNS)
    ld = m8 + n8
    ldh = ld + m8
    P, end = carve(scratch, 0, n8, n8)  # the upper triangle of V and v while it is made
    G, end = carve(scratch, end, n8, ld)  # V [B A] and the slope v + V c
    H, end = carve(scratch, end, m8, ldh)  # [Quu Qux qu I], eliminated
    L, end = carve(scratch, end, m8, ldh)  # its rows divided by the pivots, later Quu^{-1} H
    unit, end = carve(scratch, end, m8, m8)
    near_A, end = carve(scratch, end, n8, n8)
    near_B, end = carve(scratch, end, n8, m8)
    near_Q, end = carve(scratch, end, n8, n8)
    nothing, end = carve(scratch, end, 1, n8)
    offset, end = carve(scratch, end, 1, n8)  # c
    slope, diagonal = scratch[end : end + n8], scratch[end + n8 : end + n8 + m]
    end += n8 + m
    scratch[:end] = zero
    for a in range(m):
        unit[a, a] = one
    # Matrices are used as they stand, with whole vectors read beyond the ends of rows, which spoils
    # only padding. Near an array's end, where that would leave the array, they are copied.
    beyond_n, beyond_m = round_up(n, COLUMNS) - n, m8 - m

    for i in range(n):
        v[T, i] = q[T, i]
    pad_rows(at(P, 0), n8, at(Q, T * n * n), n, n, n)
    add_symmetric(at(P, 0), n8, at(P, 0), n8, at(nothing, 0), 0, n)
    move_rows(at(V, T * n * n), n, at(P, 0), n8, n, n, one)
    value, ldv = at(P, 0), n8

    for t in range(T - 1, -1, -1):
        A_t, lda = at(A, t * n * n), n
        if A.size - t * n * n < n * n + beyond_n:
            pad_rows(at(near_A, 0), n8, A_t, n, n, n)
            A_t, lda = at(near_A, 0), n8
        B_t, ldb = at(B, t * n * m), m
        if B.size - t * n * m < n * m + beyond_m:
            pad_rows(at(near_B, 0), m8, B_t, m, n, m)
            B_t, ldb = at(near_B, 0), m8
        Q_t, ldq = at(Q, t * n * n), n
        if Q.size - t * n * n < (n + beyond_n) * (n + 1):
            pad_rows(at(near_Q, 0), n8, Q_t, n, n, n)
            Q_t, ldq = at(near_Q, 0), n8
        pad_rows(at(H, 0), ldh, at(R, t * m * m), m, m, m)
        for a in range(m):
            if has_S:
                pad_row(at(H, a * ldh + m8), at(S, (t * m + a) * n), n)
            else:
                move_row(at(H, a * ldh + m8), at(nothing, 0), n8, one)
            move_row(at(H, a * ldh + ld), at(unit, a * m8), m8, one)
            H[a, a] += damping
            H[a, m8 + n] = r[t, a]
        for i in range(n):
            slope[i] = v[t + 1, i]
        if has_c:
            pad_row(at(offset, 0), at(c, t * n), n)
            add_product(at(slope, 0), value, ldv, at(offset, 0), n, n)

        multiply(value, ldv, B_t, ldb, at(G, 0), ld, n, n, m, False)
        multiply(value, ldv, A_t, lda, at(G, m8), ld, n, n, n, False)
        for i in range(n):
            G[i, m8 + n] = slope[i]
        multiply_add(B_t, ldb, at(G, 0), ld, at(H, 0), ldh, n, m, m8 + n + 1, False)
        multiply(A_t, lda, at(G, m8), ld, at(P, 0), n8, n, n, n + 1, True)
        if not eliminate(H, L, m, ldh, diagonal):
            return False
        multiply_subtract(at(H, m8), ldh, at(L, m8), ldh, at(P, 0), n8, m, n, n + 1, True)
        for i in range(n):
            v[t, i] = P[i, n] + q[t, i]
        if beyond_n == 0:
            value, ldv = at(V, t * n * n), n
        add_symmetric(value, ldv, at(P, 0), n8, Q_t, ldq, n)
        if beyond_n > 0:
            move_rows(at(V, t * n * n), n, value, ldv, n, n, one)

        back_substitute(at(L, 0), ldh, m, m8, ldh)
        move_rows(at(K, t * m * n), n, at(L, m8), ldh, m, n, -one)
        for a in range(m):
            k[t, a] = -L[a, m8 + n]
            for b in range(a, m):
                Quu_inv[t, a, b] = L[a, ld + b]
                Quu_inv[t, b, a] = L[a, ld + b]
    return True


@part
def _initial(V, v, damping, dz, scratch):
    """dz = -V^{-1} v after adding the damping to V; False where V is not positive definite."""
    n = v.size
    ld, width = round_up(n + COLUMNS, COLUMNS), round_up(n + 1, COLUMNS)
    E, end = carve(scratch, 0, n, ld)
    S, end = carve(scratch, end, n, ld)
    scratch[:end] = scratch.dtype.type(0.0)
    pad_rows(at(E, 0), ld, at(V, 0), n, n, n)
    for i in range(n):
        V[i, i] += damping
        E[i, i] = V[i, i]
        E[i, n] = v[i]
    if not eliminate(E, S, n, width, scratch[end:]):
        return False
    back_substitute(at(S, 0), ld, n, n, n + 1)
    for i in range(n):
        dz[i] = -S[i, n]
    return True


@part
def _forward(problem, has_c, damping, law, cost, step, scratch):
    """Roll the rest of the step out from dz[0]; model = (decrease, linear).

    The curvature of J along the step follows from stationarity: the gradient of the Lagrangian is
    zero at (dz, du), so is its product with them, and only the offsets' and damping's work is left.
    """
    A, B, _Q, q, _R, r, c, _S = problem
    K, k, _Quu_inv = law
    V, v = cost
    dz, du, costate, model = step
    T, n, m = B.shape
    n8, m8 = round_up(n, COLUMNS), round_up(m, COLUMNS)
    z, after, p = scratch[:n8], scratch[n8 : 2 * n8], scratch[2 * n8 : 3 * n8]
    u, nothing = scratch[3 * n8 : 3 * n8 + m8], scratch[3 * n8 + m8 : 4 * n8 + m8]
    zero, one = z.dtype.type(0.0), z.dtype.type(1.0)
    nothing[:] = zero
    linear, squares, offsets = 0.0, 0.0, 0.0
    pad_row(at(z, 0), at(dz, 0), n)
    for i in range(n):
        squares += z[i] * z[i]
    for t in range(T + 1):
        pad_row(at(p, 0), at(v, t * n), n)
        add_product(at(p, 0), at(V, t * n * n), n, at(z, 0), n, n)
        move_row(at(costate, t * n), at(p, 0), n, one)
        for i in range(n):
            linear += q[t, i] * z[i]
        if has_c and t > 0:
            for i in range(n):
                offsets += p[i] * c[t - 1, i]
        if t == T:
            break
        pad_row(at(u, 0), at(k, t * m), m)
        add_product(at(u, 0), at(K, t * m * n), n, at(z, 0), m, n)
        if has_c:
            pad_row(at(after, 0), at(c, t * n), n)
        else:
            move_row(at(after, 0), at(nothing, 0), n8, one)
        add_product(at(after, 0), at(A, t * n * n), n, at(z, 0), n, n)
        add_product(at(after, 0), at(B, t * n * m), m, at(u, 0), n, m)
        for a in range(m):
            linear += r[t, a] * u[a]
            squares += u[a] * u[a]
        move_row(at(du, t * m), at(u, 0), m, one)
        move_row(at(dz, (t + 1) * n), at(after, 0), n, one)
        z, after = after, z
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
        _forward(problem_b, has_c, damping[b], law_b, cost_b, step_b, scratch)
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
    gain, end = carve(scratch, end, m8, n8)
    inverse, end = carve(scratch, end, m8, m8)
    nothing, end = carve(scratch, end, 1, n8)
    one = scratch.dtype.type(1.0)
    scratch[start:end] = scratch.dtype.type(0.0)
    below = n * n8
    for t in range(T):
        move_rows(at(Sigma, t * n * n), n, at(P, 0), n8, n, n, one)
        pad_rows(at(gain, 0), n8, at(K, t * m * n), n, m, n)
        pad_rows(at(inverse, 0), m8, at(Quu_inv, t * m * m), m, m, m)
        for a in range(m):
            for j in range(n):
                X[n + a, j] = B[t, j, a]
        multiply(at(gain, 0), n8, at(X, below), n8, at(X, 0), n8, m, n, n, False)
        for a in range(m):
            for j in range(n):
                X[n + a, j] = B[t, j, a]
        for i in range(n):
            for j in range(n):
                X[i, j] += A[t, j, i]
        multiply(at(P, 0), n8, at(X, 0), n8, at(Y, 0), n8, n, n, n, False)
        multiply(at(inverse, 0), m8, at(X, below), n8, at(Y, below), n8, m, m, n, False)
        multiply(at(X, 0), n8, at(Y, 0), n8, at(P, 0), n8, n + m, n, n, True)
        add_symmetric(at(P, 0), n8, at(P, 0), n8, at(nothing, 0), 0, n)
    move_rows(at(Sigma, T * n * n), n, at(P, 0), n8, n, n, one)
    return True


@compiled
def covariance(first, last, A, B, K, Quu_inv, V0, Sigma, ok, scratch):
    """`marginal_covariance_reference` for problems ``first`` to ``last`` of a batch, into Sigma."""
    for b in range(first, last):
        ok[b] = covariance_of_one(A[b], B[b], K[b], Quu_inv[b], V0[b], Sigma[b], scratch)
