"""Odd and impossible recordings: read rightly, with a named warning, or refused with one line."""

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
from ilqr_vae.recordings import (
    ClockSpec,
    MatSpec,
    NwbSpec,
    Recording,
    RecordingSpec,
    TrialSpec,
    load_recording,
)

Array = NDArray[np.float64]

SECONDS, UNITS = 60.0, 6
TIME = np.arange(round(SECONDS * 100)) / 100.0
MOVEMENT = np.stack([np.sin(TIME), np.cos(1.3 * TIME)], axis=1)


def trains(seed: int = 0, rate: float = 12.0) -> list[Array]:
    rng = np.random.default_rng(seed)
    return [np.sort(rng.uniform(0, SECONDS, rng.poisson(rate * SECONDS))) for _ in range(UNITS)]


SPIKES = trains()


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


# ---- settings keep what they do not name --------------------------------------------------------


def test_an_ordinary_recording_has_no_warning(tmp_path: Path) -> None:
    assert plain(tmp_path).warnings == ()


@pytest.mark.parametrize("offset", [0.0, 12.5])
def test_a_stated_rate_keeps_the_first_stamp(tmp_path: Path, offset: float) -> None:
    stamps = TIME + offset
    stamps[101] = stamps[100]
    nwb = moved(file([t + offset for t in SPIKES]), timestamps=stamps)
    made = read(tmp_path, nwb, nwb=NwbSpec(rate=100.0))
    assert made.start_time == pytest.approx(offset)
    assert np.array_equal(made.counts, plain(tmp_path).counts)
    assert made.kinematics is not None
    assert np.allclose(made.kinematics, plain(tmp_path).kinematics)


def test_a_stated_rate_keeps_pauses_in_the_stamps(tmp_path: Path) -> None:
    paused = np.where(TIME < 30, TIME, TIME + 20)
    nwb = moved(file([np.where(t < 30, t, t + 20) for t in SPIKES]), timestamps=paused)
    made = read(tmp_path, nwb, nwb=NwbSpec(rate=100.0))
    assert made.kinematics is not None
    assert len(made) == 1600
    assert np.allclose(made.kinematics[1000:1600], plain(tmp_path).kinematics[600:])  # pyright: ignore[reportOptionalSubscript]
    assert not made.valid[610:990].any()


def test_a_stated_rate_keeps_the_starting_time(tmp_path: Path) -> None:
    nwb = moved(file(), rate=0.01, starting_time=2.0)
    assert read(tmp_path, nwb, nwb=NwbSpec(rate=100.0)).start_time == 2.0


def test_a_window_without_an_event_is_refused(tmp_path: Path) -> None:
    nwb = trials(moved(file()), [1.0, 20.0, 40.0], [5.0, 25.0, 45.0])
    with pytest.raises(RecordingError, match=r"data.trials.event: expected a column"):
        read(tmp_path, nwb, mode="trials", trials=TrialSpec(window=(0.0, 1.0)))


# ---- clocks of spikes ---------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [-7.0, 5000.0, 1.7e9])
def test_spikes_alone_may_begin_anywhere(tmp_path: Path, offset: float) -> None:
    made = read(tmp_path, file([t + offset for t in SPIKES]))
    assert made.start_time == pytest.approx(offset, abs=0.2)
    assert made.counts.sum() == sum(map(len, SPIKES))


def test_spikes_alone_begin_where_they_were_observed(tmp_path: Path) -> None:
    nwb = pynwb.NWBFile("made up", "id", datetime(2024, 1, 1, tzinfo=UTC))
    for times in SPIKES:
        nwb.add_unit(spike_times=times + 110.0, obs_intervals=[[100.0, 170.0]])
    made = read(tmp_path, nwb)
    assert made.start_time == pytest.approx(100.0)


def test_spikes_alone_in_mat_may_begin_anywhere(tmp_path: Path) -> None:
    spec = RecordingSpec(mat=MatSpec(spike_times="st"))
    made = load_recording(mat(tmp_path, [t + 3000 for t in SPIKES]), spec)
    assert made.start_time == pytest.approx(3000, abs=0.2)


def mat(tmp_path: Path, spikes: list[Array], **variables: Any) -> Path:
    cells = np.empty((1, len(spikes)), dtype=object)
    for i, times in enumerate(spikes):
        cells[0, i] = times[None]
    io.savemat(tmp_path / "a.mat", {"st": cells, **variables})
    return tmp_path / "a.mat"


