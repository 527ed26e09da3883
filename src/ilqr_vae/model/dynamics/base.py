"""What a dynamics family is; see the package's docstring."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import msgspec
import torch
from jaxtyping import Float
from torch import Tensor, nn

Weights = tuple[Tensor, ...]


class DynamicsOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Choices within a family; each family reads those it knows.

    Attributes:
        forget_bias: mgu, mgu2: where the gate's bias starts; negative makes slow units.
        learn_forget_bias: mgu, mgu2: else the bias stays there (zero and fixed: no bias at all).
        normalise_input: mgu, mgu2: columns of the input weights have unit length, so that the
            prior's scale alone says how strong an input is.
        activation: rnn, mlp: "tanh", "relu" or "silu" (relu has no second derivative: the exact
            gradient then holds wherever no unit sits on its kink).
        expansion: mlp: width of its hidden layer, in latents.
        step: mlp: share of the way to where its network points that one step covers.
    """

    forget_bias: float = 0.0
    learn_forget_bias: bool = True
    normalise_input: bool = False
    activation: str = "tanh"
    expansion: int = 4
    step: float = 0.1


class Dynamics(nn.Module, ABC):
    """Base of the families; ``family`` names one in configs and model files."""

    family: str

    def __init__(self, n: int, m: int) -> None:
        super().__init__()
        self.n, self.m = n, m

    @classmethod
    @abstractmethod
    def from_options(cls, n: int, m: int, options: DynamicsOptions) -> Dynamics:
        """A fresh member with n latents and m inputs."""

    @abstractmethod
    def weights(self) -> Weights:
        """Effective weights, differentiable in the raw parameters."""

    @abstractmethod
    def step(
        self, w: Weights, z: Float[Tensor, "*batch n"], u: Float[Tensor, "*batch m"]
    ) -> Float[Tensor, "*batch n"]:
        """f(z, u)."""

    @abstractmethod
    def jacobians(
        self, w: Weights, z: Float[Tensor, "*batch n"], u: Float[Tensor, "*batch m"]
    ) -> tuple[Float[Tensor, "*batch n n"], Float[Tensor, "*batch n m"]]:
        """A = df/dz and B = df/du at (z, u)."""

    def tangent(
        self,
        w: Weights,
        z: Float[Tensor, "*batch n"],
        u: Float[Tensor, "*batch m"],
        dz: Float[Tensor, "*batch n"],
        du: Float[Tensor, "*batch m"],
    ) -> tuple[Float[Tensor, "*batch n"], Float[Tensor, "*batch n"]]:
        """f(z, u), and its change A dz + B du; differentiable in w."""
        pushed: Any = torch.func.jvp(lambda z, u: self.step(w, z, u), (z, u), (dz, du))
        return pushed

    def curvature(
        self,
        w: Weights,
        z: Float[Tensor, "batch n"],
        u: Float[Tensor, "batch m"],
        costate: Float[Tensor, "batch n"],
    ) -> tuple[Float[Tensor, "batch n n"], Float[Tensor, "batch m n"], Float[Tensor, "batch m m"]]:
        """Second derivatives of costate . f(z, u): (zz, uz, uu), by autodiff over the batch.

        What the exact gradient adds to the Gauss-Newton Hessian.
        """

        def weighted(zu: Tensor, lam: Tensor) -> Tensor:
            return lam @ self.step(w, zu[: self.n], zu[self.n :])

        hessian = torch.func.vmap(torch.func.hessian(weighted))(torch.cat([z, u], -1), costate)
        n = self.n
        return hessian[:, :n, :n], hessian[:, n:, :n], hessian[:, n:, n:]
