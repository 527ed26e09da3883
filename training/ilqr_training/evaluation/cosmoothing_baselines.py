"""Co-smoothing by Poisson regression (scikit-learn), and its baselines: smoothing, and factors.

Both baselines smooth the held-in units' counts with a symmetric Gaussian kernel within each
segment. A Poisson regression then predicts each held-out unit from the logarithm of the smoothed
counts, as the Neural Latents Benchmark's baseline does, or from a factor analysis of their square
roots, the two-step variant of GPFA. The width of the kernel, the number of factors and the penalty
are chosen on the validation part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d

from ilqr_vae.errors import ShapeError
from ilqr_vae.recordings import Recording, SplitSpec
from ilqr_vae.scoring.metrics import ZERO_RATE, bits_per_spike

Array = NDArray[np.float64]
Flags = NDArray[np.bool_]

SMOOTHING, FACTORS = "spike smoothing", "factor analysis"
WIDTHS_S = (0.025, 0.05, 0.1, 0.2, 0.4)
SIZES = (5, 10, 20, 40, 60)
ALPHAS = {SMOOTHING: (1e-3, 1e-2, 1e-1, 1.0), FACTORS: (1e-4, 1e-3, 1e-2, 1e-1)}
_OFFSET = 1e-2
_TOLERANCE = 1e-4
"""The factor analysis stops when a step gains less, in nats per bin."""
_BINS_TO_CHOOSE = 6000
"""Number of evenly spaced training bins for fitting candidates; the chosen one uses all bins."""


def smoothed(recording: Recording, units: Flags, width_s: float) -> Array:
    """Smooth counts (T, units) within each segment; missing counts have no weight."""
    sigma = width_s / recording.bin_width
    seen = recording.mask()[:, units].astype(np.float64)
    made = np.empty(seen.shape)
    for a, b in recording.segments():
        weight = gaussian_filter1d(seen[a:b], sigma, axis=0, mode="constant")
        spikes = recording.counts[a:b, units] * seen[a:b]
        total = gaussian_filter1d(spikes, sigma, axis=0, mode="constant")
        made[a:b] = np.divide(total, weight, out=np.zeros_like(total), where=weight > 1e-9)
    return made


def standard(x: Array, rows: NDArray[np.int64]) -> Array:
    """Standardise columns (T, F) by their means and deviations over these rows."""
    return (x - x[rows].mean(axis=0)) / (x[rows].std(axis=0) + 1e-9)


def _regressions(
    x: Array, y: Array, seen: Flags, rows: NDArray[np.int64], alpha: float
) -> Callable[[Array], Array]:
    """Fit a Poisson regression of each unit on features (T, F), on rows where it was observed."""
    from sklearn.linear_model import PoissonRegressor

    made: list[Any] = []
    for unit in range(y.shape[1]):
        used = rows[seen[rows, unit]]
        if not y[used, unit].any():
            made.append(None)  # a unit that never fired there has nothing to learn from
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
        chosen: hyperparameters chosen on the validation part, as text.
        validation_bits: bits per spike there, of the fit on the training part.
    """

    chosen: str
    validation_bits: float
    _features: Array
    _rates: Callable[[Array], Array]

    def rates(self, bins: tuple[int, int]) -> Array:
        """Return expected counts (stop - start, held-out units) of the bins [start, stop)."""
        return self._rates(self._features[slice(*bins)])


@dataclass(frozen=True)
class Candidate:
    """One choice of features.

    Attributes:
        description: text for tables.
        features: returns features (T, F) of the whole recording, learnt from the given rows only.
        alphas: penalties of the regression to try.
    """

    description: str
    features: Callable[[NDArray[np.int64]], Array]
    alphas: tuple[float, ...]


def _widths(recording: Recording) -> list[float]:
    return [w for w in WIDTHS_S if w >= recording.bin_width / 2] or [recording.bin_width]


def smoothing(recording: Recording, held_in: Flags) -> list[Candidate]:
    """Return candidates: logarithms of smoothed counts, by width."""

    def features(width: float) -> Callable[[NDArray[np.int64]], Array]:
        return lambda rows: standard(np.log(smoothed(recording, held_in, width) + _OFFSET), rows)

    alphas = ALPHAS[SMOOTHING]
    return [Candidate(f"{1e3 * w:g} ms", features(w), alphas) for w in _widths(recording)]


def factors(recording: Recording, held_in: Flags) -> list[Candidate]:
    """Return candidates: factors of square roots of smoothed counts, by width and number."""
    from sklearn.decomposition import FactorAnalysis

    def features(width: float, size: int) -> Callable[[NDArray[np.int64]], Array]:
        def made(rows: NDArray[np.int64]) -> Array:
            root = standard(np.sqrt(smoothed(recording, held_in, width)), rows)
            # the tolerance applies to the log-likelihood summed over rows
            analysis = FactorAnalysis(size, tol=_TOLERANCE * len(rows), max_iter=500)
            return standard(analysis.fit(root[rows]).transform(root), rows)

        return made

    sizes = [s for s in SIZES if s < held_in.sum()] or [1]
    return [
        Candidate(f"{1e3 * w:g} ms, {size} factors", features(w, size), ALPHAS[FACTORS])
        for w, size in product(_widths(recording), sizes)
    ]


def fit_offline(
    candidates: list[Candidate], recording: Recording, split: SplitSpec, held_out: Flags
) -> Offline:
    """Fit candidates on the training part; refit the best on the validation part on both.

    Args:
        recording: the whole recording.
        held_out: (N,), True for the units to predict.

    Raises:
        ShapeError: a part has no bin, or no spike of the held-out units.
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
    scored: list[tuple[float, int, Candidate, float]] = []
    for candidate in candidates:
        features = candidate.features(few)
        for alpha in candidate.alphas:
            rates = _regressions(features, y, seen, few, alpha)(features[choose])
            bits = bits_per_spike(rates[:, known], truth[:, known])
            scored.append((bits, -len(scored), candidate, alpha))
    bits, _, best, alpha = max(scored, key=lambda s: s[:2])
    both = np.concatenate([fit, choose])
    features = best.features(both)
    rates = _regressions(features, y, seen, both, alpha)
    return Offline(f"{best.description}, penalty {alpha:g}", bits, features, rates)
