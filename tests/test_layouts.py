"""Recordings in the layouts of public archives: what is read from each, and what stays out."""

from __future__ import annotations

from pathlib import Path

import h5py
import msgspec
import numpy as np
import pytest
from scipy import io

from ilqr_training.config import load_config
from ilqr_vae.errors import RecordingError
from ilqr_vae.recordings import (
    Hdf5Spec,
    MatSpec,
    NwbSpec,
    Recording,
    RecordingSpec,
    SplitSpec,
    TrialSpec,
    load_recording,
)
from layouts import (
    N_HELD_OUT,
    N_UNITS,
    area2_bump,
    falcon_h1,
    falcon_m2,
    file,
    mc_maze,
    mc_rtt,
    nlb_hdf5,
    reaches,
    save,
    self_paced,
)

CONFIGS = Path(__file__).parent.parent / "configs"


def spec_of(name: str, **changes: object) -> RecordingSpec:
    data = load_config(CONFIGS / f"{name}.toml").data
    return msgspec.structs.replace(data, **changes)


def lengths(recording: Recording) -> set[int]:
    return {b - a for a, b in recording.segments()}


def direct(times: np.ndarray, begin: float, bins: int, width: float) -> list[int]:
    """Counts the slow way."""
    return [
        int(((times >= begin + k * width - 1e-9) & (times < begin + (k + 1) * width - 1e-9)).sum())
        for k in range(bins)
    ]


def test_maze_trials_are_windows_around_their_own_onset(tmp_path: Path) -> None:
    made = reaches(30, 1.2, 0.45)
    read = load_recording(mc_maze(tmp_path / "a.nwb"), spec_of("mc_maze"))
    assert lengths(read) == {35}
    # 25 labelled train or val; trial 7 has no onset, 4 no hand at all
    labels = ["train", "train", "train", "val", "train", "none"] * 5
    train = [k for k in range(30) if labels[k] == "train" and k not in (4, 7)]
    test = [k for k in range(30) if labels[k] == "val"]
    chosen = round(0.8 * (len(train) + 1))
    assert read.bounds == (35 * (chosen - 1), 35 * len(train))  # 4 was of the training part
    assert read.trials is not None
    assert len(read.trials) == len(train) + len(test)
    for row, k in enumerate(train + test):
        begin = made.onset[k] - 0.25
        for unit in range(N_UNITS):
            expected = direct(made.spikes[unit], begin, 35, 0.02)
            assert read.counts[35 * row : 35 * row + 35, unit].tolist() == expected
        at = made.time.searchsorted(begin + 0.1 - 1e-9)  # the hand 100 ms later
        hand = made.velocity[at : at + 700].reshape(35, 20, 2).mean(axis=1)
        assert read.kinematics is not None
        scored = read.scored[35 * row : 35 * row + 35]
        assert scored.all() == (k != 2)
        assert np.allclose(read.kinematics[35 * row : 35 * row + 35][scored], hand[scored])
        kind = f"{made.angle[k] / 90:g}/{k % 2}"
        assert read.trials.condition[row] == kind
    assert read.valid.all()
    assert np.allclose(read.trials.events["move_onset_time"] - read.trials.start, 12.5)
    assert np.allclose(read.trials.events["target_on_time"] - read.trials.start, -5.0)
    assert read.held_out == ("102", "105", "108")
    assert read.kinematic_names == ("vx", "vy")
    assert read.kinematic_units == ("mm/s", "mm/s")
    assert "1 of 30 trials have no move_onset_time: left out." in read.notes
    assert any("have no kinematics" in note for note in read.notes)
    assert any("another label" in note for note in read.notes)


