"""Confidence intervals of scores: bootstrap over trials, or over blocks of time.

All scored bins are resampled, including those between trials, so that an interval refers to the
same quantity as its score.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ilqr_vae.recordings import Trials

Array = NDArray[np.float64]

DRAWS = 2000
BLOCK_SECONDS = 5.0
FEWEST = 8
"""Fewest pieces to resample; with fewer there is no interval."""
WITH_GAPS = "each with the time up to the next"


@dataclass(frozen=True, slots=True)
class Pieces:
    """Scored bins in pieces that are drawn together, since neighbouring bins are correlated.

    Attributes:
        of: int64 (n,), piece of each scored bin, 0 to K - 1; no piece is empty.
        number: K.
        what: ``trials``, ``trials, each with the time up to the next``, or ``blocks of 5 s``.
    """

    of: NDArray[np.int64]
    number: int
    what: str


def pieces(scored: NDArray[np.bool_], bin_width: float, trials: Trials | None) -> Pieces:
    """Partition the scored bins into pieces.

    Pieces are trials if at least ``FEWEST`` of them contain most of the scored bins, else blocks.
    Bins between trials belong to the previous trial, those before the first to the first. What
    follows a reach (the return, the rest) depends on it, so trials with the time up to the next are
    closer to independent than blocks, whose edges cut through movements.

    Args:
        scored: bool (T,).
        bin_width: seconds.
        trials: trials on the same bins, in any order, or None.
    """
    bins = np.flatnonzero(scored)
    if trials is not None and len(trials):
        inside = np.zeros(len(scored), dtype=bool)
        for a, b in zip(trials.start.tolist(), trials.stop.tolist(), strict=True):
            inside[max(a, 0) : max(b, 0)] = True
        before = np.searchsorted(np.sort(trials.start), bins, side="right") - 1
        made = _numbered(before.clip(0), "trials")
        share = float(inside[bins].mean()) if len(bins) else 0.0
        if made.number >= FEWEST and share > 0.5:
            return made if share == 1.0 else replace(made, what=f"trials, {WITH_GAPS}")
    length = max(1, round(BLOCK_SECONDS / bin_width))
    return _numbered(bins // length, f"blocks of {BLOCK_SECONDS:g} s")


def _numbered(of: NDArray[np.int64], what: str) -> Pieces:
    found, place = np.unique(of, return_inverse=True)
    return Pieces(place.astype(np.int64), len(found), what)


def r2_draws(
    truth: Array, decoded: Array, piece: NDArray[np.int64], number: int, *, seed: int = 0
) -> Array:
    """Return R2 (DRAWS,), averaged over channels, of resampled pieces; NaN without variance.

    The same seed draws the same pieces, so that draws of two decoders can be subtracted.

    Args:
        truth, decoded: (T, D), finite.
        piece: (T,), 0 to ``number`` - 1.
    """
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(number, np.full(number, 1 / number), size=DRAWS).astype(np.float64)

    def total(values: Array) -> Array:
        each = np.zeros((number, values.shape[1]))
        np.add.at(each, piece, values)
        return weights @ each

    n = weights @ np.bincount(piece, minlength=number).astype(np.float64)
    # centre first: sums of squares far from zero lose precision
    centred = truth - truth.mean(axis=0)
    error, first, second = total((truth - decoded) ** 2), total(centred), total(centred**2)
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = second - first**2 / n[:, None]
        each = np.where(variance > 0, 1.0 - error / variance, np.nan)
    return each.mean(axis=1)


def interval(draws: Array, level: float = 0.95) -> tuple[float, float] | None:
    """Return the central interval of the finite draws, or None if most are not finite."""
    finite = draws[np.isfinite(draws)]
    if len(finite) < 0.9 * len(draws):
        return None
    low, high = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
