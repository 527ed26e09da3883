"""Minimal gated units: a gate f in (0, 1)^n sets how far each unit moves towards h,

    z_{k+1} = (1 - f) . z_k + f . h

with f and h functions of z_k and u_k, see the classes. A and B are the Jacobians in z and u.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from ilqr_vae.model.dynamics.base import Dynamics, DynamicsOptions, Weights


def unit_columns(W: Tensor) -> Tensor:
    """Columns scaled to unit length."""
    return W / W.norm(dim=0, keepdim=True).clamp(min=1e-12)


class MGU2(Dynamics):
    """Minimal gated unit, variant 2 (Heck & Salem 2017; Schimel et al. 2022, appendix C).

    f = sigmoid(U_f z + b_f);  h = phi(U_h (f . z) + W u + b_h);  z' = (1 - f) . z + f . h

    With ``input="outside"``, h = phi(U_h (f . z) + b_h) + W u. The published models have that and
    phi = "soft-relu". ``b_f`` starts at ``forget_bias`` and is learned by default; a negative value
    makes units slow (small f) initially. With ``normalise_input`` the columns of W have unit
    length.

    Args:
        options: fields of ``DynamicsOptions``.

    Raises:
        ConfigError: an unknown activation.
    """

    family = "mgu2"

    def __init__(self, n: int, m: int, **options: Any) -> None:
        chosen = DynamicsOptions(**options)
        super().__init__(n, m, activation=chosen.activation)
        self.outside, self.normalise_input = chosen.input == "outside", chosen.normalise_input
        self.gate = nn.Parameter(torch.randn(n, n) / math.sqrt(n))
        self.gate_bias = nn.Parameter(
            torch.full((n,), float(chosen.forget_bias)), requires_grad=chosen.learn_forget_bias
        )
        self.hidden = nn.Parameter(torch.randn(n, n) / math.sqrt(n))
        self.hidden_bias = nn.Parameter(torch.zeros(n))
        self.input = nn.Parameter(torch.randn(n, m) / math.sqrt(m))

    @classmethod
    def from_options(cls, n: int, m: int, options: DynamicsOptions) -> MGU2:
        return cls(n, m, **msgspec.structs.asdict(options))

    @property
    def kernel(self) -> str:
        if type(self) is not MGU2:
            return ""
        variant = [] if self.activation == "tanh" else [self.activation]
        return " ".join([self.family, *variant, *(["outside"] if self.outside else [])])

    def _columns(self, W: Tensor) -> Tensor:
        return unit_columns(W) if self.normalise_input else W

    def weights(self) -> Weights:
        return self.gate, self.gate_bias, self.hidden, self.hidden_bias, self._columns(self.input)

    def _gate(self, w: Weights, z: Tensor, u: Tensor) -> Tensor:
        return torch.sigmoid(z @ w[0].mT + w[1])

    def _candidate(self, w: Weights, f: Tensor, z: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """h, and the slope of phi."""
        _, _, Uh, bh, W, *_ = w
        recurrent, drive = (f * z) @ Uh.mT, u @ W.mT
        x = recurrent + bh if self.outside else recurrent + drive + bh
        h = self._phi.value(x)
        return (h + drive if self.outside else h), self._phi.slope(x, h)

    def step(self, w: Weights, z: Tensor, u: Tensor) -> Tensor:
        f = self._gate(w, z, u)
        return z + f * (self._candidate(w, f, z, u)[0] - z)

    def jacobians(self, w: Weights, z: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        Uf, _, Uh, _, W, *Wf = w
        f = self._gate(w, z, u)
        h, slope = self._candidate(w, f, z, u)
        fh = (f * slope).unsqueeze(-1)  # d z' / d (argument of phi)
        s = (f * (1 - f)).unsqueeze(-1)  # slope of the gate
        # A = diag(1 - f) + diag(h - z) F + diag(fh) U_h (diag(f) + diag(z) F),  F = diag(s) U_f
        gap, Uz = (h - z).unsqueeze(-1), Uh * z.unsqueeze(-2)
        F = s * Uf
        A = gap * F + fh * (Uh * f.unsqueeze(-2) + Uz @ F) + torch.diag_embed(1 - f)
        B = (f.unsqueeze(-1) if self.outside else fh) * W
        for V in Wf:  # the input's way through the gate
            G = s * V
            B = B + gap * G + fh * (Uz @ G)
        return A, B

    def tangent(
        self, w: Weights, z: Tensor, u: Tensor, dz: Tensor, du: Tensor
    ) -> tuple[Tensor, Tensor]:
        Uf, _, Uh, _, W, *Wf = w
        f = self._gate(w, z, u)
        h, slope = self._candidate(w, f, z, u)
        df = f * (1 - f) * (dz @ Uf.mT + sum(du @ V.mT for V in Wf))
        recurrent, drive = (df * z + f * dz) @ Uh.mT, du @ W.mT
        dh = slope * recurrent + drive if self.outside else slope * (recurrent + drive)
        gap = h - z
        return z + f * gap, dz + df * gap + f * (dh - dz)


class MGU(MGU2):
    """Minimal gated unit (Zhou et al. 2016): as MGU2, with the input in the gate too.

    f = sigmoid(U_f z + W_f u + b_f);  h, z' as in MGU2.
    """

    family = "mgu"

    def __init__(self, n: int, m: int, **options: Any) -> None:
        super().__init__(n, m, **options)
        self.gate_input = nn.Parameter(torch.randn(n, m) / math.sqrt(m))

    def weights(self) -> Weights:
        return *super().weights(), self._columns(self.gate_input)

    def _gate(self, w: Weights, z: Tensor, u: Tensor) -> Tensor:
        return torch.sigmoid(z @ w[0].mT + u @ w[5].mT + w[1])
