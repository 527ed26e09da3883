"""How to read a recording, as a person writes it in a config and as a model file remembers it."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from ilqr_vae.errors import ConfigError, RecordingError
from ilqr_vae.recordings.types import Recording

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
    """Field map of a MAT file holding binned counts, or spike times.

    Attributes:
        spikes: variable with the counts.
        spikes_axes: order of its two axes.
        spike_times: cell array of vectors of spike times in seconds, one cell a unit (of any
            shape; empty cells are no units); given, it takes the place of ``spikes``.
        time: with ``spike_times``: variable with the times of the kinematics' samples, seconds.
        bin_width: variable with the bin width in seconds, or "" to take ``data.bin_width``.
        kinematics: variable with the kinematics, or "" for none; channels x bins or transposed.
        kinematic_rows: which channels of it to decode; empty means all.
        kinematic_names, kinematic_units: one each per decoded channel.
        trial_starts: variable with one-based first bins of trials, or "".
        trial_stops: variable with one-based last bins of trials; "" means until the next begins.
        trial_conditions: variable with a number per trial, or "".
        trial_events: variables with one-based bins of events, one number a trial, NaN for none.
    """

    spikes: str = "spikes"
    spikes_axes: Literal["units,bins", "bins,units"] = "units,bins"
    spike_times: str = ""
    time: str = ""
    bin_width: str = ""
    kinematics: str = ""
    kinematic_rows: tuple[int, ...] = ()
    kinematic_names: tuple[str, ...] = ()
    kinematic_units: tuple[str, ...] = ()
    trial_starts: str = ""
    trial_stops: str = ""
    trial_conditions: str = ""
    trial_events: tuple[str, ...] = ()


class NwbSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where to look in an NWB file.

    Attributes:
        counts: path of a TimeSeries of binned counts inside the file; "" means spike times from
            the units table.
        kinematics: name (or path) of the behaviour series to decode, or of a container whose
            one-channel series are to be decoded together; "" means: the first whose name holds
            "vel", else the first behaviour series, else none.
        kinematic_names, kinematic_units: override what the file says; empty keeps it.
        rate: samples per second of the kinematics, instead of the file's; 0 keeps it. (FALCON's H1
            files state the interval where the rate belongs.)
        stamps: whether a sample's time is the start or the end of what it covers.
        scored: name (or path) of a series that is nonzero where kinematics are to be learnt from
            and scored, e.g. ``eval_mask``; "" means everywhere.
        trials: use the trials table where there is one.
    """

    counts: str = ""
    kinematics: str = ""
    kinematic_names: tuple[str, ...] = ()
    kinematic_units: tuple[str, ...] = ()
    rate: float = 0.0
    stamps: Literal["start", "end"] = "start"
    scored: str = ""
    trials: bool = True


class Hdf5Spec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Datasets of an HDF5 file of trials x bins x units, by default as NLB's tools name them.

    Attributes:
        group: the group they are in; "" is the file itself.
        spikes: counts of the held-in units.
        held_out: counts of the held-out units, or "" to leave them.
        kinematics: trials x bins x channels, or "" for none; absent is none for the default name.
        test_spikes, test_held_out, test_kinematics: the same of the trials to test on; they are
            used where the file has all that the training part has.
        conditions, test_conditions: a number per trial, or "".
        kinematic_names, kinematic_units: one each per channel.
    """

    group: str = ""
    spikes: str = "train_spikes_heldin"
    held_out: str = "train_spikes_heldout"
    kinematics: str = "train_behavior"
    test_spikes: str = "eval_spikes_heldin"
    test_held_out: str = "eval_spikes_heldout"
    test_kinematics: str = "eval_behavior"
    conditions: str = ""
    test_conditions: str = ""
    kinematic_names: tuple[str, ...] = ()
    kinematic_units: tuple[str, ...] = ()


class TrialSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How ``mode = "trials"`` cuts a recording: which window of each trial.

    Bin k of a trial covers [event + from + k w, event + from + (k+1) w); only whole bins are kept.
    Files already binned are cut at the nearest edges of their own bins.

    Attributes:
        event: column of the trials table (or of ``data.mat.trial_events``) the window is laid
            around; "" takes each trial from its start to its stop.
        window: seconds from the event, (from, to).
        condition: columns that make up a trial's condition; empty means the first there is of
            condition, target_index, target_id, target, trial_type.
        events: columns kept as events; empty means all that end in ``_time``.
    """

    event: str = ""
    window: tuple[float, float] = (0.0, 0.0)
    condition: tuple[str, ...] = ()
    events: tuple[str, ...] = ()


class SplitSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Split by time, as fractions of the bins: [0, train), [train, validation), [validation, 1).

    In ``mode = "trials"`` the fractions are of the trials. With ``column``, the file's own labels
    decide what is tested on: trials labelled ``test_labels`` are the test part, those labelled
    ``validation_labels`` the validation part, those labelled ``train_labels`` the training part;
    without validation labels the last of the training trials are, in the proportion that ``train``
    has to ``validation``. Other trials are left out.

    ``fraction`` leaves a decoder less to learn from: training and validation part together are the
    first ``fraction`` of all bins, divided as they would be without it, and what lies between them
    and the test part is left out. The test part stays what it is. So whatever is chosen is chosen
    within that share too, by every decoder alike. Trials stay whole.
    """

    train: float = 0.60
    validation: float = 0.75
    column: str = ""
    train_labels: tuple[str, ...] = ("train",)
    validation_labels: tuple[str, ...] = ()
    test_labels: tuple[str, ...] = ("val",)
    fraction: float = 1.0

    def bins(self, span: Span, n_bins: int) -> tuple[int, int]:
        """The half-open range of bins of a span of a recording without bounds of its own."""
        a, b = round(self.train * n_bins), round(self.validation * n_bins)
        return self._ranges(a, b, n_bins)[span]

    def span(self, span: Span, recording: Recording) -> tuple[int, int]:
        """The half-open range of bins of a span: by the recording's own bounds if it has any."""
        if recording.bounds is None:
            return self.bins(span, len(recording))
        return self._ranges(*recording.bounds, len(recording), recording)[span]

    def occupied(self, span: Span, recording: Recording) -> tuple[int, int]:
        """``span``, of one that has some bins. Raises RecordingError."""
        start, stop = self.span(span, recording)
        if stop <= start:
            raise RecordingError(
                "recording", expected=f"at least one bin in the {span} span", got="none"
            )
        return start, stop

    def _ranges(
        self, a: int, b: int, n_bins: int, trials: Recording | None = None
    ) -> dict[Span, tuple[int, int]]:
        """Of first bins ``a`` and ``b`` after the training and the validation part."""
        test = b
        if self.fraction < 1 and b > 0:
            used = min(b, round(self.fraction * n_bins))
            a, b = round(used * a / b), used
            if trials is not None and test in trials.breaks:
                a, b = segment_start(trials, a), segment_start(trials, b)
        return {"train": (0, a), "validation": (a, b), "test": (test, n_bins), "all": (0, n_bins)}


def segment_start(recording: Recording, bin_: int) -> int:
    """The first bin of the segment that ``bin_`` lies in; itself where it is past the end."""
    if bin_ >= len(recording):
        return bin_
    before = recording.breaks[recording.breaks <= bin_]
    return int(before[-1]) if len(before) else 0


def rehearsal(recording: Recording, split: SplitSpec) -> Recording:
    """The recording without its test part, with bounds of its own, to try on what is scored once.

    The validation part stands for the test part, and the last of the training part, in the
    proportion that validation has to both, for the validation part. Nothing of the test part is
    left, so nothing can be fitted to it or chosen on it.
    """
    a, b = split.span("validation", recording)
    inner = round(a * a / b) if b else 0
    if b > a and a in recording.breaks:  # a split between trials stays one
        inner = segment_start(recording, inner)
    return replace(recording.slice(0, b), bounds=(inner, a))


class RecordingSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The ``[data]`` part of a config.

    Attributes:
        bin_width: seconds; must agree with a file that is already binned.
        min_rate: Hz; units slower than this on the training part are left out of the model.
        mode: the recording as it ran, or its trials one after the other, nothing crossing from one
            to the next.
        lag: seconds; the kinematics of a bin are those measured this much later (negative:
            earlier). Movement follows motor cortex, so decoding is easier some 0.1 s ahead.
        differentiate: decode the rate of change of the kinematics (velocity from position), by
            central differences of the bins' means.
        mat, nwb, hdf5: how to read each format.
        trials: which part of each trial.
        split: by time, or by the file's labels.
    """

    bin_width: float = 0.05
    min_rate: float = 0.0
    mode: Literal["continuous", "trials"] = "continuous"
    lag: float = 0.0
    differentiate: bool = False
    mat: MatSpec = msgspec.field(default_factory=MatSpec)
    nwb: NwbSpec = msgspec.field(default_factory=NwbSpec)
    hdf5: Hdf5Spec = msgspec.field(default_factory=Hdf5Spec)
    trials: TrialSpec = msgspec.field(default_factory=TrialSpec)
    split: SplitSpec = msgspec.field(default_factory=SplitSpec)

    def as_it_ran(self) -> RecordingSpec:
        """The same, in one piece: to stream it, since a stream runs on between trials."""
        split = msgspec.structs.replace(self.split, column="")
        return msgspec.structs.replace(self, mode="continuous", split=split)
