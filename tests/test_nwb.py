"""NWB files: read as other laboratories write them, written as nwbinspector likes them."""

from __future__ import annotations

import subprocess
import sys
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import h5py
import msgspec
import numpy as np
import pynwb
import pytest

from ilqr_vae.errors import RecordingError
from ilqr_vae.recordings import (
    BehaviourSeries,
    NwbSpec,
    Recording,
    RecordingSpec,
    SubjectInfo,
    Trials,
    TrialTable,
    load_recording,
    write_nwb,
)

SOMEBODY = SubjectInfo("m1", "Macaca mulatta", age="P8Y", description="made up")
TIMES = np.arange(400) * 0.01 + 2.0  # four seconds from 2 s, 100 a second
SPIKES = [np.arange(2.0, 6.0, 0.1), np.array([2.01, 2.02, 3.0]), np.array([0.5, 5.99])]


def file(**options: Any) -> Any:
    return pynwb.NWBFile("made up", "id", datetime(2024, 1, 1, tzinfo=UTC), **options)


def save(path: Path, nwb: Any) -> Path:
    with pynwb.NWBHDF5IO(str(path), "w") as io:
        io.write(nwb)
    return path


def with_units(nwb: Any, names: list[str] | None = None, column: str = "unit_name") -> Any:
    if column == "name":
        with pytest.warns(UserWarning, match="'name' already exists"):
            nwb.add_unit_column(column, "names")
    elif names:
        nwb.add_unit_column(column, "names")
    for i, times in enumerate(SPIKES):
        nwb.add_unit(spike_times=times, id=10 + i, **({column: names[i]} if names else {}))
    return nwb


def velocity(name: str = "hand_vel", **options: Any) -> Any:
    data = np.stack([TIMES, -TIMES, 0 * TIMES], axis=1)
    return pynwb.TimeSeries(**({"name": name, "data": data, "unit": "m/s"} | options))


def test_series_in_a_processing_module_with_timestamps(tmp_path: Path) -> None:
    nwb = with_units(file())
    module = nwb.create_processing_module("behavior", "behaviour")
    module.add(velocity("cursor_pos", timestamps=TIMES))
    module.add(velocity("hand_vel", timestamps=TIMES, conversion=0.001))
    nwb.add_trial_column("condition", "kind")
    for start, stop, kind in ((2.0, 3.0, "a"), (3.0, 4.02, "b"), (5.5, 9.0, "beyond")):
        nwb.add_trial(start_time=start, stop_time=stop, condition=kind)
    nwb.add_invalid_time_interval(start_time=4.0, stop_time=4.12)
    recording = load_recording(save(tmp_path / "a.nwb", nwb))
    assert len(recording) == 80
    assert recording.start_time == 2.0
    assert recording.unit_names == ("10", "11", "12")
    assert recording.counts[:, 0].sum() == 40
    assert recording.counts[:, 0].tolist() == [1, 0] * 40
    assert recording.counts[[0, 20], 1].tolist() == [2, 1]
    assert recording.counts[:, 2].sum() == 1  # the other spike came before the series
    assert recording.kinematic_names == ("hand_vel_x", "hand_vel_y", "hand_vel_z")
    assert recording.kinematic_units == ("m/s",) * 3
    assert recording.kinematics is not None
    middle = 2.02 + 0.05 * np.arange(80)
    assert np.allclose(recording.kinematics, 1e-3 * np.stack([middle, -middle, 0 * middle], 1))
    assert recording.trials is not None
    assert recording.trials.start.tolist() == [0, 20]
    assert recording.trials.stop.tolist() == [20, 40]
    assert recording.trials.condition == ("a", "b")
    assert np.flatnonzero(~recording.valid).tolist() == [40, 41, 42]


