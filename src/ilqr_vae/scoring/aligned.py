"""Values of a stream around the events of its trials."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ilqr_vae.recordings.binning import bins_of

Array = NDArray[np.float64]


def aligned(
    values: Array,
    at: Array,
    bin_width: float,
    window: tuple[float, float],
    ranges: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None,
) -> tuple[Array, Array]:
    """Values around one event of each of K trials.

    Args:
        values: (T, ...).
        at: (K,) time of the event in bins; NaN if there was none.
        bin_width: seconds.
        window: seconds from the event.
        ranges: (K,) first bin of each trial and (K,) the one after its last; default all bins.

    Returns:
        (L,) seconds from the event, middle of each bin, and (K, L, ...) values, NaN outside.
    """
    low, high = (round(s / bin_width) for s in window)
    offsets = np.arange(low, high + 1)
    made = np.full((len(at), len(offsets), *values.shape[1:]), np.nan)
    for k, when in enumerate(at):
        if np.isfinite(when):
            a, b = (0, len(values)) if ranges is None else (int(ranges[0][k]), int(ranges[1][k]))
            rows = int(bins_of(when, 0.0, 1.0)) + offsets
            inside = (rows >= max(a, 0)) & (rows < min(b, len(values)))
            made[k, inside] = values[rows[inside]]
    return np.asarray((offsets + 0.5) * bin_width, dtype=np.float64), made


def mean_of(values: Array, fewest: int) -> Array:
    """Return the mean over trials of known values; NaN if there are fewer than ``fewest``."""
    known = np.isfinite(values)
    number = known.sum(axis=0)
    total = np.where(known, values, 0.0).sum(axis=0)
    return np.where(number >= fewest, total / np.maximum(number, 1), np.nan)


def telling_apart(rates: Array) -> list[int]:
    """Return units by how much their rates (C, L, N) differ between conditions, largest first.

    The difference is averaged over time. With a single condition it is over time.
    """
    spread = rates.std(axis=0).mean(axis=0) if len(rates) > 1 else rates[0].std(axis=0)
    return [int(unit) for unit in np.argsort(-spread, kind="stable")]
