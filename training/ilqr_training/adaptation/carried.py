"""A model transferred to the units of a recording: known rows, new rows, and the readout."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import msgspec
import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from ilqr_training.adaptation.units import Rows, refit
from ilqr_vae.artifact import Artifact, ModelSpec, build
from ilqr_vae.errors import ConfigError
from ilqr_vae.model.generative import Model
from ilqr_vae.model.likelihoods import Counts, Likelihood, Observed
from ilqr_vae.model.readout import KinematicReadout
from ilqr_vae.progress import Progress
from ilqr_vae.recordings import Recording
from ilqr_vae.streaming.bounds import TrainingRange, highest_counts

_LEAST_BINS = 400
_ALIKE = 0.5  # least squared correlation of the rates that the old and the new row expect
_LEVELS = 4.0  # largest ratio of mean rates up to which counts are rescaled


@dataclass(frozen=True)
class CarriedUnits:
    """The model's units among those of a recording.

    Attributes:
        here: (N,) index in the model of each unit of the recording; -1 if the model does not know
            the unit.
    """

    here: NDArray[np.int64]

    @property
    def known(self) -> Tensor:
        return torch.as_tensor(self.here >= 0)

    def rows(self, old: Tensor, new: Tensor) -> Tensor:
        """Return the model's entry for each unit that it knows, and the new entry for the
        others.
        """
        entry = old[torch.as_tensor(np.maximum(self.here, 0))]
        return torch.where(self.known.view(-1, *[1] * (entry.ndim - 1)), entry, new)


def units_of(artifact: Artifact, recording: Recording, bins: tuple[int, int]) -> CarriedUnits:
    """The model's units among the recording's. Raises ConfigError: its spikes are no counts, or the
    bins are too few."""
    spikes = artifact.model.group("spikes")
    if not isinstance(spikes, Counts):
        raise ConfigError("model.groups.spikes", expected="counts", got=spikes.family)
    if bins[1] - bins[0] < _LEAST_BINS:
        got = f"{bins[1] - bins[0]}"
        raise ConfigError("bins", expected=f"at least {_LEAST_BINS}", got=got)
    index = {name: i for i, name in enumerate(artifact.manifest.unit_names)}
    return CarriedUnits(np.array([index.get(name, -1) for name in recording.unit_names]))


def fitted_rows(
    artifact: Artifact,
    units: CarriedUnits,
    recording: Recording,
    part: slice,
    behaviour: Observed | None,
    seed: int,
    progress: Progress,
    start: Rows | None = None,
) -> tuple[Artifact, Rows]:
    """Return the model with rows fitted on these bins, given those fitted on a part of them."""
    model = carried_model(artifact, units, recording.mean_counts(part.start, part.stop))
    y = torch.as_tensor(recording.counts[part].astype(np.float64))
    mask = torch.as_tensor(recording.mask()[part].astype(np.float64))
    like = artifact.model.group("spikes").C.detach()
    rows = refit(
        model,
        units.known,
        y,
        mask,
        like,
        behaviour=behaviour,
        start=start,
        seed=seed,
        progress=progress,
    )
    return _adapted(artifact, model, units, rows, recording, part), rows


def carried_model(artifact: Artifact, units: CarriedUnits, mean: NDArray[np.float64]) -> Model:
    """Return the model for the recording's units: known rows, and constant rates otherwise."""
    model = build(carried_spec(artifact, len(units.here))).double()
    old, new = artifact.model.group("spikes"), model.group("spikes")
    of_units = {id(p) for p in old.parameters()}
    named = artifact.model.named_parameters()
    kept = {name: p.detach() for name, p in named if id(p) not in of_units}
    model.load_state_dict(kept, strict=False)
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.zero_()
        new.start_at(torch.as_tensor(mean))
        for name, parameter in new.named_parameters():
            parameter.copy_(units.rows(old.get_parameter(name), parameter))
    return model


def carried_spec(artifact: Artifact, channels: int) -> ModelSpec:
    spec = artifact.manifest.model
    spikes = msgspec.structs.replace(spec.groups["spikes"], channels=channels)
    return msgspec.structs.replace(spec, groups={**spec.groups, "spikes": spikes})


