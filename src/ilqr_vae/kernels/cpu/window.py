"""Compiled moving horizon: what one stream's window does before and after its solve.

A full window moves: the bin that leaves is absorbed into the arrival cost. Then it takes the new
bin in. After the solve it answers. Letters and formulas are those of ``streaming.horizon``.

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
from ilqr_vae.kernels.cpu.iteration import ITERATION_LIMIT, NOT_FINITE, RUNNING, stated_weight
from ilqr_vae.kernels.cpu.lqr import covariance_of_one, solve_one
from ilqr_vae.kernels.cpu.lqr import scratch_size as lqr_scratch
from ilqr_vae.kernels.cpu.panels import finite, whole
from ilqr_vae.kernels.cpu.tiles import PANEL, at


def scratch_size(T, n, m, N, hidden, recurrent):
    """Numbers of scratch that one thread needs; ``hidden``, ``recurrent``: of the readout."""
    n8, N8 = n + PANEL, N + PANEL
    absorb = 2 * n + m + 2 * n8 + 2 * N8 + 5 * n * n + 2 * n + n * m
    absorb += 3 * n8 * n8 + 2 * (n8 + m) * n8 + 5 * n8 * n8 + n8
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
    family, weights, channels, prior = model
    centre, input_precision, _, _ = prior
    old_mean, old_precision, z, u = before.mean, before.precision, before.z, before.u
    counts, mask = before.counts, before.mask
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
    observations.score(channels, z[b, :2], counts[b, :1], mask[b, :1], d, w)
    observations.quadratise(channels, d, w, q, Q, rest)

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
    share = z.dtype.type(stated_weight(u_one, 0, prior))
    for i in range(n):
        shift[i] = zero
        for j in range(n):
            X[j, i] = A[0, i, j]
            shift[i] += A[0, i, j] * (old_mean[b, j] - z[b, 0, j])
        for a in range(m):
            # R is diagonal, so R^-1 r = u - centre
            shift[i] -= B[0, i, a] * (u[b, 0, a] - centre[a])
            X[n + a, i] = B[0, i, a] / math.sqrt(share * input_precision[a])
    multiply(at(P, 0), n8, at(X, 0), n8, at(Y, 0), n8, n, n, n, False)
    move_rows(at(Y, n * n8), n8, at(X, n * n8), n8, m, n, z.dtype.type(1.0))
    multiply(at(X, 0), n8, at(Y, 0), n8, at(P_minus, 0), n8, n + m, n, n, True)
    trace = zero
    for i in range(n):
        trace += P_minus[i, i]
    for i in range(n):
        P_minus[i, i] += 1e-10 * trace / n
        for j in range(i):
            P_minus[i, j] = P_minus[j, i]
    if not inverse_of_symmetric(P_minus, information, n, rest):
        return False

    ld, width = round_up(n + COLUMNS, COLUMNS), round_up(n + 1, COLUMNS)
    E, end = carve(rest, 0, n, ld)
    S, end = carve(rest, end, n, ld)
    rest[:end] = zero
    for i in range(n):
        total = -q[1, i]
        for j in range(n):
            total += information[i, j] * shift[j]
            precision[b, i, j] = information[i, j] + Q[1, i, j]
            E[i, j] = precision[b, i, j]
        E[i, n] = total
    if not eliminate(E, S, n, width, rest[end:]):
        return False
    back_substitute(at(S, 0), ld, n, n, n + 1)
    for i in range(n):
        mean[b, i] = z[b, 1, i] + S[i, n]
    return True


@part
def _forget(b, share, prior_precision, before, after):
    """The arrival cost one bin later where the bin that leaves is not absorbed: around the current
    trajectory, with a ``share`` of what was known beyond the prior."""
    n = before.z.shape[2]
    for i in range(n):
        after.mean[b, i] = before.z[b, 1, i]
        for j in range(n):
            after.precision[b, i, j] = prior_precision[i, j]
            if share > 0:
                known = before.precision[b, i, j] - prior_precision[i, j]
                after.precision[b, i, j] += share * known


@part
def _stay(b, before, after):
    """The arrival cost of a window that does not move."""
    n = before.mean.shape[1]
    for i in range(n):
        after.mean[b, i] = before.mean[b, i]
        for j in range(n):
            after.precision[b, i, j] = before.precision[b, i, j]


@part
def lost(b, bounds, before):
    """Whether stream ``b``'s state is not finite or astronomically far from all that was seen."""
    z, mean = before.z, before.mean
    for i in range(z.shape[2]):
        farthest = bounds.latent_lost[i]
        # written so that what is not a number is lost
        if not abs(mean[b, i] - bounds.latent_centre[i]) <= farthest:
            return True
        for t in range(z.shape[1]):
            if not abs(z[b, t, i] - bounds.latent_centre[i]) <= farthest:
                return True
    for t in range(before.u.shape[1]):
        for a in range(before.u.shape[2]):
            if not finite(before.u[b, t, a]):
                return True
    return False


