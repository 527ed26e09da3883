"""The base class of dynamics families; see the package's docstring."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import msgspec
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ilqr_vae.errors import ConfigError
from ilqr_vae.files import FiniteFloat, PositiveInt, ShareAboveZero

Weights = tuple[Tensor, ...]


class DynamicsOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of the families; each family uses those that apply.

    Attributes:
        forget_bias: mgu, mgu2: initial bias of the gate; a negative bias makes slow units.
        learn_forget_bias: mgu, mgu2: whether to learn the bias; if false it is fixed.
        normalise_input: mgu, mgu2: whether columns of the input weights have unit length, so that
            only the prior's scale sets the strength of an input.
        activation: mgu, mgu2, rnn, mlp: one of ``ACTIVATIONS`` (relu has no second derivative: the
            exact gradient then holds unless a unit is exactly at its kink).
        input: mgu, mgu2: whether W u enters inside the activation or is added outside it.
        expansion: mlp: width of its hidden layer, in latents.
        step: mlp: share of the way to where its network points that one step covers.
    """

    forget_bias: FiniteFloat = 0.0
    learn_forget_bias: bool = True
    normalise_input: bool = False
    activation: str = "tanh"
    input: Literal["inside", "outside"] = "inside"
    expansion: PositiveInt = 4
    step: ShareAboveZero = 0.1


class Activation(NamedTuple):
    """An elementwise function.

    Attributes:
        value: x -> phi(x).
        slope: (x, phi(x)) -> phi'(x).
    """

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor]

    def slope_at(self, x: Tensor) -> Tensor:
        """phi'(x)."""
        return self.slope(x, self.value(x))


def _silu_slope(x: Tensor, _: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def _root(x: Tensor) -> Tensor:
    return torch.sqrt(x * x + 4)


ACTIVATIONS = {
    "tanh": Activation(torch.tanh, lambda x, y: 1 - y * y),
    "relu": Activation(torch.relu, lambda x, y: (x > 0).to(x.dtype)),
    "silu": Activation(lambda x: x * torch.sigmoid(x), _silu_slope),
    # (x + sqrt(x^2 + 4)) / 2 - 1: smooth, zero at zero, above -1 (Schimel et al. 2022, appendix C)
    "soft-relu": Activation(
        lambda x: 0.5 * (x + _root(x)) - 1, lambda x, y: 0.5 * (1 + x / _root(x))
    ),
}
"""The activations by the name configs and model files use."""


class Dynamics(nn.Module, ABC):
    """Base of the families; ``family`` names one in configs and model files.

    Attributes:
        activation: see ``ACTIVATIONS``.

    Raises:
        ConfigError: an unknown activation.
    """

    family: str

    def __init__(self, n: int, m: int, *, activation: str = "tanh") -> None:
        super().__init__()
        self.n, self.m = n, m
        if activation not in ACTIVATIONS:
            raise ConfigError(
                "dynamics.activation",
                expected=f"one of {', '.join(ACTIVATIONS)}",
                got=repr(activation),
            )
        self.activation = activation

    @property
    def _phi(self) -> Activation:
        return ACTIVATIONS[self.activation]

    @property
    def kernel(self) -> str:
        """Name of this family and variant in compiled code; "" if there is none."""
        return ""

    @classmethod
    @abstractmethod
    def from_options(cls, n: int, m: int, options: DynamicsOptions) -> Dynamics:
        """Create dynamics with n latents and m inputs."""

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
        """Return second derivatives of costate . f(z, u): (zz, uz, uu), by autodiff over the batch.

        The exact gradient adds them to the Gauss-Newton Hessian.
        """

        def weighted(zu: Tensor, lam: Tensor) -> Tensor:
            return lam @ self.step(w, zu[: self.n], zu[self.n :])

        hessian = torch.func.vmap(torch.func.hessian(weighted))(torch.cat([z, u], -1), costate)
        n = self.n
        return hessian[:, :n, :n], hessian[:, n:, :n], hessian[:, n:, n:]
