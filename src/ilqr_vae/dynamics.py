"""Dynamics families: how the latent state moves, z_{k+1} = f(z_k, u_k).

Notation: z in R^n latent state, u in R^m input, A = df/dz, B = df/du. A family is two things:

- a module that owns raw parameters and turns them into effective weights ``w = family.weights()``
  (differentiable; computed once per solve or per gradient step), and
- pure functions of those weights: ``step(w, z, u)`` and ``jacobians(w, z, u)``, batched over any
  leading axes, with analytic Jacobians (tested against autodiff).

A new family is a subclass with those three methods; a compiled rollout for it is one entry in
``ilqr_vae.rollout``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor, nn

Weights = tuple[Tensor, ...]


class Dynamics(nn.Module, ABC):
    """Base of the families; ``family`` names one in configs and model files."""

    family: str

    def __init__(self, n: int, m: int) -> None:
        super().__init__()
        self.n, self.m = n, m

    @abstractmethod
    def weights(self) -> Weights:
        """Effective weights, differentiable in the raw parameters."""

    @staticmethod
    @abstractmethod
    def step(
        w: Weights, z: Float[Tensor, "*batch n"], u: Float[Tensor, "*batch m"]
    ) -> Float[Tensor, "*batch n"]:
        """f(z, u)."""

    @staticmethod
    @abstractmethod
    def jacobians(
        w: Weights, z: Float[Tensor, "*batch n"], u: Float[Tensor, "*batch m"]
    ) -> tuple[Float[Tensor, "*batch n n"], Float[Tensor, "*batch n m"]]:
        """A = df/dz and B = df/du at (z, u)."""

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

    def weights(self) -> Weights:
        left = torch.linalg.matrix_exp(self.skew_left - self.skew_left.mT)
        right = torch.linalg.matrix_exp(self.skew_right - self.skew_right.mT)
        return (left * torch.sigmoid(self.raw_gain)) @ right, self.input

    @staticmethod
    def step(w: Weights, z: Tensor, u: Tensor) -> Tensor:
        A, B = w
        return z @ A.mT + u @ B.mT

    @staticmethod
    def jacobians(w: Weights, z: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        A, B = w
        batch = z.shape[:-1]
        return A.expand(*batch, *A.shape), B.expand(*batch, *B.shape)


class MGU2(Dynamics):
    """Minimal gated unit, variant 2 (Heck & Salem 2017; Schimel et al. 2022, appendix C).

    f = sigmoid(U_f z + b_f);  h = tanh(U_h (f . z) + W u + b_h);  z' = (1 - f) . z + f . h

    ``b_f`` starts at ``forget_bias``: negative makes slow units (small f) at the start.
    """

    family = "mgu2"

    def __init__(self, n: int, m: int, *, forget_bias: float = 0.0) -> None:
        super().__init__(n, m)
        self.gate = nn.Parameter(torch.randn(n, n) / math.sqrt(n))
        self.gate_bias = nn.Parameter(torch.full((n,), float(forget_bias)))
        self.hidden = nn.Parameter(torch.randn(n, n) / math.sqrt(n))
        self.hidden_bias = nn.Parameter(torch.zeros(n))
        self.input = nn.Parameter(torch.randn(n, m) / math.sqrt(m))

    def weights(self) -> Weights:
        return self.gate, self.gate_bias, self.hidden, self.hidden_bias, self.input

    @staticmethod
    def step(w: Weights, z: Tensor, u: Tensor) -> Tensor:
        Uf, bf, Uh, bh, W = w
        f = torch.sigmoid(z @ Uf.mT + bf)
        h = torch.tanh((f * z) @ Uh.mT + u @ W.mT + bh)
        return z + f * (h - z)

    @staticmethod
    def jacobians(w: Weights, z: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        Uf, bf, Uh, bh, W = w
        f = torch.sigmoid(z @ Uf.mT + bf)
        h = torch.tanh((f * z) @ Uh.mT + u @ W.mT + bh)
        fh = f * (1 - h * h)  # d z' / d (argument of tanh)
        s = f * (1 - f)  # slope of the gate
        # A = diag(1 - f) + diag(h - z) F + diag(fh) U_h (diag(f) + diag(z) F),  F = diag(s) U_f
        F = s.unsqueeze(-1) * Uf
        A = (h - z).unsqueeze(-1) * F + fh.unsqueeze(-1) * (
            Uh * f.unsqueeze(-2) + (Uh * z.unsqueeze(-2)) @ F
        )
        A = A + torch.diag_embed(1 - f)
        return A, fh.unsqueeze(-1) * W


FAMILIES: dict[str, type[Dynamics]] = {cls.family: cls for cls in (Linear, MGU2)}
