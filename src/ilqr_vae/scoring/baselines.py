"""Baseline decoders: a Wiener filter and a Kalman filter, both causal.

Each is fitted once and then used in two ways that agree to rounding: ``predict`` on a recording,
and ``init`` with ``step`` bin by bin. Notation: T bins, N units, D kinematic channels, L bins of
history; counts are spikes per bin (T, N), kinematics (T, D) in the recording's units.

>>> wiener = WienerFilter.fit(counts, kinematics, train=(0, 600), validation=(600, 750))
...                                                             # doctest: +SKIP
>>> decoded = wiener.predict(counts, 750, 1000)                 # doctest: +SKIP
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from ilqr_vae.errors import ShapeError
from ilqr_vae.scoring.metrics import r2

Array = NDArray[np.float64]

ALPHAS: tuple[float, ...] = tuple(float(a) for a in np.logspace(1, 5, 9))
"""Ridge penalties to try on the validation part."""
_ROWS = 4096


def _checked(counts: NDArray[Any], kinematics: NDArray[Any]) -> tuple[Array, Array]:
    x, y = np.asarray(counts, dtype=np.float64), np.asarray(kinematics, dtype=np.float64)
    if x.ndim != 2:
        raise ShapeError("counts", expected="(bins, units)", got=str(x.shape))
    if y.ndim != 2 or len(y) != len(x):
        raise ShapeError("kinematics", expected=f"({len(x)}, channels)", got=str(y.shape))
    for field, values in (("counts", x), ("kinematics", y)):
        if not np.isfinite(values).all():
            raise ShapeError(field, expected="finite values", got="some that are not")
    return x, y


def _rows(span: tuple[int, int], n_bins: int, valid: NDArray[np.bool_] | None, field: str) -> Any:
    start, stop = span
    if not 0 <= start < stop <= n_bins:
        raise ShapeError(field, expected=f"bins within 0 to {n_bins}", got=str(span))
    rows = np.arange(start, stop)
    if valid is not None:
        rows = rows[np.asarray(valid, dtype=bool)[start:stop]]
        if not len(rows):
            raise ShapeError(field, expected="at least one valid bin", got="none")
    return rows


def _least_squares(x: Array, y: Array) -> Array:
    return np.asarray(np.linalg.lstsq(x, y, rcond=None)[0], dtype=np.float64)


def _bin_of(counts: NDArray[Any], n_units: int) -> Array:
    z = np.asarray(counts, dtype=np.float64)
    if z.shape != (n_units,):
        raise ShapeError("counts", expected=f"({n_units},)", got=str(z.shape))
    return z


def _batch_of(
    counts: NDArray[Any], n_units: int, start: int, stop: int | None
) -> tuple[Array, int]:
    x = np.asarray(counts, dtype=np.float64)
    if x.ndim != 2 or x.shape[1] != n_units:
        raise ShapeError("counts", expected=f"(bins, {n_units})", got=str(x.shape))
    stop = len(x) if stop is None else stop
    if not 0 <= start <= stop <= len(x):
        raise ShapeError("span", expected=f"bins within 0 to {len(x)}", got=f"{start} to {stop}")
    return x, stop


def history_matrix(counts: Array, rows: NDArray[np.int64], history: int, fill: Array) -> Array:
    """Return each row's bin and the ``history - 1`` before it, newest first: (len(rows), history *
    N).

    Bins before the first of ``counts`` (T, N) are ``fill`` (N,).
    """
    padded = np.concatenate([np.tile(fill, (history - 1, 1)), counts])
    lags = [padded[rows + history - 1 - lag] for lag in range(history)]
    return np.concatenate(lags, axis=1)


@dataclass(frozen=True, slots=True)
class WienerFilter:
    """Ridge regression from the last ``history`` bins of all units, the present one included.

    Attributes:
        weights: (history * N, D), newest bin first.
        offset: (D,), the prediction at the training mean of all counts.
        mean: (N,), mean counts in training, also used for bins before the recording.
        history: bins.
        alpha: the chosen ridge penalty.
        validation_r2: R2 of that penalty on the validation part, or NaN without one.
    """

    weights: Array
    offset: Array
    mean: Array
    history: int
    alpha: float
    validation_r2: float

    @staticmethod
    def fit(
        counts: NDArray[Any],
        kinematics: NDArray[Any],
        *,
        train: tuple[int, int],
        validation: tuple[int, int] | None = None,
        history: int = 10,
        alphas: tuple[float, ...] = ALPHAS,
        valid: NDArray[np.bool_] | None = None,
        refit: bool = True,
    ) -> WienerFilter:
        """Fit on ``train``; choose the penalty with the best R2 on ``validation``; refit on both.

        Args:
            counts: (T, N), the whole recording: a span's first bins use those before it.
            kinematics: (T, D), finite.
            train, validation: half-open ranges of bins; bins outside them are only used as history.
                Without ``validation``, ``alphas`` must have a single penalty.
            history: bins, 1 or more.
            alphas: penalties to choose from.
            valid: bool (T,), bins to fit and choose on; None means all.
            refit: whether to refit on both parts with the chosen penalty.

        Raises:
            ShapeError: shapes, spans or options do not fit.
        """
        x, y = _checked(counts, kinematics)
        if history < 1:
            raise ShapeError("history", expected="1 bin or more", got=str(history))
        if not alphas or (validation is None and len(alphas) != 1):
            raise ShapeError("validation", expected="a span to choose alpha on", got="none")
        rows = _rows(train, len(x), valid, "train")
        problem = _normal_equations(x, y, rows, history)
        if validation is None:
            return problem.solve(float(alphas[0]), float("nan"))
        chosen = _rows(validation, len(x), valid, "validation")
        best_alpha, best_score = float(alphas[0]), float("-inf")
        for alpha in alphas:
            wiener = problem.solve(float(alpha), 0.0)
            score = r2(y[chosen], wiener.at(x, chosen))
            if score > best_score:
                best_alpha, best_score = float(alpha), score
        if refit:
            problem = _normal_equations(x, y, np.concatenate([rows, chosen]), history)
        return problem.solve(best_alpha, best_score)

    def predict(self, counts: NDArray[Any], start: int = 0, stop: int | None = None) -> Array:
        """Decodes (stop - start, D) of bins [start, stop) of ``counts`` (T, N), causally.

        Bins before ``start`` serve as history. Raises ShapeError.
        """
        x, stop = _batch_of(counts, len(self.mean), start, stop)
        return self.at(x, np.arange(start, stop))

    def at(self, counts: Array, rows: NDArray[np.int64]) -> Array:
        """Return decodes (len(rows), D) of some bins of ``counts`` (T, N)."""
        x, before = counts - self.mean, np.zeros_like(self.mean)
        parts = [
            history_matrix(x, piece, self.history, before) @ self.weights
            for piece in np.array_split(rows, max(1, -(-len(rows) // _ROWS)))
        ]
        return np.concatenate(parts) + self.offset

    def init(self) -> Array:
        """Return the initial state: centred counts of the last bins, (history, N)."""
        return np.zeros((self.history, len(self.mean)))

    def step(self, state: Array, counts: NDArray[Any]) -> tuple[Array, Array]:
        """Process the counts (N,) of a bin; return the new state and decode (D,). Raises
        ShapeError.
        """
        z = _bin_of(counts, len(self.mean))
        state = np.concatenate([(z - self.mean)[None], state[:-1]])
        return state, state.ravel() @ self.weights + self.offset


@dataclass(frozen=True, slots=True)
class _NormalEquations:
    """The sums of ridge regression over the fitted rows: one Gram matrix for all penalties."""

    gram: Array
    cross: Array
    shift: Array
    offset: Array
    mean: Array
    history: int

    def solve(self, alpha: float, validation_r2: float) -> WienerFilter:
        penalised = self.gram.copy()
        penalised[np.diag_indices_from(penalised)] += alpha
        weights = linalg.solve(penalised, self.cross, assume_a="pos", overwrite_a=True)
        offset = self.offset - self.shift @ weights
        return WienerFilter(weights, offset, self.mean, self.history, alpha, validation_r2)


def _normal_equations(
    x: Array, y: Array, rows: NDArray[np.int64], history: int
) -> _NormalEquations:
    mean, offset = x[rows].mean(axis=0), y[rows].mean(axis=0)
    size = history * x.shape[1]
    total, gram = np.zeros(size), np.zeros((size, size))
    cross = np.zeros((size, y.shape[1]))
    # in chunks, since the design of a long recording may not fit in memory
    for piece in np.array_split(rows, -(-len(rows) // _ROWS)):
        design = history_matrix(x - mean, piece, history, np.zeros_like(mean))
        total += design.sum(axis=0)
        gram += design.T @ design
        cross += design.T @ (y[piece] - offset)
    # Means of lagged columns differ slightly from those of the units at the start of the span.
    shift = total / len(rows)
    gram -= len(rows) * np.outer(shift, shift)
    return _NormalEquations(gram, cross, shift, offset, mean, history)


@dataclass(frozen=True, slots=True)
class KalmanState:
    """Filtered kinematics: ``mean`` (D,) in the recording's units, ``covariance`` (D, D)."""

    mean: Array
    covariance: Array


