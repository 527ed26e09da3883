"""A decoder of factor-analysis latents that are realigned to new units (Degenhart et al. 2020).

    s_t = L f_t + mu + e_t,   f_t ~ N(0, I),   e_t ~ N(0, diag psi)

s are square roots of the counts. A Wiener filter decodes the posterior means of f. On other units
the factor model is refitted, and its loadings are rotated so that those of stable units come
closest to the old ones (Procrustes). The units that remain farthest are dropped from the alignment
one by one until half are left. The filter does not change. (Nature Biomedical Engineering 4:672.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import orthogonal_procrustes

from ilqr_vae.errors import ShapeError
from ilqr_vae.recordings import Recording, SplitSpec
from ilqr_vae.scoring.baselines import WienerFilter

Array = NDArray[np.float64]

NAME = "factor analysis, aligned"
_FACTORS = (8, 12, 20)
_STABLE = 0.5
_LEAST_VARIANCE = 1e-3
_STEPS = 200


@dataclass(frozen=True)
class _Factors:
    """Attributes: mean (N,), loadings (N, k), noise (N,) variances."""

    mean: Array
    loadings: Array
    noise: Array

    @staticmethod
    def fit(values: Array, mask: NDArray[np.bool_], factors: int) -> _Factors:
        """Fit square roots of counts (T, N) by EM from principal components (Rubin & Thayer 1982).

        A unit that was never observed is ignored.
        """
        seen = mask.any(0)
        mean = np.where(mask, values, 0).sum(0) / np.maximum(mask.sum(0), 1)
        x = np.where(mask, values - mean, 0)[:, seen]
        S = x.T @ x / len(x)
        size, axes = np.linalg.eigh(S)
        L = axes[:, -factors:] * np.sqrt(np.maximum(size[-factors:], 0))
        psi = np.maximum(np.diag(S) - (L**2).sum(1), _LEAST_VARIANCE)
        for _ in range(_STEPS):
            weighted = L / psi[:, None]
            beta = np.linalg.solve(np.eye(factors) + L.T @ weighted, weighted.T)
            SB = S @ beta.T
            L = np.linalg.solve(np.eye(factors) - beta @ L + beta @ SB, SB.T).T
            psi = np.maximum(np.diag(S) - (L * SB).sum(1), _LEAST_VARIANCE)
        loadings, noise = np.zeros((len(mean), factors)), np.full(len(mean), np.inf)
        loadings[seen], noise[seen] = L, psi
        return _Factors(mean, loadings, noise)

    def latents(self, values: Array, mask: NDArray[np.bool_]) -> Array:
        """Return posterior means (T, k); a missing unit is assumed to be at its mean."""
        x = np.where(mask, values - self.mean, 0)
        weighted = self.loadings / self.noise[:, None]
        precision = np.eye(self.loadings.shape[1]) + self.loadings.T @ weighted
        return np.asarray(np.linalg.solve(precision, (x @ weighted).T).T, dtype=np.float64)


@dataclass(frozen=True)
class Stabiliser:
    """A fitted decoder.

    Attributes:
        factors: factor model of the current units.
        reference: loadings at training.
        wiener: decodes latents.
    """

    factors: _Factors
    reference: Array
    wiener: WienerFilter

    @staticmethod
    def fit(recording: Recording, split: SplitSpec) -> Stabiliser:
        """Fit on the training part; choose the penalty and number of factors on the validation
        part.

        Raises:
            ShapeError: no kinematics, or a part without a bin.
        """
        if recording.kinematics is None:
            raise ShapeError("recording.kinematics", expected="a behaviour to decode", got="none")
        train, held = split.span("train", recording), split.span("validation", recording)
        values, mask = np.sqrt(recording.counts.astype(np.float64)), recording.mask()
        made: list[Stabiliser] = []
        for k in _FACTORS:
            if k >= recording.n_units and made:
                break
            part = slice(*train)
            factors = _Factors.fit(values[part], mask[part], min(k, recording.n_units))
            wiener = WienerFilter.fit(
                factors.latents(values, mask),
                recording.kinematics,
                train=train,
                validation=held,
                valid=recording.scored,
            )
            made.append(Stabiliser(factors, factors.loadings, wiener))
        return max(made, key=lambda s: s.wiener.validation_r2)

    def aligned(self, recording: Recording, bins: tuple[int, int]) -> Stabiliser:
        """Return a decoder whose loadings are fitted on these bins and aligned with the reference.

        Args:
            recording: a recording with the same unit names in the same order.
        """
        part = slice(*bins)
        values = np.sqrt(recording.counts[part].astype(np.float64))
        found = _Factors.fit(values, recording.mask()[part], self.reference.shape[1])
        stable = np.flatnonzero(np.isfinite(found.noise) & self.reference.any(1))
        least = max(self.reference.shape[1], round(_STABLE * len(stable)))
        while True:
            turn, _ = orthogonal_procrustes(found.loadings[stable], self.reference[stable])
            apart = np.linalg.norm(found.loadings @ turn - self.reference, axis=1)
            if len(stable) <= least:
                break
            stable = np.delete(stable, np.argmax(apart[stable]))
        turned = _Factors(found.mean, found.loadings @ turn, found.noise)
        return Stabiliser(turned, self.reference, self.wiener)

    def decode(self, recording: Recording, bins: tuple[int, int]) -> Array:
        """Return causal decodes (stop - start, D) of bins [start, stop)."""
        first = max(0, bins[0] - self.wiener.history)
        part = slice(first, bins[1])
        values = np.sqrt(recording.counts[part].astype(np.float64))
        latents = self.factors.latents(values, recording.mask()[part])
        return self.wiener.predict(latents, bins[0] - first)
