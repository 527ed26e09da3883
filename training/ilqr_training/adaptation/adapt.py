"""A model file for other units of the same brain, without labels.

Dynamics, priors and the readout stay as they were trained; the rows of the units are fitted again
on bins of the new recording (``units``), and the readout reads units only whose rows held
(``model.readout``). A candidate fitted on the first part of the bins is then streamed through the
rest beside the model as it was, and refused unless it predicts them better, from latents that lie
where training's did.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ilqr_training.adaptation.units import Rows, UnitVerdict, refit
from ilqr_training.readout.causal import Causal, causal_pass
from ilqr_vae.artifact import Artifact, ModelSpec, build
from ilqr_vae.errors import ConfigError
from ilqr_vae.model.generative import Model
from ilqr_vae.model.likelihoods import Counts
from ilqr_vae.model.readout import KinematicReadout
from ilqr_vae.progress import SILENT, Progress
from ilqr_vae.recordings import Recording
from ilqr_vae.streaming.bounds import TrainingRange, highest_counts
from ilqr_vae.streaming.horizon import MovingHorizon

_FITTED = 0.75
_RUN_IN = 100
_LEAST_BINS = 400
_ANCHORS = 0.2
_SHIFT = 0.35  # of a log rate
_OUTSIDE = 0.1


@dataclass(frozen=True)
class Adaptation:
    """A model adapted to other units.

    Attributes:
        artifact: the adapted model; its units are those of the recording.
        verdicts: of each of them.
        gone: units of the model that the recording lacks.
        bits: predicted of a bin's spikes beyond their mean rates, on bins not fitted on: by the
            model as it was, and by the candidate.
        outside: share of these bins in which a latent lies outside its range in training.
        refused: why the candidate must not be used; "" if it may be.
    """

    artifact: Artifact
    verdicts: dict[str, UnitVerdict]
    gone: tuple[str, ...]
    bits: tuple[float, float]
    outside: float
    refused: str

    def count(self, verdict: UnitVerdict) -> int:
        """Units of that verdict."""
        return sum(v is verdict for v in self.verdicts.values())


@dataclass(frozen=True)
class _Units:
    """The model's units among those of a recording.

    Attributes:
        here: (N,) of each unit of the recording the model's index, -1 for one it does not know.
    """

    here: NDArray[np.int64]

    @property
    def known(self) -> Tensor:
        return torch.as_tensor(self.here >= 0)

    def rows(self, old: Tensor, new: Tensor) -> Tensor:
        """Of each unit the model's entry, where it knows the unit; else the new one."""
        entry = old[torch.as_tensor(np.maximum(self.here, 0))]
        return torch.where(self.known.view(-1, *[1] * (entry.ndim - 1)), entry, new)


def adapt(
    artifact: Artifact,
    recording: Recording,
    bins: tuple[int, int],
    *,
    seed: int = 0,
    progress: Progress = SILENT,
) -> Adaptation:
    """Fit the rows of a recording's units on some of its bins; of an ensemble each member's.

    Args:
        artifact: in float64 on the CPU; its spikes are counts.
        recording: of the units to stream from now on; those with the names of the model's are
            taken for the same until their spikes say otherwise.
        bins: half-open.
        seed: of folds and draws.

    Raises:
        ConfigError: a model of spikes that are not counts; too few bins.
    """
    if artifact.others:
        return _together(
            artifact,
            [adapt(m, recording, bins, seed=seed, progress=progress) for m in artifact.members],
        )
    spikes = artifact.model.group("spikes")
    if not isinstance(spikes, Counts):
        raise ConfigError("model.groups.spikes", expected="counts", got=spikes.family)
    if bins[1] - bins[0] < _LEAST_BINS:
        got = f"{bins[1] - bins[0]}"
        raise ConfigError("bins", expected=f"at least {_LEAST_BINS}", got=got)
    index = {name: i for i, name in enumerate(artifact.manifest.unit_names)}
    units = _Units(np.array([index.get(name, -1) for name in recording.unit_names]))
    middle = bins[0] + round(_FITTED * (bins[1] - bins[0]))

    def fitted(stop: int) -> tuple[Artifact, Rows]:
        part = slice(bins[0], stop)
        model = _model(artifact, units, recording.mean_counts(bins[0], stop))
        y = torch.as_tensor(recording.counts[part].astype(np.float64))
        mask = torch.as_tensor(recording.mask()[part].astype(np.float64))
        rows = refit(model, units.known, y, mask, seed=seed, progress=progress)
        return _adapted(artifact, model, units, rows, recording, part), rows

    candidate, rows = fitted(middle)
    before = _model(artifact, units, recording.mean_counts(bins[0], middle))
    bits, latents = _judged(before, candidate, recording, (middle, bins[1]), progress)
    outside = 0.0
    if artifact.seen is not None:
        low, high = artifact.seen.latents.numpy()
        outside = float(((latents < low) | (latents > high)).any(-1).mean())
    known = int(units.known.sum())
    anchors = int(rows.anchors.sum())
    refused = ""
    if anchors < max(1, _ANCHORS * known):
        refused = f"{anchors} of {known} units of the model still fit, fewer than {_ANCHORS:.0%}"
    elif not bits[1] > max(bits[0], 0.0):
        refused = f"it predicts {bits[1]:.3f} bits a bin, the model as it was {bits[0]:.3f}"
    elif outside > _OUTSIDE:
        refused = f"latents lie outside their range in training in {outside:.0%} of the bins"
    if not refused:
        candidate, rows = fitted(bins[1])
    verdicts = dict(zip(recording.unit_names, rows.verdicts, strict=True))
    gone = tuple(name for name in index if name not in verdicts)
    return Adaptation(candidate, verdicts, gone, bits, outside, refused)