@pytest.mark.parametrize("place", ["position", "behavioural", "acquisition"])
def test_series_elsewhere_with_a_rate(tmp_path: Path, place: str) -> None:
    nwb = with_units(file(), names=["a", "b", "c"], column="name")
    rate = {"rate": 100.0, "starting_time": 2.0}
    spatial = pynwb.behavior.SpatialSeries(
        name="hand", data=np.stack([TIMES, TIMES], 1), unit="meters", reference_frame="r", **rate
    )
    if place == "acquisition":
        nwb.add_acquisition(spatial)
    elif place == "position":
        module = nwb.create_processing_module("motion", "any name")
        module.add(pynwb.behavior.Position(spatial_series=[spatial]))
    else:
        module = nwb.create_processing_module("motion", "any name")
        series = velocity("hand", data=np.stack([TIMES, TIMES], 1), **rate)
        module.add(pynwb.behavior.BehavioralTimeSeries(time_series=[series]))
    path = save(tmp_path / "a.nwb", nwb)
    recording = load_recording(path)
    assert recording.unit_names == ("a", "b", "c")
    assert recording.kinematic_names == ("hand_x", "hand_y")
    assert len(recording) == 80
    named = NwbSpec(kinematics="hand", kinematic_names=("p", "q"), kinematic_units=("cm", "cm"))
    again = load_recording(path, RecordingSpec(bin_width=0.1, nwb=named))
    assert len(again) == 40
    assert again.kinematic_names == ("p", "q")
    assert again.kinematic_units == ("cm", "cm")


def test_without_kinematics_bins_begin_at_zero_and_hold_every_spike(tmp_path: Path) -> None:
    recording = load_recording(save(tmp_path / "a.nwb", with_units(file())))
    assert recording.kinematics is None
    assert recording.start_time == 0.0
    assert recording.counts.sum() == sum(map(len, SPIKES))


@pytest.mark.parametrize("width", [1e-9, 1e-300])
def test_more_bins_than_any_recording_has_are_refused(tmp_path: Path, width: float) -> None:
    path = save(tmp_path / "a.nwb", with_units(file()))
    with pytest.raises(RecordingError, match=r"data.bin_width: .*bins x \d+ units"):
        load_recording(path, RecordingSpec(bin_width=width))


def test_gaps_in_kinematics_never_come_out_as_nan(tmp_path: Path) -> None:
    data = np.stack([TIMES, TIMES], 1)
    data[100:120] = np.nan
    data[200:330, 1] = np.nan
    nwb = with_units(file())
    nwb.add_acquisition(velocity(data=data, rate=100.0, starting_time=2.0))
    recording = load_recording(save(tmp_path / "a.nwb", nwb))
    assert recording.kinematics is not None
    assert np.allclose(recording.kinematics[:, 1], 2.02 + 0.05 * np.arange(80))
    assert np.flatnonzero(~recording.valid).tolist() == list(range(40, 66))


def test_invalid_times_may_have_no_end(tmp_path: Path) -> None:
    nwb = with_units(file())
    nwb.add_invalid_time_interval(start_time=-np.inf, stop_time=0.5)
    nwb.add_invalid_time_interval(start_time=5.0, stop_time=np.inf)
    recording = load_recording(save(tmp_path / "a.nwb", nwb))
    assert np.flatnonzero(recording.valid).tolist() == list(range(10, 100))


def binned(data: Any, **options: Any) -> Any:
    nwb = file()
    module = nwb.create_processing_module("ecephys", "counts")
    usual = {"name": "counts", "data": data, "unit": "count", "rate": 20.0}
    module.add(pynwb.TimeSeries(**(usual | options)))
    return nwb


COUNTED = RecordingSpec(bin_width=0.05, nwb=NwbSpec(counts="processing/ecephys/counts"))
GOOD = np.arange(24).reshape(12, 2)


def test_counts_already_binned(tmp_path: Path) -> None:
    recording = load_recording(save(tmp_path / "a.nwb", binned(GOOD)), COUNTED)
    assert np.array_equal(recording.counts, GOOD)
    assert recording.unit_names == ("unit0", "unit1")
    timed = binned(GOOD, rate=None, timestamps=1.5 + np.arange(12) * 0.05)
    assert load_recording(save(tmp_path / "b.nwb", timed), COUNTED).start_time == 1.5


