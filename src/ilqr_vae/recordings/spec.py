"""How to read a recording, as a person writes it in a config and as a model file remembers it."""

from __future__ import annotations

from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from ilqr_vae.errors import ConfigError, RecordingError

Span = Literal["train", "validation", "test", "all"]
SPANS: tuple[Span, ...] = ("train", "validation", "test", "all")

WARMUP_BINS = 100
"""Bins streamed before a span so that the estimator has settled when scoring begins; not scored.

Fewer where the recording begins less than this before the span. ``evaluate`` and ``replay`` both
start there, so that their decodes of a span are the same.
"""


def warmup_start(start: int) -> int:
    """The first bin to stream for a span that begins at bin ``start``."""
    return max(0, start - WARMUP_BINS)


def parse_span(text: str) -> Span:
    """A span by name. Raises ConfigError."""
    for span in SPANS:
        if text == span:
            return span
    raise ConfigError("--span", expected="train, validation, test or all", got=repr(text))


def plan_drops(n_bins: int, share: float, seed: int) -> NDArray[np.bool_]:
    """bool (n_bins,), True for bins to leave out; never the first nor the last of the stream.

    ``evaluate`` and ``replay`` both draw from here: the same seed leaves out the same bins.
    """
    dropped = np.random.default_rng(seed).random(n_bins) < share
    dropped[:1] = dropped[-1:] = False
    return dropped


class MatSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Field map of a MAT file holding binned counts.

    Attributes:
        spikes: variable with the counts.
        spikes_axes: order of its two axes.
        bin_width: variable with the bin width in seconds, or "" to take ``data.bin_width``.
        kinematics: variable with the kinematics, or "" for none; channels x bins or transposed.
        kinematic_rows: which channels of it to decode; empty means all.
        kinematic_names, kinematic_units: one each per decoded channel.
        trial_starts: variable with one-based first bins of trials, or "".
    """

    spikes: str = "spikes"
    spikes_axes: Literal["units,bins", "bins,units"] = "units,bins"
    bin_width: str = ""
    kinematics: str = ""
    kinematic_rows: tuple[int, ...] = ()
    kinematic_names: tuple[str, ...] = ()
    kinematic_units: tuple[str, ...] = ()
    trial_starts: str = ""


class NwbSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where to look in an NWB file.

    Attributes:
        counts: path of a TimeSeries of binned counts inside the file; "" means spike times from
            the units table.
        kinematics: name (or path) of the behaviour series to decode; "" means: the first whose name
            holds "vel", else the first behaviour series, else none.
        kinematic_names, kinematic_units: override what the file says; empty keeps it.
        trials: use the trials table where there is one.
    """

    counts: str = ""
    kinematics: str = ""
    kinematic_names: tuple[str, ...] = ()
    kinematic_units: tuple[str, ...] = ()
    trials: bool = True


class SplitSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Split by time, as fractions of the bins: [0, train), [train, validation), [validation, 1)."""

    train: float = 0.60
    validation: float = 0.75

    def bins(self, span: Span, n_bins: int) -> tuple[int, int]:
        """The half-open range of bins of a span."""
        a, b = round(self.train * n_bins), round(self.validation * n_bins)
        return {
            "train": (0, a),
            "validation": (a, b),
            "test": (b, n_bins),
            "all": (0, n_bins),
        }[span]

    def occupied(self, span: Span, n_bins: int) -> tuple[int, int]:
        """``bins``, of a span that has some. Raises RecordingError."""
        start, stop = self.bins(span, n_bins)
        if stop <= start:
            raise RecordingError(
                "recording", expected=f"at least one bin in the {span} span", got="none"
            )
        return start, stop


class RecordingSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The ``[data]`` part of a config.

    Attributes:
        bin_width: seconds; must agree with a file that is already binned.
        min_rate: Hz; units slower than this on the training part are left out of the model.
        mat, nwb: how to read each format.
        split: by time.
    """

    bin_width: float = 0.05
    min_rate: float = 0.0
    mat: MatSpec = msgspec.field(default_factory=MatSpec)
    nwb: NwbSpec = msgspec.field(default_factory=NwbSpec)
    split: SplitSpec = msgspec.field(default_factory=SplitSpec)
