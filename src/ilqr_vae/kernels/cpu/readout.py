"""Compiled answers: what a window's newest state says, in expected spikes and in kinematics.

Letters and formulas are those of ``readout``. Only numba code lives here: it must not be wrapped by
a type-checking import hook.
"""

# pyright: reportMissingParameterType=false

from __future__ import annotations

import math

from ilqr_vae.kernels.cpu import observations
from ilqr_vae.kernels.cpu.algebra import carve, inner, part
from ilqr_vae.kernels.cpu.panels import exp_inplace, whole


@part
def _features(b, reads, sizes, after, window, scratch):
    """Write what the readout reads of stream ``b``: latents, unexplained spikes, and for a
    recurrent layer the bins held and their counts.

    Args:
        reads: the channels it takes rates of, and (N,) one for units that it reads, else zero.
    """
    channels, believed = reads
    lags, residuals, recurrent = sizes
    age, z, counts, mask = after.age, after.z, after.counts, after.mask
    n, N = z.shape[2], counts.shape[2]
    zero = z.dtype.type(0.0)
    newest = age[b]
    for lag in range(lags + 1):
        slot = max(newest - lag, 0)
        for i in range(n):
            window[b, lag * n + i] = z[b, slot, i]
    expected, end = carve(scratch, 0, 1, whole(N))
    at, end = carve(scratch, end, 1, n)
    bins = max(residuals, lags if recurrent else 0)
    left_from = (lags + 1) * n
    held_at = left_from + residuals * N
    if recurrent:
        window[b, held_at] = min(newest, lags)
    for k in range(bins):
        slot = newest - k
        left, filled = left_from + k * N, held_at + 1 + k * N
        if slot < 1:
            for i in range(N):
                if k < residuals:
                    window[b, left + i] = zero
                if recurrent and k < lags:
                    window[b, filled + i] = zero
            continue
        for i in range(n):
            at[0, i] = z[b, slot, i]
        observations.expected(channels, at, expected)
        for i in range(N):
            seen, there = counts[b, slot - 1, i], mask[b, slot - 1, i] * believed[i]
            if k < residuals:
                window[b, left + i] = there * (seen - expected[0, i])
            if recurrent and k < lags:
                window[b, filled + i] = seen if there > zero else expected[0, i]


@inner
def _squash(x, count, factor):
    """x = 1 / (1 + exp(-factor x)) of a row's first numbers; up to the next multiple of eight the
    row's others are spoilt."""
    one = x.dtype.type(1.0)
    for i in range(count):
        x[i] *= -factor
    exp_inplace(x, 0, count)
    for i in range(count):
        x[i] = one / (one + x[i])


@part
def _recur(b, layer, at, held, window, h, scratch):
    """h (g) = the recurrent layer's state of stream ``b``, see ``model.readout``.

    Args:
        layer: (A, a, P', p, G', g).
        at: first columns of the state to begin from, and of the newest bin's counts.
        held: how many bins.
    """
    A, a, Pt, p, Gt, g = layer
    start, first = at
    g_units, n, N = A.shape[0], A.shape[1], Pt.shape[0]
    one, two = h.dtype.type(1.0), h.dtype.type(2.0)
    zero = h.dtype.type(0.0)
    given, end = carve(scratch, 0, 2, whole(3 * g_units))
    gates, end = carve(scratch, end, 1, whole(2 * g_units))
    fresh, end = carve(scratch, end, 1, whole(g_units))
    for i in range(g_units):
        total = a[i]
        for j in range(n):
            total += A[i, j] * window[b, start + j]
        h[i] = total
    _squash(h, g_units, two)
    for i in range(g_units):
        h[i] = two * h[i] - one
    for k in range(held - 1, -1, -1):
        for i in range(3 * g_units):
            given[0, i] = p[i]
            given[1, i] = g[i]
        for j in range(N):
            x = window[b, first + k * N + j]
            if x != zero:  # most counts are; what is not a number is not
                for i in range(3 * g_units):
                    given[0, i] += Pt[j, i] * x
        for j in range(g_units):
            x = h[j]
            for i in range(3 * g_units):
                given[1, i] += Gt[j, i] * x
        for i in range(2 * g_units):
            gates[0, i] = given[0, i] + given[1, i]
        _squash(gates[0], 2 * g_units, one)
        for i in range(g_units):
            fresh[0, i] = given[0, 2 * g_units + i] + gates[0, i] * given[1, 2 * g_units + i]
        _squash(fresh[0], g_units, two)
        for i in range(g_units):
            s = gates[0, g_units + i]
            h[i] = (one - s) * (two * fresh[0, i] - one) + s * h[i]


