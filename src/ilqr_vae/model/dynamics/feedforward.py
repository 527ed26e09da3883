"""Ungated networks: the vanilla RNN, and a residual step through a wide hidden layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ilqr_vae.errors import ConfigError
from ilqr_vae.model.dynamics.base import Dynamics, DynamicsOptions, Weights


class RNN(Dynamics):
    """Vanilla RNN: z' = phi(U z + W u + b).

    Raises:
        ConfigError: an unknown activation.
    """

    family = "rnn"

    def __init__(self, n: int, m: int, *, activation: str = "tanh") -> None:
        super().__init__(n, m, activation=activation)
        self.recurrent = nn.Parameter(torch.randn(n, n) / math.sqrt(n))
        self.bias = nn.Parameter(torch.zeros(n))
        self.input = nn.Parameter(torch.randn(n, m) / math.sqrt(m))

    @classmethod
    def from_options(cls, n: int, m: int, options: DynamicsOptions) -> RNN:
        return cls(n, m, activation=options.activation)

    def weights(self) -> Weights:
        return self.recurrent, self.bias, self.input

    def step(self, w: Weights, z: Tensor, u: Tensor) -> Tensor:
        U, b, W = w
        return self._phi.value(z @ U.mT + u @ W.mT + b)

    def jacobians(self, w: Weights, z: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        U, b, W = w
        slope = self._phi.slope_at(z @ U.mT + u @ W.mT + b).unsqueeze(-1)
        return slope * U, slope * W


class ResidualMLP(Dynamics):
    """Inverted-bottleneck step: a hidden layer wider than z computes the target of z.

    z' = z + step (h - z) + step B u,   h = V phi(U z + W u + b) + c

    ``step`` is fixed; with a bounded activation |z| is bounded for any parameters. Weights are
    stored at unit scale and divided by the root of their fan-in, so that one learning rate suits
    all.

    Args:
        expansion: width of the hidden layer, in latents.
        step: share of the way to h that one step covers, above 0 and at most 1.

    Raises:
        ConfigError: an unknown activation, an expansion below one, a step out of range.
    """

    family = "mlp"

    def __init__(
        self, n: int, m: int, *, activation: str = "tanh", expansion: int = 4, step: float = 0.1
    ) -> None:
        super().__init__(n, m, activation=activation)
        if expansion < 1:
            raise ConfigError("dynamics.expansion", expected="at least 1", got=str(expansion))
        if not 0 < step <= 1:
            raise ConfigError("dynamics.step", expected="above 0, at most 1", got=f"{step:g}")
        self.wide, self.share = expansion * n, step
        self.up = nn.Parameter(torch.randn(self.wide, n))
        self.up_input = nn.Parameter(torch.zeros(self.wide, m))
        self.up_bias = nn.Parameter(torch.randn(self.wide))
        self.down = nn.Parameter(torch.randn(n, self.wide))
        self.down_bias = nn.Parameter(torch.zeros(n))
        self.input = nn.Parameter(torch.randn(n, m))

    @classmethod
    def from_options(cls, n: int, m: int, options: DynamicsOptions) -> ResidualMLP:
        return cls(
            n,
            m,
            activation=options.activation,
            expansion=options.expansion,
            step=options.step,
        )

    def weights(self) -> Weights:
        share = self.share
        return (
            self.up / math.sqrt(self.n),
            self.up_input / math.sqrt(self.m),
            self.up_bias,
            self.down * (share / math.sqrt(self.wide)),
            self.down_bias * share,
            self.input * (share / math.sqrt(self.m)),
        )

    def step(self, w: Weights, z: Tensor, u: Tensor) -> Tensor:
        U, W, b, V, c, B = w
        h = self._phi.value(z @ U.mT + u @ W.mT + b) @ V.mT + c
        return (1 - self.share) * z + h + u @ B.mT

    def jacobians(self, w: Weights, z: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        U, W, b, V, _c, B = w
        slope = self._phi.slope_at(z @ U.mT + u @ W.mT + b).unsqueeze(-2)
        # V diag(slope) [U W] for all times as one matrix product
        wide = (V * slope) @ torch.cat([U, W], 1)
        n = z.shape[-1]
        eye = torch.eye(n, dtype=z.dtype, device=z.device)
        return wide[..., :n] + (1 - self.share) * eye, wide[..., n:] + B
