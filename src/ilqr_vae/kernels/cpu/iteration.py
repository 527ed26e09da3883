"""Compiled iLQR: ``ilqr.init`` and ``ilqr.step`` of a range of a batch, problem by problem.

Everything a problem's iteration reads or writes is its own, so problems may be shared out among
threads and never change each other's bits. What the last accepted trajectory left (gates f, h;
slopes d and curvatures w of its channels) is kept in one of two slots per problem, the trial goes
to the other. Several iterations may be done in one call; asked for one at a time they give the same
bits. In a batch the LQR problems of several are solved at once, with the same bits as one by one
(see `lanes.py`).

Only numba code lives here: it must not be wrapped by a type-checking import hook.
"""

# numba infers the types of what it compiles, and gives an intrinsic's first parameter itself.
# pyright: reportMissingParameterType=false, reportCallIssue=false

from __future__ import annotations

import math

import numpy as np

from ilqr_vae.kernels.cpu import lane_tiles, lanes, lqr, observations
from ilqr_vae.kernels.cpu.algebra import all_finite, carve, compiled, inner, never_inline, part
from ilqr_vae.kernels.cpu.dynamics import linearise, roll_out
from ilqr_vae.kernels.cpu.dynamics import scratch_size as rollout_scratch
from ilqr_vae.kernels.cpu.panels import finite

RUNNING, CONVERGED, ITERATION_LIMIT, STALLED, NOT_FINITE = 0, 1, 2, 3, 4
CONTINUE, START = 0, 1
NEVER = -1


def scratch_size(T, n, m):
    """Numbers of scratch that one thread needs."""
    trial = (T + 1) * n + T * m
    return trial + max(
        rollout_scratch(n, m), observations.scratch_size(T, n), lqr.scratch_size(n, m)
    )


@inner
def energy(u, t, prior):
    """d = u' L u of the inputs of a bin, centred; L the prior's ``precision``."""
    centre, precision, _, _ = prior
    d = u.dtype.type(0.0)
    for a in range(u.shape[1]):
        e = u[t, a] - centre[a]
        d += e * e * precision[a]
    return d


@inner
def weight(u, t, prior):
    """What the curvature of -log p(u) is of L in a bin: one for a Gaussian prior, for a Student of
    nu degrees of freedom (nu + m) / (nu + d)."""
    nu, one = prior[3], u.dtype.type(1.0)
    return one if nu == 0 else (nu + u.shape[1]) / (nu + energy(u, t, prior))


@inner
def stated_weight(u, t, prior):
    """``weight``, but no more than what the prior's own precision is of L (see ``priors``): by
    this, covariances are stated."""
    nu = prior[3]
    share = weight(u, t, prior)
    own = u.dtype.type((nu - 2.0) / nu) if nu > 0 else share
    return own if own < share else share


@inner
def _initial_and_prior(b, z, u, prior, initial):
    """The parts of J that are not observations."""
    never_inline()
    centre, precision, constant, nu = prior
    mean, arrival = initial
    n, (T, m) = z.shape[1], u.shape
    total = T * constant
    for t in range(T):
        if nu > 0:
            total += 0.5 * (nu + m) * math.log(1.0 + energy(u, t, prior) / nu)
            continue
        for a in range(m):
            e = u[t, a] - centre[a]
            total += 0.5 * e * e * precision[a]
    for i in range(n):
        row = 0.0
        for j in range(n):
            row += arrival[b, i, j] * (z[0, j] - mean[b, j])
        total += 0.5 * (z[0, i] - mean[b, i]) * row
    return total


@part
def begin(b, anew, model, data, initial, start, state, kept, scratch):
    """Roll problem ``b`` out from its start; sets z, u, cost and status. If not ``anew``, from
    the state, which is left as it is."""
    family, weights, channels, prior = model
    values, mask = data
    z0, u0, nothing, no_law = start
    z, u, cost, damping, status, iterations = state
    f, h, d, w, slot = kept
    slot[b] = 0
    zero = z.dtype.type(0.0)
    first = z0[b] if anew else z[b, 0]
    inputs = u0[b] if anew else u[b]
    roll_out(
        family, weights, False, first, nothing, inputs, no_law, nothing, zero, z[b], u[b],
        f[b, 0], h[b, 0], scratch,
    )  # fmt: skip
    J = observations.score(channels, z[b], values[b], mask[b], d[b, 0], w[b, 0])
    if not anew:
        return
    cost[b] = J + _initial_and_prior(b, z[b], u[b], prior, initial)
    damping[b] = 0.0
    iterations[b] = 0
    status[b] = RUNNING if finite(cost[b]) else NOT_FINITE


