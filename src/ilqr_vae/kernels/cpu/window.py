"""Compiled moving horizon: what one stream's window does before and after its solve.

It moves where it is full (the bin that leaves is absorbed into the arrival cost) and takes the new
bin in; when it is solved, it answers. Letters and formulas are those of ``horizon``.

Only numba code lives here: it must not be wrapped by a type-checking import hook.
"""

# numba infers the types of what it compiles, and gives an intrinsic's first parameter itself.
# pyright: reportMissingParameterType=false, reportCallIssue=false

from __future__ import annotations

import math

from ilqr_vae.kernels.cpu import observations
from ilqr_vae.kernels.cpu import readout as decoder
from ilqr_vae.kernels.cpu.algebra import (
    COLUMNS,
    back_substitute,
    carve,
    eliminate,
    inner,
    inverse_of_symmetric,
    move_rows,
    multiply,
    part,
    round_up,
)
from ilqr_vae.kernels.cpu.dynamics import linearise, roll_out
from ilqr_vae.kernels.cpu.dynamics import scratch_size as rollout_scratch
from ilqr_vae.kernels.cpu.iteration import ITERATION_LIMIT, NOT_FINITE, RUNNING, weight
from ilqr_vae.kernels.cpu.lqr import covariance_of_one
from ilqr_vae.kernels.cpu.lqr import scratch_size as lqr_scratch
from ilqr_vae.kernels.cpu.panels import finite, whole
from ilqr_vae.kernels.cpu.tiles import PANEL


def scratch_size(T, n, m, N, hidden, recurrent):
    """Numbers of scratch that one thread needs; ``hidden``, ``recurrent``: of the readout."""
    n8, N8 = n + PANEL, N + PANEL
    absorb = 2 * n + m + 2 * n8 + 2 * N8 + 5 * n * n + 2 * n + n * m
    absorb += 5 * n8 * n8 + 2 * (n8 + m) * n8 + 3 * n8 * n8 + n8
    absorb += max(rollout_scratch(n, m), observations.scratch_size(1, n))
    answer = (T + 1) * n * n + lqr_scratch(n, m) + N8 + n + hidden + 10 * (recurrent + PANEL)
    return max(absorb, answer)


@inner
def _carve3(scratch, start, count, rows, columns):
    end = start + count * rows * columns
    return scratch[start:end].reshape(count, rows, columns), end


@part
def _absorb(b, model, before, mean, precision, scratch):
    """Arrival mean and precision one bin later, for stream ``b``; False where they break down."""
    family, weights, bank, prior = model
    centre, input_precision, _, _ = prior
    _, old_mean, old_precision, z, u, counts, mask = before
    n, m = z.shape[2], u.shape[2]
    n8 = round_up(n, COLUMNS)
    zero = z.dtype.type(0.0)

    # the model around the oldest transition
    z_two, end = carve(scratch, 0, 2, n)
    u_one, end = carve(scratch, end, 1, m)
    f, end = carve(scratch, end, 1, whole(n))
    h, end = carve(scratch, end, 1, whole(n))
    d, end = carve(scratch, end, 1, whole(counts.shape[2]))
    w, end = carve(scratch, end, 1, whole(counts.shape[2]))
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
    linearise(family, weights, z_two, u_one, f, h, A, B, rest)
    observations.score(bank, z[b, :2], counts[b, :1], mask[b, :1], d, w)
    observations.quadratise(bank, d, w, q, Q, rest)

    start = end
    P, end = carve(scratch, start, n8, n8)
    X, end = carve(scratch, end, n + m, n8)  # [A'; R^-1/2 B']
    Y, end = carve(scratch, end, n + m + COLUMNS, n8)  # [P A'; R^-1/2 B']
    P_minus, end = carve(scratch, end, n8, n8)
    information, end = carve(scratch, end, n8, n8)
    scratch[start:end] = zero
    shift, rest = scratch[end : end + n], scratch[end + n :]

    if not inverse_of_symmetric(old_precision[b], P, n, rest):
        return False
    share = z.dtype.type(weight(u_one, 0, prior))
    for i in range(n):
        shift[i] = zero
        for j in range(n):
            X[j, i] = A[0, i, j]
            shift[i] += A[0, i, j] * (old_mean[b, j] - z[b, 0, j])
        for a in range(m):
            # R is diagonal, so R^-1 r = u - centre
            shift[i] -= B[0, i, a] * (u[b, 0, a] - centre[a])
            X[n + a, i] = B[0, i, a] / math.sqrt(share * input_precision[a])
    multiply(P, 0, n8, X, 0, n8, Y, 0, n8, n, n, n, False)
    move_rows(Y, n * n8, n8, X, n * n8, n8, m, n)
    multiply(X, 0, n8, Y, 0, n8, P_minus, 0, n8, n + m, n, n, True)
    trace = zero
    for i in range(n):
        trace += P_minus[i, i]
    for i in range(n):
        P_minus[i, i] += 1e-10 * trace / n
        for j in range(i):
            P_minus[i, j] = P_minus[j, i]
    if not inverse_of_symmetric(P_minus, information, n, rest):
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
def _forget(b, share, prior_precision, before, after):
    """The arrival cost one bin later where the bin that leaves is not absorbed: around the current
    trajectory, with a ``share`` of what was known beyond the prior."""
    _, _, old_precision, old_z, _, _, _ = before
    _, mean, precision, _, _, _, _ = after
    n = old_z.shape[2]
    for i in range(n):
        mean[b, i] = old_z[b, 1, i]
        for j in range(n):
            precision[b, i, j] = prior_precision[i, j]
            if share > 0:
                precision[b, i, j] += share * (old_precision[b, i, j] - prior_precision[i, j])