@part
def _decode(b, maps, C, h, spread, window, z_cov, kinematics, kinematics_std, scratch):
    """Mean and standard deviation of stream ``b``'s kinematics, see ``readout``.

    Args:
        C, h: of the recurrent layer, and its state.
    """
    W, offset, Ut, U, c, O = maps  # noqa: E741 (the letter of the formula)
    variance, gain, kappa, centre, scale = spread
    n, D, hidden = z_cov.shape[1], W.shape[0], U.shape[0]
    zero = window.dtype.type(0.0)
    unit, end = carve(scratch, 0, 1, hidden)
    J, end = carve(scratch, end, 1, n)
    for a in range(hidden):
        unit[0, a] = c[a]
    # unit by unit each sum would wait for its last term; in this order the units go side by side
    for j in range(Ut.shape[0]):
        x = window[b, j]
        for a in range(hidden):
            unit[0, a] += Ut[j, a] * x
    for a in range(hidden):
        # written so that what is not a number stays that
        unit[0, a] = zero if unit[0, a] <= zero else unit[0, a]
    energy = zero
    for k in range(D):
        total = offset[k]
        for j in range(W.shape[1]):
            total += W[k, j] * window[b, j]
        for a in range(hidden):
            total += O[k, a] * unit[0, a]
        for a in range(C.shape[1]):
            total += C[k, a] * h[0, a]
        kinematics[b, k] = total
        off = (total - centre[k]) / scale[k]
        energy += off * off / D
    for k in range(D):
        for i in range(n):
            J[0, i] = W[k, i]
        for a in range(hidden):
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
def answer(b, channels, bounds, readout, after, estimates, scratch):
    """Write stream ``b``'s features, kinematics and rates, and whether they are beyond what is
    believable; its covariance is there already.

    Args:
        readout: ((L, K, g), (W, b, U', U of z, c, O), (C, A, a, P', p, G', g), (variance, gain,
            kappa, centre, spread), what ``_features`` reads).
    """
    sizes, maps, layer, spread, reads = readout
    window, z, kinematics = estimates.window, after.z, estimates.kinematics
    newest = after.age[b]
    n, N = z.shape[2], estimates.rates.shape[1]
    _features(b, reads, sizes, after, window, scratch)
    lags, residuals, recurrent = sizes
    h, end = carve(scratch, 0, 1, whole(recurrent))
    if recurrent:
        held_at = (lags + 1) * n + residuals * N
        at = (lags * n, held_at + 1)
        _recur(b, layer[1:], at, min(newest, lags), window, h[0], scratch[end:])
    _decode(
        b, maps, layer[0], h, spread, window, estimates.z_cov, kinematics,
        estimates.kinematics_std, scratch[end:],
    )  # fmt: skip
    expected, end = carve(scratch, 0, 1, whole(N))
    state, end = carve(scratch, end, 1, n)
    beyond = estimates.beyond[b]
    for i in range(n):
        state[0, i] = z[b, newest, i]
        # written so that what is not a number is beyond
        beyond |= not abs(state[0, i] - bounds.latent_centre[i]) <= bounds.latent_reach[i]
    observations.expected(channels, state, expected)
    for i in range(N):
        estimates.rates[b, i] = expected[0, i]
        beyond |= not abs(expected[0, i]) <= bounds.counts[i]
    for k in range(kinematics.shape[1]):
        off = abs(kinematics[b, k] - bounds.decode_centre[k])
        beyond |= not off <= bounds.decode_reach[k]
    estimates.beyond[b] = beyond
