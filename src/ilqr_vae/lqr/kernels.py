"""One LQR problem solved by compiled code: the recursion of `reference.py`, arranged for a CPU.

With F = [B | A] a backward step is two matrix products, H = F' (V F), and one elimination: adding
the step's cost to H gives [[Quu, Qux], [Qux', Qxx]], m steps of Cholesky on its first m rows give
U, W = U^{-T} Qux, and V = Qxx - W' W. Carrying the identity and the gradient along as further
columns gives Quu^{-1}, k and K by one back substitution.

Scratch matrices are padded with zeros to whole tiles (see `algebra.py`). Letters and signs are
those of `types.py`. Only numba code lives here: it must not be wrapped by a type-checking import
hook.
"""

# numba infers the types of what it compiles.
# pyright: reportMissingParameterType=false

from __future__ import annotations

from ilqr_vae.lqr.algebra import (
    COLUMNS,
    ROWS,
    add_product,
    all_finite,
    back_substitute,
    carve,
    compiled,
    eliminate,
    inner,
    multiply,
    never_inline,
    part,
    round_up,
)


def scratch_size(n, m):
    """Numbers of scratch that one problem's solution or covariance needs."""
    wide, narrow = n + COLUMNS, m + COLUMNS
    both = n + m + 2 * COLUMNS
    return 6 * both * both + 4 * wide * wide + 4 * narrow * both


@part
def _backward(problem, has_c, has_S, damping, law, cost, scratch):
    """Fill K, k, V, v and Quu_inv of one problem; False where some Quu is not positive definite."""
    A, B, Q, q, R, r, c, S = problem
    K, k, Quu_inv = law
    V, v = cost
    T, n, m = B.shape
    dtype = A.dtype
    half, one, zero = dtype.type(0.5), dtype.type(1.0), dtype.type(0.0)
    padded = round_up(n, COLUMNS)  # row length of V
    ldf = round_up(m + padded, COLUMNS)  # row length of F, V F and H
    lde = ldf + round_up(m + 1, COLUMNS)  # row length of E = [Quu | Qux | I | qu]
    gradient = ldf + m  # E's last column
    F, end = carve(scratch, 0, n, ldf)
    VF, end = carve(scratch, end, round_up(n, ROWS), ldf)
    H, end = carve(scratch, end, round_up(n + m, ROWS), ldf)
    E, end = carve(scratch, end, m, lde)
    P, end = carve(scratch, end, padded, padded)  # the current V, padded
    scratch[:end] = zero
    slope = scratch[end : end + n]
    g = scratch[end + n : end + 2 * n + m]
    diagonal = scratch[end + 2 * n + m :]

    for i in range(n):
        v[T, i] = q[T, i]
        for j in range(n):
            V[T, i, j] = half * (Q[T, i, j] + Q[T, j, i])
            P[i, j] = V[T, i, j]

    for t in range(T - 1, -1, -1):
        for i in range(n):
            slope[i] = v[t + 1, i]
            for j in range(m):
                F[i, j] = B[t, i, j]
            for j in range(n):
                F[i, m + j] = A[t, i, j]
        if has_c:
            add_product(slope, V[t + 1], c[t])
        multiply(P, 0, padded, F, 0, ldf, VF, ldf, n, n, m + n, False)
        multiply(F, 0, ldf, VF, 0, ldf, H, ldf, n, m + n, m + n, True)
        for j in range(m):
            g[j] = r[t, j]
        for j in range(n):
            g[m + j] = q[t, j]
        for i in range(n):
            factor = slope[i]
            for j in range(m + n):
                g[j] += factor * F[i, j]

        for a in range(m):
            row = E[a]
            for b in range(a, m):
                row[b] = H[a, b] + half * (R[t, a, b] + R[t, b, a])
            row[a] += damping
            for j in range(n):
                row[m + j] = H[a, m + j]
            if has_S:
                for j in range(n):
                    row[m + j] += S[t, a, j]
            for b in range(m):
                row[ldf + b] = zero
            row[ldf + a] = one
            row[gradient] = g[a]
        if not eliminate(E, m, gradient + 1, diagonal):
            return False

        multiply(E, m, lde, E, m, lde, P, padded, m, n, n, True)
        for i in range(n):
            for j in range(i, n):
                value = H[m + i, m + j] + half * (Q[t, i, j] + Q[t, j, i]) - P[i, j]
                P[i, j] = value
                P[j, i] = value
            v[t, i] = g[m + i]
        for i in range(n):
            for j in range(n):
                V[t, i, j] = P[i, j]
        for a in range(m):
            factor = E[a, gradient]
            for j in range(n):
                v[t, j] -= factor * E[a, m + j]

        back_substitute(E, m, m, gradient + 1)
        for a in range(m):
            k[t, a] = -E[a, gradient]
            for j in range(n):
                K[t, a, j] = -E[a, m + j]
            for b in range(a, m):
                Quu_inv[t, a, b] = E[a, ldf + b]
                Quu_inv[t, b, a] = E[a, ldf + b]
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
        add_product(costate[t], V[t], dz[t])
        if has_c and t > 0:
            for i in range(n):
                offsets += costate[t, i] * c[t - 1, i]
        if t == T:
            break
        for a in range(m):
            du[t, a] = k[t, a]
        add_product(du[t], K[t], dz[t])
        for a in range(m):
            linear += r[t, a] * du[t, a]
            squares += du[t, a] * du[t, a]
        for i in range(n):
            dz[t + 1, i] = c[t, i] if has_c else 0.0
        add_product(dz[t + 1], A[t], dz[t])
        add_product(dz[t + 1], B[t], du[t])
    model[0] = -linear - 0.5 * (offsets - linear - damping * squares)
    model[1] = linear


