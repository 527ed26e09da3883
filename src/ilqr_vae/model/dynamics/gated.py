"""Minimal gated units: one gate decides how far each unit moves."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ilqr_vae.model.dynamics.base import Dynamics, DynamicsOptions, Weights


def unit_columns(W: Tensor) -> Tensor:
    """Columns scaled to unit length."""
    return W / W.norm(dim=0, keepdim=True).clamp(min=1e-12)


class MGU2(Dynamics):
    """Minimal gated unit, variant 2 (Heck & Salem 2017; Schimel et al. 2022, appendix C).

    f = sigmoid(U_f z + b_f);  h = tanh(U_h (f . z) + W u + b_h);  z' = (1 - f) . z + f . h

    ``b_f`` starts at ``forget_bias`` and is learned unless told not to; negative makes slow units
    (small f) at the start. With ``normalise_input`` the columns of W have unit length.
    """

    family = "mgu2"

    def __init__(
        self,
        n: int,
        m: int,
        *,
        forget_bias: float = 0.0,
        learn_forget_bias: bool = True,
        normalise_input: bool = False,
    ) -> None:
        super().__init__(n, m)
        self.normalise_input = normalise_input
        self.gate = nn.Parameter(torch.randn(n, n) / math.sqrt(n))
        self.gate_bias = nn.Parameter(
            torch.full((n,), float(forget_bias)), requires_grad=learn_forget_bias
        )
        self.hidden = nn.Parameter(torch.randn(n, n) / math.sqrt(n))
        self.hidden_bias = nn.Parameter(torch.zeros(n))
        self.input = nn.Parameter(torch.randn(n, m) / math.sqrt(m))

    @classmethod
    def from_options(cls, n: int, m: int, options: DynamicsOptions) -> MGU2:
        return cls(
            n,
            m,
            forget_bias=options.forget_bias,
            learn_forget_bias=options.learn_forget_bias,
            normalise_input=options.normalise_input,
        )

    def _input(self) -> Tensor:
        return unit_columns(self.input) if self.normalise_input else self.input

    def weights(self) -> Weights:
        return self.gate, self.gate_bias, self.hidden, self.hidden_bias, self._input()

    def step(self, w: Weights, z: Tensor, u: Tensor) -> Tensor:
        Uf, bf, Uh, bh, W = w
        f = torch.sigmoid(z @ Uf.mT + bf)
        h = torch.tanh((f * z) @ Uh.mT + u @ W.mT + bh)
        return z + f * (h - z)

    def jacobians(self, w: Weights, z: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
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

    def tangent(
        self, w: Weights, z: Tensor, u: Tensor, dz: Tensor, du: Tensor
    ) -> tuple[Tensor, Tensor]:
        Uf, bf, Uh, bh, W = w
        f = torch.sigmoid(z @ Uf.mT + bf)
        h = torch.tanh((f * z) @ Uh.mT + u @ W.mT + bh)
        df = f * (1 - f) * (dz @ Uf.mT)
        dh = (1 - h * h) * ((df * z + f * dz) @ Uh.mT + du @ W.mT)
        gap = h - z
        return z + f * gap, dz + df * gap + f * (dh - dz)


class MGU(MGU2):
    """Minimal gated unit (Zhou et al. 2016): as MGU2, with the input in the gate too.

    f = sigmoid(U_f z + W_f u + b_f);  h, z' as in MGU2.
    """

    family = "mgu"

    def __init__(
        self,
        n: int,
        m: int,
        *,
        forget_bias: float = 0.0,
        learn_forget_bias: bool = True,
        normalise_input: bool = False,
    ) -> None:
        super().__init__(
            n,
            m,
            forget_bias=forget_bias,
            learn_forget_bias=learn_forget_bias,
            normalise_input=normalise_input,
        )
        self.gate_input = nn.Parameter(torch.randn(n, m) / math.sqrt(m))

    def weights(self) -> Weights:
        Wf = unit_columns(self.gate_input) if self.normalise_input else self.gate_input
        return self.gate, self.gate_bias, self.hidden, self.hidden_bias, self._input(), Wf

    def step(self, w: Weights, z: Tensor, u: Tensor) -> Tensor:
        Uf, bf, Uh, bh, W, Wf = w
        f = torch.sigmoid(z @ Uf.mT + u @ Wf.mT + bf)
        h = torch.tanh((f * z) @ Uh.mT + u @ W.mT + bh)
        return z + f * (h - z)

    # its step is another than MGU2's, so is its change
    tangent = Dynamics.tangent

    def jacobians(self, w: Weights, z: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        Uf, bf, Uh, bh, W, Wf = w
        f = torch.sigmoid(z @ Uf.mT + u @ Wf.mT + bf)
        h = torch.tanh((f * z) @ Uh.mT + u @ W.mT + bh)
        fh = (f * (1 - h * h)).unsqueeze(-1)
        s = (f * (1 - f)).unsqueeze(-1)
        gap, Uz = (h - z).unsqueeze(-1), Uh * z.unsqueeze(-2)
        F, G = s * Uf, s * Wf  # df/dz, df/du
        A = gap * F + fh * (Uh * f.unsqueeze(-2) + Uz @ F) + torch.diag_embed(1 - f)
        return A, gap * G + fh * (Uz @ G + W)
