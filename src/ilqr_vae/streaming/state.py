"""The states of streams of the moving-horizon estimator, and the estimates.

Each of S streams has a window of H bins of N units, with n latents and m inputs, and an arrival
cost 1/2 (z - mean)' precision (z - mean) on the window's first state; see ``streaming.horizon``.
An ensemble of K members has a state for each: (S, K) instead of S (``streaming.ensemble``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ilqr_vae.inference.problem import where

INPUT_DELAY = 5
"""Delay of a reported input in bins, since a bin alone says little about its own input."""


@dataclass(frozen=True)
class HorizonState:
    """The state of a batch of streams.

    Attributes:
        age: bins in the window so far, at most H.
        mean, precision: of the arrival cost on the first state of the window.
        z, u: current solution over the slots of the window.
        counts, mask: data of the window; mask is one where observed.
    """

    age: Int[Tensor, "*S"]
    mean: Float[Tensor, "*S n"]
    precision: Float[Tensor, "*S n n"]
    z: Float[Tensor, "*S H1 n"]
    u: Float[Tensor, "*S H m"]
    counts: Float[Tensor, "*S H N"]
    mask: Float[Tensor, "*S H N"]

    def tensors(self) -> tuple[Tensor, ...]:
        """The fields, in order."""
        return (self.age, self.mean, self.precision, self.z, self.u, self.counts, self.mask)

    @property
    def published(self) -> HorizonState:
        """State of the first member, whose latents are published; itself for a single model."""
        return HorizonState(*(t[:, 0] for t in self.tensors())) if self.age.ndim == 2 else self

    def __getitem__(self, i: int) -> HorizonState:
        """Return one stream, as a batch of one."""
        return HorizonState(*(t[i : i + 1] for t in self.tensors()))

    def replaced(self, which: Bool[Tensor, " S"], new: HorizonState) -> HorizonState:
        """Return this state with some streams replaced."""
        pairs = zip(new.tensors(), self.tensors(), strict=True)
        return HorizonState(*(where(which, a, b) for a, b in pairs))

    @staticmethod
    def stack(states: Sequence[HorizonState]) -> HorizonState:
        """Stack several streams into one batch."""
        return HorizonState(
            *(torch.cat([getattr(s, f.name) for s in states]) for f in fields(HorizonState))
        )


@dataclass(frozen=True)
class Estimate:
    """The estimate for the newest bin of each stream.

    Attributes:
        z: mean of the latent state after the newest bin.
        window: features of the readout, the newest L + 1 states first (``model.readout``).
        z_cov: covariance of z.
        rates: expected counts per bin under z.
        kinematics, kinematics_std: in the recording's units; D = 0 without kinematics.
        bits: log-likelihood of the newest bin as predicted one step ahead, in bits, relative to the
            training mean rates; over observed units only.
        spikes: how many spikes the observed units had.
        iterations, status: of the solve (``ilqr.Status``).
        ignored: units whose counts were beyond the bounds and were not used (``bounds``).
        beyond: whether the answer is beyond what training showed (``bounds``).
        restarted: whether the stream began anew with this bin, its state being lost (``bounds``).
    """

    z: Float[Tensor, "S n"]
    window: Float[Tensor, "S features"]
    z_cov: Float[Tensor, "S n n"]
    rates: Float[Tensor, "S N"]
    kinematics: Float[Tensor, "S D"]
    kinematics_std: Float[Tensor, "S D"]
    bits: Float[Tensor, " S"]
    spikes: Float[Tensor, " S"]
    iterations: Int[Tensor, " S"]
    status: Int[Tensor, " S"]
    ignored: Int[Tensor, " S"]
    beyond: Bool[Tensor, " S"]
    restarted: Bool[Tensor, " S"]

    @property
    def z_std(self) -> Float[Tensor, "S n"]:
        variance = self.z_cov.diagonal(dim1=-2, dim2=-1)
        if variance.device.type != "cpu":
            return variance.sqrt()
        # numpy rounds roots correctly, whatever the array's size and layout; torch does not
        return torch.from_numpy(np.sqrt(variance.detach().numpy()))