@part
def _stay(b, before, after):
    """The arrival cost of a window that does not move."""
    _, old_mean, old_precision, _, _, _, _ = before
    _, mean, precision, _, _, _, _ = after
    n = old_mean.shape[1]
    for i in range(n):
        mean[b, i] = old_mean[b, i]
        for j in range(n):
            precision[b, i, j] = old_precision[b, i, j]


@part
def _take_in(b, model, null, before, after, arriving, predicted, estimate, scratch):
    """Move what stream ``b``'s window holds if it is full, put the new bin in, and predict it. The
    arrival cost is written already."""
    family, weights, bank, prior = model
    age, _, _, old_z, old_u, old_counts, old_mask = before
    new_age, _, _, _, _, counts, mask = after
    new_counts, new_mask = arriving
    z, u = predicted
    _, _, _, _, _, bits, spikes, _, ended = estimate
    H, m = old_u.shape[1], old_u.shape[2]
    n, N = old_z.shape[2], old_counts.shape[2]
    zero = old_z.dtype.type(0.0)
    moves = 1 if age[b] == H else 0
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
        f, end = carve(scratch, end, 1, whole(n))
        h, end = carve(scratch, end, 1, whole(n))
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

    expected, end = carve(scratch, 0, 1, whole(N))
    at, end = carve(scratch, end, 1, n)
    for i in range(n):
        at[0, i] = z[b, newest + 1, i]
    observations.expected(bank, at, expected)
    poisson, precision = bank[0], bank[4]
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
        if i < poisson:
            gain += (count * (math.log(rate) - math.log(base)) - (rate - base)) * here
        else:
            error, other = count - expected[0, i], count - null[i]
            gain += 0.5 * precision[i] * (other * other - error * error) * here
        seen += count * here
    bits[b] = gain / math.log(2.0)
    spikes[b] = seen


@part
def leave(b, bank, wide, readout, work, after, predicted, estimate, scratch):
    """Write stream ``b``'s solved window and its answer.

    Args:
        bank: the channels.
        wide: (n, n) covariance of z_0, stated where a solve broke down.
        readout: see ``readout.answer``.
        work: (state, info) of ``iteration`` after the solve.
        after: the fields of ``HorizonState``; z and u are written.
        predicted, estimate: see ``enter``; the estimate is written.
    """
    state, info = work
    solved_z, solved_u, _, _, status, iterations = state
    problem, law, value, _, _, _ = info
    age, _, _, z, u, _, _ = after
    _, z_cov, _, _, _, _, _, done, ended = estimate
    n = z.shape[2]
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

    decoder.answer(b, bank, readout, after, estimate, scratch)


@part
def enter(b, fixed, before, after, arriving, predicted, estimate, scratch):
    """Stream ``b`` moves its window and takes the new bin in.

    Args:
        fixed: (model, prior precision of z_0, mean rates).
        before, after: the fields of ``HorizonState``; ``after`` is written but for z and u.
        arriving: (counts, mask) of the new bin.
        predicted: (z_0, z, u) of the window before the solve, written.
        estimate: the answer's arrays, written as far as they are known.
    """
    model, prior_precision, null = fixed
    z0, z, u = predicted
    if before[0][b] < before[4].shape[1]:
        _stay(b, before, after)
    elif not _absorb(b, model, before, after[1], after[2], scratch):
        _forget(b, z.dtype.type(0.0), prior_precision, before, after)
    _take_in(b, model, null, before, after, arriving, (z, u), estimate, scratch)
    for i in range(z.shape[2]):
        z0[b, i] = z[b, 0, i]


@part
def pass_by(b, fixed, readout, before, after, arriving, estimate, scratch):
    """Stream ``b`` takes the new bin in and answers by its prediction, unsolved.

    Args:
        fixed, before, arriving: see ``enter``; ``readout``: see ``readout.answer``.
        after: the fields of ``HorizonState``, written.
        estimate: the answer's arrays, written; its covariance is not known (NaN).
    """
    model, prior_precision, null = fixed
    trajectory = (after[3], after[4])
    z_cov, done = estimate[1], estimate[7]
    n = z_cov.shape[1]
    unknown = z_cov.dtype.type(math.nan)
    if before[0][b] < before[4].shape[1]:
        _stay(b, before, after)
    else:
        _forget(b, z_cov.dtype.type(0.5), prior_precision, before, after)
    _take_in(b, model, null, before, after, arriving, trajectory, estimate, scratch)
    done[b] = 0
    for i in range(n):
        for j in range(n):
            z_cov[b, i, j] = unknown
    decoder.answer(b, model[2], readout, after, estimate, scratch)
