"""Fitting ``ilqr_vae.model.intervals``: the same ratio of stated to actual error at every speed.

Held-out bins are divided into bands by decoded and by true speed. With errors e and stated
deviations s, the squared factor of a band is (mean(e^2) + standard error of that mean) / mean(s^2).
The standard error matters if a few errors dominate the mean, as at rest, where large errors occur
when the hand starts to move: in other bins such errors are more often larger than smaller. The
factor at the median decoded speed of a decoded band combines the factor of that band with those of
the true-speed bands that share its bins: when a decode is at rest while the hand starts to move,
the stated deviation must not be that of rest.

Errors within ``_BLOCK_S`` seconds count as one. All factors are multiplied by the ratio of the
Student quantile for so many errors to the normal quantile: by 1.18 for 15 s, by 1.02 for two
minutes. Few errors say little about the size of later ones, the more so as the readout was chosen
on them.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from ilqr_vae.model.intervals import SpeedScale, stated

Array = NDArray[np.float64]

LEVEL = 0.9
"""Nominal coverage of the intervals."""

_BANDS, _FEWEST = 8, 40
"""Largest number of bands by speed, and fewest bins in each."""
_BLOCK_S = 2.5
"""Chosen on StevensonV2, trained on 1.3 minutes, by the coverage of its validation part."""
_LEAST_FREEDOM = 2.0
"""Fewest degrees of freedom of the Student quantile."""
_ROUNDS = 12
_TRUE = 0.5
"""Weight of the bands by true speed, chosen by cross-validation on validation parts."""


def _bands(speed: Array, bands: int) -> tuple[NDArray[np.intp], int]:
    """Return the band of each bin, and the number of bands; equal speeds share a band."""
    edges = np.unique(np.quantile(speed, np.arange(1, bands) / bands, method="higher"))
    band = np.searchsorted(edges, speed)
    found, numbered = np.unique(band, return_inverse=True)
    return numbered, len(found)


def _factor(error: Array, std: Array) -> float:
    """Return the logarithm of the factor by which the deviations are too small."""
    if not len(error):
        return 0.0
    squares = error**2
    size = squares.mean() + np.sqrt((squares**2).sum()) / squares.size
    return 0.5 * float(np.log(max(size / (std**2).mean(), 1e-24)))


def _few(seconds: float) -> float:
    """Return the factor of deviations that were fitted on so many seconds."""
    level = 0.5 + LEVEL / 2
    freedom = max(seconds / _BLOCK_S, _LEAST_FREEDOM)
    return float(stats.t.ppf(level, freedom) / stats.norm.ppf(level))


def fit_intervals(
    truth: Array, decoded: Array, std: Array, unit: Array, bin_width: float
) -> SpeedScale | None:
    """Fit the scale of these deviations; None if the decoded speed has fewer than two bands.

    Args:
        truth, decoded, std: (T, D) of held-out bins.
        unit: (D,) divisors of the channels in the speed.
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
    passes /= passes.sum(1, keepdims=True)

    def scale(log_factors: Array) -> SpeedScale:
        arrays = (unit, knots, np.exp(log_factors)[:, None].repeat(len(unit), 1))
        return SpeedScale(*(torch.as_tensor(x, dtype=torch.float64) for x in arrays))

    log_factors = np.full(bands, _factor(error, spread))
    for _ in range(_ROUNDS):
        now = stated(scale(log_factors), decoded, std)[:, live]
        own = np.array([_factor(error[band == j], now[band == j]) for j in range(bands)])
        by_truth = np.array([_factor(error[true == j], now[true == j]) for j in range(trues)])
        # average squares, not logarithms: in bands by true speed, small errors in slow bins come
        # with large errors in fast ones
        by_truth = 0.5 * np.log(passes @ np.exp(2 * by_truth))
        log_factors = log_factors + 0.5 * (own + _TRUE * by_truth)
    return scale(log_factors + np.log(_few(len(truth) * bin_width)))