def test_the_same_file_as_it_ran(tmp_path: Path) -> None:
    spec = RecordingSpec(bin_width=0.02, nwb=NwbSpec(kinematics="hand_vel"))
    read = load_recording(mc_maze(tmp_path / "a.nwb"), spec)
    assert not len(read.breaks)
    assert read.bounds is None
    assert read.kinematic_names == ("hand_vel_x", "hand_vel_y")
    # between trials nothing was recorded, by obs_intervals
    made = reaches(30, 1.2, 0.45)
    middle = read.start_time + 0.02 * (np.arange(len(read)) + 0.5)
    inside = np.zeros(len(read), dtype=bool)
    for a, b in zip(made.start, made.stop, strict=True):
        inside |= (middle > a - 0.03) & (middle < b + 0.03)
    assert read.valid[~inside].mean() < 0.2
    assert read.valid[inside].mean() > 0.9
    assert read.trials is not None
    assert len(read.trials) > 20
    coarse = load_recording(tmp_path / "a.nwb", msgspec.structs.replace(spec, bin_width=0.1))
    assert coarse.counts.sum() == pytest.approx(read.counts.sum(), abs=20)


def test_rtt_pieces_follow_on_but_nothing_crosses(tmp_path: Path) -> None:
    read = load_recording(mc_rtt(tmp_path / "a.nwb"), spec_of("mc_rtt"))
    assert lengths(read) == {30}
    assert read.trials is not None
    assert read.trials.condition == ()
    assert read.bounds is not None
    assert 0 < read.bounds[0] < read.bounds[1] < len(read)
    assert not read.scored.all()  # the stretch without a finger
    assert read.valid.all()


def test_bumps_lag_behind_and_have_two_columns_of_condition(tmp_path: Path) -> None:
    made = reaches(30, 1.0, 0.25)
    read = load_recording(area2_bump(tmp_path / "a.nwb"), spec_of("area2_bump"))
    assert lengths(read) == {30}
    assert read.kinematic_units == ("cm/s", "cm/s")
    assert read.trials is not None
    assert read.trials.condition[0] == f"{made.angle[0]:g}/True"
    at = made.time.searchsorted(made.onset[0] - 0.1 - 0.02 - 1e-9)
    hand = made.velocity[at : at + 600].reshape(30, 20, 2).mean(axis=1) / 10
    assert read.kinematics is not None
    assert np.allclose(read.kinematics[:30], hand)


def test_a_split_by_number_of_trials(tmp_path: Path) -> None:
    spec = spec_of("area2_bump", split=SplitSpec(train=0.5, validation=0.8))
    read = load_recording(area2_bump(tmp_path / "a.nwb"), spec)
    assert read.bounds == (15 * 30, 24 * 30)
    assert spec.split.span("test", read) == (24 * 30, 30 * 30)


