"""The training part of a recording as tensors, random crops of it, and warm starts per bin."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ilqr_vae.errors import RecordingError
from ilqr_vae.model.generative import Model
from ilqr_vae.model.likelihoods import Observed
from ilqr_vae.recordings import Recording, RecordingSpec, SplitSpec
from ilqr_vae.recordings.split import at_rest, varies


@dataclass(frozen=True)
class Prepared:
    """A recording with the model's units, and its spans.

    Attributes:
        recording: the recording with units selected on the training part.
        train, validation, test: half-open bin ranges.
        kinematic_mean, kinematic_scale: statistics of the training part. A joint model observes
            standardised kinematics. A channel that never varies has scale zero and is not modelled.
    """

    recording: Recording
    train: tuple[int, int]
    validation: tuple[int, int]
    test: tuple[int, int]
    kinematic_mean: NDArray[np.float64]
    kinematic_scale: NDArray[np.float64]

    def standardised(self) -> NDArray[np.float64] | None:
        """Return standardised kinematics (T, D), or None."""
        k = self.recording.kinematics
        scale = np.where(self.kinematic_scale > 0, self.kinematic_scale, 1.0)
        return None if k is None else (k - self.kinematic_mean) / scale


def prepare(recording: Recording, spec: RecordingSpec, *, chunk: int) -> Prepared:
    """Select units by rate on the training part and cut the spans.

    Raises:
        RecordingError: no unit fires fast enough, a span is too short for one crop, or no
            kinematics vary in the training or the validation part.
    """
    T = len(recording)
    train = spec.split.span("train", recording)
    validation = spec.split.span("validation", recording)
    if train[1] - train[0] < chunk or validation[1] - validation[0] < 2:
        raise RecordingError(
            "recording",
            expected=f"at least {chunk} bins of training and 2 of validation",
            got=f"{train[1] - train[0]} and {validation[1] - validation[0]} "
            f"({T} bins of {recording.bin_width:g} s)",
        )
    rates = recording.mean_counts(*train) / recording.bin_width
    keep = (rates >= spec.min_rate) & (rates > 0)
    counted = recording.counted
    keep[counted:] = _varying(recording, train)
    if not keep[:counted].any():
        raise RecordingError(
            "data.min_rate",
            expected="a rate that leaves at least one unit",
            got=f"{spec.min_rate:g} Hz; the fastest unit has {rates[:counted].max():.3g} Hz",
        )
    names = tuple(name for name, k in zip(recording.unit_names, keep, strict=True) if k)
    recording = recording.select_units(names)
    if recording.kinematics is None:
        mean = scale = np.zeros(0)
    else:
        part = recording.kinematics[train[0] : train[1]]
        part = part[recording.scored[train[0] : train[1]]]
        if len(part) < 2:
            raise RecordingError(
                "recording.kinematics",
                expected="two or more bins of the training part to learn from",
                got=str(len(part)),
            )
        mean, scale = part.mean(0), np.where(varies(part), part.std(0), 0.0)
        _movement(recording, spec.split)
        said = recording.warnings  # a recording read from a file has them already
        still = tuple(w for w in at_rest(recording, spec.split) if w not in said)
        recording = replace(recording, warnings=said + still)
    return Prepared(recording, train, validation, spec.split.span("test", recording), mean, scale)


def _varying(recording: Recording, train: tuple[int, int]) -> list[bool]:
    """Which features vary where they were observed in the training part."""
    part, first = slice(*train), recording.counted
    values, seen = recording.counts[part, first:], recording.mask()[part, first:]
    return [
        bool(varies(x[there][:, None]).any()) for x, there in zip(values.T, seen.T, strict=True)
    ]


def _movement(recording: Recording, split: SplitSpec) -> None:
    """Raise RecordingError if no kinematics vary in the training or the validation part."""
    k = recording.kinematics
    for span in ("train", "validation"):
        start, stop = split.span(span, recording)
        part = np.zeros((0, 0)) if k is None else k[start:stop][recording.scored[start:stop]]
        if len(part) and not varies(part).any():
            raise RecordingError(
                "recording.kinematics",
                expected=f"movement in the {span} part, bins {start}:{stop} (see data.split)",
                got=f"none: {', '.join(recording.kinematic_names)} do not vary there",
            )


class Crops:
    """Random crops of the training part, with warm starts from earlier solutions of their bins.

    A crop never crosses from one segment into the next (``Recording.segments``). A segment shorter
    than a crop is drawn from its first bin; later bins are masked and not ``live``.
    """

    def __init__(self, data: Prepared, model: Model, chunk: int, seed: int) -> None:
        like = model.initial.mean
        a, b = data.train
        self.chunk, self.n_bins = chunk, b - a
        spikes = model.group("spikes")
        values = torch.as_tensor(data.recording.counts[a:b].astype(np.float64))
        self.counts = spikes.standard(values.to(like.device)).to(like)
        whole = data.recording.observed is None
        seen = data.recording.valid[a:b, None] if whole else data.recording.mask()[a:b]
        self.mask = torch.as_tensor(seen.astype(np.float64)).to(like)
        scored = torch.as_tensor(data.recording.scored[a:b].astype(np.float64)).to(like)
        moves = torch.as_tensor(data.kinematic_scale > 0).to(like)
        self.scored = scored.unsqueeze(1) * (moves if len(moves) else 1.0)
        self.starts, stops = _starts(data.recording.segments(a, b), a, chunk)
        self.stop_of = torch.as_tensor(stops, device=like.device)
        self.whole = all(stop - start >= chunk for start, stop in data.recording.segments(a, b))
        k = data.standardised() if "kinematics" in model.groups else None
        self.kinematics = None if k is None else torch.as_tensor(k[a:b]).to(like)
        self.z = torch.zeros(self.n_bins + 1, model.n).to(like)
        self.u = torch.zeros(self.n_bins, model.m).to(like)
        self.rng = np.random.default_rng(seed)

    def draw(self, batch: int) -> Tensor:
        """Return bin indices (B, chunk) of random crops."""
        starts = self.starts[self.rng.integers(0, len(self.starts), size=batch)]
        return torch.as_tensor(starts[:, None] + np.arange(self.chunk)[None]).to(self.z.device)

    def _inside(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Clip indices to the end of their segment; also return which were inside it."""
        last = self.stop_of[index[:, :1]] - 1
        return torch.minimum(index, last), index <= last

    def observed(self, index: Tensor) -> dict[str, Observed]:
        """Return the values and masks of all groups at these bins."""
        index, inside = self._inside(index)
        live = inside.unsqueeze(-1).to(self.mask)
        counts, mask = self.counts[index], self.mask[index] * live
        groups = {"spikes": Observed(counts * mask, mask.expand_as(counts))}
        if self.kinematics is not None:
            k = self.kinematics[index]
            groups["kinematics"] = Observed(k, self.scored[index] * live)
        return groups

    def live(self, index: Tensor) -> Tensor | None:
        """Return (B, chunk) ones within segments; None if no segment is shorter than a crop."""
        return None if self.whole else self._inside(index)[1].to(self.mask)

    def warm(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the initial state and inputs of the last solution, or zeros."""
        if self.whole:
            return self.z[index[:, 0]], self.u[index]
        inside, live = self._inside(index)
        return self.z[index[:, 0]], self.u[inside] * live.unsqueeze(-1).to(self.u)

    def remember(self, index: Tensor, z: Tensor, u: Tensor) -> None:
        """Store a solution for the next time these bins are drawn."""
        if self.whole:
            self.z[index], self.u[index] = z[:, :-1], u
            return
        live = self._inside(index)[1]
        self.z[index[live]], self.u[index[live]] = z[:, :-1][live], u[live]


def _starts(
    segments: list[tuple[int, int]], first: int, chunk: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return possible first bins of crops, and each bin's segment end, relative to ``first``."""
    starts = [np.arange(a, max(a + 1, b - chunk + 1), dtype=np.int64) - first for a, b in segments]
    stops = [np.full(b - a, b - first, dtype=np.int64) for a, b in segments]
    return np.concatenate(starts), np.concatenate(stops)
