"""Answers that wait: a bin's latents, rates and decode once the bins after it have come.

The window that the newest bin was read from holds the states of the bins before it, given all bins
up to the newest one. The decode is that of ``model.fixed_lag``; of an ensemble the mean.
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
    """What a bin's window says of the bins before it.

    Attributes:
        latents: (K, n), of the first member. rates: (K, N).
        projected: (K + 1, D), see ``FixedLag.project``.
    """

    latents: Array
    rates: Array
    projected: Array


class FixedLags:
    """Reads answers that wait from windows.

    Args:
        estimator: whose windows.

    Attributes:
        lags: K, the longest lag; 0 where a readout has none.
        scales: (K, D) of the deviations.
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
        """(S, K + 1, D), of windows (S, F), the members' side by side."""
        parts = [lag.project(windows[:, part]) for _, lag, part in self._members]
        return np.mean([part[:, : self.lags + 1] for part in parts], axis=0)

    def after(self, window: Array) -> Later:
        """Of one stream's window (F,)."""
        latents: list[Array] = []
        rates: list[Array] = []
        for member, _, part in self._members:
            n = member.model.n
            z = window[part][n : (self.lags + 1) * n].reshape(self.lags, n).copy()
            latents.append(z)
            expected = member.spikes.mean(torch.tensor(z).to(member.mean_rate))
            rates.append(expected.cpu().numpy())
        return Later(latents[0], np.mean(rates, axis=0), self.project(window[None])[0])
