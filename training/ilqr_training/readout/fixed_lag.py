"""Fitting ``ilqr_vae.model.fixed_lag``: corrections of a decode by later bins.

Ridge maps from windows to the kinematics of their newest bin and of the K bins before it. They
share one penalty and one factor w, both chosen on the held-out part; w = 0 if waiting gains
nothing. The maps are refitted on both parts. Deviations are scaled by the ratio of the held-out
errors to those of the first decodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from scipy import linalg

from ilqr_vae.model.fixed_lag import FixedLag
from ilqr_vae.model.readout import KinematicReadout
from ilqr_vae.recordings.split import varies
from ilqr_vae.scoring.metrics import r2

Array = NDArray[np.float64]

_FACTORS = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class LagWindows:
    """The windows of a span, and their targets.

    Attributes:
        x: (T, F); y: (T, D); scored: (T,), True for bins with a valid target.
        segment: (T,) index of the segment of each bin.
    """

    x: Array
    y: Array
    scored: NDArray[np.bool_]
    segment: NDArray[np.int64]

    def rows(self, lags: int) -> NDArray[np.int64]:
        """Return the scored bins whose ``lags`` previous bins are scored, in the same segment."""
        t = np.arange(lags, len(self.x))
        back = t[:, None] - np.arange(lags + 1)
        whole = self.scored[back].all(1) & (self.segment[t] == self.segment[t - lags])
        return t[whole]


def fit_fixed_lag(
    train: LagWindows, held: LagWindows, decoded: Array, lags: int, alphas: Sequence[float]
) -> FixedLag | None:
    """Fit the maps; None if a part has no ``lags`` + 1 consecutive bins.

    Args:
        decoded: (T, D) decodes of the held-out bins by the readout fitted on the training part.
        lags: K.
        alphas: penalties to try.
    """
    rows, seen = train.rows(lags), held.rows(lags)
    if not len(rows) or not len(seen):
        return None
    x_mean, variance = train.x[rows].mean(0), train.x[rows].var(0)
    # do not amplify a unit that hardly fires
    x_scale = np.sqrt(variance + 0.1 * variance.mean() + 1e-18)
    y_mean = train.y[rows].mean(0)
    y_scale = np.where(varies(train.y[rows]), train.y[rows].std(0) + 1e-12, 1.0)

    def sums(part: LagWindows, at: NDArray[np.int64]) -> tuple[Array, Array, Array]:
        x = (part.x[at] - x_mean) / x_scale
        y = [(part.y[at - k] - y_mean) / y_scale for k in range(lags + 1)]
        return x, x.T @ x, x.T @ np.concatenate(y, 1)

    def ridge(gram: Array, cross: Array, alpha: float) -> Array:
        return linalg.solve(gram + alpha * np.eye(len(gram)), cross, assume_a="pos")

    _, gram, cross = sums(train, rows)
    x, more_gram, more_cross = sums(held, seen)
    x_newest = (held.x[np.stack([seen - k for k in range(lags + 1)])] - x_mean) / x_scale
    D = train.y.shape[1]

    def later(maps: Array, k: int) -> Array:
        """Return the decodes of the bins k before, without the factor."""
        each = maps.reshape(len(maps), lags + 1, D)
        return (x @ each[:, k] - x_newest[k] @ each[:, 0]) * y_scale

    chosen, best = (0.0, float(alphas[0])), 0.0
    fitted = {float(alpha): ridge(gram, cross, alpha) for alpha in alphas}
    firsts = [r2(held.y[seen - k], decoded[seen - k]) for k in range(1, lags + 1)]
    for factor, (alpha, maps) in product(_FACTORS, fitted.items()):
        gains = [
            r2(held.y[seen - k], decoded[seen - k] + factor * later(maps, k)) - firsts[k - 1]
            for k in range(1, lags + 1)
        ]
        if np.mean(gains) > best:
            chosen, best = (factor, alpha), float(np.mean(gains))
    factor, alpha = chosen
    scales = np.ones((lags, D))
    for k in range(1, lags + 1):
        error = held.y[seen - k] - decoded[seen - k]
        moved = error - factor * later(fitted[alpha], k)
        sizes = np.sqrt((error**2).mean(0))
        scales[k - 1] = np.where(sizes > 0, np.sqrt((moved**2).mean(0)) / (sizes + 1e-300), 1.0)
    both = ridge(gram + more_gram, cross + more_cross, alpha)
    maps = factor * both.reshape(len(both), lags + 1, D).transpose(1, 2, 0)
    maps = maps * y_scale[:, None] / x_scale
    offsets = factor * y_mean - maps @ x_mean
    given = (np.ascontiguousarray(maps), offsets, np.clip(scales, 0.1, 10.0))
    return FixedLag(*(torch.as_tensor(values, dtype=torch.float64) for values in given))


def with_fixed_lag(readout: KinematicReadout, lag: FixedLag, units: int) -> KinematicReadout:
    """Return the readout of N ``units`` with these maps."""
    shape = msgspec.structs.replace(readout.shape, later=lag.lags)
    made = KinematicReadout(readout.n, len(readout.b), shape, units=units).double()
    held = {f"later_{name}": values for name, values in lag._asdict().items()}
    made.load_state_dict(readout.state_dict() | held)
    return made
