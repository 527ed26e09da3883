"""Compiled moving horizon: ``MovingHorizon.step`` of a range of streams, stream by stream.

A stream's window comes in, moves where it is full (the bin that leaves is absorbed into the arrival
cost), takes the new bin, is solved, and answers. Letters and formulas are those of ``horizon``.

Only numba code lives here: it must not be wrapped by a type-checking import hook.
"""

# numba infers the types of what it compiles, and gives an intrinsic's first parameter itself.
# pyright: reportMissingParameterType=false, reportCallIssue=false

from __future__ import annotations

import math

from ilqr_vae.fused import observations
from ilqr_vae.fused.iteration import ITERATION_LIMIT, NOT_FINITE, RUNNING
from ilqr_vae.fused.primitives import eight, finite
from ilqr_vae.lqr.algebra import (
    COLUMNS,
    back_substitute,
    carve,
    compiled,
    eliminate,
    inner,
    multiply,
    never_inline,
    part,
)
from ilqr_vae.lqr.kernels import covariance_of_one
from ilqr_vae.lqr.kernels import scratch_size as lqr_scratch
from ilqr_vae.rollout_kernels import linearise, roll_out
from ilqr_vae.rollout_kernels import scratch_size as rollout_scratch


def scratch_size(T, n, m, N, hidden):
    """Numbers of scratch that one thread needs; ``hidden``: of the readout."""
    n8, N8 = n + COLUMNS, N + COLUMNS
    absorb = 2 * n + m + 2 * n8 + 2 * N8 + 5 * n * n + 2 * n + n * m
    absorb += 6 * n8 * n8 + m * n8 + 2 * n8 + 2 * n * n8 + n8
    absorb += max(rollout_scratch(n, m), observations.scratch_size(1, n))
    answer = (T + 1) * n * n + lqr_scratch(n, m) + N8 + n + hidden
    return max(absorb, answer)


@inner
def _carve3(scratch, start, count, rows, columns):
    end = start + count * rows * columns
    return scratch[start:end].reshape(count, rows, columns), end


@inner
def _spd_inverse(M, out, n, scratch):
    """out[:n, :n] = M[:n, :n]^-1; False where M is not positive definite."""
    never_inline()
    E, end = carve(scratch, 0, n, 2 * n)
    zero, one = E.dtype.type(0.0), E.dtype.type(1.0)
    for i in range(n):
        for j in range(n):
            E[i, j] = M[i, j]
            E[i, n + j] = zero
        E[i, n + i] = one
    if not eliminate(E, n, 2 * n, scratch[end:]):
        return False
    back_substitute(E, n, n, 2 * n)
    for i in range(n):
        for j in range(i, n):
            out[i, j] = E[i, n + j]
            out[j, i] = E[i, n + j]
    return True


