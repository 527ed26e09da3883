"""Writing NWB files with pynwb (extra ``nwb``): spike times or binned counts, behaviour, trials."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilqr_vae.errors import RecordingError
from ilqr_vae.files import replacing
from ilqr_vae.recordings.checks import missing_extra, unique_names
from ilqr_vae.recordings.nwb.series import channel_comments
from ilqr_vae.recordings.nwb.tables import NAME_COLUMNS
from ilqr_vae.recordings.recording import Recording

BINNED = "binned_spikes"
"""The series a ``Recording``'s counts are written to: what ``data.nwb.counts`` then names."""


@dataclass(frozen=True, slots=True)
class BehaviourSeries:
    """A behaviour series sampled regularly.

    Attributes:
        name: e.g. ``hand_velocity``.
        values: (K, D).
        unit: e.g. ``m/s``.
        rate: samples per second.
        start: seconds of the first sample.
        channels: D names, e.g. ("vx", "vy").
        units: D units if channels differ; empty means ``unit`` for all.
        description: for people.
        position: write as a SpatialSeries inside a Position container.
    """

    name: str
    values: NDArray[Any]
    unit: str
    rate: float
    channels: tuple[str, ...]
    start: float = 0.0
    units: tuple[str, ...] = ()
    description: str = "no description"
    position: bool = False


@dataclass(frozen=True, slots=True)
class SubjectInfo:
    """The recorded subject, as NWB requires: ``species`` is a Latin binomial or an NCBI taxonomy
    address, ``sex`` is M, F, O or U, ``age`` is an ISO 8601 duration (P8Y) or empty if unknown."""

    subject_id: str
    species: str = ""
    sex: str = "U"
    age: str = ""
    description: str = "no description"


@dataclass(frozen=True, slots=True)
class TrialTable:
    """Trials in seconds, with further columns.

    Attributes:
        start, stop: (K,), seconds.
        columns: values by column name, K each.
        descriptions: of the columns, for people.
    """

    start: Sequence[float]
    stop: Sequence[float]
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    descriptions: Mapping[str, str] = field(default_factory=dict)


def write_nwb(
    path: str | Path,
    spikes: Sequence[NDArray[Any]] | Recording,
    *,
    unit_names: Sequence[str] = (),
    series: Sequence[BehaviourSeries] = (),
    trials: TrialTable | None = None,
    subject: SubjectInfo | None = None,
    description: str = "recording",
    session_start: datetime | None = None,
    resolution: float = 1 / 30000,
    force: bool = False,
) -> Path:
    """Write an NWB file, whole or not at all.

    Args:
        path: must end in .nwb; its folder must exist.
        spikes: increasing spike times in seconds, one array a unit; or a ``Recording``, whose
            counts become the series ``binned_spikes`` and whose kinematics, units and trials are
            written too (``series``, ``unit_names`` and ``trials`` must then be left out).
        unit_names: one a unit; by default ``unit0``, ``unit1``, ...
        series: behaviour.
        trials: the trials table.
        subject: the recorded subject; without it, nwbinspector reports a violation.
        description: of the session, for people.
        session_start: with a time zone; by default now.
        resolution: resolution of the spike times in seconds.
        force: replace an existing file.

    Returns:
        The path written.

    Raises:
        RecordingError: the file exists and ``force`` is not given, its folder does not exist, it
            has another suffix, it cannot be written, names do not fit or are repeated, the
            recording has features, or pynwb is not installed.
    """
    path = Path(path)
    if path.suffix.lower() != ".nwb":
        raise RecordingError("out", expected="a name ending in .nwb", got=path.name)
    if path.exists() and not force:
        raise RecordingError("out", expected="a new file, or --force", got=f"{path} exists")
    if not path.parent.is_dir():
        raise RecordingError("out", expected="an existing folder", got=str(path.parent))
    if isinstance(spikes, Recording):
        spikes.require_counts("binned_spikes")
        if unit_names or series or trials is not None:
            raise RecordingError("series", expected="the recording's own", got="more beside it")
        names, series, trials = spikes.unit_names, _series_of(spikes), _trials_of(spikes)
    else:
        names = tuple(unit_names) or tuple(f"unit{i}" for i in range(len(spikes)))
        if not spikes or len(names) != len(spikes):
            raise RecordingError(
                "unit_names", expected=f"{len(spikes)}, at least one", got=str(len(names))
            )
        if any((np.diff(times) < 0).any() for times in spikes):
            raise RecordingError("spike_times", expected="increasing", got="some that are not")
    unique_names(names, "unit_names")
    try:
        import pynwb as pynwb_module
    except ModuleNotFoundError as error:
        raise missing_extra("out", "pynwb", "nwb") from error
    # pynwb's classes are made at run time: the type checker does not know their attributes.
    pynwb: Any = pynwb_module
    nwb: Any = pynwb.NWBFile(
        session_description=description,
        identifier=str(uuid.uuid4()),
        session_start_time=session_start or datetime.now(UTC),
    )
    if subject is not None:
        known = {key: value for key, value in asdict(subject).items() if value}
        nwb.subject = pynwb.file.Subject(**known)
    _add_spikes(nwb, pynwb, spikes, names, resolution)
    _add_series(nwb, pynwb, series)
    if trials is not None and len(trials.start):
        _add_trials(nwb, trials)
    write_whole_nwb(pynwb, nwb, path)
    return path


