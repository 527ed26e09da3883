"""Latent -> kinematics, with standard deviations.

    y_t = W x_t + b + O relu(U x_t + c) + C h_t + e_t
    x_t = [z_t, z_{t-1}, ..., z_{t-L},  r_t, r_{t-1}, ..., r_{t-K+1}],    e_t ~ N(0, diag s_t^2)

z are the estimates available at bin t (nothing later), and r_k = mask_k (counts_k - rates(z_k)) the
residual spikes, zero for a missing unit or bin. h_t is the state of a recurrent layer after the
last L bins of the window (below). L, K and the numbers of hidden and recurrent units may be zero.
The stated variance of channel d is

    s_td^2 = gain_d (J_t Sigma_t J_t')_dd + tau_d^2 + kappa_d q_t

Sigma_t is the estimator's own covariance of z_t, J_t the derivative of all but C h_t in z_t, and
q_t the decode's mean square over channels, each centred and in units of its spread, since errors
grow with speed. ``gain``, tau^2 and kappa are fitted on held-out residuals, so that the intervals
are calibrated.

The recurrent layer runs over the bins of the window, oldest first::

    h_0 = tanh(A z_{t-L} + a)
    r = sigmoid(P_r x_k + p_r + G_r h + g_r),   s = sigmoid(P_s x_k + p_s + G_s h + g_s)
    c = tanh(P_c x_k + p_c + r (G_c h + g_c)),  h <- (1 - s) c + s h      for k = L - 1, ..., 0

x_k are the counts k bins before the newest; for a missing unit or bin they are the counts that the
latents predict, rates(z_{t-k}). The layer starts from the state before the oldest of these bins, so
that earlier bins enter through the latents. It has no memory of its own, so that late or revised
bins and resumed sessions need no special treatment. A window with fewer bins starts from its first
state. (Cho et al. 2014, with the reset gate as in torch.nn.GRU.)

A readout is fitted to the model's units. When the rows of a model are adapted to other units, the
readout keeps the rows that it was fitted with, and a list of the units that it still reads. All
others are missing to it, so that it reads the counts that the latents predict for the earlier unit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Annotated, NamedTuple

import msgspec
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ilqr_vae.model.fixed_lag import FixedLag
from ilqr_vae.model.likelihoods import Counts, Likelihood


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
        z: state before the oldest bin in the window.
        x: counts, newest first.
        held: number of bins in the window, which are the newest ones.
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


class ReadoutShape(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True
):
    """The shape of a readout.

    Attributes:
        lags: L, number of earlier estimates to read beside the newest.
        residuals: K, number of bins whose residual spikes it reads; zero for none.
        hidden: units of the hidden layer; zero for none.
        recurrent: units of the recurrent layer over the last L bins; zero for none.
        own_rows: whether it has its own rows, see the module's docstring.
        later: K, largest lag of fixed-lag decodes (``model.fixed_lag``); zero for none.
    """

    lags: Annotated[int, msgspec.Meta(ge=0, le=10_000)] = 0
    residuals: Annotated[int, msgspec.Meta(ge=0, le=10_000)] = 0
    hidden: Annotated[int, msgspec.Meta(ge=0, le=10_000)] = 0
    recurrent: Annotated[int, msgspec.Meta(ge=0, le=10_000)] = 0
    own_rows: bool = False
    later: Annotated[int, msgspec.Meta(ge=0, le=100)] = 0

    def direct(self, n: int, units: int) -> int:
        """Length of x, F."""
        return (self.lags + 1) * n + self.residuals * units

    def features(self, n: int, units: int) -> int:
        """Length of all features: x, and for a recurrent layer the number of bins and their
        counts.
        """
        return self.direct(n, units) + (1 + self.lags * units if self.recurrent else 0)


def read_window(
    shape: ReadoutShape,
    age: Int[Tensor, " S"],
    z: Float[Tensor, "S H1 n"],
    counts: Float[Tensor, "S H N"],
    mask: Float[Tensor, "S H N"],
    rates: Callable[[Tensor], Tensor],
) -> Float[Tensor, "S F"]:
    """Return the features of each stream.

    They are its newest latents, then the residual spikes of its newest bins, then for a recurrent
    layer the number of bins and their counts, with missing ones filled in.

    Args:
        age: bins in the window; z[:, age] is the newest estimate.
        rates: expected counts from latents.
    """
    row = torch.arange(len(age), device=z.device).unsqueeze(1)
    back = age.unsqueeze(1) - torch.arange(shape.lags + 1, device=z.device)
    read = [z[row, back.clamp(min=0)].reshape(len(age), -1)]
    bins = max(shape.residuals, shape.lags if shape.recurrent else 0)
    if not bins:
        return read[0]
    back = age.unsqueeze(1) - torch.arange(bins, device=z.device)
    held, slot = (back > 0).unsqueeze(-1), back.clamp(min=1)
    expected, seen, there = rates(z[row, slot]), counts[row, slot - 1], mask[row, slot - 1]
    K, L = shape.residuals, shape.lags
    read.append((there * (seen - expected) * held)[:, :K].reshape(len(age), -1))
    if shape.recurrent:
        filled = torch.where(there > 0, seen, expected) * held
        read += [age.clamp(max=L).to(z).unsqueeze(1), filled[:, :L].reshape(len(age), -1)]
    return torch.cat(read, -1)


def split_recurrent(
    x: Float[Tensor, "*batch features"], n: int, shape: ReadoutShape
) -> tuple[Float[Tensor, "*batch n"], Int[Tensor, "*batch"], Float[Tensor, "*batch L N"]]:
    """Return the features of the recurrent layer: initial state, number of bins, and counts."""
    L = shape.lags
    units = (x.shape[-1] - 1 - (L + 1) * n) // (shape.residuals + L)
    at = shape.direct(n, units)
    counts = x[..., at + 1 :].unflatten(-1, (L, units))
    return x[..., L * n : (L + 1) * n], x[..., at].to(torch.int64), counts


class KinematicReadout(nn.Module):
    """Readout of the newest window.

    Args:
        n: latents.
        channels: D.
        shape: shape of the readout.
        units: N, required if residuals are read.

    Attributes:
        W: (D, F); b: (D,); in the recording's kinematic units.
        U: (h, F); c: (h,); O: (D, h).
        C: (D, g); and the recurrent layer's weights, as in ``Cell``.
        rows: (N, n + 1), its own rows C and b; log_gain: (N,), their gains.
        reads: (N,) one for units that it reads, else zero.
        later_maps, later_offsets, later_scales: see ``FixedLag``.
        variance: (D,) tau^2.
        gain: (D,) multiplier of the propagated latent variance.
        kappa: (D,) of the decode's mean square.
        centre, spread: (D,) mean and standard deviation of the kinematics fitted on.
    """

    W: Tensor
    b: Tensor
    U: Tensor
    c: Tensor
    O: Tensor  # noqa: E741 (the letter of the formula)
    C: Tensor
    A: Tensor
    a: Tensor
    P: Tensor
    p: Tensor
    G: Tensor
    g: Tensor
    rows: Tensor
    log_gain: Tensor
    reads: Tensor
    later_maps: Tensor
    later_offsets: Tensor
    later_scales: Tensor
    variance: Tensor
    gain: Tensor
    kappa: Tensor
    centre: Tensor
    spread: Tensor

    def __init__(
        self, n: int, channels: int, shape: ReadoutShape | None = None, *, units: int = 0
    ) -> None:
        super().__init__()
        self.n, self.shape = n, shape or ReadoutShape()
        F, h, D = self.shape.direct(n, units), self.shape.hidden, channels
        sizes = {"W": (D, F), "b": (D,), "U": (h, F), "c": (h,), "O": (D, h)}
        if g := self.shape.recurrent:
            sizes |= {"C": (D, g), "A": (g, n), "a": (g,), "P": (3 * g, units), "p": (3 * g,)}
            sizes |= {"G": (3 * g, g), "g": (3 * g,)}
        if self.shape.own_rows:
            sizes |= {"rows": (units, n + 1), "log_gain": (units,), "reads": (units,)}
        if K := self.shape.later:
            sizes |= {"later_maps": (K + 1, D, F), "later_offsets": (K + 1, D)}
            sizes |= {"later_scales": (K, D)}
        for name, size in sizes.items():
            self.register_buffer(name, torch.zeros(size))
        for name, value in (
            ("variance", 1.0),
            ("gain", 1.0),
            ("kappa", 0.0),
            ("centre", 0.0),
            ("spread", 1.0),
        ):
            self.register_buffer(name, torch.full((D,), value))

    @property
    def cell(self) -> Cell:
        """The recurrent layer, or None."""
        return Cell(self.A, self.a, self.P, self.p, self.G, self.g)

    @property
    def later(self) -> FixedLag | None:
        """The maps of fixed-lag decodes, or None."""
        if not self.shape.later:
            return None
        return FixedLag(self.later_maps, self.later_offsets, self.later_scales)

    def expects(self, spikes: Likelihood) -> Likelihood:
        """The observation model whose rates replace missing units."""
        if not self.shape.own_rows:
            return spikes
        own = copy.deepcopy(spikes).requires_grad_(False)
        own.C.copy_(self.rows[:, :-1])
        own.b.copy_(self.rows[:, -1])
        if isinstance(own, Counts) and own.log_gain is not None:
            own.log_gain.copy_(self.log_gain)
        return own

    def believed(self, mask: Float[Tensor, "*batch N"]) -> Float[Tensor, "*batch N"]:
        """Return the mask without the units that it does not read."""
        return mask * self.reads if self.shape.own_rows else mask

    def mean(self, x: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch D"]:
        """Return the decode of the features."""
        F, shape = self.W.shape[1], self.shape
        direct = x[..., :F]
        mean = direct @ self.W.mT + self.b + (direct @ self.U.mT + self.c).relu() @ self.O.mT
        if not shape.recurrent:
            return mean
        oldest, held, counts = split_recurrent(x, self.n, shape)
        return mean + run(self.cell, oldest, counts, held) @ self.C.mT

    def latent_variance(
        self, x: Float[Tensor, "*batch features"], covariance: Float[Tensor, "*batch n n"]
    ) -> Float[Tensor, "*batch D"]:
        """Return diag(J Sigma J'), the variance of the decode due to the latents."""
        slope = (x[..., : self.W.shape[1]] @ self.U.mT + self.c > 0).to(x)
        J = self.W[:, : self.n] + (self.O * slope.unsqueeze(-2)) @ self.U[:, : self.n]
        return ((J @ covariance) * J).sum(-1)

    def energy(self, mean: Float[Tensor, "*batch D"]) -> Float[Tensor, " *batch"]:
        """Return q, the mean square of the decode, centred and in units of its spread."""
        return (((mean - self.centre) / self.spread) ** 2).mean(-1)

    def forward(
        self, x: Float[Tensor, "*batch features"], covariance: Float[Tensor, "*batch n n"]
    ) -> tuple[Float[Tensor, "*batch D"], Float[Tensor, "*batch D"]]:
        """Return mean and standard deviation of the kinematics."""
        mean = self.mean(x)
        variance = self.gain * self.latent_variance(x, covariance) + self.variance
        return mean, (variance + self.kappa * self.energy(mean).unsqueeze(-1)).sqrt()
