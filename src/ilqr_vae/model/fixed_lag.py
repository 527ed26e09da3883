"""Decodes of a bin that wait for the bins after it.

With y_t the decode of bin t when it came and x_t what the readout's linear map reads then
(``ilqr_vae.model.readout``), the decode of bin t - k once bin t has come is

    y_{t-k} + (R_k x_t + b_k) - (R_0 x_{t-k} + b_0),      k = 1, ..., K.

R_k, b_k is a linear readout of the kinematics k bins before the newest bin: what waiting gains a
linear readout is added to the decode. The stated deviation of y_{t-k} is multiplied by c_k.
Fitted by ``ilqr_training.readout.fixed_lag``; a readout that has them holds them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]


class FixedLag(NamedTuple):
    """Maps from a window to the kinematics of its newest bins.

    Attributes:
        maps: (K + 1, D, F) R; offsets: (K + 1, D) b.
        scales: (K, D) c, positive.
    """

    maps: Tensor
    offsets: Tensor
    scales: Tensor

    @property
    def lags(self) -> int:
        """K."""
        return len(self.scales)

    def project(self, window: Array) -> Array:
        """R x + b, (S, K + 1, D), of windows (S, F or more).

        Summed stream by stream, so that no stream changes another's bits.
        """
        maps, offsets = (
            t.cpu().numpy().astype(window.dtype, copy=False) for t in (self.maps, self.offsets)
        )
        x = np.ascontiguousarray(window[:, : maps.shape[-1]])
        return np.stack([(maps * row).sum(-1) for row in x]) + offsets if len(x) else offsets[:0]
