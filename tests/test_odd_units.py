"""Which units are read, and their names and indices; spike times given trial by trial."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pynwb
import pytest
from numpy.typing import NDArray
from scipy import io

from ilqr_vae.errors import RecordingError
from ilqr_vae.recordings import MatSpec, NwbSpec, RecordingSpec, load_recording
from odd_files import (
    MOVEMENT,
    SPIKES,
    START,
    TIME,
    UNITS,
    file,
    moved,
    named,
    plain,
    read,
    replaced,
    saved,
    trials,
)

# ---- which units ---------------------------------------------------------------------------------


def labelled() -> Any:
    """Six units with a quality, an electrode each and the group it is of."""
    nwb = pynwb.NWBFile("made up", "id", datetime(2024, 1, 1, tzinfo=UTC))
    device = nwb.create_device("d")
    groups = [nwb.create_electrode_group(f"probe{i}", "d", "M1", device) for i in range(2)]
    for i in range(UNITS):
        nwb.add_electrode(group=groups[i // 3], location="M1" if i < 2 else "PMd")
    nwb.add_unit_column("quality", "made up")
    nwb.add_unit_column("curated", "made up")
    for i, times in enumerate(SPIKES):
        nwb.add_unit(
            spike_times=times,
            electrodes=[i],
            electrode_group=groups[i // 3],
            quality=("good", "mua", "noise")[i % 3],
            curated=i % 2 == 0,
        )
    return nwb


@pytest.mark.parametrize(
    ("units", "rows"),
    [
        ({"quality": "good"}, [0, 3]),
        ({"quality": ("good", "mua")}, [0, 1, 3, 4]),
        ({"electrode_group": "probe1"}, [3, 4, 5]),
        ({"location": "M1"}, [0, 1]),
        ({"quality": "good", "group_name": "probe0"}, [0]),
        ({"curated": True, "id": (0, 2, 3)}, [0, 2]),
    ],
)
def test_units_are_selected_by_any_column(
    tmp_path: Path, units: dict[str, Any], rows: list[int]
) -> None:
    path = saved(tmp_path, moved(labelled()))
    made = load_recording(path, units=units)
    assert made.unit_names == tuple(map(str, rows))
    assert np.array_equal(made.counts, load_recording(path).counts[:, rows])
    assert f"{len(rows)} of 6 units" in made.notes[-1]


@pytest.mark.parametrize(
    ("units", "said"),
    [
        ({"quality": "god"}, "data.units.quality: expected a value .* good, mua, noise, got 'god'"),
        ({"quality": ("good", "bad")}, "data.units.quality: .* got 'bad'"),
        ({"kuality": "good"}, "data.units.kuality: expected a column .* quality, .* location"),
        ({"quality": "mua", "location": "M1", "id": 0}, "data.units: .* got none with quality ="),
    ],
)
def test_a_column_or_value_that_is_not_there_is_listed(
    tmp_path: Path, units: dict[str, Any], said: str
) -> None:
    with pytest.raises(RecordingError, match=said):
        load_recording(saved(tmp_path, moved(labelled())), units=units)


def test_units_of_mat_and_hdf5_are_selected_by_variables_of_one_value_a_unit(
    tmp_path: Path,
) -> None:
    quality = np.array(["good", "mua"] * 3, dtype=object)
    cells = np.empty((1, UNITS), dtype=object)
    cells[0] = [times[None] for times in SPIKES]
    made = {"st": cells, "quality": quality, "shank": np.arange(UNITS) // 2}
    io.savemat(path := tmp_path / "a.mat", made)
    spec = RecordingSpec(mat=MatSpec(spike_times="st"), units={"quality": "good", "shank": (0, 1)})
    assert load_recording(path, spec).unit_names == ("unit0", "unit2")
    with pytest.raises(RecordingError, match=r"data.units.area: expected one of .*quality, shank"):
        load_recording(path, spec, units={"area": "M1"})
    with h5py.File(tmp_path / "a.h5", "w") as raw:
        raw["train_spikes_heldin"] = np.ones((4, 10, 2))
        raw["train_spikes_heldout"] = np.ones((4, 10, 1))
        raw["area"] = ["M1", "PMd", "M1"]
    made = load_recording(tmp_path / "a.h5", bin_width=0.02, mode="trials", units={"area": "M1"})
    assert made.unit_names == ("heldin0", "heldout0")
    assert made.held_out == ("heldout0",)


# ---- spike times told from their trials' starts --------------------------------------------------


BY_TRIAL = [[t[(t >= a) & (t < a + 5)] - a for a in START] for t in SPIKES]
"""Of units, of trials."""
RELATIVE: dict[str, Any] = {"trials": {"relative_spikes": True}}


def test_spike_times_that_start_again_at_each_trial_are_unrolled(tmp_path: Path) -> None:
    joined = [np.concatenate(unit) for unit in BY_TRIAL]
    path = saved(tmp_path, trials(moved(file(joined)), START, START + 5))
    with pytest.raises(RecordingError, match=r"restart|data.trials.relative_spikes = true"):
        load_recording(path)
    made = load_recording(path, **RELATIVE)
    assert np.array_equal(made.counts, plain(tmp_path).counts)
    assert made.valid.all()
    path = saved(tmp_path, trials(moved(file()), START, START + 5))
    with pytest.raises(RecordingError, match=r"at each of 12 trials, or spike_trials"):
        load_recording(path, **RELATIVE)


def test_a_unit_that_is_silent_in_a_trial_needs_to_be_told(tmp_path: Path) -> None:
    quiet = [[*BY_TRIAL[0][:3], np.zeros(0), *BY_TRIAL[0][4:]], *BY_TRIAL[1:]]
    joined = [np.concatenate(unit) for unit in quiet]
    which = [np.repeat(np.arange(12), [len(t) for t in unit]) for unit in quiet]
    path = saved(tmp_path, trials(moved(file(joined)), START, START + 5))
    made = load_recording(path, **RELATIVE)
    assert named(made) == ["units-ambiguous"]
    assert made.unit_names == tuple("12345")
    nwb = pynwb.NWBFile("made up", "id", datetime(2024, 1, 1, tzinfo=UTC))
    nwb.add_unit_column("trial", "of each spike", index=True)
    for times, rows in zip(joined, which, strict=True):
        nwb.add_unit(spike_times=times, trial=rows)
    path = saved(tmp_path, trials(moved(nwb), START, START + 5))
    made = load_recording(path, nwb={"spike_trials": "trial"}, **RELATIVE)
    whole = plain(tmp_path).counts
    assert np.array_equal(made.counts[:, 1:], whole[:, 1:])
    assert not made.counts[300:400, 0].any()


@pytest.mark.parametrize("layout", ["units x trials", "trials x units", "cells of cells", "told"])
@pytest.mark.parametrize("moving", [True, False])
def test_cells_of_units_and_trials_are_unrolled(tmp_path: Path, layout: str, moving: bool) -> None:
    cells = np.empty((UNITS, 12), dtype=object)
    for i, unit in enumerate(BY_TRIAL):
        for k, times in enumerate(unit):
            cells[i, k] = times[None]
    made: dict[str, Any] = {"st": cells, "t": TIME, "v": MOVEMENT, "a": START, "b": START + 5}
    spec: dict[str, Any] = {"trial_starts": "a", "trial_stops": "b", "trial_times": "seconds"}
    spec |= {"spike_times": "st"} | ({"time": "t", "kinematics": "v"} if moving else {})
    if layout == "trials x units":
        made["st"] = cells.T
    elif layout != "units x trials":
        made["st"] = np.empty((1, UNITS), dtype=object)
        made["st"][0] = [row[None] for row in cells]
    if layout == "told":
        made["which"] = np.empty((1, UNITS), dtype=object)
        for i, unit in enumerate(BY_TRIAL):
            made["which"][0, i] = np.repeat(np.arange(1, 13), [len(t) for t in unit])
            made["st"][0, i] = np.concatenate(unit)
        spec["spike_trials"] = "which"
    io.savemat(tmp_path / "a.mat", made)
    read_back = load_recording(tmp_path / "a.mat", mat=spec, **RELATIVE)
    whole = plain(tmp_path).counts
    assert np.array_equal(read_back.counts[: len(whole)], whole[: len(read_back.counts)])
    if " x " in layout:
        with pytest.raises(RecordingError, match=r"relative_spikes"):
            load_recording(tmp_path / "a.mat", mat=spec)


def test_bins_between_trials_are_masked_where_spikes_are_of_trials(tmp_path: Path) -> None:
    short = [np.concatenate([t[t < 3] for t in unit]) for unit in BY_TRIAL]
    path = saved(tmp_path, trials(moved(file(short)), START, START + 3))
    made = load_recording(path, **RELATIVE)
    inside = (np.arange(len(made)) * 0.05) % 5 < 3 - 1e-9
    assert np.array_equal(made.valid, inside)


# ---- what units are called, and where their values stand -----------------------------------------


def test_names_that_repeat_over_probes(tmp_path: Path) -> None:
    numbers = ["0", "1", "2"] * 2
    made = read(tmp_path, moved(file(unit_name=numbers, probe=["a"] * 3 + ["b"] * 3)))
    assert made.unit_names == ("a/0", "a/1", "a/2", "b/0", "b/1", "b/2")
    assert named(made) == ["unit-names"]
    made = read(tmp_path, moved(file(unit_name=numbers)))
    assert made.unit_names == ("0#0", "1#1", "2#2", "0#3", "1#4", "2#5")
    made = read(tmp_path, moved(file(unit_name=numbers)), nwb=NwbSpec(unit_names="id"))
    assert made.unit_names == tuple("012345")
    assert made.warnings == ()
    path = saved(tmp_path, moved(file(unit_name=numbers)))
    made = load_recording(replaced(path, "units/id", np.zeros(6, dtype=np.int64)))
    assert made.unit_names == ("0#0", "1#1", "2#2", "0#3", "1#4", "2#5")
    with pytest.raises(RecordingError, match=r"data.nwb.unit_names: expected a column .*'cluster'"):
        read(tmp_path, moved(file()), nwb=NwbSpec(unit_names="cluster"))


def test_names_that_are_numbers_stay_whole(tmp_path: Path) -> None:
    made = read(tmp_path, file(unit_name=[12345670.0 + i for i in range(UNITS)]))
    assert made.unit_names[:2] == ("12345670", "12345671")


def _wrapped(ends: NDArray[Any]) -> NDArray[Any]:
    return ends.astype(np.uint8)


def _starts(ends: NDArray[Any]) -> NDArray[Any]:
    return np.concatenate([[0], ends[:-1]])


def _beyond(ends: NDArray[Any]) -> NDArray[Any]:
    return ends + 7


def _short(ends: NDArray[Any]) -> NDArray[Any]:
    return np.append(ends[:-1], ends[-1] - 5)


def _shuffled(ends: NDArray[Any]) -> NDArray[Any]:
    return ends[::-1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_wrapped, "overflowed"),
        (_starts, "as if it held starts"),
        (_beyond, "beyond the data"),
        (_short, "a last end of"),
        (_shuffled, "and then"),
    ],
)
@pytest.mark.parametrize("column", ["spike_times", "obs_intervals"])
def test_an_index_that_does_not_fit_is_refused(
    tmp_path: Path, change: Callable[[NDArray[Any]], NDArray[Any]], said: str, column: str
) -> None:
    nwb = pynwb.NWBFile("made up", "id", datetime(2024, 1, 1, tzinfo=UTC))
    intervals = np.stack([np.arange(0, 60, 0.5), np.arange(0.5, 60.5, 0.5)], axis=1)
    for times in SPIKES:
        nwb.add_unit(spike_times=times, obs_intervals=intervals)
    path = saved(tmp_path, moved(nwb))
    with h5py.File(path, "r") as raw:
        ends = raw[f"units/{column}_index"][:]
    replaced(path, f"units/{column}_index", change(ends))
    with pytest.raises(RecordingError, match=rf"units.{column}_index: expected row ends.*{said}"):
        load_recording(path)
