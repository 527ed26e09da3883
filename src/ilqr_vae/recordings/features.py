"""Continuous channels beside the counts: their mean in each bin, or NaN without a sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilqr_vae.errors import RecordingError
from ilqr_vae.recordings.binning import resample
from ilqr_vae.recordings.recording import Recording
from ilqr_vae.recordings.session import Moving


def series_of(
    arrays: Mapping[str, NDArray[Any]],
    n: int,
    what: str,
    times: NDArray[np.float64],
    interval: float,
    rows: NDArray[np.int64] | slice = slice(None),
) -> tuple[Moving, ...]:
    """Convert arrays of channels x samples, or samples x channels, to series on one clock.

    Args:
        n, what: number of samples, and their name for errors.
        times: times of the selected samples, in seconds.
        interval: seconds between samples.
        rows: the selected samples.

    Raises:
        RecordingError: an array has another shape.
    """
    made: list[Moving] = []
    for name, given in arrays.items():
        array = np.atleast_2d(given)
        if array.ndim != 2 or n not in array.shape:
            got = f"shape {array.shape}"
            raise RecordingError(name, expected=f"channels x {n} {what}", got=got)
        values = (array.T if array.shape[1] == n else array).astype(np.float64)
        channels = values.shape[1]
        names = (name,) if channels == 1 else tuple(f"{name}{k}" for k in range(channels))
        made.append(Moving(name, values[rows], times, interval, names, ("",) * channels))
    return tuple(made)


def with_features(
    made: Recording, features: Sequence[Moving], windows: Sequence[tuple[float, int]]
) -> Recording:
    """Return the recording with series as its last channels, unobserved in bins without a sample.

    Args:
        windows: start in seconds and number of bins of each contiguous stretch, in the order of
            the bins of ``made``.

    Raises:
        RecordingError: a series has fewer samples than bins, or none inside the bins, or a name
            is repeated.
    """
    if not features:
        return made
    width, parts = made.bin_width, [made.counts.astype(np.float64)]
    for one in features:
        if one.interval > width * (1 + 1e-6):
            expected = f"a sample in each bin of {width:g} s"
            raise RecordingError(one.path, expected=expected, got=f"one in {one.interval:g} s")
        each = []
        for begin, bins in windows:
            rows = slice(*np.searchsorted(one.times, [begin - width, begin + (bins + 1) * width]))
            given = one.values[rows], one.times[rows], begin, width, bins
            each.append(resample(*given, interval=one.interval))
        parts.append(np.concatenate(each))
        if not np.isfinite(parts[-1]).any(0).all():
            span = f"{windows[0][0]:g} to {windows[-1][0] + width * windows[-1][1]:g} s"
            expected = f"numbers in every channel, within the bins, {span}"
            raise RecordingError(one.path, expected=expected, got="a channel without any")
    values = np.concatenate(parts, axis=1)
    names = (*made.unit_names, *(name for one in features for name in one.names))
    if len(set(names)) < len(names):
        twice = next(name for k, name in enumerate(names) if name in names[:k])
        raise RecordingError("data.features", expected="names of their own", got=f"{twice!r} twice")
    observed = np.isfinite(values)
    if made.observed is not None:
        observed[:, : made.n_units] = made.observed
    return replace(
        made,
        counts=np.where(np.isfinite(values), values, 0.0),
        unit_names=names,
        observed=observed,
        features=len(names) - made.n_units,
    )