@part
def _absorb(b, model, before, mean, precision, scratch):
    """Arrival mean and precision one bin later, for stream ``b``; False where they break down."""
    family, weights, bank, prior = model
    centre, input_precision, _ = prior
    _, old_mean, old_precision, z, u, counts, mask = before
    n, m = z.shape[2], u.shape[2]
    n8, N8 = eight(n), eight(counts.shape[2])
    zero = z.dtype.type(0.0)

    # the model around the oldest transition
    z_two, end = carve(scratch, 0, 2, n)
    u_one, end = carve(scratch, end, 1, m)
    f, end = carve(scratch, end, 1, n8)
    h, end = carve(scratch, end, 1, n8)
    d, end = carve(scratch, end, 1, N8)
    w, end = carve(scratch, end, 1, N8)
    A, end = _carve3(scratch, end, 1, n, n)
    B, end = _carve3(scratch, end, 1, n, m)
    Q, end = _carve3(scratch, end, 2, n, n)
    q, end = carve(scratch, end, 2, n)
    rest = scratch[end:]
    nothing = z[b]
    law = z
    roll_out(
        family, weights, False, z[b, 0], nothing, u[b, :1], law, nothing, zero, z_two, u_one, f, h,
        rest,
    )  # fmt: skip
    linearise(family, weights, z_two, f, h, A, B, rest)
    observations.score(bank, z[b, :2], counts[b, :1], mask[b, :1], d, w)
    observations.quadratise(bank, d, w, q, Q, rest)

    start = end
    P, end = carve(scratch, start, n8, n8)
    At, end = carve(scratch, end, n8, n8)
    PAt, end = carve(scratch, end, n8, n8)
    P_minus, end = carve(scratch, end, n8, n8)
    noise, end = carve(scratch, end, n8, n8)
    Bt, end = carve(scratch, end, m, n8)
    information, end = carve(scratch, end, n, n)
    scratch[start:end] = zero
    shift, rest = scratch[end : end + n], scratch[end + n :]

    if not _spd_inverse(old_precision[b], P, n, rest):
        return False
    for i in range(n):
        shift[i] = zero
        for j in range(n):
            At[j, i] = A[0, i, j]
            shift[i] += A[0, i, j] * (old_mean[b, j] - z[b, 0, j])
        for a in range(m):
            # R is diagonal, so R^-1 r = u - centre
            shift[i] -= B[0, i, a] * (u[b, 0, a] - centre[a])
            Bt[a, i] = B[0, i, a] / math.sqrt(input_precision[a])
    multiply(P, 0, n8, At, 0, n8, PAt, n8, n, n, n, False)
    multiply(At, 0, n8, PAt, 0, n8, P_minus, n8, n, n, n, True)
    multiply(Bt, 0, n8, Bt, 0, n8, noise, n8, m, n, n, True)
    trace = zero
    for i in range(n):
        for j in range(i, n):
            P_minus[i, j] += noise[i, j]
            P_minus[j, i] = P_minus[i, j]
        trace += P_minus[i, i]
    for i in range(n):
        P_minus[i, i] += 1e-10 * trace / n
    if not _spd_inverse(P_minus, information, n, rest):
        return False

    E, end = carve(rest, 0, n, n + 1)
    for i in range(n):
        total = -q[1, i]
        for j in range(n):
            total += information[i, j] * shift[j]
            precision[b, i, j] = information[i, j] + Q[1, i, j]
            E[i, j] = precision[b, i, j]
        E[i, n] = total
    if not eliminate(E, n, n + 1, rest[end:]):
        return False
    back_substitute(E, n, n, n + 1)
    for i in range(n):
        mean[b, i] = z[b, 1, i] + E[i, n]
    return True


@part
def _enter(b, model, prior_precision, null, before, after, arriving, predicted, estimate, scratch):
    """Move stream ``b``'s window if it is full, put the new bin in, and predict that bin."""
    family, weights, bank, prior = model
    age, old_mean, old_precision, old_z, old_u, old_counts, old_mask = before
    new_age, mean, precision, _, _, counts, mask = after
    new_counts, new_mask = arriving
    z, u = predicted
    _, _, _, _, _, bits, spikes, _, ended = estimate
    H, m = old_u.shape[1], old_u.shape[2]
    n, N = old_z.shape[2], old_counts.shape[2]
    zero = old_z.dtype.type(0.0)
    moves = 1 if age[b] == H else 0
    if moves == 1:
        if not _absorb(b, model, before, mean, precision, scratch):
            for i in range(n):
                mean[b, i] = old_z[b, 1, i]
                for j in range(n):
                    precision[b, i, j] = prior_precision[i, j]
    else:
        for i in range(n):
            mean[b, i] = old_mean[b, i]
            for j in range(n):
                precision[b, i, j] = old_precision[b, i, j]
    for t in range(H - moves):
        for a in range(m):
            u[b, t, a] = old_u[b, t + moves, a]
        for i in range(N):
            counts[b, t, i] = old_counts[b, t + moves, i]
            mask[b, t, i] = old_mask[b, t + moves, i]
    for t in range(H - moves + 1):
        for i in range(n):
            z[b, t, i] = old_z[b, t + moves, i]
    if moves == 1:
        centre = prior[0]
        z_two, end = carve(scratch, 0, 2, n)
        u_one, end = carve(scratch, end, 1, m)
        f, end = carve(scratch, end, 1, eight(n))
        h, end = carve(scratch, end, 1, eight(n))
        rest, end = carve(scratch, end, 1, m)
        for a in range(m):
            rest[0, a] = centre[a]
            u[b, H - 1, a] = centre[a]
        for i in range(N):
            counts[b, H - 1, i] = zero
            mask[b, H - 1, i] = zero
        roll_out(
            family, weights, False, old_z[b, H], old_z[b], rest, old_z, old_z[b], zero, z_two,
            u_one, f, h, scratch[end:],
        )  # fmt: skip
        for i in range(n):
            z[b, H, i] = z_two[1, i]
    newest = age[b] - moves
    new_age[b] = newest + 1

    expected, end = carve(scratch, 0, 1, eight(N))
    at, end = carve(scratch, end, 1, n)
    for i in range(n):
        at[0, i] = z[b, newest + 1, i]
    observations.expected(bank, at, expected)
    gain, seen = 0.0, 0.0
    ended[b] = RUNNING
    for i in range(N):
        here = new_mask[b, i]
        count = new_counts[b, i] if here > zero else zero
        if not finite(count):
            # counts as not observed, and is reported
            here, count = zero, zero
            ended[b] = NOT_FINITE
        counts[b, newest, i] = count
        mask[b, newest, i] = here
        floor, base = 1e-9, max(null[i], 1e-9)
        rate = max(expected[0, i], floor) if expected[0, i] == expected[0, i] else expected[0, i]
        gain += (count * (math.log(rate) - math.log(base)) - (rate - base)) * here
        seen += count * here
    bits[b] = gain / math.log(2.0)
    spikes[b] = seen


