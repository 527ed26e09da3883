"""Discrete output: the probability of each of C classes, from latents.

    p(c | x) = softmax(W x + b)_c,    x = [z_t, z_{t-1}, ..., z_{t-L}]

x are the first features of the kinematic readout (``model.readout``): estimates available at bin t,
nothing later. L is the readout's number of lags, zero without one. W and b include the temperature
that calibrates the probabilities on held-out bins (``ilqr_training.readout.classes``).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


class ClassReadout(NamedTuple):
    """Weights on the CPU, float64.

    Attributes:
        W: (C, F).
        b: (C,).
    """

    W: Tensor
    b: Tensor

    def probabilities(self, window: NDArray[Any]) -> NDArray[np.float64]:
        """Return probabilities (S, C) from windows (S, F or more); NaN if a latent is not finite.

        Results are bit-identical in any batch, since there is no matrix product.
        """
        W, b = self.W.numpy(), self.b.numpy()
        x = window[:, None, : W.shape[1]].astype(np.float64, copy=False)
        with np.errstate(invalid="ignore", over="ignore"):
            logits = (W * x).sum(-1) + b
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            return weights / weights.sum(-1, keepdims=True)
