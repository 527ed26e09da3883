"""Odd and impossible kinematics, trials and events: read rightly, with a warning, or refused."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pynwb
import pytest

from ilqr_vae.errors import RecordingError
from ilqr_vae.recordings import (
    ClockSpec,
    NwbSpec,
    RecordingSpec,
    TrialSpec,
    load_recording,
)
from odd_files import (
    MOVEMENT,
    SPIKES,
    START,
    TIME,
    Array,
    file,
    moved,
    named,
    plain,
    read,
    replaced,
    saved,
    trials,
)

# ---- movement -----------------------------------------------------------------------------------


def test_a_few_samples_without_a_time_are_left_out(tmp_path: Path) -> None:
    stamps = TIME.copy()
    stamps[[100, 500]] = np.nan
    made = read(tmp_path, moved(file(), timestamps=stamps))
    assert named(made) == ["stamps-missing"]
    assert np.array_equal(made.counts, plain(tmp_path).counts)
    stamps[700:2000] = np.nan
    with pytest.raises(RecordingError, match=r"timestamps: expected finite seconds, got 1302 of"):
        read(tmp_path, moved(file(), timestamps=stamps))


def test_a_few_times_that_do_not_increase_are_left_out(tmp_path: Path) -> None:
    stamps = TIME.copy()
    stamps[101], stamps[300], stamps[400] = stamps[100], 1e6, 0.0
    made = read(tmp_path, moved(file(), timestamps=stamps))
    assert named(made) == ["stamps-order"]
    assert len(made) == 1200
    with pytest.raises(RecordingError, match="expected increasing seconds, got 2999 of 6000"):
        read(tmp_path, moved(file(), timestamps=TIME % 30))


@pytest.mark.parametrize(
    ("stamps", "said"),
    [
        (np.stack([TIME, TIME]), r"timestamps: got \(2, 6000\)"),
        (np.stack([TIME, TIME], axis=1), r"timestamps: got \(6000, 2\)"),
        (TIME[:-3], "one a sample, got 5997"),
    ],
)
def test_times_of_another_shape_are_said(tmp_path: Path, stamps: Any, said: str) -> None:
    path = saved(tmp_path, moved(file(), timestamps=TIME))
    replaced(path, "processing/behavior/hand_vel/timestamps", stamps)
    with pytest.raises(RecordingError, match=rf"hand_vel.*{said}"):
        load_recording(path)


def test_channels_first_are_transposed_where_the_times_prove_it(tmp_path: Path) -> None:
    path = saved(tmp_path, moved(file(), timestamps=TIME))
    made = load_recording(replaced(path, "processing/behavior/hand_vel/data", MOVEMENT.T))
    assert named(made) == ["kinematics-transposed"]
    assert np.allclose(made.kinematics, plain(tmp_path).kinematics)  # pyright: ignore[reportArgumentType, reportCallIssue]
    with pytest.raises(RecordingError, match=r"hand_vel: .*2 x 6000: are they transposed"):
        read(tmp_path, moved(file(), data=MOVEMENT.T))


def test_a_jittered_camera_is_read_alike_in_trials(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    stamps = np.sort(TIME[::2] + 0.006 + rng.uniform(-0.006, 0.006, 3000))
    nwb = moved(file(), data=MOVEMENT[::2], timestamps=stamps)
    trials(nwb, 5.0 * np.arange(11) + 1, 5.0 * np.arange(11) + 4)
    path = saved(tmp_path, nwb)
    ran = load_recording(path, RecordingSpec(bin_width=0.02))
    cut = load_recording(path, RecordingSpec(bin_width=0.02, mode="trials"))
    assert ran.scored.all()
    assert cut.scored.all()


def test_missing_samples_are_scored_alike_in_trials(tmp_path: Path) -> None:
    data = MOVEMENT.copy()
    data[1050:1100] = np.nan  # half a second, from 10.5 s on
    nwb = trials(moved(file(), data=data), 4.0 * np.arange(14), 4.0 * np.arange(1, 15))
    path = saved(tmp_path, nwb)
    ran = load_recording(path)
    cut = load_recording(path, RecordingSpec(mode="trials"))
    assert np.array_equal(ran.scored[: len(cut)], cut.scored)
    assert np.allclose(ran.kinematics[: len(cut)], cut.kinematics)  # pyright: ignore[reportOptionalSubscript, reportArgumentType, reportCallIssue]
    assert np.flatnonzero(~ran.scored).tolist() == list(range(210, 220))


def test_velocity_comes_first_and_cursors_eyes_and_rewards_last(tmp_path: Path) -> None:
    one = np.sin(TIME)
    order = [
        ("a_water_level", one),
        ("Reward", one),
        ("eye_velocity", MOVEMENT),
        ("lever", one),
        ("cursor_pos", MOVEMENT),
        ("handVelocity", MOVEMENT),
    ]
    for count in range(1, len(order) + 1):
        nwb = file()
        for name, data in order[:count]:
            moved(nwb, name, data)
        made = read(tmp_path, nwb)
        best = {1: 0, 2: 1, 3: 2, 4: 3, 5: 3, 6: 5}[count]
        assert made.kinematic_names[0].startswith(order[best][0]), count
        assert ("also possible" in "".join(made.notes)) == (count > 1)


def test_what_was_found_and_left_is_said(tmp_path: Path) -> None:
    nwb = file()
    nwb.add_acquisition(pynwb.TimeSeries(name="lfp", data=MOVEMENT, unit="V", rate=100.0))
    made = read(tmp_path, nwb)
    assert made.kinematics is None
    assert named(made) == ["kinematics-none"]
    assert "acquisition/lfp (TimeSeries)" in made.warnings[0].text


def test_samples_much_rarer_than_bins_are_named(tmp_path: Path) -> None:
    assert named(read(tmp_path, moved(file(), data=MOVEMENT[::30], rate=100 / 30))) == [
        "kinematics-slow"
    ]
    assert named(read(tmp_path, moved(file(), data=MOVEMENT[::10], rate=10.0))) == []


def test_tables_in_other_places_are_named(tmp_path: Path) -> None:
    nwb = moved(pynwb.NWBFile("made up", "id", datetime(2024, 1, 1, tzinfo=UTC)))
    elsewhere = pynwb.misc.Units(name="sorted", description="made up")
    elsewhere.add_unit(spike_times=SPIKES[0])
    nwb.create_processing_module("ecephys", "e").add(elsewhere)
    with pytest.raises(RecordingError, match="but ecephys/sorted"):
        read(tmp_path, nwb)
    nwb = moved(file())
    nwb.add_epoch(1.0, 2.0)
    nwb.add_invalid_time_interval(start_time=0.0, stop_time=60.0)
    assert named(read(tmp_path, nwb)) == ["masked"]
    with pytest.raises(RecordingError, match="other intervals, which are not read: epochs"):
        read(tmp_path, nwb, mode="trials")


def test_booleans_are_numbers(tmp_path: Path) -> None:
    made = read(tmp_path, moved(file(), "licking", np.sin(TIME) > 0))
    assert made.kinematics is not None
    assert set(np.unique(made.kinematics).tolist()) >= {0.0, 1.0}


@pytest.mark.parametrize(("unit", "turn"), [("radians", 2 * np.pi), ("degrees", 360.0)])
def test_directions_are_averaged_round_the_circle(tmp_path: Path, unit: str, turn: float) -> None:
    true = 0.4 * TIME / (2 * np.pi) * turn
    series = pynwb.behavior.SpatialSeries(
        name="head", data=true % turn, unit=unit, reference_frame="north", rate=100.0
    )
    nwb = file()
    module = nwb.create_processing_module("behavior", "b")
    module.add(pynwb.behavior.CompassDirection(spatial_series=[series]))
    path = saved(tmp_path, nwb)
    made = load_recording(path)
    middle = true.reshape(1200, 5).mean(axis=1)
    assert made.kinematics is not None
    off = (made.kinematics[:, 0] - middle + turn / 2) % turn - turn / 2
    assert np.abs(off).max() < 1e-9 * turn
    assert made.kinematics.min() >= 0
    assert made.kinematics.max() < turn
    faster = load_recording(path, RecordingSpec(differentiate=True))
    assert np.allclose(faster.kinematics, 0.4 / (2 * np.pi) * turn)  # pyright: ignore[reportArgumentType, reportCallIssue]


def test_directions_of_no_stated_unit(tmp_path: Path) -> None:
    """Those of a CompassDirection are angles, their rate of change too; others are named."""
    angle = (0.4 * TIME) % (2 * np.pi)
    series = pynwb.behavior.SpatialSeries(
        name="head", data=angle, unit="n/a", reference_frame="north", rate=100.0
    )
    nwb = file()
    module = nwb.create_processing_module("behavior", "b")
    module.add(pynwb.behavior.CompassDirection(spatial_series=[series]))
    made = read(tmp_path, nwb, differentiate=True)
    assert made.kinematics is not None
    assert np.allclose(made.kinematics, 0.4)
    plain_series = moved(file(), "head_direction", angle, unit="n/a")
    assert named(read(tmp_path, plain_series)) == ["kinematics-wrap"]
    assert named(read(tmp_path, plain_series, nwb=NwbSpec(kinematic_units=("rad",)))) == []


def test_a_rate_that_is_an_interval_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match=r"spikes throughout .*hand_vel.*is its rate"):
        read(tmp_path, moved(file(), rate=0.01))


# ---- trials and events --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "stop", "name"),
    [
        (np.append(START[:-1], 500.0), np.append(START[:-1], 500.0) + 4, "trials-outside"),
        (START[::-1], START[::-1] + 4, "trials-order"),
        (np.repeat(START[:6], 2), np.repeat(START[:6], 2) + 4, "trials-coincide"),
        (START, START + np.r_[-1.0, np.full(11, 4.0)], "trials-negative"),
        (START / 60, START / 60 + 0.05, "trials-cover"),
        (START, START, "trials-empty"),
        (np.where(START == 10, np.nan, START), START + 4, "trials-unknown"),
        (START, START + 7, "trials-overlap"),
    ],
)
def test_odd_trials_are_named(tmp_path: Path, start: Array, stop: Array, name: str) -> None:
    assert name in named(read(tmp_path, trials(moved(file()), start, stop)))


@pytest.mark.parametrize(
    ("start", "stop", "said"),
    [
        (START, np.full(12, 4.0), "trials.stop_time: .*a duration"),
        (START * 1000 + 1e5, START * 1000 + 1e5 + 4000, "trials.start_time: .*within the rec"),
        (0 * START, 0 * START + 4, "windows of trials that lie apart"),
        (START[:1], START[:1] + 4, "recording.trials: expected 3 or more.*got 1"),
    ],
)
def test_impossible_trials_are_refused(
    tmp_path: Path, start: Array, stop: Array, said: str
) -> None:
    with pytest.raises(RecordingError, match=said):
        read(tmp_path, trials(moved(file()), start, stop), mode="trials")


def test_trials_on_another_clock_can_be_converted(tmp_path: Path) -> None:
    nwb = trials(moved(file()), START * 1000, START * 1000 + 4000, go_time=START * 1000 + 2000)
    clocks = ClockSpec(trials=(1e-3, 0.0))
    made = read(tmp_path, nwb, clocks=clocks)
    assert made.warnings == ()
    assert made.trials is not None
    assert made.trials.start.tolist() == (100 * np.arange(12)).tolist()
    assert np.allclose(made.trials.events["go_time"], 100 * np.arange(12) + 40)


def relative(tmp_path: Path) -> Path:
    return saved(tmp_path, trials(moved(file()), START, START + 4, go_time=1 + 0.02 * START))


def test_events_told_from_their_trials_start(tmp_path: Path) -> None:
    path = relative(tmp_path)
    around = TrialSpec(event="go_time", window=(-0.5, 1.0))
    with pytest.raises(RecordingError, match=r"data.trials.event: .*data.trials.relative"):
        load_recording(path, RecordingSpec(mode="trials", trials=around))
    unasked = load_recording(path)
    assert named(unasked) == ["event-relative"]
    assert unasked.trials is not None
    assert unasked.trials.events == {}
    spec = TrialSpec(event="go_time", window=(-0.5, 1.0), relative=True)
    made = load_recording(path, RecordingSpec(mode="trials", trials=spec))
    assert made.trials is not None
    assert np.allclose(made.trials.begin, START + 1 + 0.02 * START - 0.5)
    assert made.warnings == ()


def test_durations_are_no_events(tmp_path: Path) -> None:
    nwb = trials(moved(file()), START, START + 4, reaction_time=0.3 + 0 * START)
    made = read(tmp_path, nwb)
    assert made.warnings == ()
    assert made.trials is not None
    assert made.trials.events == {}


def test_events_outside_of_their_trials_are_named(tmp_path: Path) -> None:
    nwb = trials(moved(file()), START, START + 4, go_time=START + 1000)
    assert named(read(tmp_path, nwb)) == ["event-outside"]


def test_windows_that_overlap_are_named(tmp_path: Path) -> None:
    nwb = trials(moved(file()), START, START + 4, go_time=START + 2)
    spec = TrialSpec(event="go_time", window=(-1.5, 4.5))
    assert "windows-overlap" in named(read(tmp_path, nwb, mode="trials", trials=spec))


@pytest.mark.parametrize(
    "values",
    [
        np.zeros(6, dtype=[("a", "f8"), ("b", "i4")]),
        np.array([b"x"] * 6),
        np.zeros((3, 3)),
        np.full(6, 2**63, dtype=np.uint64),
        np.array([]),
        0.0,
    ],
)
@pytest.mark.parametrize(
    "place",
    [
        "processing/behavior/hand_vel/data",
        "processing/behavior/hand_vel/timestamps",
        "units/spike_times",
        "units/spike_times_index",
        "units/obs_intervals",
        "units/unit_name",
        "intervals/trials/start_time",
        "intervals/trials/go_time",
    ],
)
def test_no_content_of_a_dataset_is_more_than_one_line(
    tmp_path: Path, place: str, values: Any
) -> None:
    nwb = pynwb.NWBFile("made up", "id", datetime(2024, 1, 1, tzinfo=UTC))
    nwb.add_unit_column("unit_name", "made up")
    for name, times in zip("abcdef", SPIKES, strict=True):
        nwb.add_unit(spike_times=times, obs_intervals=[[0.0, 60.0]], unit_name=name)
    trials(moved(nwb, timestamps=TIME), START, START + 4, go_time=START + 1)
    path = replaced(saved(tmp_path, nwb), place, values)
    said = "as it should be"
    try:
        load_recording(path, RecordingSpec(mode="trials"))
    except RecordingError as error:
        said = str(error)
    assert len(said.splitlines()) == 1


def test_a_sample_far_from_all_others_is_named(tmp_path: Path) -> None:
    data = MOVEMENT.copy()
    data[3000, 1] = 1e8
    made = read(tmp_path, moved(file(), data=data))
    assert "kinematics-outlier" in named(made)
    assert "1 of 6000 samples of hand_vel_y" in made.warnings[0].text
    zeros = np.where(np.arange(len(TIME))[:, None] % 50 == 0, 0.0, MOVEMENT + 3)
    assert "kinematics-sentinel" in named(read(tmp_path, moved(file(), data=zeros)))


def test_invalid_times_that_stop_before_they_start_are_refused(tmp_path: Path) -> None:
    nwb = moved(file())
    nwb.add_invalid_time_interval(start_time=4.0, stop_time=3.0)
    with pytest.raises(RecordingError, match=r"invalid_times.stop_time: .*3 for a start at 4"):
        read(tmp_path, nwb)


def test_a_name_that_several_series_have_is_answered_with_their_paths(tmp_path: Path) -> None:
    nwb = moved(file(), "hand")
    again = pynwb.TimeSeries(name="hand", data=MOVEMENT, unit="m/s", rate=100.0)
    nwb.create_processing_module("other", "b").add(again)
    with pytest.raises(RecordingError, match=r"one of several .*other/hand, got 'hand'$"):
        read(tmp_path, nwb, nwb=NwbSpec(kinematics="hand"))


def test_values_that_stand_for_lost_samples_are_named(tmp_path: Path) -> None:
    lost = np.where(np.arange(len(TIME))[:, None] % 50 == 0, [-9999.0, 0.0], MOVEMENT)
    made = read(tmp_path, moved(file(), data=lost))
    assert named(made) == ["kinematics-sentinel"]
    assert "120 of 6000 samples of hand_vel_x" in made.warnings[0].text


def test_a_stated_rate_that_the_stamps_contradict_is_named(tmp_path: Path) -> None:
    made = read(tmp_path, moved(file(), timestamps=TIME), nwb=NwbSpec(rate=150.0))
    assert "rate-contradicts" in named(made)


def test_units_of_measure_that_the_file_contradicts_are_named(tmp_path: Path) -> None:
    made = read(tmp_path, moved(file()), nwb=NwbSpec(kinematic_units=("cm/s", "meters/second")))
    assert named(made) == ["units-contradict"]
    assert "hand_vel_x is in m/s by the file and in cm/s" in made.warnings[0].text
    assert "hand_vel_y" not in made.warnings[0].text
    assert not read(
        tmp_path, moved(file(), unit="n/a"), nwb=NwbSpec(kinematic_units=("m", "m"))
    ).warnings


def test_some_channels_alone_are_decoded_and_keep_what_the_file_says(tmp_path: Path) -> None:
    made = read(tmp_path, moved(file()), nwb=NwbSpec(kinematic_rows=(1,)))
    assert made.kinematic_names == ("hand_vel_y",)
    assert made.kinematic_units == ("m/s",)
    with pytest.raises(RecordingError, match=r"data.nwb.kinematic_rows: expected different rows"):
        read(tmp_path, moved(file()), nwb=NwbSpec(kinematic_rows=(1, 1)))


def test_a_few_events_outside_of_their_trials_are_named(tmp_path: Path) -> None:
    go = np.where(np.arange(12) % 4 == 1, 0.0, START + 1)
    spec = {"mode": "trials", "trials": TrialSpec(event="go_time", window=(-0.5, 1.0))}
    made = read(tmp_path, trials(moved(file()), START, START + 4, go_time=go), **spec)
    assert "event-outside" in named(made)
