"""Fixed-lag decodes: decodes of a bin that use later bins.

With y_t the causal decode of bin t and x_t the features of the readout's linear map at bin t
(``ilqr_vae.model.readout``), the decode of bin t - k given the bins up to t is

    y_{t-k} + (R_k x_t + b_k) - (R_0 x_{t-k} + b_0),      k = 1, ..., K.

R_k, b_k is a linear readout of the kinematics k bins before the newest bin: the gain of a linear
readout from waiting is added to the decode. The stated deviation of y_{t-k} is multiplied by c_k.
The maps are part of a readout, and fitted by ``ilqr_training.readout.fixed_lag``.
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

        Summed stream by stream, so that results are bit-identical in any batch.
        """
        maps, offsets = (
            t.cpu().numpy().astype(window.dtype, copy=False) for t in (self.maps, self.offsets)
        )
        x = np.ascontiguousarray(window[:, : maps.shape[-1]])
        return np.stack([(maps * row).sum(-1) for row in x]) + offsets if len(x) else offsets[:0]
