"""The calibration index of a session: how well its model predicts, relative to its validation.

The bits of an answer are the log-likelihood that the model gains over the mean rates in training,
mu. If units now fire at other rates, mu is a poor baseline, over which any model gains. So the
index uses the mean rates of the stream, nu, an exponential average:

    bits over nu = bits over mu - sum_n [c_n log2(nu_n / mu_n) - k_n (nu_n - mu_n) / log 2]

for a block of bins in which unit n was used k_n times and fired c_n spikes, all Poisson. The index
is these bits per spike, divided by those in the validation of the model.
"""

from __future__ import annotations

import math

import numpy as np

from ilqr_service.work import EngineAnswer, EngineInfo
from ilqr_vae.protocol.answer import Vector

_STRETCH_S = 1.0
_RATES_S, _INDEX_S = 30.0, 30.0
"""Half-lives of the stream's mean rates and of the index."""
_PRIOR_S = 5.0
"""Weight of the mean rates of training at the start of a stream, in seconds of data."""
_LEAST = 1e-9  # lower bound of a mean rate, as in the kernels


class Calibration:
    """The index of a session while one model serves it.

    Args:
        model_info: of a model that states its mean rates and bits per spike.

    Attributes:
        index: 1 is as good as at validation; None before the first block of bins.
    """

    def __init__(self, model_info: EngineInfo) -> None:
        self.model_info = model_info
        width = 1e-9 * model_info.bin_width_ns
        self._mu: Vector = np.maximum(model_info.mean_rates, _LEAST)
        self._stretch = max(1, round(_STRETCH_S / width))
        self._fade = 0.5 ** (_STRETCH_S / _RATES_S), 0.5 ** (_STRETCH_S / _INDEX_S)
        prior = _PRIOR_S / width
        self._counts, self._bins = prior * self._mu, np.full(len(self._mu), prior)
        self._met = self._expected = 0.0
        self._clear()

    def _clear(self) -> None:
        self._new_counts, self._new_bins = np.zeros_like(self._mu), np.zeros_like(self._mu)
        self._bits, self._spikes, self._done = 0.0, 0, 0

    @property
    def index(self) -> float | None:
        return self._met / self._expected if self._expected > 0 else None

    def add(self, answer: EngineAnswer) -> tuple[float, float]:
        """Add an answer with finite bits; return bits met and bits expected.

        Both are 0 except at the last bin of a block.
        """
        counts = answer.work.counts
        if counts is None or answer.ignored:
            return 0.0, 0.0
        counts = counts[: len(self._mu)]  # features come after them
        if answer.used is None:
            self._new_counts += counts
            self._new_bins += 1.0
        else:
            used = answer.used[: len(self._mu)]
            self._new_counts += counts * used
            self._new_bins += used
        self._bits += answer.bits
        self._spikes += answer.spikes
        self._done += 1
        return self._end() if self._done == self._stretch else (0.0, 0.0)

    def _end(self) -> tuple[float, float]:
        keep, remember = self._fade
        self._counts = keep * self._counts + self._new_counts
        self._bins = keep * self._bins + self._new_bins
        mu, nu = self._mu, np.maximum(self._counts / self._bins, _LEAST)
        gain = float(self._new_counts @ np.log(nu / mu) - self._new_bins @ (nu - mu))
        met = self._bits - gain / math.log(2.0)
        expected = self.model_info.bits_per_spike * self._spikes
        self._met = remember * self._met + met
        self._expected = remember * self._expected + expected
        self._clear()
        return met, expected