def _together(artifact: Artifact, members: list[Adaptation]) -> Adaptation:
    """The members' adaptations as one: refused where one is, the verdicts the first one's."""
    first, *others = members
    before, after = np.mean([member.bits for member in members], axis=0).tolist()
    return replace(
        first,
        artifact=replace(
            first.artifact,
            intervals=artifact.intervals,
            others=tuple(other.artifact for other in others),
        ),
        bits=(before, after),
        outside=max(member.outside for member in members),
        refused=next((member.refused for member in members if member.refused), ""),
    )


def _model(artifact: Artifact, units: _Units, mean: NDArray[np.float64]) -> Model:
    """The model of the recording's units: the rows it knows, and constant rates."""
    model = build(_spec(artifact, len(units.here))).double()
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


def _spec(artifact: Artifact, channels: int) -> ModelSpec:
    spec = artifact.manifest.model
    spikes = msgspec.structs.replace(spec.groups["spikes"], channels=channels)
    return msgspec.structs.replace(spec, groups={**spec.groups, "spikes": spikes})


def _adapted(
    artifact: Artifact,
    model: Model,
    units: _Units,
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
    seen = artifact.seen
    if seen is not None:
        highest = highest_counts(recording.counts[part], recording.mask()[part])
        counts = torch.as_tensor(highest.astype(np.float64))
        kept = units.rows(seen.counts, counts)
        seen = TrainingRange(torch.maximum(kept, counts), seen.latents, seen.kinematics)
    readout = artifact.readout
    if readout is not None:
        readout = _readout(readout, units, rows, own, own_gain, artifact.mean_rate)
    manifest = msgspec.structs.replace(
        artifact.manifest,
        unit_names=recording.unit_names,
        model=_spec(artifact, len(own)),
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
    units: _Units,
    rows: Rows,
    own: Tensor,
    own_gain: Tensor,
    mean_rate: Tensor,
) -> KinematicReadout:
    """The readout of the model's units as one of the recording's.

    Units that are gone, or whose rows changed, are missing to it. Of those that are gone it cannot
    infer rates any more: their mean counts take their place.
    """
    n, N = old.n, len(units.here)
    shape = msgspec.structs.replace(old.shape, own_rows=True)
    new = KinematicReadout(n, len(old.b), shape, units=N).double()
    names = dict(old.named_buffers())
    was = names.get("reads", torch.ones(len(mean_rate)).double())
    known = units.known
    for name, value in names.items():
        if name not in ("W", "U", "P", "p", "rows", "log_gain", "reads"):
            getattr(new, name).copy_(value)
    latents = (shape.lags + 1) * n
    for name in ("W", "U"):
        value = names[name]
        residuals = value[:, latents:].reshape(len(value), shape.residuals, len(mean_rate))
        moved = units.rows(residuals.movedim(-1, 0), torch.zeros(()).to(value)).movedim(0, -1)
        getattr(new, name).copy_(torch.cat([value[:, :latents], moved.flatten(1)], 1))
    if shape.recurrent:
        gone = np.setdiff1d(np.arange(len(mean_rate)), units.here)
        new.P.copy_(units.rows(old.P.mT, torch.zeros(()).to(old.P)).mT)
        new.p.copy_(old.p + old.P[:, torch.as_tensor(gone)] @ mean_rate[torch.as_tensor(gone)])
    if old.shape.own_rows:
        own, own_gain = units.rows(old.rows, own), units.rows(old.log_gain, own_gain)
    new.rows.copy_(own)
    new.log_gain.copy_(own_gain)
    # A unit that fires at another level is missing too: its counts, brought back to the old level,
    # were tried, and decode worse where rows change as well.
    shift = own[:, -1] - rows.w[:, -1]
    read = (shift.abs() < _SHIFT) & rows.anchors & known
    new.reads.copy_(read * units.rows(was, torch.zeros(()).to(own)))
    return new


def _judged(
    before: Model,
    candidate: Artifact,
    recording: Recording,
    bins: tuple[int, int],
    progress: Progress,
) -> tuple[tuple[float, float], NDArray[np.float64]]:
    """Bits a bin that the model as it was and the candidate predict, and the latter's latents."""
    passes: list[Causal] = []
    for model in (before, candidate.model):
        estimator = MovingHorizon(
            model,
            candidate.readout,
            candidate.mean_rate,
            candidate.manifest.horizon,
            candidate.seen,
        )
        passes.append(
            causal_pass(
                estimator, recording, *bins, run_in=_RUN_IN, progress=progress, what="candidate"
            )
        )
    bits = [float(made.bits.mean()) for made in passes]
    return (bits[0], bits[1]), passes[1].window[:, : before.n]
