"""Small recordings made up for the tests of odd ones, and ways to spoil them."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pynwb
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ilqr_vae.recordings import (
    Recording,
    RecordingSpec,
    load_recording,
)

Array = NDArray[np.float64]

SECONDS, UNITS = 60.0, 6
TIME = np.arange(round(SECONDS * 100)) / 100.0
MOVEMENT = np.stack([np.sin(TIME), np.cos(1.3 * TIME)], axis=1)


def trains(seed: int = 0, rate: float = 12.0) -> list[Array]:
    rng = np.random.default_rng(seed)
    return [np.sort(rng.uniform(0, SECONDS, rng.poisson(rate * SECONDS))) for _ in range(UNITS)]


FEW = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

SPIKES = trains()
START = 5.0 * np.arange(12)
"""Seconds, of trials."""


def file(spikes: list[Array] | None = None, **columns: Any) -> Any:
    nwb = pynwb.NWBFile("made up", "id", datetime(2024, 1, 1, tzinfo=UTC))
    for name in columns:
        nwb.add_unit_column(name, "made up")
    for i, times in enumerate(SPIKES if spikes is None else spikes):
        nwb.add_unit(spike_times=times, **{name: values[i] for name, values in columns.items()})
    return nwb


def moved(nwb: Any, name: str = "hand_vel", data: Any = MOVEMENT, **options: Any) -> Any:
    if not {"rate", "timestamps"} & set(options):
        options["rate"] = 100.0
    series = pynwb.TimeSeries(**({"name": name, "data": data, "unit": "m/s"} | options))
    module = nwb.processing.get("behavior", None)
    (module or nwb.create_processing_module("behavior", "b")).add(series)
    return nwb


def trials(nwb: Any, start: Any, stop: Any, **columns: Any) -> Any:
    for name in columns:
        nwb.add_trial_column(name, "made up")
    for k, (a, b) in enumerate(zip(start, stop, strict=True)):
        nwb.add_trial(start_time=a, stop_time=b, **{n: v[k] for n, v in columns.items()})
    return nwb


def saved(tmp_path: Path, nwb: Any, name: str = "a.nwb") -> Path:
    with pynwb.NWBHDF5IO(str(tmp_path / name), "w") as out:
        out.write(nwb)
    return tmp_path / name


def read(tmp_path: Path, made: Any, **spec: Any) -> Recording:
    return load_recording(saved(tmp_path, made), RecordingSpec(**spec))


def replaced(path: Path, place: str, values: Any) -> Path:
    """The file with other values in a dataset, as a program other than pynwb may write them."""
    with h5py.File(path, "r+") as raw:
        kept = dict(raw[place].attrs)
        del raw[place]
        raw[place] = values
        raw[place].attrs.update(kept)
    return path


def named(recording: Recording) -> list[str]:
    return [warning.name for warning in recording.warnings]


def plain(tmp_path: Path) -> Recording:
    return read(tmp_path, moved(file()))


Damage = tuple[list[tuple[int, bytes]], int]


def damages(size: int) -> st.SearchStrategy[Damage]:
    """Of a file of so many bytes: what to write where, and how much of it to keep."""
    change = st.tuples(st.integers(0, size - 1), st.binary(min_size=1, max_size=4))
    return st.tuples(st.lists(change, max_size=6), st.integers(0, size))


def spoilt(whole: bytes, damage: Damage) -> bytes:
    """A file's bytes with the changes, and half of the time without its end."""
    (changes, kept), raw = damage, bytearray(whole)
    for at, new in changes:
        raw[at : at + len(new)] = new
    return bytes(raw[: max(kept, 200)]) if kept % 2 else bytes(raw)