def test_an_empty_cell_does_not_rename_the_units_after_it(tmp_path: Path) -> None:
    spec = RecordingSpec(mat=MatSpec(spike_times="st"))
    gone = [t if i != 2 else np.zeros(0) for i, t in enumerate(SPIKES)]
    full, holed = (load_recording(mat(tmp_path, s), spec) for s in (SPIKES, gone))
    assert holed.unit_names == full.unit_names
    for name in set(full.unit_names) - {"unit2"}:
        a, b = full.select_units((name,)), holed.select_units((name,))
        assert np.array_equal(a.counts[: len(b)], b.counts)


def scaled(by: float) -> list[Array]:
    return [t * by for t in SPIKES]


def restarted(every: float) -> list[Array]:
    """A clock that begins again."""
    return [t % every for t in SPIKES]


@pytest.mark.parametrize(
    ("spikes", "message"),
    [
        (scaled(1000.0), "units.spike_times: expected most spikes within .* of 4"),
        ([np.round(t * 30000) for t in SPIKES], "units.spike_times: expected seconds .* whole"),
        ([np.round(t * 1000) for t in SPIKES], "units.spike_times: expected seconds .* whole"),
        (restarted(30.0), "units.spike_times: expected times on one clock .* restart"),
        (restarted(50.0), "units.spike_times: expected times on one clock .* restart"),
        (restarted(3.0), "units.spike_times: expected times on one clock .* restart"),
        ([t + 5000 for t in SPIKES], "units.spike_times: expected .* all of them elsewhere"),
        (scaled(1 / 60), "units.spike_times: expected spikes throughout .* 1.7 % of it"),
    ],
)
def test_impossible_spike_times_are_refused(
    tmp_path: Path, spikes: list[Array], message: str
) -> None:
    with pytest.raises(RecordingError, match=message):
        read(tmp_path, moved(file(spikes)))
    spec = MatSpec(spike_times="st", kinematics="v", time="t")
    path = mat(tmp_path, spikes, v=MOVEMENT.T, t=TIME)
    with pytest.raises(RecordingError, match=message.replace("units.spike_times", "st")):
        load_recording(path, RecordingSpec(mat=spec))


def test_a_clock_setting_reads_them(tmp_path: Path) -> None:
    clocks = ClockSpec(spikes=(1e-3, 0.0))
    made = read(tmp_path, moved(file(scaled(1000.0))), clocks=clocks)
    assert np.array_equal(made.counts, plain(tmp_path).counts)
    late = moved(file([t + 100 for t in SPIKES]), timestamps=TIME * 1000)
    clocks = ClockSpec(spikes=(1.0, -100.0), kinematics=(1e-3, 0.0))
    made = read(tmp_path, late, clocks=clocks)
    assert np.array_equal(made.counts, plain(tmp_path).counts)
    with pytest.raises(RecordingError, match=r"data.clocks.spikes: expected \(1, 0\)"):
        load_recording(
            counted(tmp_path), RecordingSpec(mat=MatSpec(), clocks=ClockSpec(spikes=(2.0, 0.0)))
        )


def counted(tmp_path: Path, silent: slice = slice(0, 0)) -> Path:
    counts = np.random.default_rng(0).poisson(0.6, (UNITS, 1200))
    counts[:, silent] = 0
    io.savemat(tmp_path / "c.mat", {"spikes": counts})
    return tmp_path / "c.mat"


@pytest.mark.parametrize(
    ("spikes", "name"),
    [
        ([np.random.default_rng(1).permutation(t) for t in SPIKES], "spike-order"),
        ([np.concatenate([t, t + 1e-5]) for t in SPIKES], "spike-order"),
        ([t + 30 for t in SPIKES], "spikes-outside"),
        ([t[t < 40] for t in SPIKES], "spikes-cover"),
        ([t[(t < 20) | (t > 40)] for t in SPIKES], "spikes-pause"),
        (
            [np.where(np.arange(len(t)) == 5, np.nan, t) for t in SPIKES[:1]] + SPIKES[1:],
            "spikes-missing",
        ),
    ],
)
def test_odd_spike_times_are_named(tmp_path: Path, spikes: list[Array], name: str) -> None:
    assert name in named(read(tmp_path, moved(file(spikes))))


