"""Scores of a discrete output: accuracy, and calibration of its probabilities."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ilqr_vae.errors import ShapeError

THRESHOLDS = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
_BANDS = 10


@dataclass(frozen=True, slots=True)
class ClassScores:
    """Scores on the n bins of trials whose condition is one of the C classes.

    Attributes:
        names: names of the classes.
        n: number of scored bins.
        accuracy: share of bins whose most probable class is right; chance: share of the most
            frequent class.
        log_loss: mean of -log2 of the probability of the right class, bits.
        calibration_error: mean of |stated - actual| over bins.
        stated, actual, sizes: reliability curve: for each band of the largest probability its mean,
            the share of right bins, and the number of bins.
        answered, right: for each of ``THRESHOLDS`` below which to abstain, the share of bins with a
            class, and the share of these that are right (NaN for none).
    """

    names: tuple[str, ...]
    n: int
    accuracy: float
    chance: float
    log_loss: float
    calibration_error: float
    stated: tuple[float, ...]
    actual: tuple[float, ...]
    sizes: tuple[int, ...]
    answered: tuple[float, ...]
    right: tuple[float, ...]


def score_classes(
    probabilities: NDArray[np.float64], labels: NDArray[np.int64], names: tuple[str, ...]
) -> ClassScores | None:
    """Score probabilities (T, C) against labels (T,), -1 where a bin has no class.

    Rows that are not finite were not answered and are ignored; None if no row is left.

    Raises:
        ShapeError: shapes differ.
    """
    if probabilities.shape != (len(labels), len(names)):
        raise ShapeError(
            "probabilities",
            expected=f"({len(labels)}, {len(names)})",
            got=str(probabilities.shape),
        )
    rows = (labels >= 0) & np.isfinite(probabilities).all(1)
    if not rows.any():
        return None
    p, y = probabilities[rows], labels[rows]
    top, right = p.max(1), p.argmax(1) == y
    band = np.minimum((top * _BANDS).astype(np.int64), _BANDS - 1)
    bands = [band == k for k in np.unique(band)]
    stated = [float(top[b].mean()) for b in bands]
    actual = [float(right[b].mean()) for b in bands]
    sizes = [int(b.sum()) for b in bands]
    kept = [top >= least for least in THRESHOLDS]
    likelihood = np.maximum(p[np.arange(len(y)), y], 1e-300)
    return ClassScores(
        names=names,
        n=len(y),
        accuracy=float(right.mean()),
        chance=float(np.bincount(y).max() / len(y)),
        log_loss=-float(np.log2(likelihood).mean()),
        calibration_error=float(np.average(np.abs(np.subtract(stated, actual)), weights=sizes)),
        stated=tuple(stated),
        actual=tuple(actual),
        sizes=tuple(sizes),
        answered=tuple(float(k.mean()) for k in kept),
        right=tuple(float(right[k].mean()) if k.any() else float("nan") for k in kept),
    )
