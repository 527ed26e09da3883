"""Odd and impossible clocks, spikes and units: read rightly, named in a warning, or refused."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pynwb
import pytest
from scipy import io

from ilqr_vae.errors import ConfigError, RecordingError
from ilqr_vae.recordings import (
    ClockSpec,
    MatSpec,
    NwbSpec,
    RecordingSpec,
    TrialSpec,
    load_recording,
)
from odd_files import (
    MOVEMENT,
    SPIKES,
    TIME,
    UNITS,
    Array,
    file,
    moved,
    named,
    plain,
    read,
    saved,
    trials,
)

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


@pytest.mark.parametrize(
    ("counts", "width", "said"),
    [
        (20, 0.05, "counts-multiples"),
        (1, 9.0, "spike-rate"),
        (1, 50.0, "w: expected one number of seconds, above zero and at most 10"),
        (1, 0.0, "w: expected one number of seconds"),
    ],
)
def test_counts_that_are_rates_and_widths_that_are_not_seconds(
    tmp_path: Path, counts: int, width: float, said: str
) -> None:
    made = counts * np.random.default_rng(0).poisson(0.4, (UNITS, 1200))
    io.savemat(tmp_path / "a.mat", {"spikes": made, "w": width})
    spec = RecordingSpec(mat=MatSpec(bin_width="w"))
    if said.startswith("w:"):
        with pytest.raises(RecordingError, match=said):
            load_recording(tmp_path / "a.mat", spec)
    else:
        read_back = load_recording(tmp_path / "a.mat", spec)
        assert named(read_back) == [said]
        assert read_back.bin_width == width


def test_units_with_the_same_spikes_are_named(tmp_path: Path) -> None:
    assert named(read(tmp_path, moved(file([SPIKES[0], SPIKES[0], *SPIKES[2:]])))) == [
        "units-coincide"
    ]


def test_trials_longer_than_the_recording_are_refused(tmp_path: Path) -> None:
    nwb = trials(moved(file()), 1000 * np.arange(12.0), 1000 * np.arange(12.0) + 900)
    with pytest.raises(RecordingError, match=r"trials.stop_time: expected trials shorter"):
        read(tmp_path, nwb, mode="trials")


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
        load_recording(counted(tmp_path), bin_width=0.05, clocks={"spikes": (2.0, 0.0)})


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
    path = mat(tmp_path, spikes, v=MOVEMENT.T, t=TIME)
    spec = MatSpec(spike_times="st", kinematics="v", time="t")
    assert name in named(load_recording(path, RecordingSpec(mat=spec)))


@pytest.mark.parametrize(
    ("spikes", "name"),
    [
        ([np.r_[np.zeros(200), t] for t in SPIKES], "spikes-repeat"),
        ([np.repeat(t, 2) for t in SPIKES], "spikes-repeat"),
        ([np.round(t, 1) for t in SPIKES], "spike-resolution"),
        ([SPIKES[0] * 1000, *SPIKES[1:]], "spikes-outside"),
    ],
)
def test_times_that_are_none_of_spikes_are_named(
    tmp_path: Path, spikes: list[Array], name: str
) -> None:
    assert name in named(read(tmp_path, moved(file(spikes))))


def test_spikes_at_one_time_alone_are_refused(tmp_path: Path) -> None:
    times = [np.full(20, 7.0)] * UNITS
    with pytest.raises(RecordingError, match=r"expected seconds that differ, got 120 spikes"):
        read(tmp_path, moved(file(times)))


def test_a_unit_of_many_on_another_clock_is_named(tmp_path: Path) -> None:
    many = [t + 1e-4 * k for k in range(20) for t in SPIKES]
    path = mat(tmp_path, [many[0] + 1000, *many[1:]], v=MOVEMENT.T, t=TIME)
    spec = MatSpec(spike_times="st", kinematics="v", time="t")
    made = load_recording(path, RecordingSpec(mat=spec))
    assert named(made) == ["spikes-outside"]
    assert "Units with most of theirs there: 1." in made.warnings[0].text


def test_a_unit_that_fires_too_often_and_transposed_counts_are_named(tmp_path: Path) -> None:
    counts = np.random.default_rng(0).poisson(0.6, (UNITS, 1200))
    counts[2] += 50
    io.savemat(tmp_path / "a.mat", {"spikes": counts})
    made = load_recording(tmp_path / "a.mat", bin_width=0.05)
    assert named(made) == ["unit-rate"]
    assert "Unit unit2 fires 1.01e+03 times a second" in made.warnings[0].text
    io.savemat(tmp_path / "a.mat", {"spikes": counts.T})
    made = load_recording(tmp_path / "a.mat", bin_width=0.05)
    assert "counts-transposed" in named(made)


def test_a_clock_setting_holds_for_all_that_is_on_that_clock(tmp_path: Path) -> None:
    """Intervals beside the spikes, masks beside the kinematics, a rate's first sample."""
    nwb = pynwb.NWBFile("made up", "id", datetime(2024, 1, 1, tzinfo=UTC))
    for times in SPIKES:
        nwb.add_unit(spike_times=times * 1e3, obs_intervals=[[0.0, 30e3]])
    moved(nwb, timestamps=TIME * 1e3)
    moved(nwb, "eval_mask", np.arange(600) < 100, timestamps=100.0 * np.arange(600))
    nwb.add_invalid_time_interval(start_time=20e3, stop_time=25e3)
    nwb_spec = NwbSpec(kinematics="hand_vel", scored="eval_mask")
    ms = (1e-3, 0.0)
    clocks = ClockSpec(spikes=ms, kinematics=ms, trials=ms)
    made = read(tmp_path, nwb, clocks=clocks, nwb=nwb_spec)
    assert "spikes-unobserved" in named(made)
    valid = np.zeros(1200, bool)
    valid[:600] = True
    valid[400:500] = False
    assert np.array_equal(made.valid, valid)
    assert np.array_equal(np.flatnonzero(made.scored), np.arange(199))
    late = moved(file(), rate=0.1, starting_time=2000.0)
    made = read(tmp_path, late, clocks=ClockSpec(kinematics=ms), nwb=NwbSpec(rate=100.0))
    assert made.start_time == 2.0
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=r"clocks.spikes: expected float"):
            load_recording(saved(tmp_path, late), clocks={"spikes": (wrong, 0.0)})


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
    made = load_recording(counted(tmp_path, silent), bin_width=0.05)
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
