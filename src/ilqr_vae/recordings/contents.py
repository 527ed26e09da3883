"""The contents of a recording file: units, series, trials, and what would be read of them."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ilqr_vae.errors import RecordingError
from ilqr_vae.recordings.checks import existing_file
from ilqr_vae.recordings.load import load_recording
from ilqr_vae.recordings.mat_variables import variables_of
from ilqr_vae.recordings.recording import Recording, RecordingWarning
from ilqr_vae.recordings.spec import RecordingSpec
from ilqr_vae.recordings.trials import TrialRows, words

_MOST_GROUPS = 8
"""Largest number of listed values of a column of units."""


class Group(msgspec.Struct, frozen=True):
    """Units with the same value in a column; ``rate`` is their mean rate in Hz."""

    column: str
    value: str
    units: int
    rate: float


class Series(msgspec.Struct, frozen=True):
    """A series, variable or dataset.

    Attributes:
        kind: its type in the file.
        shape: as stored.
        rate: samples per second; None without a clock.
        begin, end: seconds; None without a clock.
        decodable: assumed kind of behaviour; "" for none.
    """

    name: str
    kind: str
    shape: tuple[int, ...] = ()
    unit: str = ""
    rate: float | None = None
    begin: float | None = None
    end: float | None = None
    decodable: str = ""


class Column(msgspec.Struct, frozen=True):
    """A column of the trials table, and a description of its values."""

    name: str
    holds: str


class Contents(msgspec.Struct, frozen=True):
    """The contents of a recording file.

    Attributes:
        name: name of the file.
        n_units: number of units in the file, before selection.
        rates: rate of the slowest, median and fastest unit in Hz; empty if not known.
        unit_columns: what units can be selected by (``data.units``).
        groups: units by the values of those columns.
        series: all series; first those that could be decoded, in order of preference.
        n_trials, trials_begin, trials_end, trial_columns: the trials table; seconds.
        reads: what would be read, by kind; empty if it cannot be read.
        notes, warnings: see ``Recording``.
        refused: why it cannot be read with these settings.
    """

    name: str
    n_units: int = 0
    rates: tuple[float, ...] = ()
    unit_columns: tuple[str, ...] = ()
    groups: tuple[Group, ...] = ()
    series: tuple[Series, ...] = ()
    n_trials: int = 0
    trials_begin: float | None = None
    trials_end: float | None = None
    trial_columns: tuple[Column, ...] = ()
    reads: dict[str, str] = {}
    notes: tuple[str, ...] = ()
    warnings: tuple[RecordingWarning, ...] = ()
    refused: str = ""


def contents_of(path: str | Path, spec: RecordingSpec) -> Contents:
    """Inspect a recording file.

    Args:
        spec: how to read it.

    Raises:
        RecordingError: there is no such file, or it is not of a known type.
    """
    path = existing_file(path)
    suffix = path.suffix.lower()
    if suffix == ".nwb":
        found = _nwb(path)
    elif suffix == ".mat":
        found = Contents(path.name, series=tuple(Series(n, w) for n, w in variables_of(path)))
    elif suffix in (".h5", ".hdf5"):
        found = _hdf5(path)
    else:
        raise RecordingError("recording", expected="a .nwb, .mat or .h5 file", got=path.name)
    try:
        read = load_recording(path, spec)
    except RecordingError as error:
        return msgspec.structs.replace(found, refused=str(error))
    return msgspec.structs.replace(
        found,
        n_units=found.n_units or read.counted,
        rates=found.rates or _spread(_rates(read)),
        reads=_reads(read, spec),
        notes=read.notes,
        warnings=read.warnings,
    )


def _reads(read: Recording, spec: RecordingSpec) -> dict[str, str]:
    begin = read.start_time
    parts = (f"{s} {' to '.join(map(str, spec.split.span(s, read)))}" for s in _SPANS)
    channels = zip(read.kinematic_names, read.kinematic_units, strict=True)
    laid = ", trials laid end to end" if spec.mode == "trials" else ""
    units, features = read.counted, read.unit_names[-read.features :]
    said = {"features": f"{read.features}: {', '.join(features)}"} if read.features else {}
    return {
        "units": f"{units}: {', '.join(read.unit_names[: min(units, 6)])}"
        + (", ..." if units > 6 else "")
        + (f"; {len(read.held_out)} held out" if read.held_out else ""),
        **said,
        "bins": f"{len(read)} of {read.bin_width * 1e3:g} ms from {begin:g} s{laid}; "
        f"{int((~read.valid).sum())} masked",
        "kinematics": ", ".join(f"{n} ({u})" if u else n for n, u in channels) or "none",
        "trials": f"{0 if read.trials is None else len(read.trials)} inside the bins",
        "split": "; ".join(parts),
    }


_SPANS = ("train", "validation", "test")


def _rates(read: Recording) -> NDArray[np.float64]:
    read = read.without_features()
    seen = read.mask()
    spikes = np.where(seen, read.counts, 0).sum(axis=0, dtype=np.float64)
    return spikes / np.maximum(seen.sum(axis=0), 1) / read.bin_width


def _spread(rates: NDArray[np.float64]) -> tuple[float, ...]:
    if not len(rates):
        return ()
    return float(rates.min()), float(np.median(rates)), float(rates.max())


def _holds(values: NDArray[Any]) -> str:
    """Describe the values of a column."""
    lost = ""
    if values.dtype.kind in "iuf":
        numbers = values.astype(np.float64)
        known = np.isfinite(numbers)
        if not known.any():
            return "no number"
        lost = f", {int((~known).sum())} missing" if not known.all() else ""
        values, numbers = values[known], numbers[known]
        if len(np.unique(numbers)) > _MOST_GROUPS:
            return f"{numbers.min():g} to {numbers.max():g}{lost}"
    there = sorted(set(words(values).tolist()))
    more = f", ... ({len(there)} values)" if len(there) > _MOST_GROUPS else ""
    return ", ".join(there[:_MOST_GROUPS]) + more + lost


def _hdf5(path: Path) -> Contents:
    from ilqr_vae.recordings.h5 import File

    with closing(File(path, "an HDF5 file")) as file:
        found = [Series(n, kind, shape) for n, kind, shape in file.datasets()]
    return Contents(path.name, series=tuple(found))


# ---- NWB -----------------------------------------------------------------------------------------


def _nwb(path: Path) -> Contents:
    from ilqr_vae.recordings.nwb.read import opened
    from ilqr_vae.recordings.nwb.series import RANKS, behaviour
    from ilqr_vae.recordings.nwb.tables import trials_table

    with opened(path) as (nwb, series):
        order = behaviour(series)
        kinds = {place: RANKS[rank] for place, rank in order.items()}
        places = [*order, *(place for place in series if place not in order)]
        made = Contents(
            path.name,
            series=tuple(_series(place, series[place], kinds.get(place, "")) for place in places),
        )
        made = _with_units(made, nwb)
        try:
            table = trials_table(nwb)
        except RecordingError as error:
            return msgspec.structs.replace(made, trial_columns=(Column("trials", str(error)),))
        return made if table is None else _with_trials(made, table)


def _series(place: str, item: Any, decodable: str) -> Series:
    from ilqr_vae.recordings.nwb.series import clock

    shape = tuple(int(n) for n in getattr(item.data, "shape", ()) or ())
    made = Series(place, type(item).__name__, shape, str(item.unit or ""), decodable=decodable)
    try:
        times, interval = clock(item, shape[0] if shape else 0)
    except RecordingError:
        return made
    if not len(times):
        return made
    return msgspec.structs.replace(
        made,
        rate=1.0 / interval if interval else None,
        begin=float(times[0]),
        end=float(times[-1]) + interval,
    )


def _with_units(made: Contents, nwb: Any) -> Contents:
    from ilqr_vae.recordings.nwb.tables import ragged, unit_columns, unit_labels

    units = nwb.units
    if units is None or not len(units):
        return made
    made = msgspec.structs.replace(made, n_units=len(units))
    rates = np.zeros(0)
    try:
        columns = tuple(unit_columns(units))
        labels = {name: unit_labels(units, name, f"units.{name}") for name in columns}
        if "spike_times" in units.colnames:
            times = ragged(units, "spike_times", "units.spike_times", np.arange(len(units)))
            known = [t[np.isfinite(t)] for t in times]
            every = np.concatenate(known)
            span = float(np.ptp(every)) if len(every) > 1 else 0.0
            rates = np.array([len(t) for t in known]) / span if span else rates
    except RecordingError as error:
        return msgspec.structs.replace(made, unit_columns=(str(error),))
    groups = [
        Group(name, value, int(same.sum()), float(rates[same].mean()) if len(rates) else 0.0)
        for name, each in labels.items()
        if len(set(each.tolist())) <= min(_MOST_GROUPS, len(units) - 1)
        for value in sorted(set(each.tolist()))
        for same in [each == value]
    ]
    return msgspec.structs.replace(
        made, rates=_spread(rates), unit_columns=columns, groups=tuple(groups)
    )


def _with_trials(made: Contents, table: TrialRows) -> Contents:
    both = np.concatenate([table.start, table.stop])
    known = both[np.isfinite(both)]
    return msgspec.structs.replace(
        made,
        n_trials=len(table.start),
        trials_begin=float(known.min()) if len(known) else None,
        trials_end=float(known.max()) if len(known) else None,
        trial_columns=tuple(Column(name, _holds(v)) for name, v in table.columns.items()),
    )