@part
def _features(b, bank, sizes, after, window, scratch):
    """Write what the readout reads of stream ``b``: latents, then unexplained spikes."""
    lags, residuals = sizes
    age, _, _, z, _, counts, mask = after
    n, N = z.shape[2], counts.shape[2]
    zero = z.dtype.type(0.0)
    newest = age[b]
    for lag in range(lags + 1):
        slot = max(newest - lag, 0)
        for i in range(n):
            window[b, lag * n + i] = z[b, slot, i]
    expected, end = carve(scratch, 0, 1, eight(N))
    at, end = carve(scratch, end, 1, n)
    for k in range(residuals):
        slot, first = newest - k, (lags + 1) * n + k * N
        if slot < 1:
            for i in range(N):
                window[b, first + i] = zero
            continue
        for i in range(n):
            at[0, i] = z[b, slot, i]
        observations.expected(bank, at, expected)
        for i in range(N):
            left = counts[b, slot - 1, i] - expected[0, i]
            window[b, first + i] = mask[b, slot - 1, i] * left


@part
def _decode(b, maps, spread, window, z_cov, kinematics, kinematics_std, scratch):
    """Mean and standard deviation of stream ``b``'s kinematics, see ``readout``."""
    W, offset, Ut, U, c, O = maps  # noqa: E741 (the letter of the formula)
    variance, gain, kappa, centre, scale = spread
    n, D, h = z_cov.shape[1], W.shape[0], U.shape[0]
    zero = window.dtype.type(0.0)
    unit, end = carve(scratch, 0, 1, h)
    J, end = carve(scratch, end, 1, n)
    for a in range(h):
        unit[0, a] = c[a]
    # unit by unit each sum would wait for its last term; in this order the units go side by side
    for j in range(Ut.shape[0]):
        x = window[b, j]
        for a in range(h):
            unit[0, a] += Ut[j, a] * x
    for a in range(h):
        # written so that what is not a number stays that
        unit[0, a] = zero if unit[0, a] <= zero else unit[0, a]
    energy = zero
    for k in range(D):
        total = offset[k]
        for j in range(W.shape[1]):
            total += W[k, j] * window[b, j]
        for a in range(h):
            total += O[k, a] * unit[0, a]
        kinematics[b, k] = total
        off = (total - centre[k]) / scale[k]
        energy += off * off / D
    for k in range(D):
        for i in range(n):
            J[0, i] = W[k, i]
        for a in range(h):
            if unit[0, a] == zero:
                continue
            for i in range(n):
                J[0, i] += O[k, a] * U[a, i]
        latent = zero
        for i in range(n):
            row = zero
            for j in range(n):
                row += z_cov[b, i, j] * J[0, j]
            latent += J[0, i] * row
        kinematics_std[b, k] = math.sqrt(gain[k] * latent + variance[k] + kappa[k] * energy)