def test_whole_trials_of_any_length(tmp_path: Path) -> None:
    spec = spec_of("area2_bump", trials=TrialSpec(), split=SplitSpec())
    read = load_recording(area2_bump(tmp_path / "a.nwb"), spec)
    assert lengths(read) == {50}
    assert read.trials is not None
    assert np.allclose(read.trials.events["move_onset_time"] - read.trials.start, 12.5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"trials": TrialSpec(event="go")}, "data.trials.event: .*move_onset_time.*got 'go'"),
        ({"trials": TrialSpec(event="split", window=(0, 1))}, "expected a column of seconds"),
        (
            {"trials": TrialSpec(event="start_time", window=(0.2, 0.2))},
            "data.trials.window: expected .from, to. at least a bin",
        ),
        ({"trials": TrialSpec(condition=("colour",))}, "data.trials.condition: .*got 'colour'"),
        ({"split": SplitSpec(column="part")}, "data.split.column: .*got 'part'"),
        (
            {"split": SplitSpec(column="split", train_labels=("Train",))},
            "data.split.train_labels: expected labels of split: none, train, val, got Train",
        ),
        (
            {"trials": TrialSpec(event="move_onset_time", window=(1e5, 1e5 + 1))},
            "recording.trials: expected at least one trial with kinematics, got 25 without",
        ),
        ({"bin_width": 1e-9}, r"data.bin_width: .*makes .*e\+.* bins x \d+ units"),
    ],
)
def test_wrong_trials_are_named(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    path = area2_bump(tmp_path / "a.nwb")
    with pytest.raises(RecordingError, match=said):
        load_recording(path, spec_of("area2_bump", **changes))


def test_a_file_without_trials_says_so(tmp_path: Path) -> None:
    spec = RecordingSpec(mode="trials", nwb=NwbSpec(rate=50.0))
    with pytest.raises(RecordingError, match=r"data.mode: .*got no trials"):
        load_recording(falcon_h1(tmp_path / "a.nwb"), spec)


def test_spikes_on_another_clock_are_told(tmp_path: Path) -> None:
    path = area2_bump(tmp_path / "a.nwb")
    with h5py.File(path, "r+") as raw:
        raw["units/spike_times"][:] *= 1000.0  # milliseconds
        raw["units/spike_times"][:] += 1e6
    with pytest.raises(RecordingError, match=r"units.spike_times: .*all of them elsewhere, from 1"):
        load_recording(path, spec_of("area2_bump"))


def test_falcon_m2(tmp_path: Path) -> None:
    nwb = NwbSpec(kinematics="finger_vel", scored="eval_mask")
    read = load_recording(
        falcon_m2(tmp_path / "a.nwb"), RecordingSpec(bin_width=0.02, nwb=nwb, lag=0.0)
    )
    made = reaches(12, 1.0, 0.2)
    assert read.kinematic_names == ("index", "mrs")
    assert read.kinematic_units == ("a.u.", "a.u.")
    assert read.kinematics is not None
    fine = made.velocity[:2000].reshape(100, 20, 2).mean(axis=1)
    assert np.allclose(read.kinematics[:100], fine)
    time = 0.02 * np.arange(200)
    assert (read.scored[:200] == ((time % 1.0) > 0.2)).mean() > 0.98
    assert read.valid[:200].all()
    assert direct(made.spikes[0], 0.0, 50, 0.02) == read.counts[:50, 0].tolist()
    one = msgspec.structs.replace(nwb, kinematics="finger_vel/mrs")
    alone = load_recording(tmp_path / "a.nwb", RecordingSpec(bin_width=0.02, nwb=one))
    assert alone.kinematic_names == ("mrs",)
    ends = msgspec.structs.replace(nwb, stamps="end")
    moved = load_recording(tmp_path / "a.nwb", RecordingSpec(bin_width=0.02, nwb=ends))
    assert moved.start_time == pytest.approx(-0.02)
    wrong = msgspec.structs.replace(nwb, scored="mask")
    with pytest.raises(RecordingError, match=r"data.nwb.scored: .*got 'mask'"):
        load_recording(tmp_path / "a.nwb", RecordingSpec(nwb=wrong))


def test_falcon_h1_states_an_interval_for_a_rate(tmp_path: Path) -> None:
    nwb = NwbSpec(kinematics="OpenLoopKinematicsVelocity", scored="eval_mask", rate=50.0)
    read = load_recording(falcon_h1(tmp_path / "a.nwb"), RecordingSpec(bin_width=0.02, nwb=nwb))
    assert read.kinematics is not None
    assert read.kinematics.shape[1] == 7
    assert read.scored.tolist() == (np.arange(len(read)) % 50 > 5).tolist()
    assert len(read) == pytest.approx(12 * 1.4 / 0.02, abs=20)


TRIALS = RecordingSpec(bin_width=0.02, mode="trials", split=SplitSpec(train=0.6, validation=0.8))


def test_nlb_hdf5(tmp_path: Path) -> None:
    path = nlb_hdf5(tmp_path / "a.h5")
    read = load_recording(path, TRIALS)
    assert lengths(read) == {30}
    assert len(read.segments()) == 19 + 5  # one of the training part has no behaviour
    assert read.bounds == (14 * 30, 19 * 30)
    assert read.unit_names[0] == "heldin0"
    assert read.held_out == tuple(f"heldout{i}" for i in range(N_HELD_OUT))
    assert read.n_units == N_UNITS
    assert np.flatnonzero(~read.scored).tolist() == [3, 19 * 30 + 3]
    assert read.kinematic_names == ("train_behavior0", "train_behavior1")
    assert read.notes == ("1 trial without kinematics: left out.",)
    with h5py.File(path) as raw:
        assert np.array_equal(read.counts[:30, :-N_HELD_OUT], raw["train_spikes_heldin"][0])
    bare = load_recording(nlb_hdf5(tmp_path / "b.h5", behaviour=False), TRIALS)
    assert bare.kinematics is None
    assert len(bare.segments()) == 25


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (RecordingSpec(), "data.mode: expected 'trials' for an HDF5 file"),
        (msgspec.structs.replace(TRIALS, lag=0.1), "data.lag: expected 0"),
        (
            msgspec.structs.replace(TRIALS, hdf5=Hdf5Spec(spikes="spikes")),
            "data.hdf5.spikes: .*train_spikes_heldin.*got 'spikes'",
        ),
        (
            msgspec.structs.replace(TRIALS, hdf5=Hdf5Spec(group="mc_maze")),
            "data.hdf5.group: .*got 'mc_maze'",
        ),
        (
            msgspec.structs.replace(TRIALS, hdf5=Hdf5Spec(kinematic_names=("vx",))),
            "data.hdf5.kinematic_names: expected 2",
        ),
    ],
)
def test_wrong_hdf5_is_named(tmp_path: Path, spec: RecordingSpec, said: str) -> None:
    with pytest.raises(RecordingError, match=said):
        load_recording(nlb_hdf5(tmp_path / "a.h5"), spec)


