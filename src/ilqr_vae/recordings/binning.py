"""Binning of spike times and behaviour series on one grid.

Bin t covers [start + t w, start + (t+1) w).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilqr_vae.errors import RecordingError
from ilqr_vae.recordings.checks import MAX_COUNT, MAX_GAP_SECONDS
from ilqr_vae.recordings.physical_units import conversion

# A spike or sample this close to an edge, in bins, is on the edge: times such as 0.15 and 3 * 0.05
# differ by rounding.
EDGE = 1e-6


def bin_spikes(
    spike_times: Sequence[NDArray[Any]], start: float, bin_width: float, n_bins: int
) -> NDArray[np.uint16]:
    """Count spikes (n_bins, N) of N units from times in seconds, ignoring those outside the bins.

    Raises:
        RecordingError: a time is not finite, or a count exceeds 65535.
    """
    counts = np.zeros((n_bins, len(spike_times)), dtype=np.uint16)
    for unit, times in enumerate(spike_times):
        seconds = np.asarray(times, dtype=np.float64)
        if not np.isfinite(seconds).all():
            raise RecordingError(
                f"units[{unit}].spike_times", expected="finite seconds", got="some that are not"
            )
        bins = bins_of(seconds, start, bin_width)
        inside = np.bincount(bins[(bins >= 0) & (bins < n_bins)], minlength=n_bins)
        counts[:, unit] = _countable(inside, unit)
    return counts


def _countable(inside: NDArray[np.int64], unit: int) -> NDArray[np.int64]:
    """Return the counts of a unit as uint16. Raises RecordingError if one does not fit."""
    if int(inside.max(initial=0)) > MAX_COUNT:
        raise RecordingError(
            f"units[{unit}].spike_times",
            expected=f"at most {MAX_COUNT} spikes a bin",
            got=str(int(inside.max())),
        )
    return inside


def bin_windows(
    spike_times: Sequence[NDArray[Any]],
    begin: NDArray[np.float64],
    bins: NDArray[np.int64],
    bin_width: float,
) -> NDArray[np.uint16]:
    """Count spikes in concatenated windows: (sum of bins, N).

    Args:
        spike_times: N units' increasing times in seconds, finite.
        begin: (K,), left edge of each window in seconds. Windows may overlap.
        bins: (K,), number of bins of each.

    Raises:
        RecordingError: a count exceeds 65535.
    """
    edges = np.concatenate(
        [b + bin_width * (np.arange(n + 1) - EDGE) for b, n in zip(begin, bins, strict=True)]
    )
    # no bin lies between the last edge of a window and the first edge of the next
    real = np.ones(len(edges) - 1, dtype=bool)
    real[np.cumsum(bins + 1)[:-1] - 1] = False
    counts = np.empty((int(bins.sum()), len(spike_times)), dtype=np.uint16)
    for unit, times in enumerate(spike_times):
        inside = np.diff(np.searchsorted(times, edges))[real]
        counts[:, unit] = _countable(inside, unit)
    return counts


def left_edges(start: float, bin_width: float, n_bins: int) -> NDArray[np.float64]:
    """Return the left edges (n_bins,) in seconds."""
    return np.asarray(start + bin_width * np.arange(n_bins), dtype=np.float64)


def bins_of(seconds: NDArray[Any], start: float, bin_width: float) -> NDArray[np.int64]:
    """Return the bin of each time, negative before ``start``."""
    position = (np.asarray(seconds, dtype=np.float64) - start) / bin_width
    return np.floor(position + EDGE).clip(-(2.0**62), 2.0**62).astype(np.int64)


def full_turn(values: NDArray[Any], unit: str, *, circular: bool = False) -> tuple[float, float]:
    """Return the period of a channel (K,) of angles that wrap, and the start of its range.

    The channel holds angles if its ``unit`` is radians or degrees, or if ``circular`` is true; its
    range then tells which of the two. For any other channel the result is (0, 0).
    """
    finite = values[np.isfinite(values)]
    if len(finite) < 2:
        return 0.0, 0.0
    low, high = float(finite.min()), float(finite.max())
    radian = conversion("rad", unit)
    if radian is None and not circular:
        return 0.0, 0.0
    if radian is None:
        radian = 1.0 if high - low < 1.001 * 2 * np.pi else 180.0 / np.pi
    turn = 2 * np.pi * radian
    if high - low > 1.001 * turn or not (np.abs(np.diff(finite)) > 0.75 * turn).any():
        return 0.0, 0.0
    return turn, 0.0 if low >= 0 else min(low, -turn / 2)


def resample(
    values: NDArray[np.float64],
    times: NDArray[np.float64],
    start: float,
    bin_width: float,
    n_bins: int,
    *,
    interval: float | None = None,
) -> NDArray[np.float64]:
    """Resample a series (K, D), with increasing ``times`` (K,) in seconds, to bins: (n_bins, D).

    If there is at least one sample per bin, the value of a bin is the mean of the finite samples in
    it. If samples are slower than bins, it is the linear interpolation at the bin's centre; beyond
    the first and last sample, the nearest one is used for up to half a sampling interval. All other
    values are NaN. ``interval`` is the sampling interval in seconds; by default, the median.

    Raises:
        RecordingError: times do not increase.
    """
    if len(times) > 1 and not (np.diff(times) > 0).all():
        raise RecordingError(
            "kinematics.timestamps", expected="increasing seconds", got="some that do not"
        )
    if interval is None:
        interval = float(np.median(np.diff(times))) if len(times) > 1 else bin_width
    if interval > bin_width * (1 + 1e-6):
        return _interpolate(values, times, start, bin_width, n_bins, interval)
    bins = bins_of(times, start, bin_width)
    inside = (bins >= 0) & (bins < n_bins)
    bins, values = bins[inside], values[inside]
    means = np.full((n_bins, values.shape[1]), np.nan)
    for channel in range(values.shape[1]):
        good = np.isfinite(values[:, channel])
        number = np.bincount(bins[good], minlength=n_bins)
        total = np.bincount(bins[good], weights=values[good, channel], minlength=n_bins)
        np.divide(total, number, out=means[:, channel], where=number > 0)
    return means


def _interpolate(
    values: NDArray[np.float64],
    times: NDArray[np.float64],
    start: float,
    bin_width: float,
    n_bins: int,
    interval: float,
) -> NDArray[np.float64]:
    centres = start + (np.arange(n_bins) + 0.5) * bin_width
    filled = np.full((n_bins, values.shape[1]), np.nan)
    for channel in range(values.shape[1]):
        good = np.isfinite(values[:, channel])
        if not good.any():
            continue
        when, what = times[good], values[good, channel]
        inside = (centres >= when[0] - interval / 2) & (centres <= when[-1] + interval / 2)
        after = np.searchsorted(when, centres).clip(1, max(len(when) - 1, 1))
        if len(when) > 1:  # do not interpolate across missing samples: they are a gap
            hole = when[after] - when[after - 1] > max(2 * interval, MAX_GAP_SECONDS)
            between = (centres > when[after - 1]) & (centres < when[after])
            inside &= ~(hole & between)
        filled[inside, channel] = np.interp(centres[inside], when, what)
    return filled
