"""Latent -> kinematics, with standard deviations.

    y_t = W x_t + b + e_t,   x_t = [z_t, z_{t-1}, ..., z_{t-L}],   e_t ~ N(0, diag tau^2)

z are the estimates available at bin t (nothing later). The stated variance is
gain * diag(W_0 Sigma_t W_0') + tau^2, where Sigma_t is the estimator's own covariance of z_t and
W_0 the columns that read it; ``gain`` and tau^2 are fitted on held-out residuals, so that the
intervals mean what they say.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn


class KinematicReadout(nn.Module):
    """Linear readout of the newest L + 1 latent estimates.

    Attributes:
        W: (D, (L + 1) n); b: (D,); in the recording's kinematic units.
        variance: (D,) tau^2.
        gain: (D,) multiplier of the propagated latent variance.
        lags: L.
    """

    W: Tensor
    b: Tensor
    variance: Tensor
    gain: Tensor

    def __init__(self, n: int, channels: int, *, lags: int = 0) -> None:
        super().__init__()
        self.n, self.lags = n, lags
        self.register_buffer("W", torch.zeros(channels, (lags + 1) * n))
        self.register_buffer("b", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))
        self.register_buffer("gain", torch.ones(channels))

    def latent_variance(self, covariance: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch D"]:
        """diag(W_0 Sigma W_0'): how much of the decode's variance the latent's explains."""
        newest = self.W[:, : self.n]
        return ((newest @ covariance) * newest).sum(-1)

    def forward(
        self, x: Float[Tensor, "*batch features"], covariance: Float[Tensor, "*batch n n"]
    ) -> tuple[Float[Tensor, "*batch D"], Float[Tensor, "*batch D"]]:
        """Mean and standard deviation of the kinematics."""
        variance = self.gain * self.latent_variance(covariance) + self.variance
        return x @ self.W.mT + self.b, variance.sqrt()