@inner
def solve_one(b, problem, has_c, has_S, damping, free, law, cost, step, flat, scratch):
    """Solve problem ``b`` of a batch; the arguments of ``solve``. Returns whether it is ok."""
    never_inline()
    A, B, Q, q, R, r, c, S = problem
    K, k, Quu_inv = law
    V, v = cost
    dz, du, costate, model = step
    one, cross = (b if has_c else 0), (b if has_S else 0)
    problem_b = (A[b], B[b], Q[b], q[b], R[b], r[b], c[one], S[cross])
    law_b = (K[b], k[b], Quu_inv[b])
    cost_b = (V[b], v[b])
    step_b = (dz[b], du[b], costate[b], model[b])
    for i in range(dz.shape[2]):
        dz[b, 0, i] = 0.0
    good = _backward(problem_b, has_c, has_S, damping[b], law_b, cost_b, scratch)
    if good and free:
        good = _initial(V[b, 0], v[b, 0], damping[b], dz[b, 0], scratch)
    if good:
        _forward(problem_b, has_c, damping[b], law_b, cost_b, step_b)
        for values in flat:
            good = good and all_finite(values[b])
    return good


@compiled
def solve(first, last, problem, has_c, has_S, damping, free, law, cost, step, flat, ok, scratch):
    """Solve problems ``first`` to ``last`` of a batch.

    Args:
        first, last: a range of the batch.
        problem: (A, B, Q, q, R, r, c, S), C-contiguous, with the shapes of `types.py`.
        has_c, has_S: whether c and S are there; else they are (1, 0, 0) and (1, 0, 0, 0).
        damping: (B,).
        free: whether dz_0 is optimised.
        law: (K, k, Quu_inv), written.
        cost: (V, v), written.
        step: (dz, du, costate, model), written; model is (B, 2), decrease and linear.
        flat: everything written, each as (B, -1): what has to be finite.
        ok: (B,) bool, written. What is written for a problem that is not ok has no meaning.
        scratch: flat, ``scratch_size(n, m)`` numbers.
    """
    for b in range(first, last):
        ok[b] = solve_one(
            b, problem, has_c, has_S, damping, free, law, cost, step, flat, scratch
        )  # fmt: skip


@inner
def covariance_of_one(A, B, K, Quu_inv, V0, Sigma, scratch):
    """Fill Sigma of one problem; False where V0 is not positive definite.

    With C = A + B K a step is Sigma' = C Sigma C' + B Quu_inv B', each term a product X' Y.
    """
    never_inline()
    T, n, m = B.shape
    dtype = A.dtype
    half, one, zero = dtype.type(0.5), dtype.type(1.0), dtype.type(0.0)
    wide, narrow = round_up(n, COLUMNS), round_up(m, COLUMNS)
    E, end = carve(scratch, 0, n, 2 * n)
    for i in range(n):
        for j in range(n):
            E[i, n + j] = zero
            E[i, j] = half * (V0[i, j] + V0[j, i])
        E[i, n + i] = one
    if not eliminate(E, n, 2 * n, scratch[end:]):
        return False
    back_substitute(E, n, n, 2 * n)

    start = end
    P, end = carve(scratch, start, wide, wide)  # the current Sigma, padded
    Ct, end = carve(scratch, end, wide, wide)
    PCt, end = carve(scratch, end, wide, wide)
    gain, end = carve(scratch, end, m, wide)
    Bt, end = carve(scratch, end, m, wide)
    inverse, end = carve(scratch, end, m, narrow)
    noise_Bt, end = carve(scratch, end, narrow, wide)
    noise, end = carve(scratch, end, wide, wide)
    scratch[start:end] = zero
    for i in range(n):
        for j in range(i, n):
            P[i, j] = E[i, n + j]
            P[j, i] = E[i, n + j]
    for t in range(T):
        for i in range(n):
            for j in range(n):
                Sigma[t, i, j] = P[i, j]
        for a in range(m):
            for j in range(n):
                gain[a, j] = K[t, a, j]
                Bt[a, j] = B[t, j, a]
            for b in range(m):
                inverse[a, b] = Quu_inv[t, a, b]
        multiply(gain, 0, wide, Bt, 0, wide, Ct, wide, m, n, n, False)
        for i in range(n):
            for j in range(n):
                Ct[i, j] += A[t, j, i]
        multiply(P, 0, wide, Ct, 0, wide, PCt, wide, n, n, n, False)
        multiply(inverse, 0, narrow, Bt, 0, wide, noise_Bt, wide, m, m, n, False)
        multiply(Bt, 0, wide, noise_Bt, 0, wide, noise, wide, m, n, n, True)
        multiply(Ct, 0, wide, PCt, 0, wide, P, wide, n, n, n, True)
        for i in range(n):
            for j in range(i, n):
                value = P[i, j] + noise[i, j]
                P[i, j] = value
                P[j, i] = value
    for i in range(n):
        for j in range(n):
            Sigma[T, i, j] = P[i, j]
    return True


@compiled
def covariance(first, last, A, B, K, Quu_inv, V0, Sigma, ok, scratch):
    """`marginal_covariance_reference` for problems ``first`` to ``last`` of a batch, into Sigma."""
    for b in range(first, last):
        ok[b] = covariance_of_one(A[b], B[b], K[b], Quu_inv[b], V0[b], Sigma[b], scratch)
