"""The training part of a recording as tensors, random crops of it, and warm starts per bin."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ilqr_vae.errors import RecordingError
from ilqr_vae.likelihoods import Observed
from ilqr_vae.model import Model
from ilqr_vae.recordings import Recording, RecordingSpec


@dataclass(frozen=True)
class Prepared:
    """A recording with the model's units, and its spans.

    Attributes:
        recording: units selected on the training part.
        train, validation, test: half-open bin ranges.
        kinematic_mean, kinematic_scale: of the training part; the joint model sees standardised
            kinematics.
    """

    recording: Recording
    train: tuple[int, int]
    validation: tuple[int, int]
    test: tuple[int, int]
    kinematic_mean: NDArray[np.float64]
    kinematic_scale: NDArray[np.float64]

    def standardised(self) -> NDArray[np.float64] | None:
        """Kinematics (T, D) in training standard deviations, or None."""
        k = self.recording.kinematics
        return None if k is None else (k - self.kinematic_mean) / self.kinematic_scale


def prepare(recording: Recording, spec: RecordingSpec, *, chunk: int) -> Prepared:
    """Select units by rate on the training part and cut the spans.

    Raises:
        RecordingError: no unit is fast enough, or a span is too short for one crop.
    """
    T = len(recording)
    train = spec.split.bins("train", T)
    validation = spec.split.bins("validation", T)
    seen = recording.counts[train[0] : train[1]][recording.valid[train[0] : train[1]]]
    if train[1] - train[0] < chunk or validation[1] - validation[0] < 2:
        raise RecordingError(
            "recording",
            expected=f"at least {chunk} bins of training and 2 of validation",
            got=f"{train[1] - train[0]} and {validation[1] - validation[0]} "
            f"({T} bins of {recording.bin_width:g} s)",
        )
    rates = seen.mean(0) / recording.bin_width if len(seen) else np.zeros(recording.n_units)
    keep = (rates >= spec.min_rate) & (rates > 0)
    if not keep.any():
        raise RecordingError(
            "data.min_rate",
            expected="a rate that leaves at least one unit",
            got=f"{spec.min_rate:g} Hz; the fastest unit has {rates.max():.3g} Hz",
        )
    names = tuple(name for name, k in zip(recording.unit_names, keep, strict=True) if k)
    recording = recording.select_units(names)
    if recording.kinematics is None:
        mean = scale = np.zeros(0)
    else:
        part = recording.kinematics[train[0] : train[1]]
        mean, scale = part.mean(0), part.std(0)
        flat = [n for n, s in zip(recording.kinematic_names, scale, strict=True) if not s > 0]
        if flat:
            raise RecordingError(
                "recording.kinematics",
                expected="channels that vary over the training part",
                got=f"{flat[0]} constant",
            )
    return Prepared(recording, train, validation, spec.split.bins("test", T), mean, scale)


class Crops:
    """Random crops of the training part, each starting warm where its bins were solved before."""

    def __init__(self, data: Prepared, model: Model, chunk: int, seed: int) -> None:
        like = model.initial.mean
        a, b = data.train
        self.chunk, self.n_bins = chunk, b - a
        self.counts = torch.as_tensor(data.recording.counts[a:b].astype(np.float64)).to(like)
        valid = torch.as_tensor(data.recording.valid[a:b].astype(np.float64)).to(like)
        self.valid = valid.unsqueeze(1)
        k = data.standardised()
        self.kinematics = None if k is None else torch.as_tensor(k[a:b]).to(like)
        self.z = torch.zeros(self.n_bins + 1, model.n).to(like)
        self.u = torch.zeros(self.n_bins, model.m).to(like)
        self.rng = np.random.default_rng(seed)

    def draw(self, batch: int) -> Tensor:
        """Bin indices (B, chunk) of random crops."""
        starts = self.rng.integers(0, self.n_bins - self.chunk + 1, size=batch)
        return torch.as_tensor(starts[:, None] + np.arange(self.chunk)[None])

    def observed(self, index: Tensor) -> dict[str, Observed]:
        """Every group's values and masks at these bins."""
        valid = self.valid[index]
        counts = self.counts[index]
        groups = {"spikes": Observed(counts * valid, valid.expand_as(counts))}
        if self.kinematics is not None:
            k = self.kinematics[index]
            groups["kinematics"] = Observed(k, valid.expand_as(k))
        return groups

    def live(self, index: Tensor) -> None:
        """Crops have one length."""

    def warm(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Initial state and inputs as last solved (zeros before)."""
        return self.z[index[:, 0]], self.u[index]

    def remember(self, index: Tensor, z: Tensor, u: Tensor) -> None:
        """Keep a solution for the next time these bins are drawn."""
        self.z[index], self.u[index] = z[:, :-1], u