@part
def _quadratic_model(b, model, initial, state, kept, problem, scratch):
    """Fill the LQR problem around the current trajectory."""
    family, weights, channels, prior = model
    centre, precision, _, _ = prior
    mean, arrival = initial
    z, u, _, _, _, _ = state
    f, h, d, w, slot = kept
    A, B, Q, q, R, r, _, _ = problem
    s = slot[b]
    _, T, n, m = B.shape
    zero = z.dtype.type(0.0)
    linearise(family, weights, z[b], u[b], f[b, s], h[b, s], A[b], B[b], scratch)
    observations.quadratise(channels, d[b, s], w[b, s], q[b], Q[b], scratch)
    for i in range(n):
        total = zero
        for j in range(n):
            Q[b, 0, i, j] = arrival[b, i, j]
            total += arrival[b, i, j] * (z[b, 0, j] - mean[b, j])
        q[b, 0, i] = total
    for t in range(T):
        share = z.dtype.type(weight(u[b], t, prior))
        for i in range(m):
            for j in range(m):
                R[b, t, i, j] = zero
            R[b, t, i, i] = share * precision[i]
            r[b, t, i] = (u[b, t, i] - centre[i]) * precision[i] * share


@part
def _search(b, model, data, initial, state, kept, answer, options, scratch):
    """Backtrack from the full step; takes the first that lowers J enough. Returns alpha or 0."""
    family, weights, channels, prior = model
    values, mask = data
    z, u, cost, _, _, _ = state
    f, h, d, w, slot = kept
    K, k, dz, decrease = answer
    _, armijo, backtracks, _, _ = options
    T, n, m = u.shape[1], z.shape[2], u.shape[2]
    z_try, end = carve(scratch, 0, T + 1, n)
    u_try, end = carve(scratch, end, T, m)
    rest = scratch[end:]
    half, one, two = z.dtype.type(0.5), z.dtype.type(1.0), z.dtype.type(2.0)
    slack = 10 * np.finfo(z.dtype).eps * abs(cost[b])
    other = 1 - slot[b]
    alpha = one
    for _ in range(backtracks + 1):
        start = z_try[0]
        for i in range(n):
            start[i] = z[b, 0, i] + alpha * dz[b, 0, i]
        roll_out(
            family, weights, True, start, z[b], u[b], K[b], k[b], alpha, z_try, u_try,
            f[b, other], h[b, other], rest,
        )  # fmt: skip
        J = observations.score(channels, z_try, values[b], mask[b], d[b, other], w[b, other])
        trial = z.dtype.type(J + _initial_and_prior(b, z_try, u_try, prior, initial))
        promised = alpha * (two - alpha) * decrease
        if trial <= cost[b] - armijo * promised + slack:
            for t in range(T + 1):
                for i in range(n):
                    z[b, t, i] = z_try[t, i]
            for t in range(T):
                for a in range(m):
                    u[b, t, a] = u_try[t, a]
            cost[b] = trial
            slot[b] = other
            return alpha
        alpha *= half
    return alpha * z.dtype.type(0.0)


@compiled
def quadratise(first, last, model, data, initial, start, state, kept, problem, scratch):
    """Fill the LQR problems around the trajectories of ``state``; the arguments of ``solve``."""
    for b in range(first, last):
        begin(b, False, model, data, initial, start, state, kept, scratch)
        _quadratic_model(b, model, initial, state, kept, problem, scratch)


