"""Decoders on a stream whose units changed: unchanged, adapted, or fitted with labels.

All decoders receive the same stream. The model is adapted as `ilqr-vae follow` does, as if the
stream began at the change. After ``least`` seconds the rows are fitted on the last ``window``
seconds. A candidate that passes the check runs in the shadow for ``trial`` seconds, and serves from
then on if it predicted these better than the serving model. Decoders with labels are fitted on the
same seconds and used at once; the model with labels is the ceiling. The alignment of factors, which
needs no labels, is also used at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilqr_training.adaptation.adapt import Adaptation, adapt
from ilqr_training.adaptation.labels import adapt_with_labels
from ilqr_training.adaptation.units import UnitVerdict
from ilqr_training.evaluation.baselines import GRU, KALMAN, Baseline, fit_baselines
from ilqr_training.evaluation.changed import Stream
from ilqr_training.evaluation.gru import GRUConfig, GRUDecoder
from ilqr_training.evaluation.stabiliser import NAME as ALIGNED
from ilqr_training.evaluation.stabiliser import Stabiliser
from ilqr_training.readout.causal import causal_pass
from ilqr_vae.artifact import Artifact
from ilqr_vae.errors import ConfigError
from ilqr_vae.progress import Progress
from ilqr_vae.recordings import Recording, SplitSpec
from ilqr_vae.scoring.metrics import r2

Array = NDArray[np.float64]
Decode = Callable[[int, int], Array]

FROZEN, ADAPTED, LABELLED = "frozen", "adapted, no labels", "adapted, labels"
GRU_FROZEN, GRU_LABELLED = f"{GRU}, frozen", f"{GRU}, labels"
KALMAN_FROZEN = f"{KALMAN}, frozen"
DECODERS = (FROZEN, ADAPTED, LABELLED, ALIGNED, GRU_FROZEN, GRU_LABELLED, KALMAN_FROZEN)
_RUN_IN = 100
_STEP_S, _WIDTH_S = 5.0, 30.0


@dataclass(frozen=True)
class Schedule:
    """When decoders are refitted, in seconds of the stream.

    Attributes:
        least: data required before the first fit, and after a refused or dropped one.
        window: most recent data that a fit uses at most.
        trial: time that a candidate runs in the shadow.
        steps: gradient steps of the GRU with labels (a number, not seconds).
    """

    least: float = 30.0
    window: float = 90.0
    trial: float = 30.0
    steps: int = 200

    def checked(self) -> Schedule:
        """Return itself. Raises ConfigError naming a value that is out of range."""
        if not (0 < self.least <= self.window and self.trial > 0):
            raise ConfigError(
                "--least, --window, --trial",
                expected="positive seconds, the window no shorter than the least",
                got=f"{self.least:g}, {self.window:g} and {self.trial:g}",
            )
        return self


@dataclass(frozen=True)
class Refit:
    """A fit without labels.

    Attributes:
        at: time of the fit, in seconds since the change.
        outcome: "refused", "dropped" or "swapped in".
        why: reason of a refusal.
        bits: bits per bin gained over constant rates in the shadow, by the serving model and by the
            candidate.
        units: number of units by verdict.
    """

    at: float
    outcome: str
    why: str = ""
    bits: tuple[float, float] | None = None
    units: dict[str, int] | None = None


@dataclass(frozen=True)
class Others:
    """The baselines fitted before the change."""

    kalman: Baseline
    gru: GRUDecoder
    stabiliser: Stabiliser


@dataclass(frozen=True)
class Fitted:
    """The decoders fitted before the change, all on the same units and bins.

    Attributes:
        others: the baselines; None to compare the model with itself alone.
    """

    artifact: Artifact
    others: Others | None = None

    @staticmethod
    def beside(
        artifact: Artifact,
        recording: Recording,
        split: SplitSpec,
        *,
        steps: int,
        seed: int,
        progress: Progress,
    ) -> Fitted:
        """Fit the baselines of a model.

        Args:
            steps: largest number of gradient steps of the GRU.

        Raises:
            ShapeError: there are no kinematics, or a part has no bin to fit or choose on.
        """
        steps = min(steps, GRUConfig.steps)
        size = GRUConfig(steps=steps, schedule=steps)
        kalman = fit_baselines(recording, split, (KALMAN,), seed=seed, progress=progress)[KALMAN]
        gru = GRUDecoder.fit(recording, split, seed=seed, grid=(size,), progress=progress)
        others = Others(kalman, gru, Stabiliser.fit(recording, split))
        return Fitted(artifact, others)


def streamed(
    fitted: Fitted, stream: Stream, schedule: Schedule, seed: int, progress: Progress
) -> tuple[dict[str, Array], list[Refit]]:
    """Return decodes (T, D) of the stream by decoder, and the fits without labels.

    There are no decodes of a stream to which nothing may be adapted. Without baselines nothing is
    fitted with labels either.
    """
    adapted, attempts = _followed(fitted.artifact, stream, schedule, seed, progress)
    if stream.wrong:
        return {}, attempts
    recording, (start, stop) = stream.recording, stream.bins
    frozen = _decodes(fitted.artifact, recording)
    served = [(at, _decodes(made, stream.own if at > start else recording)) for at, made in adapted]
    decodes = {FROZEN: frozen(start, stop), ADAPTED: _pieced(served, stop)}
    if fitted.others is not None:
        decodes |= _with_labels(fitted.artifact, fitted.others, stream, schedule, seed, progress)
    return decodes, attempts


def _with_labels(
    artifact: Artifact,
    others: Others,
    stream: Stream,
    schedule: Schedule,
    seed: int,
    progress: Progress,
) -> dict[str, Array]:
    """Return the decodes of the model with labels and of the baselines."""
    recording, (start, stop) = stream.recording, stream.bins
    width = recording.bin_width
    counts = recording.counts * recording.mask().astype(np.float64)
    fits = [
        ((max(stream.change, at - round(schedule.window / width)), at), at)
        for at in range(
            stream.change + round(schedule.least / width), stop, round(schedule.trial / width)
        )
    ]

    def network(decoder: GRUDecoder) -> Decode:
        return lambda a, b: decoder.decode(recording, counts, (a, b))

    def factors(decoder: Stabiliser) -> Decode:
        return lambda a, b: decoder.decode(recording, (a, b))

    labelled = [(start, _decodes(artifact, recording))]
    gru, aligned = [(start, network(others.gru))], [(start, factors(others.stabiliser))]
    for done, (bins, at) in enumerate(fits):
        progress("fits with labels", done, len(fits), stream.name)
        made = adapt_with_labels(artifact, stream.own, bins, seed=seed)
        labelled.append((at, _decodes(made, stream.own)))
        tuned = others.gru.trained_on(recording, bins, steps=schedule.steps, seed=seed)
        gru.append((at, network(tuned)))
        aligned.append((at, factors(others.stabiliser.aligned(recording, bins))))
    progress("fits with labels", len(fits), len(fits))
    missing = ~recording.mask()
    return {
        LABELLED: _pieced(labelled, stop),
        ALIGNED: _pieced(aligned, stop),
        GRU_FROZEN: gru[0][1](start, stop),
        GRU_LABELLED: _pieced(gru, stop),
        KALMAN_FROZEN: others.kalman.decode(stream.bins, counts=recording.counts, missing=missing),
    }


def _decodes(artifact: Artifact, recording: Recording) -> Decode:
    """Return the decodes by the model of its units in the recording."""
    read = recording.select_units(artifact.manifest.unit_names)
    return lambda a, b: (
        causal_pass(artifact.estimator(), read, a, b, run_in=min(_RUN_IN, a)).kinematics
    )


def _pieced(decoders: Sequence[tuple[int, Decode]], stop: int) -> Array:
    """Return the decodes of consecutive decoders, each from its first bin on."""
    ends = [at for at, _ in decoders[1:]] + [stop]
    parts = [d(at, end) for (at, d), end in zip(decoders, ends, strict=True)]
    return np.concatenate(parts).astype(np.float64)


class Following:
    """Adapts the model that serves a stream, bin by bin, without labels.

    Args:
        artifact: the first model.
        width: bin width in seconds.
        change: first bin that may be fitted on.
        seed: seed of the fits.

    Attributes:
        serving: the model that serves.
        attempts: the fits so far.
        next: bin before which ``turn`` is due.
        trial: bins of a candidate in the shadow.
    """

    def __init__(
        self, artifact: Artifact, schedule: Schedule, width: float, change: int, seed: int
    ) -> None:
        self.serving, self.attempts = artifact, list[Refit]()
        self._width, self._change, self._seed = width, change, seed
        self._least, self._window, self.trial = (
            round(s / width) for s in (schedule.least, schedule.window, schedule.trial)
        )
        self._begin, self.next = change, change + self._least
        self._tried: Adaptation | None = None

    @property
    def ends(self) -> int:
        """The first bin that the result of the next turn could serve."""
        return self.next + (self.trial if self._tried is None else 0)

    def turn(self, recording: Recording) -> bool:
        """Fit a candidate, or judge the one in the shadow; return whether the model changes.

        Args:
            recording: recording whose bins before ``next`` are complete.
        """
        at = self.next
        if self._tried is not None:
            return self._judge(self._tried, recording)
        made = adapt(
            self.serving, recording, (max(self._begin, at - self._window), at), seed=self._seed
        )
        if made.refused:
            self._note(made, at, "refused")
            self._begin, self.next = at, at + self._least  # not on data that has just failed
            return False
        self._tried, self.next = made, at + self.trial
        return False

    def _judge(self, made: Adaptation, recording: Recording) -> bool:
        at, end = self.next - self.trial, self.next
        bits = made.bits
        if made.artifact.manifest.unit_names == self.serving.manifest.unit_names:
            models = self.serving, made.artifact
            bits = _bits(models[0], recording, (at, end)), _bits(models[1], recording, (at, end))
        better = bits[1] > max(bits[0], 0.0)
        self._note(made, at, "swapped in" if better else "dropped", bits)
        self._tried = None
        if better:
            self.serving = made.artifact
        else:
            self._begin, self.next = end, end + self._least
        return better

    def _note(
        self, made: Adaptation, at: int, outcome: str, bits: tuple[float, float] | None = None
    ) -> None:
        units = {verdict.name.lower(): made.count(verdict) for verdict in UnitVerdict}
        since = (at - self._change) * self._width
        self.attempts.append(Refit(since, outcome, made.refused, bits, units))


def _followed(
    artifact: Artifact, stream: Stream, schedule: Schedule, seed: int, progress: Progress
) -> tuple[list[tuple[int, Artifact]], list[Refit]]:
    """Return the serving models, each with its first bin, and all attempts."""
    own, stop = stream.own, stream.bins[1]
    following = Following(artifact, schedule, own.bin_width, stream.change, seed)
    served = [(stream.bins[0], artifact)]
    # a candidate whose trial reaches the end of the stream would serve no bin
    while following.ends < stop:
        at = following.next
        progress("fits without labels", at - stream.change, stop - stream.change, stream.name)
        if following.turn(own):
            served.append((at, following.serving))
    progress("fits without labels", stop - stream.change, stop - stream.change)
    return served, following.attempts


def _bits(artifact: Artifact, recording: Recording, bins: tuple[int, int]) -> float:
    """Return bits per bin gained over constant mean rates."""
    found = causal_pass(artifact.estimator(), recording, *bins, run_in=min(_RUN_IN, bins[0]))
    return float(found.bits.mean())


# ---- scores ------------------------------------------------------------------------------------


def scored(
    stream: Stream, decodes: dict[str, Array], attempts: list[Refit], after: float
) -> dict[str, Any]:
    """Return R2 of each decoder: per minute since the change, after ``after`` s, and over time.

    Returns:
        A dict for JSON. R2 over time is computed in ``_WIDTH_S`` seconds around each of ``times``.
    """
    recording, (start, stop) = stream.recording, stream.bins
    assert recording.kinematics is not None
    truth, kept, width = recording.kinematics, recording.scored, recording.bin_width

    def of(decoded: Array, a: int, b: int) -> float:
        rows = kept[a:b]
        return r2(truth[a:b][rows], decoded[a - start : b - start][rows]) if rows.any() else np.nan

    minute, half = round(60 / width), round(_WIDTH_S / 2 / width)
    minutes = [(a, min(a + minute, stop)) for a in range(stream.change, stop, minute)]
    minutes = [(a, b) for a, b in minutes if b - a >= minute / 3]
    settled = min(stream.change + round(after / width), stop - 1)
    middles = range(start + half, stop - half + 1, max(1, round(_STEP_S / width)))
    return {
        "change": stream.name,
        "attempts": [asdict(attempt) for attempt in attempts],
        "times": [(at - stream.change) * width for at in middles],
        "decoders": {
            name: {
                "r2": of(decoded, stream.change, stop),
                "minutes": [of(decoded, a, b) for a, b in minutes],
                "settled": of(decoded, settled, stop),
                "last_quarter": of(decoded, stop - (stop - start) // 4, stop),
                "over_time": [of(decoded, at - half, at + half) for at in middles],
            }
            for name, decoded in decodes.items()
        },
    }


def regained(found: float, frozen: float, unchanged: float) -> float:
    """Return the share of the lost R2 that is regained; NaN if little or nothing was lost."""
    lost = unchanged - frozen
    return (found - frozen) / lost if lost > 0.02 else float("nan")
