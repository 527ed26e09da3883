"""A recurrent layer run over the bins of a window, oldest first.

    h_0 = tanh(A z_{t-L} + a)
    r = sigmoid(P_r x_k + p_r + G_r h + g_r),   s = sigmoid(P_s x_k + p_s + G_s h + g_s)
    c = tanh(P_c x_k + p_c + r (G_c h + g_c)),  h <- (1 - s) c + s h      for k = L - 1, ..., 0

x_k are the counts of the bin k before the newest, and where a unit or a bin is missing what the
latents expect there: rates(z_{t-k}). It begins from the state before the oldest of these bins, so
what lies further back comes through the latents, and it has no memory of its own: what was late,
revised or taken up again needs nothing of it. A window that holds fewer bins begins from its first
state and runs over those it holds. (Cho et al. 2014, with the reset gate as in torch.nn.GRU.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Cell(NamedTuple):
    """Weights of g units on N channels and n latents; gates in the order r, s, c.

    Attributes:
        A: (g, n); a: (g,).
        P: (3 g, N); p: (3 g,).
        G: (3 g, g); g: (3 g,).
    """

    A: Tensor
    a: Tensor
    P: Tensor
    p: Tensor
    G: Tensor
    g: Tensor


def run(
    cell: Cell,
    z: Float[Tensor, "*batch n"],
    x: Float[Tensor, "*batch L N"],
    held: Int[Tensor, "*batch"],
) -> Float[Tensor, "*batch g"]:
    """The state after the newest bin.

    Args:
        z: the state before the oldest bin that is held.
        x: counts, newest first.
        held: how many of the bins, the newest ones, are in the window.
    """
    h = (z @ cell.A.mT + cell.a).tanh()
    inputs = x @ cell.P.mT + cell.p
    units = h.shape[-1]
    for k in range(x.shape[-2] - 1, -1, -1):
        given, kept = inputs[..., k, :], h @ cell.G.mT + cell.g
        r, s = (given[..., : 2 * units] + kept[..., : 2 * units]).sigmoid().chunk(2, -1)
        c = (given[..., 2 * units :] + r * kept[..., 2 * units :]).tanh()
        h = torch.where((held > k).unsqueeze(-1), (1 - s) * c + s * h, h)
    return h
