"""Scores of rates and decodes, free of torch.

The metrics of the Neural Latents Benchmark (bits per spike, co-bps, fp-bps, velocity R2, PSTH R2)
agree with its tools to rounding. Rates are expected counts per bin, not Hz.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln, ndtri

from ilqr_vae.errors import ShapeError
from ilqr_vae.recordings.split import varies

Array = NDArray[np.float64]

ZERO_RATE = 1e-9
"""Replaces a rate of zero, whose log-likelihood would be infinite."""


def _pair(
    first: NDArray[Any], second: NDArray[Any], names: tuple[str, str], ndim: int | None = None
) -> tuple[Array, Array]:
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if ndim == 2 and a.ndim == 1 and b.ndim == 1:
        a, b = a[:, None], b[:, None]
    if a.shape != b.shape:
        raise ShapeError(names[1], expected=f"{names[0]}'s shape {a.shape}", got=str(b.shape))
    if a.size == 0 or (ndim is not None and a.ndim != ndim):
        raise ShapeError(names[0], expected="not empty, right dimensions", got=str(a.shape))
    return a, b


def poisson_nll(rates: NDArray[Any], spikes: NDArray[Any]) -> float:
    """Return the summed negative log-likelihood in nats of ``spikes`` under Poisson ``rates``.

    Both have the same shape. Entries with NaN spikes are dropped; a zero rate counts as
    ``ZERO_RATE``.

    Raises:
        ShapeError: shapes differ, or a rate that counts is negative or not finite, or spikes are
            negative or infinite.
    """
    spike, rate = _pair(spikes, rates, ("spikes", "rates"))
    seen = ~np.isnan(spike)
    spike, rate = spike[seen], rate[seen]
    if not (np.isfinite(rate).all() and (rate >= 0).all()):
        raise ShapeError("rates", expected="finite counts per bin >= 0", got="some that are not")
    if not (np.isfinite(spike).all() and (spike >= 0).all()):
        raise ShapeError("spikes", expected="counts >= 0, or NaN", got="some that are not")
    rate = np.where(rate == 0, ZERO_RATE, rate)
    return float(np.sum(rate - spike * np.log(rate) + gammaln(spike + 1.0)))


def bits_per_spike(rates: NDArray[Any], spikes: NDArray[Any]) -> float:
    """Return the bits per spike gained by ``rates`` over each unit's mean rate.

    Args:
        rates: (..., N), expected counts per bin; N is the last axis.
        spikes: (..., N), counts; NaN where not observed.

    Returns:
        Bits per spike; NaN where there is no spike.

    Raises:
        ShapeError: as ``poisson_nll``; or a unit is NaN throughout.
    """
    spike, rate = _pair(spikes, rates, ("spikes", "rates"))
    flat = spike.reshape(-1, spike.shape[-1])
    if np.isnan(flat).all(axis=0).any():
        raise ShapeError("spikes", expected="units observed at least once", got="one all NaN")
    total = float(np.nansum(flat))
    if total == 0:
        return float("nan")
    null = np.broadcast_to(np.nanmean(flat, axis=0), spike.shape)
    return (poisson_nll(null, spike) - poisson_nll(rate, spike)) / total / float(np.log(2))


def co_bps(rates: NDArray[Any], spikes: NDArray[Any], held_out: slice | NDArray[Any]) -> float:
    """Return the co-smoothing score: bits per spike of held-out units.

    Args:
        rates, spikes: (..., N).
        held_out: units along the last axis, as a slice, indices or a mask.

    Raises:
        ShapeError: as ``bits_per_spike``.
    """
    return bits_per_spike(np.asarray(rates)[..., held_out], np.asarray(spikes)[..., held_out])


def fp_bps(rates: NDArray[Any], spikes: NDArray[Any], forward: slice | NDArray[Any]) -> float:
    """Return the forward-prediction score: bits per spike of later bins.

    Args:
        rates, spikes: (trials, T, N).
        forward: bins, as a slice, indices or a mask.

    Raises:
        ShapeError: as ``bits_per_spike``.
    """
    return bits_per_spike(np.asarray(rates)[:, forward, :], np.asarray(spikes)[:, forward, :])


def r2_per_axis(truth: NDArray[Any], prediction: NDArray[Any]) -> Array:
    """Return 1 - SSE/SST of each channel.

    Args:
        truth, prediction: (T, D), or (T,) for one channel.

    Returns:
        (D,); NaN for a constant channel.

    Raises:
        ShapeError: shapes differ, or there are no bins.
    """
    y, p = _pair(truth, prediction, ("truth", "prediction"), ndim=2)
    error = np.sum((y - p) ** 2, axis=0)
    total = np.sum((y - y.mean(axis=0)) ** 2, axis=0)
    return 1.0 - np.divide(error, total, out=np.full(len(total), np.nan), where=varies(y))


def r2(truth: NDArray[Any], prediction: NDArray[Any]) -> float:
    """Return ``r2_per_axis`` averaged over the channels that vary, or NaN. Raises ShapeError."""
    y, p = _pair(truth, prediction, ("truth", "prediction"), ndim=2)
    each = r2_per_axis(y, p)
    known = np.isfinite(each)
    return float(each[known].mean()) if known.any() else float("nan")


class RidgeScore(NamedTuple):
    """``r2`` on the scored bins, and the penalty ``alpha`` chosen by grid search."""

    r2: float
    alpha: float


def nlb_velocity_r2(
    rates: NDArray[Any],
    velocity: NDArray[Any],
    fit: slice | NDArray[Any],
    score: slice | NDArray[Any],
) -> RidgeScore:
    """Return the benchmark's R2: velocity decoded from rates by ridge regression.

    The penalty is chosen by 5-fold cross-validation on the bins ``fit`` over
    ``logspace(-4, 0, 9)``; R2 is averaged over axes. Needs scikit-learn (extra ``report``).

    Args:
        rates: (T, N), trials and bins flattened.
        velocity: (T, D).
        fit, score: bins, as slices, indices or masks.

    Raises:
        ShapeError: lengths differ, or fewer than five bins to fit on.
    """
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import GridSearchCV

    x, y = np.asarray(rates, dtype=np.float64), np.asarray(velocity, dtype=np.float64)
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise ShapeError(
            "velocity", expected=f"(bins, axes) beside rates {x.shape}", got=str(y.shape)
        )
    if len(x[fit]) < 5 or len(x[score]) == 0:
        raise ShapeError("fit", expected="five bins or more", got=str(len(x[fit])))
    search: Any = GridSearchCV(Ridge(), {"alpha": np.logspace(-4, 0, 9)}, cv=5)
    search.fit(x[fit], y[fit])
    return RidgeScore(float(search.score(x[score], y[score])), float(search.best_params_["alpha"]))


def psth_r2(rates: NDArray[Any], condition: NDArray[Any], psth: NDArray[Any]) -> float:
    """Return R2 of trial-averaged rates against given PSTHs, averaged over units.

    Args:
        rates: (trials, T, N).
        condition: (trials,), row of ``psth`` of each trial; negative to exclude it.
        psth: (conditions, T, N). Conditions without a trial and NaN bins are excluded.

    Raises:
        ShapeError: shapes differ, or no trial has a condition.
    """
    x, target = np.asarray(rates, dtype=np.float64), np.asarray(psth, dtype=np.float64)
    which = np.asarray(condition)
    if x.ndim != 3 or target.ndim != 3 or target.shape[1:] != x.shape[1:]:
        raise ShapeError("psth", expected=f"(conditions, *{x.shape[1:]})", got=str(target.shape))
    if which.shape != (len(x),) or which.dtype.kind not in "iu":
        raise ShapeError("condition", expected=f"({len(x)},) of int", got=str(which.shape))
    present = [int(c) for c in np.unique(which) if c >= 0]
    if not present or present[-1] >= len(target):
        raise ShapeError("condition", expected=f"rows 0 to {len(target) - 1}", got=str(present))
    mean = np.concatenate([x[which == c].mean(axis=0) for c in present])
    truth = np.concatenate([target[c] for c in present])
    seen = np.isfinite(truth).all(axis=1)
    return r2(truth[seen], mean[seen])


def interval_coverage(
    truth: NDArray[Any], mean: NDArray[Any], std: NDArray[Any], level: float = 0.9
) -> float:
    """Return the share of values inside the central Gaussian interval of probability ``level``.

    Args:
        truth, mean, std: same shape, same units; std > 0.
        level: between 0 and 1, exclusive.

    Returns:
        A fraction, close to ``level`` if the standard deviations are calibrated.

    Raises:
        ShapeError: shapes differ, a std is negative or NaN, or ``level`` is out of range.
    """
    y, m = _pair(truth, mean, ("truth", "mean"))
    y, s = _pair(y, std, ("truth", "std"))
    if not 0 < level < 1:
        raise ShapeError("level", expected="between 0 and 1", got=str(level))
    if not (s >= 0).all():
        raise ShapeError("std", expected="zero or more", got="negative or NaN")
    return float(np.mean(np.abs(y - m) <= float(ndtri(0.5 + level / 2)) * s))


def k_step_r2(values: NDArray[Any], forecasts: NDArray[Any]) -> Array:
    """Return R2 of forecasts at each number of steps ahead, pooled over channels.

    R2_k = 1 - sum (values[t + k] - forecast of it at t)^2 / sum (values[t + k] - mean)^2, sums over
    t, trials and channels, the mean per channel over the same bins.

    Args:
        values: (..., T, D).
        forecasts: (..., T, K, D); ``forecasts[..., t, k - 1, :]`` was made at t for bin t + k.

    Returns:
        (K,), from one step to K; NaN where the bins forecast never vary.

    Raises:
        ShapeError: shapes do not fit, or K is not below T.
    """
    y, f = np.asarray(values, dtype=np.float64), np.asarray(forecasts, dtype=np.float64)
    if y.ndim < 2 or f.ndim != y.ndim + 1 or f.shape[:-2] + f.shape[-1:] != y.shape:
        raise ShapeError("forecasts", expected=f"(..., T, K, D) for {y.shape}", got=str(f.shape))
    n_bins, steps, channels = y.shape[-2], f.shape[-2], y.shape[-1]
    if not 0 < steps < n_bins:
        raise ShapeError("forecasts", expected=f"1 to {n_bins - 1} steps", got=str(steps))
    scores = np.full(steps, np.nan)
    for k in range(1, steps + 1):
        truth = y[..., k:, :].reshape(-1, channels)
        guess = f[..., : n_bins - k, k - 1, :].reshape(-1, channels)
        total = float(np.sum((truth - truth.mean(axis=0)) ** 2))
        if total > 0:
            scores[k - 1] = 1.0 - float(np.sum((truth - guess) ** 2)) / total
    return scores
