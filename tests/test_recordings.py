"""MAT files and what every reader shares: what is read, and what each wrong file is told."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

import h5py
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import io, sparse

from ilqr_vae.errors import RecordingError
from ilqr_vae.recordings import MatSpec, RecordingSpec, TrialSpec, load_recording
from ilqr_vae.recordings.binning import bin_spikes, resample
from ilqr_vae.recordings.checks import fill_gaps, whole_counts

COUNTS = np.arange(60, dtype=np.uint8).reshape(3, 20) % 7  # units x bins
HAND = np.stack([np.linspace(0, 1, 20), np.linspace(3, 2, 20), np.zeros(20)])
MAT = MatSpec(
    bin_width="timeBase",
    kinematics="hand",
    kinematic_rows=(0, 1),
    kinematic_names=("vx", "vy"),
    kinematic_units=("m/s", "m/s"),
    trial_starts="starts",
)
SPEC = RecordingSpec(bin_width=0.05, mat=MAT)


def variables(**changed: Any) -> dict[str, Any]:
    usual = {
        "spikes": COUNTS,
        "timeBase": 0.05,
        "hand": HAND,
        "starts": np.array([[2, 9, 15]], dtype=np.uint16),
    }
    return {name: value for name, value in (usual | changed).items() if value is not None}


def mat5(path: Path, **changed: Any) -> Path:
    io.savemat(path, variables(**changed))
    return path


def mat73(path: Path, **changed: Any) -> Path:
    """As MATLAB writes version 7.3: HDF5 behind 512 bytes, axes reversed."""
    with h5py.File(path, "w", userblock_size=512) as file:
        for name, value in variables(**changed).items():
            file[name] = np.atleast_2d(np.asarray(value)).T
    with path.open("r+b") as raw:
        raw.write(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM")
    return path


@pytest.mark.parametrize("write", [mat5, mat73])
def test_both_versions_read_alike(tmp_path: Path, write: Any) -> None:
    path = write(tmp_path / "a.mat")
    recording = load_recording(path, SPEC)
    assert np.array_equal(recording.counts, COUNTS.T)
    assert recording.counts.dtype == np.uint16
    assert recording.kinematics is not None
    assert np.array_equal(recording.kinematics, HAND[:2].T)
    assert recording.kinematic_names == ("vx", "vy")
    assert recording.unit_names == ("unit0", "unit1", "unit2")
    assert recording.trials is not None
    assert recording.trials.start.tolist() == [1, 8, 14]
    assert recording.trials.stop.tolist() == [8, 14, 20]
    assert recording.name == "a.mat"
    assert recording.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert recording.valid.all()


def test_other_orientations_sparse_counts_and_no_kinematics(tmp_path: Path) -> None:
    path = mat5(tmp_path / "a.mat", spikes=COUNTS.T, hand=HAND.T)
    mat = MatSpec(spikes_axes="bins,units", kinematics="hand")
    recording = load_recording(path, RecordingSpec(bin_width=0.05, mat=mat))
    assert np.array_equal(recording.counts, COUNTS.T)
    assert recording.kinematic_names == ("hand0", "hand1", "hand2")
    path = mat5(tmp_path / "b.mat", spikes=sparse.csc_matrix(COUNTS.astype(float)))
    recording = load_recording(path, bin_width=0.05)
    assert np.array_equal(recording.counts, COUNTS.T)
    assert recording.kinematics is None
    assert recording.kinematic_names == ()
    assert recording.trials is None
    matrix = sparse.csc_matrix(COUNTS.astype(float))
    with h5py.File(tmp_path / "c.mat", "w", userblock_size=512) as file:
        group = file.create_group("spikes")
        group.attrs["MATLAB_sparse"] = np.uint64(3)
        for name, value in (("data", matrix.data), ("ir", matrix.indices), ("jc", matrix.indptr)):
            group[name] = value
    assert np.array_equal(load_recording(tmp_path / "c.mat", bin_width=0.05).counts, COUNTS.T)


def floats(**at: float) -> np.ndarray[Any, Any]:
    counts = COUNTS.astype(float)
    for place, value in at.items():
        counts[1, int(place[1:])] = value
    return counts


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"spikes": floats(b4=1.5)}, r"spikes: expected whole numbers, got 1 .* 1.5 at \(4, 1\)"),
        ({"spikes": floats(b4=-1.0)}, "spikes: expected counts of zero or more"),
        ({"spikes": floats(b4=np.nan)}, "spikes: expected finite whole numbers"),
        ({"spikes": floats(b4=np.inf)}, "spikes: expected finite whole numbers"),
        ({"spikes": floats(b4=70000)}, "spikes: expected counts up to 65535"),
        ({"spikes": np.zeros((3, 0))}, "spikes: expected at least one bin"),
        ({"spikes": "words"}, "spikes: expected an array of numbers"),
        ({"timeBase": 0.04}, "data.bin_width: expected the file's 0.04 s .timeBase., got 0.05 s"),
        ({"timeBase": 0.05 * (1 + 1e-5)}, "data.bin_width"),
        ({"timeBase": None}, "data.mat.bin_width: .* hand, spikes, starts, got 'timeBase'"),
        ({"spikes": None}, "data.mat.spikes: expected one of a.mat's variables: hand, starts"),
        ({"hand": None}, "data.mat.kinematics: .*got 'hand'"),
        ({"hand": HAND[:, :-1]}, "hand: expected channels x 20 bins, got shape"),
        ({"hand": HAND * np.nan}, "hand: expected some finite values"),
        ({"starts": [9, 2]}, "starts: expected increasing one-based bins up to 20"),
        ({"starts": [2, 21]}, "starts: expected increasing one-based bins up to 20"),
        ({"starts": [2.5]}, "starts: expected whole numbers of bins"),
    ],
)
def test_wrong_contents_are_named(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordingError, match=message):
        load_recording(mat5(tmp_path / "a.mat", **changed), SPEC)


def test_a_bin_width_within_rounding_is_the_same(tmp_path: Path) -> None:
    assert len(load_recording(mat5(tmp_path / "a.mat", timeBase=0.05 * (1 + 1e-8)), SPEC)) == 20


@pytest.mark.parametrize(
    ("mat", "message"),
    [
        (MatSpec(kinematics="hand", kinematic_rows=(0, 3)), "data.mat.kinematic_rows: .*got 3"),
        (MatSpec(kinematics="hand", kinematic_names=("vx",)), "data.mat.kinematic_names: .*3"),
        (MatSpec(spikes="Spikes"), "data.mat.spikes"),
    ],
)
def test_wrong_maps_are_named(tmp_path: Path, mat: MatSpec, message: str) -> None:
    with pytest.raises(RecordingError, match=message):
        load_recording(mat5(tmp_path / "a.mat"), RecordingSpec(bin_width=0.05, mat=mat))


def test_events_beside_spike_times_are_on_the_clock_of_the_samples(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    time = 100.0 + np.arange(1000) * 0.01
    cells = np.empty((2, 1), dtype=object)
    for i in range(2):
        cells[i, 0] = np.sort(rng.uniform(100.0, 110.0, 400))
    first = np.array([1, 201, 401, 601, 801])
    content = {"cells": cells, "time": time, "hand": np.sin(time)[:, None], "first": first}
    content |= {"go": first + 50, "side": np.array([1, 2, 1, 2, 1])}
    io.savemat(tmp_path / "a.mat", content)
    mat = MatSpec(
        spike_times="cells",
        time="time",
        kinematics="hand",
        trial_starts="first",
        trial_conditions="side",
        trial_events=("go",),
    )
    spec = RecordingSpec(bin_width=0.05, mat=mat, trials=TrialSpec(event="go", window=(0.0, 0.5)))
    read = load_recording(tmp_path / "a.mat", spec)
    assert read.trials is not None
    assert np.allclose(read.trials.events["go_time"], read.trials.start + 10)
    assert read.trials.condition == ("1", "2", "1", "2", "1")
    cut = load_recording(tmp_path / "a.mat", msgspec.structs.replace(spec, mode="trials"))
    assert cut.start_time == pytest.approx(100.5)
    assert cut.segments() == [(0, 10), (10, 20), (20, 30), (30, 40), (40, 50)]
    assert np.array_equal(cut.counts[:10], read.counts[10:20])


def test_what_is_no_recording_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="recording: expected a file, got no such file"):
        load_recording(tmp_path / "none.mat")
    with pytest.raises(RecordingError, match="got a directory"):
        load_recording(tmp_path)
    other = tmp_path / "a.csv"
    other.write_text("1,2")
    with pytest.raises(RecordingError, match=r"expected a .nwb, .mat or .h5 file, got a.csv"):
        load_recording(other)
    for name in ("a.mat", "a.nwb"):
        for content in (b"", b"not a recording at all" * 40, b"\x89HDF\r\n\x1a\nrubbish"):
            path = tmp_path / name
            path.write_bytes(content)
            with pytest.raises(RecordingError, match=rf"recording: expected .*{name}"):
                load_recording(path)


@pytest.mark.parametrize("write", [mat5, mat73])
def test_damaged_files_are_refused_or_read_never_worse(tmp_path: Path, write: Any) -> None:
    path = write(tmp_path / "a.mat", spikes=np.tile(COUNTS, (1, 20)), hand=np.tile(HAND, (1, 20)))
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(whole[: int(rng.integers(len(whole) // 3, len(whole)))])
        for place in rng.integers(0, len(damaged), 3):
            damaged[int(place)] = int(rng.integers(256))
        path.write_bytes(damaged)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                load_recording(path, SPEC)
        except RecordingError:
            refused += 1
    assert refused > 100


@given(
    hnp.arrays(
        st.sampled_from([np.uint8, np.int16, np.int64, np.float32, np.float64]),
        hnp.array_shapes(min_dims=2, max_dims=2),
        elements=st.integers(0, 127),
    )
)
def test_whole_counts_keep_their_values(values: Any) -> None:
    assert np.array_equal(whole_counts(values, "counts"), values)


@given(
    st.lists(st.floats(-1.0, 10.0), max_size=50),
    st.sampled_from([0.01, 0.05, 0.1, 1 / 3]),
    st.floats(0.0, 2.0),
)
def test_each_spike_is_counted_once(times: list[float], width: float, start: float) -> None:
    n_bins = 20
    counts = bin_spikes([np.sort(np.array(times))], start, width, n_bins)[:, 0]
    end = start + n_bins * width
    clear = [t for t in times if min(abs(t - start), abs(t - end)) > 1e-3 * width]
    assert sum(start <= t < end for t in clear) <= counts.sum()
    assert counts.sum() <= len(times) - sum(not start <= t < end for t in clear)
    halves = [
        bin_spikes([np.sort(np.array(times))], s, width, 10)[:, 0]
        for s in (start, start + 10 * width)
    ]
    assert np.abs(np.concatenate(halves).astype(int) - counts).sum() <= 2


def test_a_spike_on_an_edge_belongs_to_the_bin_that_begins() -> None:
    times = np.arange(20) * 0.05
    assert bin_spikes([times], 0.0, 0.05, 20)[:, 0].tolist() == [1] * 20
    assert bin_spikes([times + 12.591], 12.591, 0.05, 20)[:, 0].tolist() == [1] * 20
    with pytest.raises(RecordingError, match="spike_times: expected finite"):
        bin_spikes([np.array([np.nan])], 0.0, 0.05, 20)


def test_faster_series_are_averaged_and_slower_ones_interpolated() -> None:
    fast = np.arange(20, dtype=float)[:, None]
    means = resample(fast, np.arange(20) * 0.01, 0.0, 0.05, 4)
    assert means[:, 0] == pytest.approx([2, 7, 12, 17])
    fast[7] = np.nan  # a missing sample does not spoil its bin
    assert resample(fast, np.arange(20) * 0.01, 0.0, 0.05, 4)[1, 0] == pytest.approx(7)
    slow = np.arange(5, dtype=float)[:, None]
    centres = resample(slow, np.arange(5) * 0.2, 0.0, 0.05, 16)
    assert centres[:, 0] == pytest.approx((np.arange(16) + 0.5) * 0.25)
    with pytest.raises(RecordingError, match="timestamps: expected increasing"):
        resample(slow, np.zeros(5), 0.0, 0.05, 16)


def test_gaps_are_filled_and_long_ones_marked() -> None:
    values = np.arange(200, dtype=float)[:, None] * [1.0, -2.0]
    holed = values.copy()
    holed[10:30, 0] = np.nan  # one second: short
    holed[50:75, 1] = np.nan  # longer
    holed[:3] = np.nan
    filled, valid = fill_gaps(holed, 0.05, "hand")
    assert np.allclose(filled[3:], values[3:])
    assert np.array_equal(filled[:3], np.tile(values[3], (3, 1)))
    assert np.flatnonzero(~valid).tolist() == list(range(50, 75))
    holed[40:180] = np.nan
    with pytest.raises(RecordingError, match="hand: expected gaps above 1 s in at most half"):
        fill_gaps(holed, 0.05, "hand")


@pytest.mark.parametrize("write", [mat5, mat73])
def test_conditions_may_be_text(tmp_path: Path, write: Any) -> None:
    if write is mat5:
        cells = np.array(["left", "right", "left"], dtype=object)
        path = mat5(tmp_path / "a.mat", kind=cells)
        letters = mat5(tmp_path / "b.mat", kind=np.array(["left", "right", "left"]))
        paths = [path, letters]
    else:
        path = mat73(tmp_path / "a.mat")
        with h5py.File(path, "r+") as file:
            made = file.create_dataset("kind", (3, 1), dtype=h5py.ref_dtype)
            for i, text in enumerate(["left", "right", "left"]):
                codes = np.array([[ord(c)] for c in text], dtype=np.uint16)
                cell = file.create_dataset(f"#refs#/{i}", data=codes)
                cell.attrs["MATLAB_class"] = np.bytes_("char")
                made[i, 0] = cell.ref
        paths = [path]
    mat = msgspec.structs.replace(MAT, trial_conditions="kind")
    for each in paths:
        trials = load_recording(each, RecordingSpec(bin_width=0.05, mat=mat)).trials
        assert trials is not None
        assert trials.condition == ("left", "right", "left")


@pytest.mark.parametrize("events", [("starts", "starts"), ("go", "go_time")])
def test_an_event_listed_twice_is_refused(tmp_path: Path, events: tuple[str, ...]) -> None:
    path = mat5(tmp_path / "a.mat", go=[2, 9, 15], go_time=[2, 9, 15])
    mat = msgspec.structs.replace(MAT, trial_events=events)
    with pytest.raises(RecordingError, match=r"data.mat.trial_events.*: expected unique names"):
        load_recording(path, RecordingSpec(bin_width=0.05, mat=mat))
