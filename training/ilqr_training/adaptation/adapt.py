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

from ilqr_training.adaptation.carried import carried_model, fitted_rows, units_of
from ilqr_training.adaptation.units import Rows, UnitVerdict
from ilqr_training.readout.causal import Causal, causal_pass
from ilqr_vae.artifact import Artifact
from ilqr_vae.model.generative import Model
from ilqr_vae.progress import SILENT, Progress
from ilqr_vae.recordings import Recording
from ilqr_vae.streaming.horizon import MovingHorizon

_FITTED = 0.75
_RUN_IN = 100
_ANCHORS = 0.2
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
    units = units_of(artifact, recording, bins)
    middle = bins[0] + round(_FITTED * (bins[1] - bins[0]))

    def fitted(stop: int) -> tuple[Artifact, Rows]:
        part = slice(bins[0], stop)
        return fitted_rows(artifact, units, recording, part, None, seed, progress)

    candidate, rows = fitted(middle)
    before = carried_model(artifact, units, recording.mean_counts(bins[0], middle))
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
    elif not bits[1] > max(bits[0], 0.0):
        refused = f"it predicts {bits[1]:.3f} bits a bin, the model as it was {bits[0]:.3f}"
    elif outside > _OUTSIDE:
        refused = f"latents lie outside their range in training in {outside:.0%} of the bins"
    if not refused:
        candidate, rows = fitted(bins[1])
        usual = {"bits_per_spike": judged[1].bits_per_spike}
        manifest = msgspec.structs.replace(candidate.manifest, scores=usual)
        candidate = replace(candidate, manifest=manifest)
    verdicts = dict(zip(recording.unit_names, rows.verdicts, strict=True))
    gone = tuple(name for name in artifact.manifest.unit_names if name not in verdicts)
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


def _judged(
    before: Model,
    candidate: Artifact,
    recording: Recording,
    bins: tuple[int, int],
    progress: Progress,
) -> list[Causal]:
    """What the model as it was and the candidate predict of these bins."""
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
    return passes
