"""Fixed-lag answers: latents, rates and decode of a bin given later bins.

The window of the newest bin holds the states of earlier bins, given all bins up to the newest. The
decode is that of ``model.fixed_lag``, or its mean over an ensemble.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ilqr_vae.model.fixed_lag import FixedLag
from ilqr_vae.streaming.ensemble import EnsembleHorizon, Horizon, windows_of
from ilqr_vae.streaming.horizon import MovingHorizon

Array = NDArray[Any]


class Later(NamedTuple):
    """Estimates of earlier bins from a window.

    Attributes:
        latents: (K, n), of the first member.
        rates: (K, N).
        projected: (K + 1, D), see ``FixedLag.project``.
    """

    latents: Array
    rates: Array
    projected: Array


class FixedLags:
    """Computes fixed-lag answers from windows.

    Args:
        estimator: the estimator of the windows.

    Attributes:
        lags: K, the longest lag; 0 if a readout has none.
        scales: (K, D) factors of the deviations.
    """

    def __init__(self, estimator: Horizon) -> None:
        members = estimator.members if isinstance(estimator, EnsembleHorizon) else (estimator,)
        lags = [None if member.readout is None else member.readout.later for member in members]
        self._members: list[tuple[MovingHorizon, FixedLag, slice]] = [
            (member, lag, part)
            for member, lag, part in zip(members, lags, windows_of(estimator), strict=True)
            if lag is not None
        ]
        every = len(self._members) == len(members)
        self.lags = min(lag.lags for _, lag, _ in self._members) if every else 0
        each = [lag.scales[: self.lags].cpu().numpy() for _, lag, _ in self._members]
        self.scales = np.mean(each, axis=0) if self.lags else np.zeros((0, 0))

    def project(self, windows: Array) -> Array:
        """Return projections (S, K + 1, D) of windows (S, F), which concatenate the members'."""
        parts = [lag.project(windows[:, part]) for _, lag, part in self._members]
        return np.mean([part[:, : self.lags + 1] for part in parts], axis=0)

    def after(self, window: Array) -> Later:
        """Return the estimates from the window (F,) of a stream."""
        latents: list[Array] = []
        rates: list[Array] = []
        for member, _, part in self._members:
            n = member.model.n
            z = window[part][n : (self.lags + 1) * n].reshape(self.lags, n).copy()
            latents.append(z)
            expected = member.spikes.mean(torch.tensor(z).to(member.mean_rate))
            rates.append(member.spikes.restored(expected).cpu().numpy())
        return Later(latents[0], np.mean(rates, axis=0), self.project(window[None])[0])
