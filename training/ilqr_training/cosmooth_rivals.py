"""Baselines of co-smoothing, by scikit-learn: smoothed spikes, and factor analysis of them.

Both smooth the held-in units' counts with a Gaussian in time, both ways, within each segment, and
predict each held-out unit by a Poisson regression: on the logarithm of the smoothed counts, as the
Neural Latents Benchmark's own baseline does; or on the factors of a factor analysis of their square
roots, the two-step relative of GPFA. Width of the Gaussian, number of factors and the regression's
penalty are chosen on the validation part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d

from ilqr_vae.errors import ShapeError
from ilqr_vae.metrics import ZERO_RATE, bits_per_spike
from ilqr_vae.recordings import Recording, SplitSpec

Array = NDArray[np.float64]
Flags = NDArray[np.bool_]

SMOOTHING, FACTORS = "spike smoothing", "factor analysis"
WIDTHS_S = (0.025, 0.05, 0.1, 0.2, 0.4)
SIZES = (5, 10, 20, 40, 60)
ALPHAS = {SMOOTHING: (1e-3, 1e-2, 1e-1, 1.0), FACTORS: (1e-4, 1e-3, 1e-2, 1e-1)}
_OFFSET = 1e-2
_TOLERANCE = 1e-4
"""Nats a bin below which a step of the factor analysis ends it."""
_BINS_TO_CHOOSE = 6000
"""Bins of the training part, evenly spaced, that candidates are fitted on; what was chosen is
fitted on all."""


def smoothed(recording: Recording, units: Flags, width_s: float) -> Array:
    """(T, units) counts smoothed within each segment; what is missing weighs nothing."""
    sigma = width_s / recording.bin_width
    seen = recording.mask()[:, units].astype(np.float64)
    made = np.empty(seen.shape)
    for a, b in recording.segments():
        weight = gaussian_filter1d(seen[a:b], sigma, axis=0, mode="constant")
        spikes = recording.counts[a:b, units] * seen[a:b]
        total = gaussian_filter1d(spikes, sigma, axis=0, mode="constant")
        made[a:b] = np.divide(total, weight, out=np.zeros_like(total), where=weight > 1e-9)
    return made


def _standard(x: Array, rows: NDArray[np.int64]) -> Array:
    return (x - x[rows].mean(axis=0)) / (x[rows].std(axis=0) + 1e-9)


def _regressions(
    x: Array, y: Array, seen: Flags, rows: NDArray[np.int64], alpha: float
) -> Callable[[Array], Array]:
    """A Poisson regression a unit, on the rows where it was seen: features (T, F) to rates."""
    from sklearn.linear_model import PoissonRegressor

    made: list[Any] = []
    for unit in range(y.shape[1]):
        used = rows[seen[rows, unit]]
        if not y[used, unit].any():
            made.append(None)  # one that never fired there: nothing to learn
            continue
        regressor = PoissonRegressor(alpha=alpha, solver="newton-cholesky", max_iter=300)
        made.append(regressor.fit(x[used], y[used, unit]))

    def rates(features: Array) -> Array:
        silent = np.full(len(features), ZERO_RATE)
        columns = [silent if m is None else m.predict(features) for m in made]
        return np.stack(columns, axis=1).clip(ZERO_RATE, None)

    return rates


@dataclass(frozen=True)
class Offline:
    """A fitted baseline.

    Attributes:
        chosen: on the validation part, for people.
        validation_bits: bits per spike there, fitted on the training part alone.
    """

    chosen: str
    validation_bits: float
    _features: Array
    _rates: Callable[[Array], Array]

    def rates(self, bins: tuple[int, int]) -> Array:
        """(stop - start, held-out units) expected counts of the bins [start, stop)."""
        return self._rates(self._features[slice(*bins)])


@dataclass(frozen=True)
class _Choice:
    width: float
    size: int
    alpha: float

    def __str__(self) -> str:
        factors = f"{self.size} factors, " if self.size else ""
        return f"{1e3 * self.width:g} ms, {factors}penalty {self.alpha:g}"


def _features(kind: str, x: Array, rows: NDArray[np.int64], size: int) -> Array:
    """(T, F) from smoothed counts, everything learnt from the rows alone."""
    if kind == SMOOTHING:
        return _standard(np.log(x + _OFFSET), rows)
    from sklearn.decomposition import FactorAnalysis

    root = _standard(np.sqrt(x), rows)
    # its tolerance is on the log-likelihood of all rows together
    analysis = FactorAnalysis(size, tol=_TOLERANCE * len(rows), max_iter=500)
    return _standard(analysis.fit(root[rows]).transform(root), rows)


def fit_offline(kind: str, recording: Recording, split: SplitSpec, held_out: Flags) -> Offline:
    """Fit every candidate on the training part, keep the best on the validation part, fit it again
    on both.

    Args:
        kind: ``SMOOTHING`` or ``FACTORS``.
        recording: all of it.
        held_out: (N,), the units to predict from the others.

    Raises:
        ShapeError: a part without a bin, or without a spike of the held-out units.
    """
    train, validation = split.span("train", recording), split.span("validation", recording)
    valid = recording.valid
    fit, choose = (np.arange(*part)[valid[slice(*part)]] for part in (train, validation))
    y, seen = recording.counts[:, held_out].astype(np.float64), recording.mask()[:, held_out]
    for name, rows in (("train", fit), ("validation", choose)):
        if not (y[rows] * seen[rows]).any():
            raise ShapeError(name, expected="spikes of the units held out", got="none")
    few = fit[:: max(1, len(fit) // _BINS_TO_CHOOSE)]
    truth = np.where(seen[choose], y[choose], np.nan)
    known = ~np.isnan(truth).all(axis=0)
    held_in = ~held_out
    widths = [w for w in WIDTHS_S if w >= recording.bin_width / 2] or [recording.bin_width]
    sizes = [0] if kind == SMOOTHING else [s for s in SIZES if s < held_in.sum()] or [1]
    scored: list[tuple[float, int, _Choice]] = []
    for width in widths:
        x = smoothed(recording, held_in, width)
        for size in sizes:
            features = _features(kind, x, few, size)
            for alpha in ALPHAS[kind]:
                rates = _regressions(features, y, seen, few, alpha)(features[choose])
                bits = bits_per_spike(rates[:, known], truth[:, known])
                scored.append((bits, -len(scored), _Choice(width, size, alpha)))
    bits, _, best = max(scored)
    both = np.concatenate([fit, choose])
    features = _features(kind, smoothed(recording, held_in, best.width), both, best.size)
    return Offline(str(best), bits, features, _regressions(features, y, seen, both, best.alpha))
