"""Recordings from NWB files, read with pynwb (extra ``nwb``)."""

from __future__ import annotations

import warnings
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from ilqr_vae.errors import RecordingError
from ilqr_vae.recordings.checks import existing_file, missing_extra, sha256_of
from ilqr_vae.recordings.nwb.series import features_of, find, kinematics_of, mask_of
from ilqr_vae.recordings.nwb.tables import (
    binned_counts,
    invalid_times,
    spikes_of,
    trials_table,
    units_beside,
)
from ilqr_vae.recordings.recording import Recording
from ilqr_vae.recordings.session import RecordedSession
from ilqr_vae.recordings.spec import RecordingSpec
from ilqr_vae.recordings.unbinned import recording_of


def read_nwb(path: str | Path, spec: RecordingSpec) -> Recording:
    """Read an NWB file.

    Bins begin with the kinematic series (or the series of binned counts). Without either, they
    begin at 0 of the file's clock, or with the units if those begin far from 0. Only whole
    bins are kept. Counts come from the spike times of the units table, or from a series already
    binned (``spec.nwb.counts``). Kinematics are the mean of the samples inside each bin, or
    interpolated at bin centres if samples are slower than bins. Missing samples are
    interpolated; bins inside a gap above one second, and those in the file's ``invalid_times`` or
    outside every unit's ``obs_intervals``, are marked invalid. Unit names are
    ``NwbSpec.unit_names``; a column ``heldout`` says which are held out. With
    ``spec.mode = "trials"``, each trial's window has its own bins, aligned with the event
    (``TrialSpec``).

    Raises:
        RecordingError: no such file, no NWB file, a series is absent (those present are listed),
            there are no spikes, counts are not whole numbers 0..65535, the bin width is not the
            spec's, times are impossible (``plausible``), requested trials are absent, or pynwb is
            not installed.
    """
    path = existing_file(path)
    with opened(path) as (nwb, series):
        session, spec = _session(nwb, series, spec)
    return replace(recording_of(session, spec), name=path.name, sha256=sha256_of(path))


@contextmanager
def opened(path: Path) -> Generator[tuple[Any, dict[str, Any]]]:
    """Return the contents of the file, and all its time series by path."""
    try:
        import pynwb
        from hdmf.build.errors import BuildError, ConstructError
    except ModuleNotFoundError as error:
        raise missing_extra("recording", "pynwb", "nwb") from error
    # Raised by h5py, hdmf and pynwb on a file that is damaged or no NWB file. Contents that cannot
    # be read later are reported by ``series.contents``; any other exception there is a bug.
    unreadable = (
        OSError,
        RuntimeError,
        KeyError,
        ValueError,
        TypeError,
        AttributeError,
        BuildError,
        ConstructError,
    )
    # Files of other versions of NWB, or that break a recommendation, make pynwb and hdmf warn;
    # what matters is checked below.
    with warnings.catch_warnings(), ExitStack() as stack:
        warnings.simplefilter("ignore")
        try:
            # pynwb's classes are made at run time: the type checker does not know their arguments.
            reader: Any = pynwb.NWBHDF5IO
            nwb = stack.enter_context(reader(str(path), mode="r")).read()
            series = _all_series(nwb, pynwb)
        except unreadable as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            if isinstance(error, ConstructError):  # its text holds the whole builder
                builder, reason = error.args
                reason = f"{builder.path.removeprefix('root/')}: {reason.rpartition('due to: ')[2]}"
            raise RecordingError(
                "recording", expected="an NWB file", got=f"{path.name}: {reason[:300]}"
            ) from error
        yield nwb, series


def _all_series(nwb: Any, pynwb: Any) -> dict[str, Any]:
    """Return every TimeSeries by its path inside the file, e.g.
    ``processing/behavior/Position/hand``.
    """
    found: dict[str, Any] = {}
    for item in nwb.objects.values():
        if isinstance(item, pynwb.TimeSeries):
            names, node = [item.name], item.parent
            while node is not None and node is not nwb:
                names.append(node.name)
                node = node.parent
            top = names[-1]
            for group in ("processing", "acquisition", "stimulus", "analysis"):
                if top in (getattr(nwb, group, None) or {}):
                    names.append(group)
                    break
            found["/".join(reversed(names))] = item
    return dict(sorted(found.items()))


def _session(
    nwb: Any, series: dict[str, Any], spec: RecordingSpec
) -> tuple[RecordedSession, RecordingSpec]:
    """Return the contents of the file, and the spec with the bin width that it states."""
    binned = find(series, spec.nwb.counts, "data.nwb.counts") if spec.nwb.counts else None
    features = features_of(series, spec)
    others = {path: item for path, item in series.items() if path not in {f.path for f in features}}
    kinematics = kinematics_of(others, spec, binned)
    table = trials_table(nwb) if spec.nwb.trials or spec.mode == "trials" else None
    if table is None and spec.mode == "trials":
        tables = ", ".join(nwb.intervals or ())
        raise RecordingError(
            "data.mode",
            expected="a file with a trials table for 'trials'",
            got="no trials"
            + (f"; other intervals, which are not read: {tables}" if tables else ""),
        )
    moving, warnings = kinematics.moving, kinematics.warnings
    told = RecordedSession(
        unit_names=(),
        moving=moving,
        features=features,
        scored=mask_of(series, spec, moving),
        table=table,
        invalid=invalid_times(nwb, spec),
        notes=kinematics.notes,
    )
    if binned is None:
        units = spikes_of(nwb, series, spec)
        session = replace(
            told,
            spike_times=units.times,
            unit_names=units.names,
            held_out=units.held_out,
            observed=units.observed,
            spike_trials=units.trials,
            notes=told.notes + units.notes,
            warnings=warnings + units.warnings,
        )
        return session, spec
    counts, begin, width = binned_counts(binned, spec)
    beside = units_beside(nwb, binned, counts.shape[1], spec)
    session = replace(
        told,
        unit_names=beside.names,
        counts=counts,
        begin=begin,
        held_out=beside.held_out,
        notes=told.notes + beside.notes,
        warnings=warnings + beside.warnings,
    ).keeping(beside.rows)
    return session, msgspec.structs.replace(spec, bin_width=width)
