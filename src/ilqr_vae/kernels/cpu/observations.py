"""Compiled cost and curvature of what is observed: Poisson and Gaussian channels, with masks.

All observed groups are N channels side by side, the Poisson ones first, each an affine readout
a = C z + b (see ``pack_channels``). Shapes of one problem: z (T + 1, n), values and mask (T, N); d
and w (T, N rounded up to 8) are slope and curvature of -log p in a, masked.

Only numba code lives here: it must not be wrapped by a type-checking import hook.
"""

# numba infers the types of what it compiles, and gives an intrinsic's first parameter itself.
# pyright: reportMissingParameterType=false, reportCallIssue=false

from __future__ import annotations

import math

import numpy as np

from ilqr_vae.kernels.cpu.algebra import carve, inner, move_row, never_inline
from ilqr_vae.kernels.cpu.panels import (
    exp_inplace,
    new_panels,
    pack,
    pack_products,
    pack_transposed,
    score_poisson,
    times_panels,
    whole,
)
from ilqr_vae.kernels.cpu.tiles import PANEL, at


def scratch_size(T, n):
    """Numbers of scratch that ``quadratise`` needs."""
    return T * (n * (n + 1) // 2 + n + 2 * PANEL)


def pack_channels(C, b, limit, precision, poisson, linked, gain, floor, soft):
    """The channels as the kernels take them.

    Args:
        C: (N, n); b: (N,).
        limit: (N,), where an exponential link goes linear; not read for Gaussian channels.
        precision: (N,), one over variance; not read for Poisson channels.
        poisson: how many channels, the first ones, are Poisson.
        linked: whether the rate of any is other than exp(a): gain (link(a) + floor).
        gain, floor: (N,); soft: (N,), one where the link is softplus, zero where exp.
    """
    N, n = C.shape
    size = -(-N // PANEL) * PANEL

    def padded(x):
        out = np.zeros(size, C.dtype)
        out[:N] = x
        return out

    sizes = ((n, N), (N, n), (N, n * (n + 1) // 2))
    affine, slope, curvature = (new_panels(*size, C.dtype) for size in sizes)
    pack_transposed(C, affine)
    pack(C, slope)
    pack_products(C, curvature)
    rates = (linked, *(padded(x) for x in (gain, floor, soft)))
    return poisson, affine, padded(b), padded(limit), padded(precision), slope, curvature, rates


@inner
def _poisson_row(t, count, bias, limit, values, mask, d, w):
    """Turn a row of d = C z into d and w; returns the row's part of the cost."""
    never_inline()
    beyond = False
    for i in range(count):
        a = d[t, i] + bias[i]
        d[t, i] = a
        beyond |= a > limit[i]
    if beyond:
        return _stretched_row(t, count, limit, values, mask, d, w)
    return score_poisson(d, w, t, values, t * values.shape[1], mask, count)


@inner
def _stretched_row(t, count, limit, values, mask, d, w):
    """``_poisson_row`` where some a is beyond its limit, and the rate linear in it."""
    never_inline()
    one, zero = d.dtype.type(1.0), d.dtype.type(0.0)
    total = 0.0
    for i in range(count):
        w[t, i] = limit[i] if d[t, i] > limit[i] else d[t, i]
    for i in range(count):
        total -= values[t, i] * w[t, i] * mask[t, i]
        if d[t, i] > limit[i]:
            total -= values[t, i] * mask[t, i] * math.log1p(d[t, i] - limit[i])
    exp_inplace(w, t * d.shape[1], count)
    for i in range(count):
        over = d[t, i] - limit[i]
        stretch = one + (over if over > zero else zero)
        slope, seen = w[t, i], mask[t, i]
        total += slope * stretch * seen
        d[t, i] = (slope - values[t, i] / stretch) * seen
        w[t, i] = slope / stretch * seen
    return total


@inner
def _rate(a, limit, gain, floor, soft):
    """The rate gain (link(a) + floor), its log, and the first two derivatives of both in a."""
    zero, one = type(a)(0.0), type(a)(1.0)
    half = type(a)(0.5)
    if soft > zero:
        rest = one / (one + math.exp(a))  # one less the slope
        slope = one / (one + math.exp(-a))
        link = math.log1p(math.exp(-abs(a))) + (a if a > zero else zero)
        second = slope * rest
        tail = math.exp(a) if a < -15 else zero
        log = a - half * tail if a < -15 else math.log(link)
        ratio = one - half * tail if a < -15 else slope / link
        bend = -ratio * (ratio - rest if ratio > rest else zero)
    else:
        over = a - limit if a > limit else zero
        slope = math.exp(a - over)
        link = slope * (one + over)
        second = zero if over > zero else slope
        log = a - over + math.log1p(over)
        ratio = one / (one + over)
        bend = -ratio * ratio if over > zero else zero
    if floor > zero:
        link += floor
        log, ratio = math.log(link), slope / link
        bend = second / link - ratio * ratio
    return gain * link, gain * slope, gain * second, log + math.log(gain), ratio, bend


@inner
def _linked_row(t, count, bias, limit, rates, values, mask, d, w):
    """``_poisson_row`` where the rate is gain (link(a) + floor)."""
    never_inline()
    _, gain, floor, soft = rates
    total, zero = 0.0, d.dtype.type(0.0)
    for i in range(count):
        rate, slope, second, log, ratio, bend = _rate(
            d[t, i] + bias[i], limit[i], gain[i], floor[i], soft[i]
        )
        y, seen = values[t, i], mask[t, i]
        total += (rate - y * log) * seen
        d[t, i] = (slope - y * ratio) * seen
        # as ``likelihoods``: Fisher information under an exp link, else what is positive
        exact = second - y * bend
        curved = exact if exact > zero else zero
        w[t, i] = (curved if soft[i] > zero else slope * ratio) * seen
    return total


@inner
def _gaussian_row(t, first, count, bias, precision, values, mask, d, w):
    total = 0.0
    for i in range(first, count):
        e = d[t, i] + bias[i] - values[t, i]
        seen = mask[t, i]
        total += (
            0.5 * (e * e * precision[i] - math.log(precision[i]) + math.log(2.0 * math.pi)) * seen
        )
        d[t, i] = e * precision[i] * seen
        w[t, i] = precision[i] * seen
    return total


@inner
def score(channels, z, values, mask, d, w):
    """-sum over bins and channels of log p without log y!, and d and w on the way."""
    never_inline()
    poisson, affine, bias, limit, precision, _, _, rates = channels
    T, N = values.shape
    n = z.shape[1]
    N8 = d.shape[1]
    times_panels(at(z, n), n, T, affine, at(d, 0), N8)
    total = 0.0
    for t in range(T):
        if rates[0]:
            total += _linked_row(t, poisson, bias, limit, rates, values, mask, d, w)
        else:
            total += _poisson_row(t, poisson, bias, limit, values, mask, d, w)
        if poisson < N:
            total += _gaussian_row(t, poisson, N, bias, precision, values, mask, d, w)
    return total


@inner
def quadratise(channels, d, w, q, Q, scratch):
    """q[1:] = C' d and Q[1:] = C' diag(w) C, per bin."""
    never_inline()
    slope, curvature = channels[5], channels[6]
    T, N8 = d.shape
    n = q.shape[1]
    triangle = curvature.shape[0] * PANEL
    n8 = whole(n)
    H, end = carve(scratch, 0, T, triangle)
    g, end = carve(scratch, end, T, n8)
    times_panels(at(d, 0), N8, T, slope, at(g, 0), n8)
    times_panels(at(w, 0), N8, T, curvature, at(H, 0), triangle)
    one = Q.dtype.type(1.0)
    for t in range(T):
        for i in range(n):
            q[t + 1, i] = g[t, i]
            column = i  # of the triangle, row by row
            for j in range(i):
                Q[t + 1, i, j] = H[t, column]
                column += n - j - 1
            diagonal = at(Q, ((t + 1) * n + i) * n + i)
            move_row(diagonal, at(H, t * triangle + column), n - i, one)


@inner
def expected(channels, z, mean):
    """E[o | z] of one state z (1, n), into mean (1, N rounded up to 8)."""
    never_inline()
    poisson, affine, bias, limit, _, _, _, (linked, gain, floor, soft) = channels
    N8 = mean.shape[1]
    n = z.shape[1]
    one, zero = mean.dtype.type(1.0), mean.dtype.type(0.0)
    times_panels(at(z, 0), n, 1, affine, at(mean, 0), N8)
    for i in range(N8):
        mean[0, i] += bias[i]
    for i in range(poisson):
        a = mean[0, i]
        if linked:
            mean[0, i] = _rate(a, limit[i], gain[i], floor[i], soft[i])[0]
            continue
        over = a - limit[i]
        least = limit[i] if over > zero else a
        mean[0, i] = math.exp(least) * (one + (over if over > zero else zero))