@dataclass(frozen=True, slots=True)
class KalmanFilter:
    """Kalman filter whose state is the kinematics (Wu et al. 2006, Neural Computation 18:80).

    x_t = A x_{t-1} + w, w ~ N(0, W); counts_t - mean = C x_t + q, q ~ N(0, Q), with x the
    kinematics minus their training mean. A, W, C, Q are least-squares estimates; a constant channel
    stays at its mean. Wu et al. advise to decode position, velocity and acceleration together; here
    the state are the given channels.

    Attributes:
        transition: A, (D, D).
        transition_noise: W, (D, D).
        gain: C^T Q^-1, (D, N).
        information: C^T Q^-1 C, (D, D).
        mean_counts: (N,).
        mean: (D,), training mean of the kinematics.
        covariance: (D, D), training covariance: the state before the first bin.
    """

    transition: Array
    transition_noise: Array
    gain: Array
    information: Array
    mean_counts: Array
    mean: Array
    covariance: Array

    @staticmethod
    def fit(
        counts: NDArray[Any],
        kinematics: NDArray[Any],
        *,
        train: tuple[int, int],
        valid: NDArray[np.bool_] | None = None,
    ) -> KalmanFilter:
        """Fit on the bins ``train`` of counts (T, N) and kinematics (T, D).

        ``valid``: bool (T,), bins to fit on; None means all.

        Raises:
            ShapeError: shapes or spans do not fit.
        """
        z, x = _checked(counts, kinematics)
        rows = _rows(train, len(z), valid, "train")
        mean_counts, mean = z[rows].mean(axis=0), x[rows].mean(axis=0)
        z, x = z - mean_counts, x - mean
        here = x[rows]
        covariance = here.T @ here / len(rows)
        pairs = rows[1:][np.diff(rows) == 1]
        if not len(pairs):
            raise ShapeError("train", expected="at least two consecutive bins", got=str(train))
        past, present = x[pairs - 1], x[pairs]
        transition = _least_squares(past, present).T
        noise = present - past @ transition.T
        emission = _least_squares(here, z[rows]).T
        residual = z[rows] - here @ emission.T
        # A silent unit has no variance: the small diagonal keeps Q invertible, and the unit has no
        # effect since its column of C is zero.
        q = residual.T @ residual / len(rows)
        q[np.diag_indices_from(q)] += 1e-6 * max(float(np.trace(q)) / len(q), 1e-12)
        gain = linalg.solve(q, emission, assume_a="pos").T
        return KalmanFilter(
            transition=transition,
            transition_noise=noise.T @ noise / len(pairs),
            gain=gain,
            information=gain @ emission,
            mean_counts=mean_counts,
            mean=mean,
            covariance=covariance,
        )

    def init(self) -> KalmanState:
        """Return the initial state: mean and covariance in training."""
        return KalmanState(self.mean, self.covariance)

    def step(self, state: KalmanState, counts: NDArray[Any] | None) -> tuple[KalmanState, Array]:
        """Process the counts (N,) of a bin, or None for a missing one, which is predicted.

        Returns the new state and its mean (D,). Raises ShapeError.
        """
        predicted = self.transition @ (state.mean - self.mean)
        prior = self.transition @ state.covariance @ self.transition.T + self.transition_noise
        if counts is None:
            mean = self.mean + predicted
            return KalmanState(mean, 0.5 * (prior + prior.T)), mean
        z = _bin_of(counts, len(self.mean_counts)) - self.mean_counts
        # (prior^-1 + I)^-1 = (1 + prior I)^-1 prior, without inverting a covariance.
        system = np.eye(len(prior)) + prior @ self.information
        # numpy's solve: scipy's takes ten times as long for a few channels
        covariance = np.linalg.solve(system, prior)
        covariance = 0.5 * (covariance + covariance.T)
        innovation = self.gain @ z - self.information @ predicted
        mean = self.mean + predicted + covariance @ innovation
        return KalmanState(mean, covariance), mean

    def predict(
        self,
        counts: NDArray[Any],
        start: int = 0,
        stop: int | None = None,
        *,
        seen: NDArray[np.bool_] | None = None,
    ) -> Array:
        """Decodes (stop - start, D) of bins [start, stop) of ``counts`` (T, N), causally.

        The filter runs from bin 0, so bins before ``start`` matter. ``seen``: bool (T,), False for
        missing bins; None means none is missing. Raises ShapeError.
        """
        x, stop = _batch_of(counts, len(self.mean_counts), start, stop)
        decoded = np.empty((stop, len(self.mean)))
        state = self.init()
        for t in range(stop):
            state, decoded[t] = self.step(state, x[t] if seen is None or seen[t] else None)
        return decoded[start:]