def test_spikes_alone_in_milliseconds_are_named(tmp_path: Path) -> None:
    assert "spike-rate" in named(read(tmp_path, file(scaled(1000.0)), bin_width=5.0))


@pytest.mark.parametrize(
    ("silent", "name"),
    [
        (slice(0, 600), "spikes-cover"),
        (slice(900, 1200), "spikes-cover"),
        (slice(400, 700), "spikes-pause"),
    ],
)
def test_silence_of_all_units_is_named_in_counts_too(
    tmp_path: Path, silent: slice, name: str
) -> None:
    made = load_recording(counted(tmp_path, silent))
    assert named(made) == [name]
    assert made.valid[silent].all() == (name == "spikes-pause")


def test_a_pause_that_is_stated_is_read(tmp_path: Path) -> None:
    """Twice 30 s with a pause of 600 s: training, validation and test part hold data each."""
    nwb = pynwb.NWBFile("made up", "id", datetime(2024, 1, 1, tzinfo=UTC))
    for times in SPIKES:
        nwb.add_unit(
            spike_times=np.where(times < 30, times, times + 600),
            obs_intervals=np.array([[0.0, 30.0], [630.0, 660.0]]),
        )
    moved(nwb, timestamps=np.where(TIME < 30, TIME, TIME + 600))
    nwb.add_invalid_time_interval(start_time=30.0, stop_time=630.0)
    made = read(tmp_path, nwb)
    assert made.valid.sum() == 1200
    assert made.warnings == ()
    spec = RecordingSpec().split
    shares = [made.valid[slice(*spec.span(s, made))].sum() for s in ("train", "validation", "test")]
    assert shares == [720, 180, 300]


def test_a_pause_of_spikes_and_stamps_need_not_be_stated(tmp_path: Path) -> None:
    nwb = moved(
        file([np.where(t < 30, t, t + 600) for t in SPIKES]),
        timestamps=np.where(TIME < 30, TIME, TIME + 600),
    )
    made = read(tmp_path, nwb)
    assert "kinematics-missing" in named(made)
    assert made.valid.sum() == pytest.approx(1200, abs=2)


def test_observation_intervals_may_have_no_end(tmp_path: Path) -> None:
    nwb = pynwb.NWBFile("made up", "id", datetime(2024, 1, 1, tzinfo=UTC))
    for times in SPIKES:
        nwb.add_unit(spike_times=times, obs_intervals=[[-np.inf, np.inf]])
    assert read(tmp_path, moved(nwb)).valid.all()


# ---- the units table ----------------------------------------------------------------------------


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


def test_velocity_comes_before_position_and_rewards_last(tmp_path: Path) -> None:
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
        best = {1: 0, 2: 1, 3: 1, 4: 3, 5: 4, 6: 5}[count]
        assert made.kinematic_names[0].startswith(order[best][0]), count
        assert ("left are" in "".join(made.notes)) == (count > 1)


def test_what_was_found_and_left_is_said(tmp_path: Path) -> None:
    nwb = file()
    nwb.add_acquisition(pynwb.TimeSeries(name="lfp", data=MOVEMENT, unit="V", rate=100.0))
    made = read(tmp_path, nwb)
    assert made.kinematics is None
    assert named(made) == ["kinematics-none"]
    assert "acquisition/lfp (TimeSeries)" in made.warnings[0].text


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


def test_a_rate_that_is_an_interval_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match=r"spikes throughout .*hand_vel.*is its rate"):
        read(tmp_path, moved(file(), rate=0.01))


# ---- trials and events --------------------------------------------------------------------------

START = 5.0 * np.arange(12)


@pytest.mark.parametrize(
    ("start", "stop", "name"),
    [
        (np.append(START[:-1], 500.0), np.append(START[:-1], 500.0) + 4, "trials-outside"),
        (START[::-1], START[::-1] + 4, "trials-order"),
        (np.repeat(START[:6], 2), np.repeat(START[:6], 2) + 4, "trials-coincide"),
        (START, START + np.r_[-1.0, np.full(11, 4.0)], "trials-negative"),
        (START / 60, START / 60 + 0.05, "trials-cover"),
        (START, START, "trials-empty"),
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
