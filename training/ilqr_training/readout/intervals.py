"""Fitting ``ilqr_vae.model.intervals``: stated over actual error, the same at every speed.

Of held-out bins, cut into bands by decoded and by true speed, with e the errors and s the stated
deviations, the squared factor of a band is (mean(e^2) + standard error of that mean) / mean(s^2).
The standard error matters where a few errors make up most of the mean, as where a decode mostly
rests, and errs by much when the hand begins to move: other bins have other such errors, and more
often larger than smaller ones. A factor at each median decoded speed of the decoded bands answers
for its own band and, as far as its bins lie in them, for the bands by true speed: a decode that
rests while the hand begins to move must not state what rest would allow.

A band of few independent bins keeps the factor of all of them (``_PRIOR`` such bins), so that
little data changes little.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from ilqr_vae.model.intervals import SpeedScale, stated

Array = NDArray[np.float64]

LEVEL = 0.9
"""Nominal coverage of the intervals."""

_BANDS, _FEWEST = 8, 40
"""Bands by speed, and bins in each at least."""
_APART_S = 0.25
"""Errors closer than this in time count as one."""
_PRIOR = 20.0
_ROUNDS = 12
_TRUE = 0.5
"""Weight of the bands by true speed. Chosen in cross-validation on validation parts."""


def _bands(speed: Array, bands: int) -> tuple[NDArray[np.intp], int]:
    """The band of each bin, and their number; bins of one speed are in one band."""
    edges = np.unique(np.quantile(speed, np.arange(1, bands) / bands, method="higher"))
    band = np.searchsorted(edges, speed)
    found, numbered = np.unique(band, return_inverse=True)
    return numbered, len(found)


def _factor(error: Array, std: Array) -> float:
    """Logarithm of what the deviations are too small by."""
    if not len(error):
        return 0.0
    squares = error**2
    size = squares.mean() + np.sqrt((squares**2).sum()) / squares.size
    return 0.5 * float(np.log(max(size / (std**2).mean(), 1e-24)))


def fit_intervals(
    truth: Array, decoded: Array, std: Array, unit: Array, bin_width: float
) -> SpeedScale | None:
    """The scale of these deviations, or None where the decoded speed has less than two bands.

    Args:
        truth, decoded, std: (T, D) of held-out bins.
        unit: (D,) what the channels are divided by in the speed.
        bin_width: seconds.
    """
    error = truth - decoded
    live = (std > 0).all(0) & (error != 0).any(0)
    error, spread = error[:, live], std[:, live]
    count = min(_BANDS, len(truth) // _FEWEST)
    if count < 2 or not live.any():
        return None
    speeds = [np.linalg.norm(x / unit, axis=1) for x in (decoded, truth)]
    (band, bands), (true, trues) = (_bands(speed, count) for speed in speeds)
    knots = np.array([np.median(speeds[0][band == j]) for j in range(bands)])
    if bands < 2 or not (np.diff(knots) > 0).all():
        return None
    passes = np.zeros((bands, trues))
    np.add.at(passes, (band, true), 1.0)
    apart = max(1.0, _APART_S / bin_width)
    sizes = [passes.sum(1) / apart, passes.sum(0) / apart]
    trust = [size / (size + _PRIOR) for size in sizes]
    passes /= passes.sum(1, keepdims=True)

    def scale(log_factors: Array) -> SpeedScale:
        arrays = (unit, knots, np.exp(log_factors)[:, None].repeat(len(unit), 1))
        return SpeedScale(*(torch.as_tensor(x, dtype=torch.float64) for x in arrays))

    log_factors = np.full(bands, _factor(error, spread))
    for _ in range(_ROUNDS):
        now = stated(scale(log_factors), decoded, std)[:, live]
        own = np.array([_factor(error[band == j], now[band == j]) for j in range(bands)])
        by_truth = np.array([_factor(error[true == j], now[true == j]) for j in range(trues)])
        # squares are averaged, not their logarithms: where the truth is slow because its error is
        # small, it is fast elsewhere because that is large
        by_truth = 0.5 * np.log(passes @ np.exp(2 * trust[1] * by_truth))
        log_factors = log_factors + 0.5 * (trust[0] * own + _TRUE * by_truth)
    return scale(log_factors)