def test_what_is_not_hdf5(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    path.write_bytes(b"no such thing")
    with pytest.raises(RecordingError, match=r"recording: expected an HDF5 file, got a.h5"):
        load_recording(path, TRIALS)


def test_self_paced_cells_become_units_and_positions_velocities(tmp_path: Path) -> None:
    read = load_recording(self_paced(tmp_path / "a.mat"), spec_of("self_paced"))
    made = reaches(50, 0.6, 0.1, gap=0.0)
    assert read.n_units == 2 * N_UNITS  # a cell that is empty is a unit that never fires
    assert (read.counts.sum(axis=0) > 0).sum() == N_UNITS - 1
    assert read.kinematic_names == ("dx/dt", "dy/dt")
    assert read.kinematic_units == ("mm/s", "mm/s")
    assert read.start_time == pytest.approx(4000.0)
    assert direct(made.spikes[0], 0.0, 50, 0.064) == read.counts[:50, N_UNITS].tolist()
    assert read.kinematics is not None
    true = 0.1 * made.velocity[: 64 * 400].reshape(400, 64, 2).mean(axis=1)
    assert np.corrcoef(read.kinematics[:400, 0], true[:, 0])[0, 1] > 0.95
    mat = msgspec.structs.replace(spec_of("self_paced").mat, time="")
    with pytest.raises(RecordingError, match=r"data.mat.time: expected the variable"):
        load_recording(tmp_path / "a.mat", spec_of("self_paced", mat=mat))


def counted(tmp_path: Path, **changes: object) -> Recording:
    """Forty bins of 50 ms with four trials, as a MAT file of counts."""
    rng = np.random.default_rng(0)
    content = {
        "spikes": rng.poisson(2.0, (3, 40)),
        "hand": np.arange(40.0)[None] * [[1.0], [2.0]],
        "first": np.array([3, 13, 23, 33]),
        "last": np.array([10, 20, 30, 40]),
        "side": np.array([1, 2, 1, 2]),
        "go": np.array([5.0, np.nan, 25.0, 35.0]),
    }
    io.savemat(tmp_path / "c.mat", content)
    mat = MatSpec(
        kinematics="hand",
        kinematic_units=("m", "m"),
        trial_starts="first",
        trial_stops="last",
        trial_conditions="side",
        trial_events=("go",),
    )
    split = SplitSpec(train=0.5, validation=0.75)
    usual = {"mat": mat, "mode": "trials", "split": split, "bin_width": 0.05}
    return load_recording(tmp_path / "c.mat", RecordingSpec(**(usual | changes)))


def test_counts_are_cut_at_their_own_bins(tmp_path: Path) -> None:
    read = counted(tmp_path)
    assert read.segments() == [(0, 8), (8, 16), (16, 24), (24, 32)]
    assert read.bounds == (16, 24)
    assert read.kinematics is not None
    assert read.kinematics[8:16, 0].tolist() == list(range(12, 20))
    assert read.trials is not None
    assert read.trials.condition == ("1", "2", "1", "2")
    assert np.allclose(read.trials.events["go_time"], [2, np.nan, 18, 26], equal_nan=True)
    around = counted(tmp_path, trials=TrialSpec(event="go", window=(-0.1, 0.2)))
    assert around.segments() == [(0, 6), (6, 12), (12, 18)]
    assert around.kinematics is not None
    assert around.kinematics[6:12, 1].tolist() == [44, 46, 48, 50, 52, 54]
    assert "1 of 4 trials have no go: left out." in around.notes
    beyond = counted(tmp_path, trials=TrialSpec(event="go", window=(0.0, 0.4)))
    assert len(beyond.segments()) == 2
    assert any("not inside the recording" in note for note in beyond.notes)


def test_lag_and_velocity_of_counts(tmp_path: Path) -> None:
    later = counted(tmp_path, lag=0.1)
    assert later.kinematics is not None
    assert later.kinematics[:8, 0].tolist() == list(range(4, 12))
    with pytest.raises(RecordingError, match=r"data.lag: expected a whole number .* got 0.07 s"):
        counted(tmp_path, lag=0.07)
    moving = counted(tmp_path, differentiate=True)
    assert moving.kinematics is not None
    assert np.allclose(moving.kinematics, [20.0, 40.0])
    assert moving.kinematic_names == ("dhand0/dt", "dhand1/dt")
    assert moving.kinematic_units == ("m/s", "m/s")


def test_to_stream_it_a_recording_is_read_as_it_ran(tmp_path: Path) -> None:
    spec = spec_of("mc_rtt").as_it_ran()
    read = load_recording(mc_rtt(tmp_path / "a.nwb"), spec)
    assert not len(read.breaks)
    assert spec.split.occupied("test", read)[1] == len(read)


def test_a_unit_recorded_for_a_while_is_not_observed_afterwards(tmp_path: Path) -> None:
    nwb = file()
    spans = ([[0.0, 4.0]], [[1.0, 2.0], [2.0, 3.02]], [[0.0, 4.0]])
    for i, span in enumerate(spans):
        nwb.add_unit(spike_times=np.arange(0.01, 4.0, 0.1), obs_intervals=np.array(span), id=i)
    read = load_recording(save(tmp_path / "a.nwb", nwb), RecordingSpec(bin_width=0.1))
    assert read.valid[:40].all()
    assert not read.valid[40:].any()
    assert read.observed is not None
    assert read.observed[:40, 0].all()
    # intervals that touch are one; the bin from 3.0 on is not whole
    assert np.flatnonzero(read.observed[:, 1]).tolist() == list(range(10, 30))
    nothing = file()
    nothing.add_unit(spike_times=[0.5], obs_intervals=np.array([[0.5, 0.52]]))
    with pytest.raises(RecordingError, match=r"units.obs_intervals: expected intervals"):
        load_recording(save(tmp_path / "b.nwb", nothing), RecordingSpec(bin_width=0.1))
