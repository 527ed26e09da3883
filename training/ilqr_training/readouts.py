"""Fitting ``ilqr_vae.readout`` on causal latents: linear map, hidden layer, intervals.

Everything is fitted on the training part and chosen on the held-out part; what was chosen is then
fitted again on both, as the Wiener filter is. The intervals come from the held-out errors of the
readout that had not seen them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import linalg, optimize
from scipy.stats import norm

from ilqr_training.causal import Causal
from ilqr_training.config import ReadoutConfig
from ilqr_training.hidden import Maps, fit_hidden
from ilqr_vae.metrics import r2
from ilqr_vae.readout import KinematicReadout, ReadoutShape

Array = NDArray[np.float64]

SHARES = (0.25, 0.5, 0.75, 1.0)
"""Of what the hidden layer adds to the linear map, tried on the held-out part beside none of it."""

LEVEL = 0.9
"""Of the intervals whose coverage on the held-out part is made exact."""


@dataclass(frozen=True)
class ReadoutFit:
    """A fitted readout and what it did on the held-out part before it was refitted on both.

    Attributes:
        readout: fitted on the training and held-out parts together.
        score: mean R2 on the held-out part, of the one that saw the training part alone.
        truth, decoded, std: (T, D) on the held-out part, of that same one.
        chosen: what was chosen there, for people.
    """

    readout: KinematicReadout
    score: float
    truth: Array
    decoded: Array
    std: Array
    chosen: str


@dataclass(frozen=True)
class _Table:
    """Features and targets, standardised, with what takes them back to their units."""

    x: Array
    y: Array
    x_mean: Array
    x_scale: Array
    y_mean: Array
    y_scale: Array

    @staticmethod
    def of(x: Array, y: Array, latents: int) -> _Table:
        """``latents``: leading columns that are latent estimates, each scaled by its own deviation.

        The others are spikes left unexplained. A unit that hardly fires must not be blown up, so
        their variances get a share of the units' mean added.
        """
        variance = x.var(0)
        rest = variance[latents:]
        rest += 0.1 * rest.mean() if len(rest) else 0.0
        scale = np.sqrt(variance) + 1e-9
        y_mean, y_scale = y.mean(0), y.std(0) + 1e-12
        return _Table(
            (x - x.mean(0)) / scale, (y - y_mean) / y_scale, x.mean(0), scale, y_mean, y_scale
        )

    def in_units(self, maps: Maps) -> Maps:
        """Maps of standardised features and targets as maps of the original ones."""
        W, U = maps.W / self.x_scale, maps.U / self.x_scale
        out = self.y_scale[:, None]
        return Maps(
            W=W * out,
            b=(maps.b - W @ self.x_mean) * self.y_scale + self.y_mean,
            U=U,
            c=maps.c - U @ self.x_mean,
            O=maps.O * out,
        )


@dataclass(frozen=True)
class _Choice:
    """Penalties of the linear map, on latents and on unexplained spikes; hidden units, and how much
    of what they add is taken."""

    alpha: float
    beta: float
    hidden: int = 0
    share: float = 0.0

    def __str__(self) -> str:
        spikes = "none" if np.isinf(self.beta) else f"{self.beta:g}"
        hidden = f"hidden units {self.hidden}, {self.share:.0%} of what they add"
        return f"ridge {self.alpha:g}, on unexplained spikes {spikes}, {hidden}"


def _ridges(table: _Table, latents: int, choices: list[_Choice]) -> Iterator[Maps]:
    """The linear map of each choice; one Gram matrix serves them all."""
    gram, cross = table.x.T @ table.x, table.x.T @ table.y
    F, D = cross.shape
    for choice in choices:
        used = F if np.isfinite(choice.beta) else latents
        penalty = np.full(used, choice.alpha)
        penalty[latents:] = choice.beta
        W = np.zeros((D, F))
        W[:, :used] = linalg.solve(
            gram[:used, :used] + np.diag(penalty), cross[:used], assume_a="pos"
        ).T
        yield Maps.linear(W, np.zeros(D))


def _module(maps: Maps, n: int, units: int, shape: ReadoutShape, y: Array) -> KinematicReadout:
    readout = KinematicReadout(n, len(maps.b), shape, units=units).double()
    for name in ("W", "b", "U", "c", "O"):
        getattr(readout, name).copy_(torch.as_tensor(getattr(maps, name)))
    readout.centre.copy_(torch.as_tensor(y.mean(0)))
    readout.spread.copy_(torch.as_tensor(y.std(0) + 1e-12))
    return readout


@dataclass(frozen=True)
class _Part:
    """Bins to fit or to choose on."""

    x: Array
    y: Array
    covariance: Array

    @staticmethod
    def both(one: _Part, other: _Part) -> _Part:
        return _Part(*(np.concatenate([getattr(one, k), getattr(other, k)]) for k in vars(one)))


def fit_readout(
    train: Causal,
    train_y: Array,
    held: Causal,
    held_y: Array,
    n: int,
    config: ReadoutConfig,
    *,
    seed: int = 0,
    quick: bool = False,
) -> ReadoutFit:
    """The readout that does best on the held-out part among those the configuration allows.

    Args:
        train, held: estimates whose ``window`` holds what ``config`` reads.
        train_y, held_y: (T, D) kinematics of the same bins.
        n: latents.
        seed: of the hidden layer's start and dropout.
        quick: the linear map alone.
    """
    units = train.rates.shape[1]
    latents = (config.lags + 1) * n
    one = _Part(train.window, train_y, train.covariance)
    other = _Part(held.window, held_y, held.covariance)
    table = _Table.of(one.x, one.y, latents)
    betas = (np.inf, *config.alphas) if config.residuals else (np.inf,)
    choices = [_Choice(a, b) for a, b in product(config.alphas, betas)]

    def decode(maps: Maps) -> Array:
        return table.in_units(maps)(other.x)

    scored = [
        (r2(held_y, decode(maps)), i, choices[i], maps)
        for i, maps in enumerate(_ridges(table, latents, choices))
    ]
    score, _, choice, maps = max(scored, key=lambda s: (s[0], -s[1]))
    if config.hidden and not quick:
        deep = fit_hidden(table.x, table.y, maps, config, seed, units=units)
        for share in SHARES:
            found = r2(held_y, decode(deep.share(share)))
            if found > score:
                score, maps = found, deep.share(share)
                choice = replace(choice, hidden=len(deep.c), share=share)
    residuals = config.residuals if np.isfinite(choice.beta) or choice.hidden else 0
    shape = ReadoutShape(lags=config.lags, residuals=residuals, hidden=choice.hidden)
    reads = slice(0, shape.features(n, units))

    trained = _module(table.in_units(maps).reading(reads), n, units, shape, one.y)
    decoded, std = calibrate(trained, other.x[:, reads], other.y, other.covariance)
    whole = _Part.both(one, other)
    table = _Table.of(whole.x, whole.y, latents)
    (again,) = _ridges(table, latents, [choice])
    if choice.hidden:
        again = fit_hidden(table.x, table.y, again, config, seed, units=units)
        again = again.share(choice.share)
    readout = _module(table.in_units(again).reading(reads), n, units, shape, one.y)
    for name in ("gain", "variance", "kappa"):
        getattr(readout, name).copy_(getattr(trained, name))
    return ReadoutFit(readout, score, held_y, decoded, std, str(choice))


def calibrate(
    readout: KinematicReadout, x: Array, y: Array, covariance: Array
) -> tuple[Array, Array]:
    """Set gain, tau^2 and kappa from errors on bins that the readout was not fitted on.

    Maximum likelihood of e ~ N(0, gain v_t + tau^2 + kappa q_t), per channel (no closed form); then
    all three are scaled by the one factor that makes the 90 % interval cover 90 % of these bins,
    since errors have heavier tails than a Gaussian.

    Args:
        x: (T, F) features; y: (T, D) kinematics; covariance: (T, n, n) of the latents.

    Returns:
        the decodes and their standard deviations on these bins, (T, D) each.
    """
    inputs = torch.as_tensor(x), torch.as_tensor(covariance)
    mean = readout.mean(inputs[0])
    latent, energy = readout.latent_variance(*inputs).numpy(), readout.energy(mean).numpy()
    error = y - mean.numpy()
    for d in range(y.shape[1]):
        e2 = np.maximum(error[:, d] ** 2, 1e-300)
        total = float(e2.mean())
        terms = np.stack([latent[:, d], np.ones(len(e2)), energy], 1)
        size = terms.mean(0)
        usable = size > 1e-12 * max(float(size.max()), 1e-300)
        shares = terms[:, usable] / size[usable] * total
        ratio = np.sqrt(e2) / norm.ppf(0.5 + LEVEL / 2)

        def loss(log_weights: Array, shares: Array = shares, e2: Array = e2) -> float:
            s2 = shares @ np.exp(log_weights)
            return float((np.log(s2) + e2 / s2).mean())

        count = int(usable.sum())
        begin = np.full(count, -np.log(count))
        # the floor keeps a term that is of no use from wandering off to minus infinity
        found = optimize.minimize(loss, begin, method="L-BFGS-B", bounds=[(-12.0, 5.0)] * count).x
        weights = np.zeros(3)
        weights[usable] = np.exp(found) / size[usable] * total
        s = np.sqrt(shares @ np.exp(found))
        weights *= float(np.quantile(ratio / s, LEVEL)) ** 2
        readout.gain[d], readout.variance[d], readout.kappa[d] = weights
        readout.variance[d] = max(float(weights[1]), 1e-12 * total)
    _, std = readout(*inputs)
    return mean.numpy(), std.numpy()
