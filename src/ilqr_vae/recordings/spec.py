"""How to read a recording, as a person writes it in a config and as a model file remembers it."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from ilqr_vae.files import FiniteFloat, NonNegativeFloat, PositiveFloat, unit
from ilqr_vae.recordings.split import SplitSpec

Label = str | int | float | bool
ClockMap = tuple[PositiveFloat, FiniteFloat]


def _any_unit() -> dict[str, Label | tuple[Label, ...]]:
    return {}


class MatSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Field map of a MAT file holding binned counts, or spike times.

    A variable inside a struct is named with dots: ``session.data.spikes``.

    Attributes:
        spikes: variable with the counts.
        spikes_axes: order of its two axes.
        spike_times: cell array of vectors of spike times in seconds, one cell a unit (of any
            shape; a unit whose cell is empty never fires); given, it takes the place of ``spikes``.
            With ``data.trials.relative_spikes`` also cells of units x trials, or of trials x units.
        spike_trials: cell array like ``spike_times`` with the one-based trial of each spike, or "".
        time: with ``spike_times``: variable with the times of the kinematics' samples, seconds.
        bin_width: variable with the bin width in seconds, or "" to take ``data.bin_width``.
        kinematics: variable with the kinematics, or "" for none; channels x bins or transposed.
        kinematic_rows: which channels of it to decode, from 0; empty means all.
        kinematic_names, kinematic_units: one each per decoded channel.
        trial_starts: variable with one-based first bins of trials, or "". Beside spike times, bins
            are the kinematics' samples.
        trial_stops: variable with one-based last bins of trials; "" means until the next begins.
        trial_times: whether starts, stops and events of trials are bins or seconds.
        trial_conditions: variable with a number or text per trial, or "".
        trial_events: variables with one-based bins of events, one number a trial, NaN for none;
            each once.
    """

    spikes: str = "spikes"
    spikes_axes: Literal["units,bins", "bins,units"] = "units,bins"
    spike_times: str = ""
    spike_trials: str = ""
    time: str = ""
    bin_width: str = ""
    kinematics: str = ""
    kinematic_rows: tuple[int, ...] = ()
    kinematic_names: tuple[str, ...] = ()
    kinematic_units: tuple[str, ...] = ()
    trial_starts: str = ""
    trial_stops: str = ""
    trial_times: Literal["bins", "seconds"] = "bins"
    trial_conditions: str = ""
    trial_events: tuple[str, ...] = ()


class ClockSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How a file's times become seconds on one clock: scale x time + offset.

    Attributes:
        spikes: (scale, offset) of spike times and ``obs_intervals``: (0.001, 0.0) for milliseconds.
        kinematics: of the kinematics' timestamps, and of ``data.nwb.scored``.
        trials: of the trials' starts, stops and events (NWB, and MAT where they are seconds), and
            of ``invalid_times``.
    """

    spikes: ClockMap = (1.0, 0.0)
    kinematics: ClockMap = (1.0, 0.0)
    trials: ClockMap = (1.0, 0.0)


class NwbSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where to look in an NWB file.

    Attributes:
        counts: path of a TimeSeries of binned counts inside the file; "" means spike times from
            the units table.
        unit_names: column of the units table that names the units, or "id"; "" means
            ``unit_name`` or ``name`` where there is one, else the ids. Names that repeat get the
            probe or electrode group before them, else the id (or the row) after them.
        kinematics: name (or path) of the behaviour series to decode, or of a container whose
            one-channel series are to be decoded together; "" means the most likely one
            (``nwb.series.likeliest``): velocity before position, movement before eyes and reward.
        kinematic_rows: which of its channels to decode, from 0; empty means all.
        kinematic_names, kinematic_units: of the decoded channels, instead of what the file says;
            empty keeps it. Units that the file contradicts are a warning.
        rate: samples per second of the kinematics, instead of the file's; 0 keeps it. The first
            sample, and the first after each pause in the timestamps, keep their times. (FALCON's
            H1 files state the interval where the rate belongs.)
        stamps: whether a sample's time is the start or the end of what it covers.
        scored: name (or path) of a series that is nonzero where kinematics are to be learnt from
            and scored, e.g. ``eval_mask``; "" means everywhere.
        trials: use the trials table where there is one.
        spike_trials: column of the units table with the trial (its id) of each spike, or "".
    """

    counts: str = ""
    unit_names: str = ""
    kinematics: str = ""
    kinematic_rows: tuple[int, ...] = ()
    kinematic_names: tuple[str, ...] = ()
    kinematic_units: tuple[str, ...] = ()
    rate: Annotated[NonNegativeFloat, unit("Hz")] = 0.0
    stamps: Literal["start", "end"] = "start"
    scored: str = ""
    trials: bool = True
    spike_trials: str = ""