def _adapted(
    artifact: Artifact,
    model: Model,
    units: CarriedUnits,
    rows: Rows,
    recording: Recording,
    part: slice,
) -> Artifact:
    spikes = model.group("spikes")
    own = torch.cat([spikes.C, spikes.b.unsqueeze(1)], 1).detach().clone()
    gain = getattr(spikes, "log_gain", None)
    own_gain = torch.zeros(len(own)).double() if gain is None else gain.detach().clone()
    with torch.no_grad():
        spikes.C.copy_(rows.w[:, :-1])
        spikes.b.copy_(rows.w[:, -1])
    mean = torch.as_tensor(recording.mean_counts(part.start, part.stop))
    # bits are relative to these rates: they can be compared between models only if both have the
    # same rates
    mean = units.rows(artifact.mean_rate, mean)
    seen = artifact.seen
    if seen is not None:
        highest = highest_counts(recording.counts[part], recording.mask()[part])
        counts = torch.as_tensor(highest.astype(np.float64))
        kept = units.rows(seen.counts, counts)
        seen = TrainingRange(torch.maximum(kept, counts), seen.latents, seen.kinematics)
    readout = artifact.readout
    if readout is not None:
        readout = _readout(readout, units, rows, (own, own_gain), spikes, artifact.mean_rate)
    manifest = msgspec.structs.replace(
        artifact.manifest,
        unit_names=recording.unit_names,
        model=carried_spec(artifact, len(own)),
        readout=None if readout is None else readout.shape,
        scores={},
        provenance=artifact.manifest.provenance
        | {
            "adapted_from": artifact.manifest.model_id,
            "adapted_on": f"{recording.name}, bins {part.start}:{part.stop}",
        },
    )
    about = (readout, mean, seen, artifact.intervals)
    return Artifact(manifest, model, *about, classes=artifact.classes)


def _readout(
    old: KinematicReadout,
    units: CarriedUnits,
    rows: Rows,
    known_as: tuple[Tensor, Tensor],
    spikes: Likelihood,
    mean_rate: Tensor,
) -> KinematicReadout:
    """Return the readout for the units of the recording.

    It reads each unit whose new row expects rates like those of the row that the readout knows. The
    unit's counts are then compared with what the new row expects, and its weights are multiplied by
    the ratio of the old to the new mean rate. It ignores all other units. The rates of units that
    are gone can no longer be inferred: their mean counts are used instead.
    """
    n, N = old.n, len(units.here)
    shape = msgspec.structs.replace(old.shape, own_rows=True)
    new = KinematicReadout(n, len(old.b), shape, units=N).double()
    names = dict(old.named_buffers())
    own, gain = known_as
    known = units.known
    for name, value in names.items():
        if name not in ("W", "U", "P", "p", "rows", "log_gain", "reads", "later_maps"):
            getattr(new, name).copy_(value)
    own_gain = gain
    if old.shape.own_rows:
        own, own_gain = units.rows(old.rows, own), units.rows(old.log_gain, gain)
    assert isinstance(spikes, Counts)
    read, scale = _read(spikes, rows, own, own_gain)
    read &= known
    scale = torch.where(read, scale, 1.0)
    latents = (shape.lags + 1) * n
    for name in ("W", "U", "later_maps") if shape.later else ("W", "U"):
        value = names[name]
        residuals = value[..., latents:].unflatten(-1, (shape.residuals, len(mean_rate)))
        moved = units.rows(residuals.movedim(-1, 0), torch.zeros(()).to(value)).movedim(0, -1)
        moved = (moved * scale).flatten(-2)
        getattr(new, name).copy_(torch.cat([value[..., :latents], moved], -1))
    if shape.recurrent:
        gone = np.setdiff1d(np.arange(len(mean_rate)), units.here)
        new.P.copy_(units.rows(old.P.mT, torch.zeros(()).to(old.P)).mT * scale)
        new.p.copy_(old.p + old.P[:, torch.as_tensor(gone)] @ mean_rate[torch.as_tensor(gone)])
    new.rows.copy_(torch.where(read.unsqueeze(1), rows.w, own))
    new.log_gain.copy_(torch.where(read, gain, own_gain))
    new.reads.copy_(read)
    return new


def _read(
    spikes: Counts, rows: Rows, own: Tensor, own_gain: Tensor
) -> tuple[Bool[Tensor, " N"], Float[Tensor, " N"]]:
    """Return the units that the readout can read, and the ratio of old to new mean rates.

    The ratio is exactly one for a row that did not change.
    """
    z = rows.latents
    now = spikes.expected(z @ rows.w[:, :-1].mT + rows.w[:, -1])
    then = copy.deepcopy(spikes).requires_grad_(False)
    if then.log_gain is not None:
        then.log_gain.copy_(own_gain)
    was = then.expected(z @ own[:, :-1].mT + own[:, -1])
    x, y = now - now.mean(0), was - was.mean(0)
    alike = (x * y).mean(0) > (_ALIKE * (x * x).mean(0) * (y * y).mean(0)).sqrt()
    ratio = was.mean(0) / now.mean(0).clamp(min=1e-9)
    same = (rows.w == own).all(1)
    near = (ratio < _LEVELS) & (ratio > 1 / _LEVELS)
    return rows.used & (same | (alike & near)), torch.where(same, 1.0, ratio)