@pytest.mark.parametrize(
    ("nwb", "message"),
    [
        (binned(GOOD - 1.0), "processing/ecephys/counts: expected counts of zero or more"),
        (binned(GOOD + 0.5), "expected whole numbers"),
        (binned(np.where(GOOD == 3, np.nan, GOOD)), "expected finite whole numbers"),
        (binned(GOOD * 10_000), "expected counts up to 65535"),
        (binned(GOOD, rate=25.0), "data.bin_width: expected the file's 0.04 s .*, got 0.05 s"),
        (binned(GOOD, name="others"), "data.nwb.counts: .*processing/ecephys/others, got"),
        (
            binned(GOOD, rate=None, timestamps=np.r_[np.arange(11) * 0.05, 3.0]),
            "timestamps: expected one bin every 0.05 s",
        ),
    ],
)
def test_wrong_counts_are_named(tmp_path: Path, nwb: Any, message: str) -> None:
    with pytest.raises(RecordingError, match=message):
        load_recording(save(tmp_path / "a.nwb", nwb), COUNTED)


def test_bin_widths_that_nearly_agree_are_told_apart(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nwb", binned(GOOD, rate=60.0))
    with pytest.raises(RecordingError, match=r"the file's 0.01666666667 s .*, got 0.0166667 s"):
        load_recording(path, msgspec.structs.replace(COUNTED, bin_width=0.0166667))


def test_other_wrong_files_are_named(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nwb", binned(GOOD))
    with pytest.raises(RecordingError, match=r"units.spike_times: .*ecephys/counts.*got none"):
        load_recording(path)
    lost = file()
    lost.add_unit(spike_times=[0.1, np.nan])
    with pytest.raises(RecordingError, match=r"units.spike_times: expected finite seconds"):
        load_recording(save(tmp_path / "n.nwb", lost))
    silent = file()
    silent.add_unit(spike_times=[])
    with pytest.raises(RecordingError, match=r"units.spike_times: expected spikes.*none at all"):
        load_recording(save(tmp_path / "c.nwb", silent))
    path = save(tmp_path / "d.nwb", with_units(file()))
    spec = RecordingSpec(nwb=NwbSpec(kinematics="hand"))
    with pytest.raises(RecordingError, match=r"data.nwb.kinematics: .*got 'hand'"):
        load_recording(path, spec)
    nwb = with_units(file())
    nwb.add_acquisition(velocity(timestamps=TIMES))
    path = save(tmp_path / "e.nwb", nwb)
    spec = RecordingSpec(nwb=NwbSpec(kinematic_names=("vx", "vy")))
    with pytest.raises(RecordingError, match=r"data.nwb.kinematic_names: expected 3"):
        load_recording(path, spec)
    plain = tmp_path / "f.nwb"
    with h5py.File(plain, "w") as raw:
        raw["x"] = 1
    with pytest.raises(RecordingError, match=r"recording: expected an NWB file, got f.nwb"):
        load_recording(plain)
    whole = path.read_bytes()
    for share in (0.3, 0.7, 0.95):
        plain.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(RecordingError, match="recording: expected an NWB file"):
            load_recording(plain)


def violations(path: Path) -> list[str]:
    with warnings.catch_warnings():
        # nwbinspector's own imports warn; this is about what it says of the file.
        warnings.simplefilter("ignore")
        from nwbinspector import Importance, inspect_nwbfile

        found = inspect_nwbfile(
            nwbfile_path=str(path), importance_threshold=Importance.BEST_PRACTICE_VIOLATION
        )
        return [str(message) for message in found]


def test_spike_times_written_are_read_and_clean(tmp_path: Path) -> None:
    speed = np.stack([np.sin(TIMES), np.cos(TIMES)], axis=1)
    series = [
        BehaviourSeries("hand_velocity", speed, "m/s", 100.0, ("vx", "vy"), 2.0, description="v"),
        BehaviourSeries(
            "hand", speed, "meters", 100.0, ("x", "y"), 2.0, description="p", position=True
        ),
    ]
    trials = TrialTable([2.0, 3.0], [3.0, 4.0], {"condition": ["l", "r"]}, {"condition": "side"})
    path = write_nwb(
        tmp_path / "a.nwb",
        SPIKES,
        unit_names=("a", "b", "c"),
        series=series,
        trials=trials,
        subject=SOMEBODY,
        description="made up",
    )
    assert violations(path) == []
    recording = load_recording(path)
    assert recording.unit_names == ("a", "b", "c")
    assert recording.kinematic_names == ("vx", "vy")
    assert recording.kinematics is not None
    assert np.allclose(recording.kinematics, speed.reshape(80, 5, 2).mean(axis=1))
    assert recording.trials is not None
    assert recording.trials.condition == ("l", "r")
    assert [p.name for p in tmp_path.iterdir()] == ["a.nwb"]


def test_a_recording_written_is_read_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    recording = Recording(
        counts=rng.poisson(2.0, size=(50, 3)).astype(np.uint16),
        bin_width=0.02,
        unit_names=("a,1", "b", "c"),
        kinematics=rng.normal(size=(50, 2)),
        kinematic_names=("vx", "force"),
        kinematic_units=("m/s", "N"),
        start_time=3.5,
        trials=Trials(np.array([0, 20]), np.array([20, 45]), ("l", "r")),
    )
    path = write_nwb(tmp_path / "a.nwb", recording, subject=SOMEBODY)
    assert violations(path) == []
    spec = RecordingSpec(bin_width=0.02, nwb=NwbSpec(counts="binned_spikes"))
    read = load_recording(path, spec)
    assert np.array_equal(read.counts, recording.counts)
    assert read.unit_names == recording.unit_names
    assert read.kinematics is not None
    assert recording.kinematics is not None
    assert np.allclose(read.kinematics, recording.kinematics)
    assert read.kinematic_names == ("vx", "force")
    assert read.kinematic_units == ("m/s", "N")
    assert read.start_time == 3.5
    assert read.trials is not None
    assert read.trials.stop.tolist() == [20, 45]


def test_writing_is_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.nwb"
    bad = BehaviourSeries("v", np.zeros((4, 3)), "m/s", 100.0, ("vx", "vy"))
    with pytest.raises(RecordingError, match="v: expected"):
        write_nwb(path, SPIKES, series=[bad])
    with pytest.raises(RecordingError, match="spike_times: expected increasing"):
        write_nwb(path, [np.array([2.0, 1.0])])
    with pytest.raises(RecordingError, match="unit_names"):
        write_nwb(path, SPIKES, unit_names=("a", "a", "b"))
    with pytest.raises(RecordingError, match=r"out: expected a name ending in .nwb"):
        write_nwb(tmp_path / "a.h5", SPIKES)
    with pytest.raises(RecordingError, match="out: expected an existing folder"):
        write_nwb(tmp_path / "none" / "a.nwb", SPIKES)
    assert list(tmp_path.iterdir()) == []
    write_nwb(path, SPIKES)
    before = path.read_bytes()
    with pytest.raises(RecordingError, match="out: expected a new file, or --force"):
        write_nwb(path, SPIKES)
    assert path.read_bytes() == before
    write_nwb(path, SPIKES[:2], force=True)
    assert load_recording(path).n_units == 2
    assert [p.name for p in tmp_path.iterdir()] == ["a.nwb"]


def test_without_the_extra_it_says_what_to_install(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nwb", with_units(file()))
    # None in sys.modules is how Python itself marks a module that cannot be imported.
    program = """
import sys
sys.modules["pynwb"] = sys.modules["h5py"] = None
from ilqr_vae.errors import RecordingError
from ilqr_vae.recordings import load_recording, write_nwb
assert not {"torch", "sklearn", "hdmf"} & set(sys.modules)
for attempt in (lambda: load_recording(sys.argv[1]), lambda: write_nwb(sys.argv[2], [[0.1]])):
    try:
        attempt()
    except RecordingError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(path), str(tmp_path / "b.nwb")],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    said = "expected the package 'pynwb' (pip install '.[nwb]'), got not installed"
    assert done.stdout.splitlines() == [f"recording: {said}", f"out: {said}"]
