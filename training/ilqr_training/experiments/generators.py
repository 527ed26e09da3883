"""Simulated data with known truth: linear systems, the Lorenz attractor, Duffing oscillators.

All arrays are (trials, bins, channels), float64. All random numbers come from the given generator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


START = 0.5
"""Standard deviation of the initial states that are drawn."""


class LinearSystem(NamedTuple):
    """z' = A z + B u, observed through C."""

    A: Array
    B: Array
    C: Array

    @staticmethod
    def draw(rng: np.random.Generator, n: int, m: int, outputs: int) -> LinearSystem:
        """Draw a stable A, a B with orthonormal columns, and a random C (outputs, n)."""
        A = stable_matrix(n, rng, slowest=0.97, fastest=0.85)
        B = np.linalg.qr(rng.normal(size=(n, m)))[0]
        return LinearSystem(A, B, rng.normal(size=(outputs, n)))

    def run(
        self, rng: np.random.Generator, inputs: Array, *, noise: float, start: Array | None = None
    ) -> LinearData:
        """Simulate trials with ``inputs`` (K, T, m) from ``start`` (K, n) or random states."""
        K, T, _ = inputs.shape
        n = len(self.A)
        z = np.empty((K, T + 1, n))
        z[:, 0] = START * rng.normal(size=(K, n)) if start is None else start
        for k in range(T):
            z[:, k + 1] = z[:, k] @ self.A.T + inputs[:, k] @ self.B.T
        clean = z[:, 1:] @ self.C.T
        return LinearData(clean + noise * rng.normal(size=clean.shape), inputs, z, *self)


class LinearData(NamedTuple):
    """A linear system's trials.

    Attributes:
        values: (K, T, N) noisy observations.
        inputs: (K, T, m); states: (K, T + 1, n), states[:, k + 1] observed in bin k.
        A, B, C: the system.
    """

    values: Array
    inputs: Array
    states: Array
    A: Array
    B: Array
    C: Array


def stable_matrix(n: int, rng: np.random.Generator, *, slowest: float, fastest: float) -> Array:
    """Draw an n x n matrix whose eigenvalues have moduli between ``fastest`` and ``slowest``.

    The eigenvalues are conjugate pairs that turn by 0.05 to 0.4 radians a step, and a real one if n
    is odd. The basis is random and moderately skewed.
    """
    block = np.zeros((n, n))
    for i in range(0, n - 1, 2):
        r, angle = rng.uniform(fastest, slowest), rng.uniform(0.05, 0.4)
        c, s = r * np.cos(angle), r * np.sin(angle)
        block[i : i + 2, i : i + 2] = [[c, -s], [s, c]]
    if n % 2:
        block[-1, -1] = rng.uniform(fastest, slowest)
    rotation = np.linalg.qr(rng.normal(size=(n, n)))[0]
    basis = rotation @ np.diag(rng.uniform(0.7, 1.4, n))
    return basis @ block @ np.linalg.inv(basis)


def sparse_inputs(
    rng: np.random.Generator, trials: int, bins: int, m: int, probability: float
) -> Array:
    """Draw inputs (trials, bins, m) that are zero except at events, each N(0, I)."""
    event = rng.random((trials, bins, 1)) < probability
    return event * rng.normal(size=(trials, bins, m))


def autoregressive_inputs(
    rng: np.random.Generator, trials: int, bins: int, m: int, *, memory: float = 0.5
) -> Array:
    """Draw AR(1) inputs (trials, bins, m) of variance 0.03, as sparse inputs have by default."""
    u = np.empty((trials, bins, m))
    scale = np.sqrt(0.03)
    u[:, 0] = scale * rng.normal(size=(trials, m))
    for k in range(1, bins):
        fresh = scale * np.sqrt(1 - memory**2) * rng.normal(size=(trials, m))
        u[:, k] = memory * u[:, k - 1] + fresh
    return u


def _runge_kutta(field: Callable[[Array], Array], x: Array, dt: float) -> Array:
    a = field(x)
    b = field(x + 0.5 * dt * a)
    c = field(x + 0.5 * dt * b)
    return x + dt / 6 * (a + 2 * b + 2 * c + field(x + dt * c))


def _lorenz(x: Array) -> Array:
    a, b, c = x[..., 0], x[..., 1], x[..., 2]
    return np.stack([10 * (b - a), a * (28 - c) - b, a * b - 8 / 3 * c], -1)


def lorenz_bouts(
    rng: np.random.Generator, bouts: int, bins: int, *, dt: float = 0.01, spread: float = 10.0
) -> Array:
    """Simulate the Lorenz system, (bouts, bins, 3), each bout from its own initial state.

    Initial states are drawn around the centre of the attractor and run for 50 time units, so that
    each bout lies on the attractor. A state close to one of the two unstable fixed points leaves it
    at a rate of only 0.09: after 5 units it would hardly move. Integrated by fourth-order
    Runge-Kutta with steps of one bin.
    """
    x = np.array([0.0, 0.0, 25.0]) + spread * rng.normal(size=(bouts, 3))
    out = np.empty((bouts, bins, 3))
    for _ in range(round(50 / dt)):
        x = _runge_kutta(_lorenz, x, dt)
    for k in range(bins):
        x = _runge_kutta(_lorenz, x, dt)
        out[:, k] = x
    return out


def duffing_trials(
    rng: np.random.Generator, trials: int, bins: int, *, dt: float = 0.05, damping: float = 0.05
) -> Array:
    """Simulate x'' = x - x^3 - damping x', two wells: position and velocity (trials, bins, 2).

    Initial states are uniform over [-1.5, 1.5] x [-1, 1]. There is no input.
    """

    def field(x: Array) -> Array:
        return np.stack([x[..., 1], x[..., 0] - x[..., 0] ** 3 - damping * x[..., 1]], -1)

    x = rng.uniform([-1.5, -1.0], [1.5, 1.0], size=(trials, 2))
    out = np.empty((trials, bins, 2))
    for k in range(bins):
        for _ in range(2):
            x = _runge_kutta(field, x, dt / 2)
        out[:, k] = x
    return out


class Spiking(NamedTuple):
    """Poisson units driven by a few variables.

    Attributes:
        counts, rates: (K, T, N); rates are expected counts per bin.
    """

    counts: Array
    rates: Array


def spiking(
    rng: np.random.Generator,
    variables: Array,
    units: int,
    *,
    mean_rate: float,
    gain: float,
    weights: Array | None = None,
) -> Spiking:
    """Draw counts of units with log rate = log mean_rate + gain w . (standardised variables).

    Args:
        variables: (K, T, d).
        mean_rate: expected counts per bin at the mean of the variables, times a factor per unit.
        gain: scale of the variation of log rates.
        weights: (units, d + 1) from ``tuning``, to use the same in several calls.
    """
    x = variables - variables.mean((0, 1))
    x = x / x.std((0, 1))
    if weights is None:
        weights = tuning(rng, units, x.shape[-1])
    log_rate = np.log(mean_rate) + gain * x @ weights[:, :-1].T + weights[:, -1]
    rates = np.exp(log_rate)
    return Spiking(rng.poisson(rates).astype(np.float64), rates)


def tuning(rng: np.random.Generator, units: int, d: int) -> Array:
    """Draw weights (units, d + 1): directions of unit length, then log factors of the rates."""
    w = rng.normal(size=(units, d))
    w /= np.linalg.norm(w, axis=1, keepdims=True)
    return np.concatenate([w, 0.3 * rng.normal(size=(units, 1))], 1)