@part
def _take_in(b, fixed, before, after, bins, z, u, estimates, scratch):
    """Move what stream ``b``'s window holds if it is full, put the new bin in, and predict it. The
    arrival cost is written already."""
    family, weights, channels, prior = fixed.model
    old_z, old_u, counts, mask = before.z, before.u, after.counts, after.mask
    H, m = old_u.shape[1], old_u.shape[2]
    n, N = old_z.shape[2], counts.shape[2]
    zero = old_z.dtype.type(0.0)
    moves = 1 if before.age[b] == H else 0
    for t in range(H - moves):
        for a in range(m):
            u[b, t, a] = old_u[b, t + moves, a]
        for i in range(N):
            counts[b, t, i] = before.counts[b, t + moves, i]
            mask[b, t, i] = before.mask[b, t + moves, i]
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
    newest = before.age[b] - moves
    after.age[b] = newest + 1

    expected, end = carve(scratch, 0, 1, whole(N))
    at, end = carve(scratch, end, 1, n)
    for i in range(n):
        at[0, i] = z[b, newest + 1, i]
    observations.expected(channels, at, expected)
    poisson, precision = channels[0], channels[4]
    gain, spikes = 0.0, 0.0
    ignored, used = 0, 0
    estimates.status[b] = RUNNING
    for i in range(N):
        here = bins.mask[b, i]
        count = bins.counts[b, i] if here > zero else zero
        if not finite(count):
            # counts as not observed, and is reported
            here, count = zero, zero
            estimates.status[b] = NOT_FINITE
        elif abs(count) > fixed.bounds.counts[i]:
            here, count = zero, zero
            ignored += 1
        if here > zero:
            used += 1
        counts[b, newest, i] = count
        mask[b, newest, i] = here
        floor, base = 1e-9, max(fixed.mean_rates[i], 1e-9)
        rate = max(expected[0, i], floor) if expected[0, i] == expected[0, i] else expected[0, i]
        if i < poisson:
            gain += (count * (math.log(rate) - math.log(base)) - (rate - base)) * here
        else:
            error, other = count - expected[0, i], count - fixed.mean_rates[i]
            gain += 0.5 * precision[i] * (other * other - error * error) * here
        spikes += count * here
    estimates.bits[b] = gain / math.log(2.0)
    estimates.spikes[b] = spikes
    estimates.ignored[b] = ignored
    estimates.beyond[b] = ignored > 0 and used == 0


@part
def leave(b, fixed, readout, work, after, predicted, estimates, scratch):
    """Write stream ``b``'s solved window and its answer.

    Args:
        readout: see ``readout.answer``.
        work: (state, info) of ``iteration`` after the solve.
        after: z and u are written.
        predicted: see ``enter``.
        estimates: written.
    """
    state, info = work
    solved_z, solved_u, _, damping, status, iterations = state
    problem, law, value, found, _, _ = info
    prior = fixed.model[3]
    z, u, z_cov = after.z, after.u, estimates.z_cov
    n = z.shape[2]
    zero = z.dtype.type(0.0)
    newest = after.age[b]
    estimates.iterations[b] = iterations[b]
    if estimates.status[b] == RUNNING:
        estimates.status[b] = ITERATION_LIMIT if status[b] == RUNNING else status[b]
    broken = status[b] == NOT_FINITE
    # a solve that broke down keeps the prediction rather than spreading what is not finite
    z_best = predicted.z if broken else solved_z
    u_best = predicted.u if broken else solved_u
    for t in range(z.shape[1]):
        for i in range(n):
            z[b, t, i] = z_best[b, t, i]
    for t in range(u.shape[1]):
        for a in range(u.shape[2]):
            u[b, t, a] = u_best[b, t, a]

    if prior[3] > 0:
        # covariances are stated with another curvature of the inputs than the solver's
        R = problem[4]
        for t in range(u.shape[1]):
            share = z.dtype.type(stated_weight(u[b], t, prior))
            for a in range(u.shape[2]):
                R[b, t, a, a] = share * prior[1][a]
        damping[b] = zero
        solve_one(b, problem, False, False, damping, True, law, value, found, scratch)
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
            z_cov[b, i, j] = Sigma[newest, i, j] if good else fixed.prior_covariance[i, j]

    decoder.answer(b, fixed.model[2], fixed.bounds, readout, after, estimates, scratch)


@part
def enter(b, fixed, before, after, bins, predicted, estimates, scratch):
    """Stream ``b`` moves its window and takes the new bin in.

    Args:
        fixed: see ``Fixed``.
        before, after: the streams; ``after`` is written but for z and u.
        bins: the new bins.
        predicted: the window's trajectory before the solve, written.
        estimates: the answers, written as far as they are known.
    """
    if before.age[b] < before.u.shape[1]:
        _stay(b, before, after)
    elif not _absorb(b, fixed.model, before, after.mean, after.precision, scratch):
        _forget(b, before.z.dtype.type(0.0), fixed.prior_precision, before, after)
    _take_in(b, fixed, before, after, bins, predicted.z, predicted.u, estimates, scratch)
    for i in range(before.z.shape[2]):
        predicted.z0[b, i] = predicted.z[b, 0, i]


@part
def predict_only(b, fixed, readout, before, after, bins, estimates, scratch):
    """Stream ``b`` takes the new bin in and answers by its prediction, unsolved; its covariance is
    not known (NaN). Arguments as of ``enter`` and ``leave``; ``after`` is written."""
    z_cov = estimates.z_cov
    n = z_cov.shape[1]
    unknown = z_cov.dtype.type(math.nan)
    if before.age[b] < before.u.shape[1]:
        _stay(b, before, after)
    else:
        _forget(b, z_cov.dtype.type(0.5), fixed.prior_precision, before, after)
    _take_in(b, fixed, before, after, bins, after.z, after.u, estimates, scratch)
    estimates.iterations[b] = 0
    for i in range(n):
        for j in range(n):
            z_cov[b, i, j] = unknown
    decoder.answer(b, fixed.model[2], fixed.bounds, readout, after, estimates, scratch)
