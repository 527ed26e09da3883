"""How sure a score is: bootstrap over trials, or over blocks of time where there are none."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ilqr_vae.recordings import Trials

Array = NDArray[np.float64]

DRAWS = 2000
BLOCK_SECONDS = 5.0
FEWEST = 8
"""Pieces to resample under which an interval would say little, and none is given."""


@dataclass(frozen=True, slots=True)
class Pieces:
    """Bins in pieces that are drawn together, since neighbours in time are alike.

    Attributes:
        of: int64 (T,), the piece each bin belongs to, -1 for none.
        number: K.
        what: ``trials``, or ``blocks of 5 s``.
    """

    of: NDArray[np.int64]
    number: int
    what: str


def pieces(n_bins: int, bin_width: float, trials: Trials | None) -> Pieces:
    """Trials where there are ``FEWEST`` or more that hold most of the bins, else blocks."""
    of = np.full(n_bins, -1, dtype=np.int64)
    if trials is not None and len(trials) >= FEWEST:
        for k, (a, b) in enumerate(zip(trials.start.tolist(), trials.stop.tolist(), strict=True)):
            of[max(a, 0) : max(b, 0)] = k
        if (of >= 0).mean() > 0.5:
            return Pieces(of, len(trials), "trials")
    length = max(1, round(BLOCK_SECONDS / bin_width))
    blocks = np.arange(n_bins) // length
    return Pieces(blocks, int(blocks[-1]) + 1 if n_bins else 0, f"blocks of {BLOCK_SECONDS:g} s")


def r2_draws(
    truth: Array, decoded: Array, piece: NDArray[np.int64], number: int, *, seed: int = 0
) -> Array:
    """Mean-over-channels R2 of resampled pieces: (DRAWS,); NaN where a draw has no variance.

    The same seed draws the same pieces, so that two decoders' draws can be subtracted.

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
    centred = truth - truth.mean(axis=0)  # sums of squares of what is far from zero cancel badly
    error, first, second = total((truth - decoded) ** 2), total(centred), total(centred**2)
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = second - first**2 / n[:, None]
        each = np.where(variance > 0, 1.0 - error / variance, np.nan)
    return each.mean(axis=1)


def interval(draws: Array, level: float = 0.95) -> tuple[float, float] | None:
    """The central interval of the finite draws, or None where most are not finite."""
    finite = draws[np.isfinite(draws)]
    if len(finite) < 0.9 * len(draws):
        return None
    low, high = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