@part
def _move(b, model, data, initial, state, kept, info, options, scratch):
    """Search along the step of problem ``b``, and set its damping and status."""
    _, _, cost, damping, status, iterations = state
    problem, law, _, found, ok, taken = info
    K, k, _ = law
    dz, _, _, expected = found
    tolerance, _, _, damping_min, damping_max = options
    iterations[b] += 1
    converged = False
    if ok[b]:
        before, decrease = abs(cost[b]), expected[b, 0]
        taken[b] = _search(
            b, model, data, initial, state, kept, (K, k, dz, decrease), options, scratch
        )
        converged = decrease <= tolerance * (1 + before)
    if converged:
        status[b] = CONVERGED
    if taken[b] > 0:
        damping[b] = 0.0
    elif not converged:
        raised = max(10 * damping[b], damping_min)
        damping[b] = raised
        q = problem[3]
        if not all_finite(q[b].reshape(q[b].size)):
            status[b] = NOT_FINITE
        elif raised > damping_max:
            status[b] = STALLED


@inner
def solve_one(b, limit, entry, model, data, initial, start, state, kept, info, options, scratch):
    """``solve`` for problem ``b``."""
    never_inline()
    z, _, _, damping, status, _ = state
    problem, law, value, found, ok, taken = info
    nothing_taken = z.dtype.type(0.0)
    # a problem that never runs gets its LQR solution, and no step
    looking = False
    if entry != CONTINUE:
        begin(b, True, model, data, initial, start, state, kept, scratch)
        looking = status[b] != RUNNING
    done = 0
    while looking or (status[b] == RUNNING and done < limit):
        _quadratic_model(b, model, initial, state, kept, problem, scratch)
        ok[b] = lqr.solve_one(
            b, problem, False, False, damping, True, law, value, found, scratch
        )  # fmt: skip
        taken[b] = nothing_taken
        if looking:
            break
        done += 1
        _move(b, model, data, initial, state, kept, info, options, scratch)


@compiled
def solve(
    first, last, limit, entry, model, data, initial, start, state, kept, info, options, queue,
    scratch,
):  # fmt: skip
    """At most ``limit`` iterations of the problems of a range that are running.

    If there are as many as a vector has lanes, the LQR problems of so many are solved at once; a
    problem that is done makes room for the next.

    Args:
        entry: START from ``start``, or CONTINUE where the last call with these arrays ended.
        queue: (2, batch) int64, of no use before and after.
    """
    z, _, _, damping, status, _ = state
    problem, law, value, found, ok, taken = info
    nothing_taken = z.dtype.type(0.0)
    width = lane_tiles.lanes_of(scratch)
    active, rounds = queue[0, first:last], queue[1, first:last]
    most = width if z.shape[2] <= lqr.LANES_UP_TO and last - first >= width else 1
    following, count = first, 0
    while following < last or count:
        while count < most and following < last:
            b, done = following, 0
            following += 1
            if entry != CONTINUE:
                begin(b, True, model, data, initial, start, state, kept, scratch)
                if status[b] != RUNNING:
                    done = NEVER  # gets its LQR solution, and no step
            if done == NEVER or (status[b] == RUNNING and limit > 0):
                active[count], rounds[count] = b, done
                count += 1
        for i in range(count):
            _quadratic_model(active[i], model, initial, state, kept, problem, scratch)
        # with half of the lanes empty it is faster one by one
        together, good = 2 * count > most > 1, 0
        if together:
            for i in range(count, width):
                active[i] = active[0]
            good = lanes.backward(active[:width], problem, damping, law, value, scratch)
        left = 0
        for i in range(count):
            b, done = active[i], rounds[i]
            if together:
                ok[b] = lqr.finish_one(
                    b, (good >> i) & 1 == 1, problem, False, damping, True, law, value, found,
                    scratch,
                )  # fmt: skip
            else:
                ok[b] = lqr.solve_one(
                    b, problem, False, False, damping, True, law, value, found, scratch
                )  # fmt: skip
            taken[b] = nothing_taken
            if done == NEVER:
                continue
            _move(b, model, data, initial, state, kept, info, options, scratch)
            if status[b] == RUNNING and done + 1 < limit:
                active[left], rounds[left] = b, done + 1
                left += 1
        count = left
