"""How to read a recording: the part of a configuration that model files keep too."""

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
        spike_times: cell array of vectors of spike times in seconds, one cell per unit (of any
            shape; a unit with an empty cell never fires). It replaces ``spikes``. With
            ``data.trials.relative_spikes``, also cells of units x trials or of trials x units.
        spike_trials: cell array like ``spike_times`` with the one-based trial of each spike, or "".
        time: with ``spike_times``: variable with the times of the kinematics' samples, seconds.
        bin_width: variable with the bin width in seconds, or "" to take ``data.bin_width``.
        kinematics: variable with the kinematics, or "" for none; channels x bins or transposed.
        kinematic_rows: which channels of it to decode, from 0; empty means all.
        kinematic_names, kinematic_units: one per decoded channel.
        trial_starts: variable with one-based first bins of trials, or "". Beside spike times, bins
            are the kinematics' samples.
        trial_stops: variable with one-based last bins of trials; "" means until the next begins.
        trial_times: whether starts, stops and events of trials are bins or seconds.
        trial_conditions: variable with a number or text per trial, or "".
        trial_events: variables with the one-based bins of events, one number per trial, NaN if the
            event did not occur.
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
    """Conversion of a file's times to seconds on one clock: scale x time + offset.

    Attributes:
        spikes: (scale, offset) of spike times and ``obs_intervals``: (0.001, 0.0) for milliseconds.
        kinematics: the same for the kinematics' timestamps and ``data.nwb.scored``.
        trials: the same for the trials' starts, stops and events (in NWB, and in MAT if they are
            seconds) and ``invalid_times``.
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
            ``unit_name`` or ``name`` if it exists, else the ids. Repeated names are prefixed with
            the probe or electrode group, or else get the id (or the row) as a suffix.
        kinematics: name (or path) of the behaviour series to decode, or of a container whose
            one-channel series are to be decoded together; "" means the most likely one
            (``nwb.series.likeliest``): velocity before position, movement before eyes and reward.
        kinematic_rows: which of its channels to decode, from 0; empty means all.
        kinematic_names, kinematic_units: names and units of the decoded channels instead of the
            file's; empty keeps those. A unit that contradicts the file's causes a warning.
        rate: samples per second of the kinematics, instead of the file's; 0 keeps it. The first
            sample, and the first after each pause in the timestamps, keep their times. (FALCON's
            H1 files state the interval instead of the rate.)
        stamps: whether a sample's time is the start or the end of the interval it covers.
        scored: name (or path) of a series, e.g. ``eval_mask``, that is nonzero where kinematics are
            learnt from and scored; "" means everywhere.
        trials: use the trials table if there is one.
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
        group: group of the datasets; "" is the root of the file.
        spikes: counts of the held-in units.
        held_out: counts of the held-out units, or "" to leave them out.
        kinematics: trials x bins x channels, or "" for none. The default name may be absent.
        test_spikes, test_held_out, test_kinematics: the same for the test trials, which are used if
            the file has all that the training part has.
        conditions, test_conditions: a number or text per trial, or "".
        kinematic_rows: which channels to decode, from 0; empty means all.
        kinematic_names, kinematic_units: one per decoded channel.
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
    """The window of each trial that ``mode = "trials"`` reads.

    Bin k of a trial covers [event + from + k w, event + from + (k+1) w); only whole bins are kept.
    Files already binned are cut at the nearest edges of their own bins.

    Attributes:
        event: column of the trials table (or of ``data.mat.trial_events``) to align the window
            with; "" takes each trial from its start to its stop.
        window: seconds from the event, (from, to); only with an event.
        condition: columns that define a trial's condition; empty means the first that exists of
            condition, target_index, target_id, target, trial_type.
        events: columns kept as events; empty means all that end in ``_time``.
        relative: whether events are relative to the start of their trial, not of the recording.
        relative_spikes: whether spike times are relative to the start of their trial. The trial of
            each spike is given by ``spike_trials`` (``data.nwb``, ``data.mat``), by a cell array of
            units x trials in MAT, or by times that restart at each trial, if the unit has a spike
            in every trial. Bins outside all trials are masked.
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
        bin_width: seconds. The default is 0.05 for spike times and the file's bin width for counts,
            with which it must agree. It is required for counts without one (MAT, HDF5).
        min_rate: Hz; units that fire more slowly on the training part are left out of the model.
        units: units to read, by the value, or values, of columns of the units table, e.g.
            ``quality = "good"`` or ``electrode_group = ["a", "b"]``. In NWB, also by columns of the
            units' electrodes (``location``); in MAT and HDF5, by variables with one value per unit.
            Empty means all units.
        features: continuous series to observe beside the counts, e.g. spike-band power: names or
            paths in NWB; in MAT, variables of channels x bins, or of channels x samples on the
            clock of ``mat.time`` if there are spike times. The value of a bin is the mean of its
            samples; without samples, the feature is not observed. The model learns mean and scale.
        mode: "continuous" reads the recording as it ran; "trials" concatenates its trials, and
            nothing crosses from one to the next.
        lag: seconds by which the kinematics of a bin are taken later (negative: earlier). Movement
            follows motor cortex, so decoding is easier some 0.1 s ahead.
        differentiate: decode the rate of change of the kinematics (velocity from position), by
            central differences of the bins' means.
        clocks: conversion of the file's times to seconds.
        mat, nwb, hdf5: how to read each format.
        trials: window of each trial to read.
        split: split by time, or by the file's labels.
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
        """Bin width in seconds."""
        return 0.05 if self.bin_width is None else self.bin_width

    def as_it_ran(self) -> RecordingSpec:
        """Return the same spec in continuous mode, since a stream does not stop between trials."""
        split = msgspec.structs.replace(self.split, column="")
        return msgspec.structs.replace(self, mode="continuous", split=split)