def write_whole_nwb(pynwb: Any, nwb: Any, path: Path) -> None:
    """Write an ``NWBFile`` atomically, by renaming a complete file to ``path``.

    Raises:
        ConfigError: the path cannot be written.
    """
    with replacing(path, "--out") as part, pynwb.NWBHDF5IO(str(part), mode="w") as file:
        file.write(nwb)


def _add_spikes(
    nwb: Any,
    pynwb: Any,
    spikes: Sequence[NDArray[Any]] | Recording,
    names: tuple[str, ...],
    resolution: float,
) -> None:
    if isinstance(spikes, Recording):
        module = nwb.create_processing_module("ecephys", "spikes counted in bins")
        module.add(
            pynwb.TimeSeries(
                name=BINNED,
                data=spikes.counts,
                unit="count",
                rate=1.0 / spikes.bin_width,
                starting_time=float(spikes.start_time),
                description="spikes of each unit (columns) in each bin (rows)",
                comments=channel_comments(names, ("count",) * len(names)),
            )
        )
        return
    nwb.units = pynwb.misc.Units(name="units", description="sorted units", resolution=resolution)
    nwb.add_unit_column(NAME_COLUMNS[0], "what the unit is called")
    for name, times in zip(names, spikes, strict=True):
        nwb.add_unit(spike_times=np.asarray(times, dtype=np.float64), unit_name=name)


def _add_series(nwb: Any, pynwb: Any, series: Sequence[BehaviourSeries]) -> None:
    if not series:
        return
    module = nwb.create_processing_module("behavior", "what the subject did")
    places = {
        True: pynwb.behavior.Position(name="Position"),
        False: pynwb.behavior.BehavioralTimeSeries(name="BehavioralTimeSeries"),
    }
    for item in series:
        values = np.asarray(item.values, dtype=np.float64)
        if values.ndim != 2 or values.shape[1] != len(item.channels):
            raise RecordingError(
                item.name, expected=f"(samples, {len(item.channels)})", got=str(values.shape)
            )
        units = item.units or (item.unit,) * len(item.channels)
        common = {
            "name": item.name,
            "data": values,
            "unit": item.unit or "n.a.",
            "rate": float(item.rate),
            "starting_time": float(item.start),
            "description": item.description,
            "comments": channel_comments(item.channels, units),
        }
        if item.position:
            frame = "centre of the workspace; x to the right, y away"
            places[True].add_spatial_series(
                pynwb.behavior.SpatialSeries(reference_frame=frame, **common)
            )
        else:
            places[False].add_timeseries(pynwb.TimeSeries(**common))
    for position, place in places.items():
        if any(item.position is position for item in series):
            module.add(place)


def _add_trials(nwb: Any, trials: TrialTable) -> None:
    for name in trials.columns:
        nwb.add_trial_column(name, trials.descriptions.get(name, name))
    for k, (start, stop) in enumerate(zip(trials.start, trials.stop, strict=True)):
        row = {name: values[k] for name, values in trials.columns.items()}
        nwb.add_trial(start_time=float(start), stop_time=float(stop), **row)


def _series_of(recording: Recording) -> tuple[BehaviourSeries, ...]:
    if recording.kinematics is None:
        return ()
    units = set(recording.kinematic_units)
    return (
        BehaviourSeries(
            name="kinematics",
            values=recording.kinematics,
            unit=units.pop() if len(units) == 1 else "n.a.",
            rate=1.0 / recording.bin_width,
            channels=recording.kinematic_names,
            units=recording.kinematic_units,
            start=recording.start_time,
            description="mean of each bin",
        ),
    )


def _trials_of(recording: Recording) -> TrialTable | None:
    trials = recording.trials
    if trials is None:
        return None
    condition = {"condition": list(trials.condition)} if trials.condition else {}
    at = recording.start_time + recording.bin_width * np.stack([trials.start, trials.stop])
    return TrialTable(at[0].tolist(), at[1].tolist(), condition, {"condition": "kind of trial"})
