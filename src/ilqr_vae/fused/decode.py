"""Compiled answers: what a window's newest state says, in expected spikes and in kinematics.

Letters and formulas are those of ``readout``. Only numba code lives here: it must not be wrapped by
a type-checking import hook.
"""

# pyright: reportMissingParameterType=false

from __future__ import annotations

import math

from ilqr_vae.fused import observations
from ilqr_vae.fused.primitives import whole
from ilqr_vae.lqr.algebra import carve, part


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
    expected, end = carve(scratch, 0, 1, whole(N))
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
def answer(b, bank, readout, after, estimate, scratch):
    """Write stream ``b``'s features, kinematics and rates; its covariance is there already.

    Args:
        readout: ((L, K), (W, b, U', U of z, c, O), (variance, gain, kappa, centre, spread)).
        after: the fields of ``HorizonState``.
        estimate: the answer's arrays.
    """
    sizes, maps, spread = readout
    age, _, _, z, _, _, _ = after
    window, z_cov, rates, kinematics, kinematics_std, _, _, _, _ = estimate
    n, N = z.shape[2], rates.shape[1]
    _features(b, bank, sizes, after, window, scratch)
    _decode(b, maps, spread, window, z_cov, kinematics, kinematics_std, scratch)
    expected, end = carve(scratch, 0, 1, whole(N))
    at, end = carve(scratch, end, 1, n)
    for i in range(n):
        at[0, i] = z[b, age[b], i]
    observations.expected(bank, at, expected)
    for i in range(N):
        rates[b, i] = expected[0, i]