@part
def _leave(b, bank, wide, readout, work, after, predicted, estimate, scratch):
    """Write stream ``b``'s solved window and its answer."""
    sizes, maps, spread = readout
    state, info = work
    solved_z, solved_u, _, _, status, iterations = state
    problem, law, value, _, _, _, _ = info
    age, _, _, z, u, _, _ = after
    window, z_cov, rates, kinematics, kinematics_std, _, _, done, ended = estimate
    n, N = z.shape[2], rates.shape[1]
    zero = z.dtype.type(0.0)
    newest = age[b]
    done[b] = iterations[b]
    if ended[b] == RUNNING:
        ended[b] = ITERATION_LIMIT if status[b] == RUNNING else status[b]
    broken = status[b] == NOT_FINITE
    # a solve that broke down keeps the prediction rather than spreading what is not finite
    z_best = predicted[1] if broken else solved_z
    u_best = predicted[2] if broken else solved_u
    for t in range(z.shape[1]):
        for i in range(n):
            z[b, t, i] = z_best[b, t, i]
    for t in range(u.shape[1]):
        for a in range(u.shape[2]):
            u[b, t, a] = u_best[b, t, a]

    Sigma, end = _carve3(scratch, 0, newest + 1, n, n)
    good = covariance_of_one(
        problem[0][b, :newest], problem[1][b, :newest], law[0][b, :newest], law[2][b, :newest],
        value[0][b, 0], Sigma, scratch[end:],
    )  # fmt: skip
    if broken:
        good = False
    for i in range(n):
        if not Sigma[newest, i, i] > zero:
            good = False
    # of a solve that broke down nothing is known but what was known before any bin came
    for i in range(n):
        for j in range(n):
            z_cov[b, i, j] = Sigma[newest, i, j] if good else wide[i, j]

    _features(b, bank, sizes, after, window, scratch)
    _decode(b, maps, spread, window, z_cov, kinematics, kinematics_std, scratch)
    expected, end = carve(scratch, 0, 1, eight(N))
    at, end = carve(scratch, end, 1, n)
    for i in range(n):
        at[0, i] = z[b, newest, i]
    observations.expected(bank, at, expected)
    for i in range(N):
        rates[b, i] = expected[0, i]


@compiled
def enter(first, last, fixed, before, after, arriving, predicted, estimate, scratch):
    """Streams ``first`` to ``last`` move their windows and take the new bin in.

    Args:
        fixed: (model, prior precision of z_0, mean rates).
        before, after: the fields of ``HorizonState``; ``after`` is written but for z and u.
        arriving: (counts, mask) of the new bin.
        predicted: (z_0, z, u) of the window before the solve, written.
        estimate: the answer's arrays, written as far as they are known.
    """
    model, prior_precision, null = fixed
    z0, z, u = predicted
    for b in range(first, last):
        _enter(b, model, prior_precision, null, before, after, arriving, (z, u), estimate, scratch)
        for i in range(z.shape[2]):
            z0[b, i] = z[b, 0, i]


@compiled
def leave(first, last, bank, wide, readout, work, after, predicted, estimate, scratch):
    """Streams ``first`` to ``last`` answer.

    Args:
        bank: the channels.
        wide: (n, n) covariance of z_0, stated where a solve broke down.
        readout: ((L, K), (W, b, U', U of z, c, O), (variance, gain, kappa, centre, spread)).
        work: (state, info) of ``iteration`` after the solve.
        after: the fields of ``HorizonState``; z and u are written.
        predicted, estimate: see ``enter``; the estimate is written.
    """
    for b in range(first, last):
        _leave(b, bank, wide, readout, work, after, predicted, estimate, scratch)
