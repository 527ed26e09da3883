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


@part
def _state(x, b):
    """Of the fields of ``HorizonState``."""
    age, mean, precision, z, u, counts, mask = x
    j = b + 1
    return age[b:j], mean[b:j], precision[b:j], z[b:j], u[b:j], counts[b:j], mask[b:j]


@part
def _answer(x, b):
    """Of the answer's arrays."""
    features, z_cov, rates, kinematics, kinematics_std, bits, spikes, done, ended = x
    j = b + 1
    return (
        features[b:j], z_cov[b:j], rates[b:j], kinematics[b:j], kinematics_std[b:j], bits[b:j],
        spikes[b:j], done[b:j], ended[b:j],
    )  # fmt: skip


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
    queue, parts, limit, fixed, readout, states, places, arriving, estimate, room, shared, scratch
):  # fmt: skip
    """Parts of the steps of streams that are still in the queue.

    Args:
        queue: (1,) the next stream to take.
        parts: any of ENTER, SOLVE (after ENTER from the start, else going on) and LEAVE.
        limit: of iterations.
        fixed: (model, prior precision of z_0, mean rates, covariance of z_0, solver options).
        readout: see ``decode.answer``.
        states: arrays of the states before the bins and after them, see ``window.enter``.
        places: (S,) the rows of both.
        arriving, estimate: (counts, mask) of the bins and the answers' arrays, S rows each.
        room: (predicted, work, arrays of no use) with a row for each stream if ``shared``, else
            with one, of this thread.
    """
    model, prior_precision, null, wide, options = fixed
    before, after = states
    sources, targets = places
    predicted, work, none = room
    while True:
        b = next_of(queue)
        if b >= sources.shape[0]:
            break
        at = b if shared else 0
        old, new = _state(before, sources[b]), _state(after, targets[b])
        z0, z, u = _three(predicted, at)
        given, said = _two(arriving, b), _answer(estimate, b)
        state, kept, info = _work(work, at)
        if parts & ENTER:
            about = (model, prior_precision, null)
            window.enter(0, about, old, new, given, (z0, z, u), said, scratch)
        if parts & SOLVE:
            entry = iteration.START if parts & ENTER else iteration.CONTINUE
            data, arrival, start = (new[5], new[6]), (new[1], new[2]), (z0, u, none[0], none[1])
            iteration.solve(
                0, 1, limit, entry, model, data, arrival, start, state, kept, info, options,
                scratch,
            )  # fmt: skip
        if parts & LEAVE:
            window.leave(0, model[2], wide, readout, (state, info), new, (z0, z, u), said, scratch)


@compiled
def pass_by(queue, fixed, readout, states, places, arriving, estimate, scratch):
    """The streams still in the queue take their bins in without a solve; as ``step``."""
    model, prior_precision, null, _, _ = fixed
    before, after = states
    sources, targets = places
    while True:
        b = next_of(queue)
        if b >= sources.shape[0]:
            break
        window.pass_by(
            0, (model, prior_precision, null), readout, _state(before, sources[b]),
            _state(after, targets[b]), _two(arriving, b), _answer(estimate, b), scratch,
        )  # fmt: skip
