"""Fitting ``ilqr_vae.model.readout`` on causal latents: linear map, layers, intervals.

All candidates are fitted on the training part, the best is chosen on the held-out part and refitted
on both, as for the Wiener filter. The intervals are calibrated on the held-out errors of the
readout before the refit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import linalg, optimize
from scipy.stats import norm

from ilqr_training.config import ReadoutConfig
from ilqr_training.readout.causal import Causal
from ilqr_training.readout.hidden import Maps, fit_hidden
from ilqr_training.readout.intervals import LEVEL
from ilqr_training.readout.recurrent import Recurrent, Windows, fit_recurrent
from ilqr_vae.model.readout import KinematicReadout, ReadoutShape
from ilqr_vae.progress import SILENT, Progress
from ilqr_vae.recordings.split import varies
from ilqr_vae.scoring.metrics import r2

Array = NDArray[np.float64]

SHARES = (0.25, 0.5, 0.75, 1.0)
"""Shares to try on the held-out part, beside zero: of the hidden layer's addition to the linear
map, and of the recurrent layer in the mean decode (there without one).
"""


@dataclass(frozen=True)
class ReadoutFit:
    """A fitted readout, and its scores on the held-out part before the refit on both.

    Attributes:
        readout: fitted on the training and held-out parts together.
        score: mean R2 on the held-out part of the fit on the training part.
        truth, decoded, std: (T, D) on the held-out part, by the same fit.
        chosen: the chosen hyperparameters, as text.
    """

    readout: KinematicReadout
    score: float
    truth: Array
    decoded: Array
    std: Array
    chosen: str


@dataclass(frozen=True)
class _Table:
    """Standardised features and targets, with their offsets and scales."""

    x: Array
    y: Array
    x_mean: Array
    x_scale: Array
    y_mean: Array
    y_scale: Array

    @staticmethod
    def of(x: Array, y: Array, latents: int) -> _Table:
        """Standardise; each of the first ``latents`` columns is scaled by its own deviation.

        The others are residual spikes. A share of the units' mean variance is added to theirs, so
        that units that hardly fire are not amplified.
        """
        variance = x.var(0)
        rest = variance[latents:]
        rest += 0.1 * rest.mean() if len(rest) else 0.0
        scale = np.sqrt(variance) + 1e-9
        y_mean, y_scale = y.mean(0), np.where(varies(y), y.std(0) + 1e-12, 1.0)
        return _Table(
            (x - x.mean(0)) / scale, (y - y_mean) / y_scale, x.mean(0), scale, y_mean, y_scale
        )

    def in_units(self, maps: Maps) -> Maps:
        """Convert maps of standardised features and targets to their original units."""
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
    """The chosen hyperparameters: penalties of the linear map on latents and on residual spikes,
    hidden units and the share of their addition, steps of the recurrent layer and its share.
    """

    alpha: float
    beta: float
    hidden: int = 0
    share: float = 0.0
    steps: int = 0
    part: float = 0.0

    def __str__(self) -> str:
        spikes = "none" if np.isinf(self.beta) else f"{self.beta:g}"
        hidden = f"hidden units {self.hidden}, {self.share:.0%} of what they add"
        recurrent = f"recurrent layer after {self.steps} steps, {self.part:.0%} of the decode"
        return f"ridge {self.alpha:g}, on unexplained spikes {spikes}, {hidden}, {recurrent}"


def _ridges(table: _Table, latents: int, choices: list[_Choice]) -> Iterator[Maps]:
    """Fit the linear map of each choice from a single Gram matrix."""
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


def _module(
    maps: Maps,
    recurrent: Recurrent | None,
    table: _Table,
    sizes: tuple[int, int],
    shape: ReadoutShape,
    choice: _Choice,
) -> KinematicReadout:
    """Build the readout in original units from standardised maps.

    Args:
        sizes: (n, N).
    """
    n, units = sizes
    readout = KinematicReadout(n, len(maps.b), shape, units=units).double()
    maps = table.in_units(maps).reading(slice(0, shape.direct(n, units)))
    for name in ("W", "b", "U", "c", "O"):
        getattr(readout, name).copy_(torch.as_tensor(getattr(maps, name)))
    if recurrent is not None:
        for name in ("W", "b", "O"):
            getattr(readout, name).mul_(1 - choice.part)
        for name, value in recurrent.cell._asdict().items():
            getattr(readout, name).copy_(value)
        out = choice.part * table.y_scale
        readout.C.copy_(torch.as_tensor(recurrent.C * out[:, None]))
        readout.b += torch.as_tensor(recurrent.d * out + choice.part * table.y_mean)
    readout.centre.copy_(torch.as_tensor(table.y_mean))
    readout.spread.copy_(torch.as_tensor(table.y_scale))
    return readout


@dataclass(frozen=True)
class ReadoutBins:
    """Bins to fit or to choose on.

    Attributes:
        x: (T, F); y: (T, D); covariance: (T, n, n) of the latents.
        recalled: (T, 1 + L N), see ``Causal``, or None.
    """

    x: Array
    y: Array
    covariance: Array
    recalled: NDArray[np.float32] | None

    @staticmethod
    def of(causal: Causal, y: Array) -> ReadoutBins:
        """Build from estimates and kinematics (T, D) of the same bins."""
        return ReadoutBins(causal.window, y, causal.covariance, causal.recalled)

    @staticmethod
    def together(parts: Sequence[ReadoutBins]) -> ReadoutBins:
        """Concatenate."""
        if len(parts) == 1:
            return parts[0]
        recalled = [p.recalled for p in parts if p.recalled is not None]
        return ReadoutBins(
            x=np.concatenate([p.x for p in parts]),
            y=np.concatenate([p.y for p in parts]),
            covariance=np.concatenate([p.covariance for p in parts]),
            recalled=np.concatenate(recalled) if len(recalled) == len(parts) else None,
        )

    def everything(self, reads: int, recurrent: bool) -> Array:
        """Return all inputs of a readout: the first columns of x, and ``recalled``."""
        if not recurrent or self.recalled is None:
            return self.x[:, :reads]
        return np.concatenate([self.x[:, :reads], self.recalled.astype(np.float64)], 1)


def fit_readout(
    train: Sequence[ReadoutBins],
    held: Sequence[ReadoutBins],
    n: int,
    units: int,
    config: ReadoutConfig,
    *,
    seed: int = 0,
    quick: bool = False,
    progress: Progress = SILENT,
) -> ReadoutFit:
    """Fit the readout that is best on the held-out part among those the configuration allows.

    Args:
        train, held: estimates with the windows that ``config`` needs. The first pass is complete
            and used for choices and intervals; bins were lost in the others.
        n: number of latents.
        units: number of units N.
        seed: seed of the layers' initialisation and dropout.
        quick: fit the linear map only.
        progress: receives the gradient steps of the layers.
    """
    reads = _Reads(n, units, config, seed)
    one, other = ReadoutBins.together(train), held[0]
    table = _Table.of(one.x, one.y, reads.latents)
    betas = (np.inf, *config.alphas) if config.residuals else (np.inf,)
    choices = [_Choice(a, b) for a, b in product(config.alphas, betas)]
    in_table = (other.x - table.x_mean) / table.x_scale
    truth = (other.y - table.y_mean) / table.y_scale

    scored = [
        (r2(truth, maps(in_table)), i, choices[i], maps)
        for i, maps in enumerate(_ridges(table, reads.latents, choices))
    ]
    score, _, choice, maps = max(scored, key=lambda s: (s[0], -s[1]))
    recurrent = None
    if config.hidden and not quick:
        deep = fit_hidden(table.x, table.y, maps, config, seed, units=units, progress=progress)
        for share in SHARES:
            found = r2(truth, deep.share(share)(in_table))
            if found > score:
                score, maps = found, deep.share(share)
                choice = replace(choice, hidden=len(deep.c), share=share)
    if config.recurrent and not quick and one.recalled is not None:
        direct, seen = maps(in_table), reads.windows(other)
        made = fit_recurrent(reads.windows(one), table.y, config, seed, progress=progress)
        for steps, layer in made:
            alone = layer(seen)
            for part in SHARES[:-1]:
                found = r2(truth, (1 - part) * direct + part * alone)
                if found > score:
                    score, recurrent = found, layer
                    choice = replace(choice, steps=steps, part=part)

    shape = reads.shape(choice)
    F = shape.direct(n, units)
    trained = _module(maps, recurrent, table, (n, units), shape, choice)
    seen = other.everything(F, bool(choice.steps))
    decoded, std = calibrate(trained, seen, other.y, other.covariance)
    readout = _again(ReadoutBins.together([*train, *held]), choice, reads, shape, progress)
    for name in ("gain", "variance", "kappa"):
        getattr(readout, name).copy_(getattr(trained, name))
    return ReadoutFit(readout, score, other.y, decoded, std, str(choice))


@dataclass(frozen=True)
class _Reads:
    """The sizes and settings of a fit."""

    n: int
    units: int
    config: ReadoutConfig
    seed: int

    @property
    def latents(self) -> int:
        """Number of columns of x that are latents."""
        return (self.config.lags + 1) * self.n

    def windows(self, bins: ReadoutBins) -> Windows:
        """Return the inputs of the recurrent layer."""
        if bins.recalled is None:
            raise ValueError("recalled: a pass without what the recurrent layer reads")
        return Windows.of(bins.x, bins.recalled, self.config.lags, self.n)

    def shape(self, choice: _Choice) -> ReadoutShape:
        """Return the shape of the chosen readout."""
        spikes = np.isfinite(choice.beta) or choice.hidden
        return ReadoutShape(
            lags=self.config.lags,
            residuals=self.config.residuals if spikes else 0,
            hidden=choice.hidden,
            recurrent=self.config.recurrent if choice.steps else 0,
        )


def _again(
    bins: ReadoutBins, choice: _Choice, reads: _Reads, shape: ReadoutShape, progress: Progress
) -> KinematicReadout:
    """Refit the choice on all bins, without intervals."""
    config, seed = reads.config, reads.seed
    table = _Table.of(bins.x, bins.y, reads.latents)
    (maps,) = _ridges(table, reads.latents, [choice])
    if choice.hidden:
        maps = fit_hidden(
            table.x, table.y, maps, config, seed, units=reads.units, progress=progress
        )
        maps = maps.share(choice.share)
    recurrent = None
    if choice.steps:
        made = fit_recurrent(reads.windows(bins), table.y, config, seed, progress=progress)
        recurrent = next(layer for steps, layer in made if steps == choice.steps)
    return _module(maps, recurrent, table, (reads.n, reads.units), shape, choice)


def calibrate(
    readout: KinematicReadout, x: Array, y: Array, covariance: Array
) -> tuple[Array, Array]:
    """Fit gain, tau^2 and kappa to errors on bins that the readout was not fitted on.

    Maximum likelihood of e ~ N(0, gain v_t + tau^2 + kappa q_t) per channel, found numerically.
    Then all three are scaled by one factor so that the 90 % interval covers 90 % of these bins,
    since the errors have heavier tails than a Gaussian.

    Args:
        x: (T, F) features; y: (T, D) kinematics; covariance: (T, n, n) of the latents.

    Returns:
        Decodes and their standard deviations on these bins, (T, D) each.
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
        # the floor keeps the logarithm of a useless term finite
        found = optimize.minimize(loss, begin, method="L-BFGS-B", bounds=[(-12.0, 5.0)] * count).x
        weights = np.zeros(3)
        weights[usable] = np.exp(found) / size[usable] * total
        s = np.sqrt(shares @ np.exp(found))
        weights *= float(np.quantile(ratio / s, LEVEL)) ** 2
        readout.gain[d], readout.variance[d], readout.kappa[d] = weights
        readout.variance[d] = max(float(weights[1]), 1e-12 * total)
    _, std = readout(*inputs)
    return mean.numpy(), std.numpy()
