"""The split into training, validation and test part, by time or by label."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from ilqr_vae.errors import ConfigError, RecordingError
from ilqr_vae.files import OpenShare, ShareAboveZero
from ilqr_vae.recordings.recording import Recording, RecordingWarning

Span = Literal["train", "validation", "test", "all"]


SPANS: tuple[Span, ...] = ("train", "validation", "test", "all")


WARMUP_BINS = 100
"""Bins streamed before a span so that the estimator has settled when scoring begins; not scored.

Fewer where the recording begins less than this before the span. ``evaluate`` and ``replay`` both
start there, so that their decodes of a span are the same.
"""


def warmup_start(start: int) -> int:
    """Return the first bin to stream for a span that starts at bin ``start``."""
    return max(0, start - WARMUP_BINS)


def parse_span(text: str) -> Span:
    """Parse the name of a span. Raises ConfigError."""
    for span in SPANS:
        if text == span:
            return span
    raise ConfigError("--span", expected="train, validation, test or all", got=repr(text))


def plan_drops(n_bins: int, share: float, seed: int) -> NDArray[np.bool_]:
    """Draw bins to drop, bool (n_bins,); never the first or last of the stream.

    ``evaluate`` and ``replay`` both draw from here: the same seed leaves out the same bins.
    """
    dropped = np.random.default_rng(seed).random(n_bins) < share
    dropped[:1] = dropped[-1:] = False
    return dropped


class SplitSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Split by time, as fractions of the bins: [0, train), [train, validation), [validation, 1).

    Bins that hold no data, in gaps and pauses (``Recording.valid``), do not count.

    In ``mode = "trials"`` the fractions are of the trials. With ``column``, the file's own labels
    decide what is tested on: trials labelled ``test_labels`` are the test part, those labelled
    ``validation_labels`` the validation part, those labelled ``train_labels`` the training part;
    without validation labels the last of the training trials are, in the proportion that ``train``
    has to ``validation``. Other trials are left out.

    With ``fraction``, decoders learn from less data: the training and the validation part together
    are the first ``fraction`` of all bins, divided in the usual proportion, and the bins between
    them and the test part are left out. The test part does not change. Choices are therefore made
    within that fraction too, for all decoders alike. Trials stay whole.

    Attributes:
        train: where the training part ends, as a share of the bins or trials.
        validation: where the validation part ends; the test part is the rest.
        column: column of the trials table with the labels; "" splits by time.
        train_labels, validation_labels, test_labels: labels of each part.
        fraction: share of the recording that training and validation part are taken from.
    """

    train: OpenShare = 0.60
    validation: ShareAboveZero = 0.75
    column: str = ""
    train_labels: tuple[str, ...] = ("train",)
    validation_labels: tuple[str, ...] = ()
    test_labels: tuple[str, ...] = ("val",)
    fraction: ShareAboveZero = 1.0

    def bins(self, span: Span, n_bins: int) -> tuple[int, int]:
        """Return the half-open range of bins of a span, without the recording's own bounds."""
        a, b = round(self.train * n_bins), round(self.validation * n_bins)
        return self._ranges(a, b, n_bins)[span]

    def span(self, span: Span, recording: Recording) -> tuple[int, int]:
        """Return the half-open range of bins of a span, by the recording's own bounds if any."""
        if recording.bounds is None:
            edges = np.append(np.flatnonzero(recording.valid), len(recording))
            start, stop = self.bins(span, len(edges) - 1)
            return int(edges[start]) if start else 0, int(edges[stop]) if stop else 0
        return self._ranges(*recording.bounds, len(recording), recording)[span]

    def occupied(self, span: Span, recording: Recording) -> tuple[int, int]:
        """Return ``span``. Raises RecordingError if it is empty."""
        start, stop = self.span(span, recording)
        if stop <= start:
            raise RecordingError(
                "recording", expected=f"at least one bin in the {span} span", got="none"
            )
        return start, stop

    def _ranges(
        self, a: int, b: int, n_bins: int, trials: Recording | None = None
    ) -> dict[Span, tuple[int, int]]:
        """Return the ranges of the parts, given the first bins after training and validation."""
        test = b
        if self.fraction < 1 and b > 0:
            used = min(b, round(self.fraction * n_bins))
            a, b = round(used * a / b), used
            if trials is not None and test in trials.breaks:
                a, b = segment_start(trials, a), segment_start(trials, b)
        return {"train": (0, a), "validation": (a, b), "test": (test, n_bins), "all": (0, n_bins)}


def segment_start(recording: Recording, bin_: int) -> int:
    """Return the first bin of the segment of ``bin_``, or ``bin_`` if it is past the end."""
    if bin_ >= len(recording):
        return bin_
    before = recording.breaks[recording.breaks <= bin_]
    return int(before[-1]) if len(before) else 0


def nested_split(recording: Recording, split: SplitSpec) -> Recording:
    """Split the recording without its test part anew, for choices that must not see that part.

    The validation part takes the place of the test part. The end of the training part takes the
    place of the validation part, in the same proportion. The result contains nothing of the test
    part, so nothing can be fitted to it or chosen on it.
    """
    a, b = split.span("validation", recording)
    inner = round(a * a / b) if b else 0
    if b > a and a in recording.breaks:  # a split between trials stays one
        inner = segment_start(recording, inner)
    return replace(recording.slice(0, b), bounds=(inner, a))


HARDLY = 0.02
"""Share of the training part's standard deviation below which a part hardly moves."""


def at_rest(recording: Recording, split: SplitSpec) -> tuple[RecordingWarning, ...]:
    """Return warnings about channels that do not vary in some part, and so have no R2 there."""
    k = recording.kinematics
    if k is None:
        return ()
    usual = np.zeros(k.shape[1])
    where: dict[tuple[str, str], list[str]] = {}
    for span in ("train", "validation", "test"):
        start, stop = split.span(span, recording)
        part = k[start:stop][recording.scored[start:stop]]
        if not len(part):
            continue
        moves, spread = varies(part), part.std(0)
        usual = spread if span == "train" else usual
        for name, moving, few in zip(
            recording.kinematic_names, moves, spread < HARDLY * usual, strict=True
        ):
            if few or not moving:
                what = "hardly any movement" if moving else "no movement"
                where.setdefault((name, what), []).append(span)
    return tuple(
        RecordingWarning(
            "at-rest",
            f"{name}: {what} in the {' and '.join(spans)} part; R2 there says "
            + ("little." if what.startswith("hardly") else "nothing."),
        )
        for (name, what), spans in where.items()
    )


def varies(y: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return (D,), the columns of (T, D) that vary by more than rounding; T is at least 1."""
    dust = 16 * np.finfo(np.float64).eps * np.abs(y).max(axis=0)
    return np.ptp(y, axis=0) > dust  # exact, unlike a mean, which is rounded
