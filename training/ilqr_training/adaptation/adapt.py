"""Adapt a model to other units of the same brain, without labels.

Dynamics, priors and readout do not change. The rows of the units are refitted on bins of the new
recording (``units``), and the readout reads only units whose rows did not change
(``model.readout``). A candidate fitted on earlier bins is then streamed through the last quarter
beside the previous model. It is refused unless it predicts them better, with latents that stay in
their range in training. An accepted candidate is refitted on all bins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import msgspec
import numpy as np

from ilqr_training.adaptation.carried import carried_model, fitted_rows, units_of
from ilqr_training.adaptation.labels import labelled_rows
from ilqr_training.adaptation.units import Rows, UnitVerdict
from ilqr_training.readout.causal import Causal, causal_pass
from ilqr_vae.artifact import Artifact
from ilqr_vae.model.generative import Model
from ilqr_vae.progress import SILENT, Progress
from ilqr_vae.recordings import Recording
from ilqr_vae.streaming.horizon import MovingHorizon

_FITTED = 0.75
_CANDIDATE = 1800  # bins that a candidate is fitted on at most, before it is refitted on all
_RUN_IN = 100
_STREAMS = 4  # parts of the last quarter that are streamed at once
_ANCHORS = 0.2
_OUTSIDE = 0.1


@dataclass(frozen=True)
class Adaptation:
    """A model adapted to other units.

    Attributes:
        artifact: the adapted model, with the units of the recording.
        verdicts: verdict on each unit.
        gone: units of the model that the recording lacks.
        bits: bits per bin that the previous model, and the candidate, gain over constant mean rates
            on bins that were not used for the fit.
        outside: share of these bins in which a latent is outside its range in training.
        refused: why the candidate must not be used; "" if it may be used.
    """

    artifact: Artifact
    verdicts: dict[str, UnitVerdict]
    gone: tuple[str, ...]
    bits: tuple[float, float]
    outside: float
    refused: str

    def count(self, verdict: UnitVerdict) -> int:
        """Return the number of units with this verdict."""
        return sum(v is verdict for v in self.verdicts.values())


def adapt(
    artifact: Artifact,
    recording: Recording,
    bins: tuple[int, int],
    *,
    labelled: bool = False,
    half_life: float = math.inf,
    seed: int = 0,
    progress: Progress = SILENT,
) -> Adaptation:
    """Fit the rows of a recording's units on some of its bins, for each member of an ensemble.

    Args:
        artifact: a model of counts, in float64 on the CPU.
        recording: recording with the units to stream. A unit with a name that the model knows is
            assumed to be the same until its spikes contradict it.
        bins: half-open range to fit on.
        labelled: whether to fit on the recording's kinematics too, as ``adapt_with_labels`` does.
            The candidate must then decode the last quarter of the bins better, instead of
            predicting it better.
        half_life: as for ``adapt_with_labels``.
        seed: seed of folds and draws.

    Raises:
        ConfigError: the model's spikes are not counts, there are too few bins, or the labels are
            not the model's kinematics.
    """
    if artifact.others:
        each = [
            adapt(
                member,
                recording,
                bins,
                labelled=labelled,
                half_life=half_life,
                seed=seed,
                progress=progress,
            )
            for member in artifact.members
        ]
        return _together(artifact, each)
    units = units_of(artifact, recording, bins)
    middle = bins[0] + round(_FITTED * (bins[1] - bins[0]))

    def fitted(part: tuple[int, int], start: Rows | None = None) -> tuple[Artifact, Rows]:
        if labelled:
            return labelled_rows(artifact, recording, part, half_life, seed, progress, start)
        return fitted_rows(artifact, units, recording, slice(*part), None, seed, progress, start)

    first = max(bins[0], middle - _CANDIDATE)
    candidate, rows = fitted((first, middle))
    before = carried_model(artifact, units, recording.mean_counts(first, middle))
    judged = _judged(before, candidate, recording, (middle, bins[1]), progress)
    bits = float(judged[0].bits.mean()), float(judged[1].bits.mean())
    outside = 0.0
    if artifact.seen is not None:
        latents = judged[1].window[:, : before.n]
        low, high = artifact.seen.latents.numpy()
        outside = float(((latents < low) | (latents > high)).any(-1).mean())
    known = int(units.known.sum())
    anchors = int(rows.anchors.sum())
    refused = ""
    if anchors < max(1, _ANCHORS * known):
        refused = f"{anchors} of {known} units of the model still fit, fewer than {_ANCHORS:.0%}"
    elif outside > _OUTSIDE:
        refused = f"latents lie outside their range in training in {outside:.0%} of the bins"
    elif labelled:
        same = artifact.manifest.unit_names == recording.unit_names
        was = _error(artifact, recording, (middle, bins[1])) if same else math.inf
        now = _error(candidate, recording, (middle, bins[1]))
        if not now < was:
            refused = f"its error on the labels is {now:.3g}, the previous model's {was:.3g}"
    elif not bits[1] > max(bits[0], 0.0):
        refused = f"it predicts {bits[1]:.3f} bits a bin, the model as it was {bits[0]:.3f}"
    if not refused:
        candidate, rows = fitted(bins, rows)
        usual = {"bits_per_spike": judged[1].bits_per_spike}
        manifest = msgspec.structs.replace(candidate.manifest, scores=usual)
        candidate = replace(candidate, manifest=manifest)
    verdicts = dict(zip(recording.unit_names, rows.verdicts, strict=True))
    gone = tuple(name for name in artifact.manifest.unit_names if name not in verdicts)
    return Adaptation(candidate, verdicts, gone, bits, outside, refused)


def _together(artifact: Artifact, members: list[Adaptation]) -> Adaptation:
    """Combine the members' adaptations: refused if one is, with the verdicts of the first."""
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


def _error(artifact: Artifact, recording: Recording, bins: tuple[int, int]) -> float:
    """Return the root mean square error of the decode, in standard units; NaN without labels."""
    assert artifact.readout is not None  # labels require one
    assert recording.kinematics is not None
    found = causal_pass(artifact.estimator(), recording, *bins, run_in=_RUN_IN)
    off = (found.kinematics - recording.kinematics[slice(*bins)]) / artifact.readout.spread.numpy()
    known = recording.scored[slice(*bins)]
    return float(np.sqrt((off[known] ** 2).mean())) if known.any() else math.nan


def _judged(
    before: Model,
    candidate: Artifact,
    recording: Recording,
    bins: tuple[int, int],
    progress: Progress,
) -> list[Causal]:
    """Score the previous model and the candidate on these bins."""
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
                estimator,
                recording,
                *bins,
                streams=_STREAMS,
                run_in=_RUN_IN,
                progress=progress,
                what="candidate",
            )
        )
    return passes
