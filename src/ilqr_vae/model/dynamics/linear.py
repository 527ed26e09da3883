"""Linear dynamics, stable for any parameters."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ilqr_vae.model.dynamics.base import Dynamics, DynamicsOptions, Weights


class Linear(Dynamics):
    """z_{k+1} = A z_k + B u_k with A = O_1 diag(d) O_2, 0 < d < 1: stable for any parameters.

    O_1, O_2 are exponentials of skew-symmetric matrices, so ||A|| = max d < 1.
    """

    family = "linear"

    def __init__(self, n: int, m: int) -> None:
        super().__init__(n, m)
        self.skew_left = nn.Parameter(0.1 * torch.randn(n, n))
        self.skew_right = nn.Parameter(0.1 * torch.randn(n, n))
        self.raw_gain = nn.Parameter(torch.full((n,), 2.0))
        self.input = nn.Parameter(torch.randn(n, m) / math.sqrt(m))

    @classmethod
    def from_options(cls, n: int, m: int, options: DynamicsOptions) -> Linear:
        return cls(n, m)

    @property
    def kernel(self) -> str:
        return self.family if type(self) is Linear else ""

    def weights(self) -> Weights:
        left = torch.linalg.matrix_exp(self.skew_left - self.skew_left.mT)
        right = torch.linalg.matrix_exp(self.skew_right - self.skew_right.mT)
        return (left * torch.sigmoid(self.raw_gain)) @ right, self.input

    def step(self, w: Weights, z: Tensor, u: Tensor) -> Tensor:
        A, B = w
        return z @ A.mT + u @ B.mT

    def jacobians(self, w: Weights, z: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        A, B = w
        batch = z.shape[:-1]
        return A.expand(*batch, *A.shape), B.expand(*batch, *B.shape)