class Hdf5Spec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Datasets of an HDF5 file of trials x bins x units, by default as NLB's tools name them.

    Attributes:
        group: the group they are in; "" is the file itself.
        spikes: counts of the held-in units.
        held_out: counts of the held-out units, or "" to leave them.
        kinematics: trials x bins x channels, or "" for none; absent is none for the default name.
        test_spikes, test_held_out, test_kinematics: the same of the trials to test on; they are
            used where the file has all that the training part has.
        conditions, test_conditions: a number or text per trial, or "".
        kinematic_rows: which channels to decode, from 0; empty means all.
        kinematic_names, kinematic_units: one each per decoded channel.
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
    kinematic_rows: tuple[int, ...] = ()
    kinematic_names: tuple[str, ...] = ()
    kinematic_units: tuple[str, ...] = ()


class TrialSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How ``mode = "trials"`` cuts a recording: which window of each trial.

    Bin k of a trial covers [event + from + k w, event + from + (k+1) w); only whole bins are kept.
    Files already binned are cut at the nearest edges of their own bins.

    Attributes:
        event: column of the trials table (or of ``data.mat.trial_events``) the window is laid
            around; "" takes each trial from its start to its stop.
        window: seconds from the event, (from, to); only with an event.
        condition: columns that make up a trial's condition; empty means the first there is of
            condition, target_index, target_id, target, trial_type.
        events: columns kept as events; empty means all that end in ``_time``.
        relative: whether events are seconds from their trial's start, not the recording's.
        relative_spikes: whether spike times are. Which trial each is of is said by ``spike_trials``
            (``data.nwb``, ``data.mat``), by a cell array of units x trials in MAT, or by times that
            start again at each trial, where every trial has a spike of the unit. Bins outside of
            all trials are masked.
    """

    event: str = ""
    window: Annotated[tuple[FiniteFloat, FiniteFloat], unit("s")] = (0.0, 0.0)
    condition: tuple[str, ...] = ()
    events: tuple[str, ...] = ()
    relative: bool = False
    relative_spikes: bool = False


class RecordingSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The ``[data]`` part of a config.

    Attributes:
        bin_width: seconds. By default 0.05 for spike times, and for counts what the file states; it
            must agree with that. A file of counts that states none (MAT, HDF5) needs it.
        min_rate: Hz; units slower than this on the training part are left out of the model.
        units: which units to read: columns of the units table with the value, or one of the values,
            that a unit has there, e.g. ``quality = "good"`` or ``electrode_group = ["a", "b"]``. In
            NWB also columns of the units' electrodes (``location``); in MAT and HDF5 variables
            with one value a unit. Empty means all units.
        features: continuous series to be observed beside the counts, spike-band power for one: of
            NWB their names (or paths), of MAT variables, channels x bins or samples, on the clock
            of ``mat.time`` beside spike times. A bin has the mean of its samples; where there is
            none, the feature is not observed. The model learns their mean and scale.
        mode: the recording as it ran, or its trials one after the other, nothing crossing from one
            to the next.
        lag: seconds; the kinematics of a bin are those measured this much later (negative:
            earlier). Movement follows motor cortex, so decoding is easier some 0.1 s ahead.
        differentiate: decode the rate of change of the kinematics (velocity from position), by
            central differences of the bins' means.
        clocks: how the file's times become seconds.
        mat, nwb, hdf5: how to read each format.
        trials: which part of each trial.
        split: by time, or by the file's labels.
    """

    bin_width: Annotated[PositiveFloat | None, unit("s")] = None
    min_rate: Annotated[NonNegativeFloat, unit("Hz")] = 0.0
    units: dict[str, Label | tuple[Label, ...]] = msgspec.field(default_factory=_any_unit)
    features: tuple[str, ...] = ()
    mode: Literal["continuous", "trials"] = "continuous"
    lag: Annotated[FiniteFloat, unit("s")] = 0.0
    differentiate: bool = False
    clocks: ClockSpec = msgspec.field(default_factory=ClockSpec)
    mat: MatSpec = msgspec.field(default_factory=MatSpec)
    nwb: NwbSpec = msgspec.field(default_factory=NwbSpec)
    hdf5: Hdf5Spec = msgspec.field(default_factory=Hdf5Spec)
    trials: TrialSpec = msgspec.field(default_factory=TrialSpec)
    split: SplitSpec = msgspec.field(default_factory=SplitSpec)

    @property
    def width(self) -> float:
        """Seconds a bin."""
        return 0.05 if self.bin_width is None else self.bin_width

    def as_it_ran(self) -> RecordingSpec:
        """The same, in one piece: to stream it, since a stream runs on between trials."""
        split = msgspec.structs.replace(self.split, column="")
        return msgspec.structs.replace(self, mode="continuous", split=split)
