"""Compiled moving horizon: ``MovingHorizon.step`` of many streams.

A thread takes a stream, does its whole step in work arrays of the thread's own, small enough to
stay in its core's cache, and takes the next; between two streams it needs neither another thread
nor the interpreter. States are read and written where they lie, each in a row of arrays that hold
many. A stream's bits depend neither on its row nor on who else is there.

Only numba code lives here: it must not be wrapped by a type-checking import hook.
"""

# numba infers the types of what it compiles, and gives an intrinsic's first parameter itself.
# pyright: reportMissingParameterType=false, reportCallIssue=false

from __future__ import annotations

from ilqr_vae.kernels.cpu import iteration, window
from ilqr_vae.kernels.cpu.algebra import compiled, part
from ilqr_vae.kernels.cpu.arguments import (
    Bins,
    Bounds,
    Estimates,
    Fixed,
    Streams,
    Trajectory,
)
from ilqr_vae.kernels.cpu.panels import next_of

# Which parts of a step are done: all in one call; or in several, where somebody is asked between
# iterations whether to go on.
ENTER, SOLVE, LEAVE = 1, 2, 4
WHOLE = ENTER | SOLVE | LEAVE


def scratch_size(T, n, m, N, hidden, recurrent):
    """Numbers of scratch that one thread needs; ``hidden``, ``recurrent``: of the readout."""
    return max(window.scratch_size(T, n, m, N, hidden, recurrent), iteration.scratch_size(T, n, m))


# Row b of each array of a tuple, as arrays that still have their first axis. (numba gives arrays of
# different types to no loop.)


@part
def _two(x, b):
    p, q = x
    return p[b : b + 1], q[b : b + 1]


@part
def _three(x, b):
    p, q, r = x
    return p[b : b + 1], q[b : b + 1], r[b : b + 1]


@part
def _four(x, b):
    p, q, r, s = x
    return p[b : b + 1], q[b : b + 1], r[b : b + 1], s[b : b + 1]


@part
def _five(x, b):
    p, q, r, s, t = x
    return p[b : b + 1], q[b : b + 1], r[b : b + 1], s[b : b + 1], t[b : b + 1]


# Bundles come as plain tuples: numba unwraps a named one an order of magnitude slower.


@part
def _fixed(x):
    model, precision, covariance, mean_rates, options, bounds, initial = x
    counts, centre, reach, lost, decode_centre, decode_reach = bounds
    return Fixed(
        model, precision, covariance, mean_rates, options,
        Bounds(counts, centre, reach, lost, decode_centre, decode_reach), _stream(initial, 0),
    )  # fmt: skip


@part
def _stream(x, b):
    age, mean, precision, z, u, counts, mask = x
    j = b + 1
    return Streams(age[b:j], mean[b:j], precision[b:j], z[b:j], u[b:j], counts[b:j], mask[b:j])


@part
def _bin(x, b):
    counts, mask = x
    return Bins(counts[b : b + 1], mask[b : b + 1])


@part
def _estimate(x, b):
    (
        window, z_cov, rates, kinematics, kinematics_std, bits, spikes, iterations, status,
        ignored, beyond, restarted,
    ) = x  # fmt: skip
    j = b + 1
    return Estimates(
        window[b:j], z_cov[b:j], rates[b:j], kinematics[b:j], kinematics_std[b:j], bits[b:j],
        spikes[b:j], iterations[b:j], status[b:j], ignored[b:j], beyond[b:j], restarted[b:j],
    )  # fmt: skip


@part
def _trajectory(x, b):
    z0, z, u = x
    j = b + 1
    return Trajectory(z0[b:j], z[b:j], u[b:j])


@part
def _work(x, b):
    """Of (state, kept, info) of ``iteration``."""
    (z, u, cost, damping, status, iterations), kept, info = x
    problem, law, value, found, ok, taken = info
    A, B, Q, q, R, r, none, nothing = problem
    j = b + 1
    state = (z[b:j], u[b:j], cost[b:j], damping[b:j], status[b:j], iterations[b:j])
    problem = (A[b:j], B[b:j], Q[b:j], q[b:j], R[b:j], r[b:j], none, nothing)
    info = (problem, _three(law, b), _two(value, b), _four(found, b), ok[b:j], taken[b:j])
    return state, _five(kept, b), info


@compiled
def step(
    queue, parts, limit, fixed, readout, streams, rows, bins, estimates, workspace, shared, scratch
):  # fmt: skip
    """Parts of the steps of streams that are still in the queue.

    Args:
        queue: (1,) the next stream to take.
        parts: any of ENTER, SOLVE (after ENTER from the start, else going on) and LEAVE.
        limit: of iterations.
        fixed: the fields of ``Fixed``.
        readout: see ``readout.answer``.
        streams: before the bins and after them.
        rows: (S,) the streams' rows in both.
        bins, estimates: S rows each.
        workspace: (predicted, work, arrays of no use) with a row for each stream if ``shared``,
            else with one, of this thread.
    """
    before, after = streams
    sources, targets = rows
    predicted, work, none = workspace
    known = _fixed(fixed)
    while True:
        b = next_of(queue)
        if b >= sources.shape[0]:
            break
        at = b if shared else 0
        old, new = _stream(before, sources[b]), _stream(after, targets[b])
        trajectory, estimate = _trajectory(predicted, at), _estimate(estimates, b)
        state, kept, info = _work(work, at)
        if parts & ENTER:
            estimate.restarted[0] = window.lost(0, known.bounds, old)
            if estimate.restarted[0]:
                old = known.initial
            window.enter(0, known, old, new, _bin(bins, b), trajectory, estimate, scratch)
        if parts & SOLVE:
            entry = iteration.START if parts & ENTER else iteration.CONTINUE
            data, arrival = (new.counts, new.mask), (new.mean, new.precision)
            start = (trajectory.z0, trajectory.u, none[0], none[1])
            iteration.solve_one(
                0, limit, entry, known.model, data, arrival, start, state, kept, info,
                known.options, scratch,
            )  # fmt: skip
        if parts & LEAVE:
            window.leave(0, known, readout, (state, info), new, trajectory, estimate, scratch)


@compiled
def predict_only(queue, fixed, readout, streams, rows, bins, estimates, scratch):
    """The streams still in the queue take their bins in without a solve; as ``step``."""
    before, after = streams
    sources, targets = rows
    known = _fixed(fixed)
    while True:
        b = next_of(queue)
        if b >= sources.shape[0]:
            break
        old, estimate = _stream(before, sources[b]), _estimate(estimates, b)
        estimate.restarted[0] = window.lost(0, known.bounds, old)
        if estimate.restarted[0]:
            old = known.initial
        new = _stream(after, targets[b])
        window.predict_only(0, known, readout, old, new, _bin(bins, b), estimate, scratch)
