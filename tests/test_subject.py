"""The made-up subject: realistic, repeatable, the same offline and online."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ilqr_training.simulate_cli import write_session
from ilqr_vae import cli
from ilqr_vae.errors import ShapeError
from ilqr_vae.recordings import NwbSpec, RecordingSpec, load_recording
from ilqr_vae.scoring.baselines import WienerFilter
from ilqr_vae.scoring.metrics import r2
from ilqr_vae.simulated.centre_out import REACH, CentreOut, target_position
from ilqr_vae.simulated.subject import LATENTS, SimulatedSession, Subject, simulate_session


@pytest.fixture(scope="module")
def session() -> SimulatedSession:
    return simulate_session(5, minutes=4, units=100)


@pytest.fixture(scope="module")
def wiener(session: SimulatedSession) -> WienerFilter:
    recording = session.to_recording()
    assert recording.kinematics is not None
    a, b = round(0.6 * len(recording)), round(0.75 * len(recording))
    return WienerFilter.fit(recording.counts, recording.kinematics, train=(0, a), validation=(a, b))


def test_rates_and_movements_are_realistic(session: SimulatedSession) -> None:
    assert session.rates.min() > 0.5
    assert session.rates.max() < 80
    assert 4 < np.median(session.rates) < 20
    assert len(session.trials) > 60
    assert np.mean([t.success for t in session.trials]) > 0.95
    reach = [t.acquired - t.go for t in session.trials if t.success]
    assert 0.4 < np.median(reach) < 1.2
    delays = [t.go - t.target_on for t in session.trials]
    assert min(delays) >= 0.2 - 1e-6
    assert max(delays) <= 0.8 + 0.02
    assert np.ptp(delays) > 0.3
    assert {t.target_index for t in session.trials} == set(range(8))
    speed = np.hypot(*session.velocity.T)
    assert 0.25 < speed.max() < 1.0
    # Smooth: acceleration is bounded, and velocity is the derivative of position.
    assert np.abs(np.diff(session.velocity, axis=0)).max() < 0.1
    step = np.diff(session.position, axis=0) / 0.01
    assert np.allclose(step, session.velocity[1:], atol=1e-9)


def test_a_wiener_filter_finds_it_neither_trivial_nor_hopeless(
    session: SimulatedSession, wiener: WienerFilter
) -> None:
    recording = session.to_recording()
    assert recording.kinematics is not None
    b = round(0.75 * len(recording))
    assert 0.65 < r2(recording.kinematics[b:], wiener.predict(recording.counts, b)) < 0.88


def test_the_same_seed_gives_the_same_session_and_tuning() -> None:
    one, two = (simulate_session(3, minutes=0.1, units=10) for _ in range(2))
    other = simulate_session(4, minutes=0.1, units=10)
    assert all(map(np.array_equal, one.spike_times, two.spike_times))
    assert np.array_equal(one.velocity, two.velocity)
    assert not all(map(np.array_equal, one.spike_times, other.spike_times))
    first, second = Subject(3, units=10), Subject(3, units=10, run=1)
    assert np.array_equal(first.tuning, second.tuning)
    counts = [
        [s.step(np.zeros(2), target_position(0)).counts.tolist() for _ in range(20)]
        for s in (first, Subject(3, units=10), second)
    ]
    assert counts[0] == counts[1]
    assert counts[0] != counts[2]


def test_the_plan_appears_before_movement_and_rotates_after_it() -> None:
    subject, names = Subject(1, units=5), list(LATENTS)
    plan, rotation = names.index("plan_x"), names.index("rotation_1a")
    for _ in range(12):
        subject.step(np.zeros(2), target_position(0), go=False)
    assert subject.latents[plan] > 0.9
    assert abs(subject.latents[rotation]) < 1e-9
    assert np.hypot(*subject.intended) < 1e-6
    moved = False
    for _ in range(10):
        subject.step(np.zeros(2), target_position(0), go=True)
        moved = moved or (subject.intended[0] > 0.05 and abs(subject.latents[rotation]) > 0.05)
    assert moved
    assert subject.latents[plan] < 0.5


def test_it_corrects_a_cursor_that_is_pushed_aside() -> None:
    subject, cursor = Subject(2, units=5), np.zeros(2)
    target = target_position(2)
    for t in range(80):
        subject.step(cursor, target)
        cursor = cursor + 0.05 * subject.intended
        if t == 15:
            cursor = cursor + np.array([0.06, 0.0])
    assert np.hypot(*(cursor - target)) < 0.02


def test_it_sets_out_for_the_centre_when_the_cursor_starts_elsewhere() -> None:
    subject, cursor = Subject(0, units=5), np.array([0.05, 0.0])
    for _ in range(40):
        subject.step(cursor, np.zeros(2))
        cursor = cursor + 0.05 * subject.intended
    assert np.hypot(*cursor) < 0.02


def test_a_decoder_in_the_loop_reaches_the_targets(
    session: SimulatedSession, wiener: WienerFilter
) -> None:
    subject, task = Subject(session.seed, units=100), CentreOut(1)
    cursor, state = np.zeros(2), wiener.init()
    while task.time < 90:
        cue = task.step(cursor, subject.bin_width)
        spikes = subject.step(cursor, cue.target, go=cue.go)
        state, velocity = wiener.step(state, spikes.counts)
        cursor = np.clip(cursor + subject.bin_width * velocity, -0.3, 0.3)
    assert len(task.trials) >= 15
    assert np.mean([t.success for t in task.trials]) > 0.8


def test_without_movement_the_task_times_out() -> None:
    task = CentreOut(0, timeout=1.0)
    while task.time < 10:
        task.step(np.zeros(2), 0.05)
    assert task.trials
    assert not any(t.success for t in task.trials)
    assert all(np.isnan(t.acquired) for t in task.trials)
    assert np.hypot(*target_position(3)) == pytest.approx(REACH)


def test_what_makes_no_session_is_named() -> None:
    with pytest.raises(ShapeError, match="minutes"):
        simulate_session(0, minutes=float("nan"))
    with pytest.raises(ShapeError, match="units"):
        Subject(0, units=0)
    with pytest.raises(ShapeError, match="bin_width"):
        Subject(0, bin_width=0.013)
    with pytest.raises(ShapeError, match="cursor"):
        Subject(0).step(np.array([np.nan, 0.0]), np.zeros(2))


def test_written_and_read_back_it_is_the_same_recording(tmp_path: Path) -> None:
    session = simulate_session(6, minutes=0.5, units=12)
    path = write_session(tmp_path / "s.nwb", session)
    read, made = load_recording(path), session.to_recording()
    assert np.array_equal(read.counts, made.counts)
    assert read.kinematics is not None
    assert made.kinematics is not None
    assert np.allclose(read.kinematics, made.kinematics, atol=1e-12)
    assert read.unit_names == made.unit_names
    assert read.kinematic_names == ("vx", "vy")
    assert read.kinematic_units == ("m/s", "m/s")
    assert read.trials is not None
    assert made.trials is not None
    assert read.trials.start.tolist() == made.trials.start.tolist()
    assert read.trials.condition == made.trials.condition
    position = load_recording(path, RecordingSpec(nwb=NwbSpec(kinematics="hand_position")))
    assert position.kinematics is not None
    assert np.ptp(position.kinematics, axis=0).max() > 0.05


def test_the_verb_writes_refuses_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, summary = tmp_path / "s.nwb", tmp_path / "s.json"
    arguments = ["simulate", "--out", str(out), "--minutes", "0.1", "--units", "4"]
    assert cli.main([*arguments, "--json", str(summary)]) == 0
    told = json.loads(summary.read_text())
    assert told["units"] == 4
    assert told["minutes"] == pytest.approx(0.1)
    before = out.read_bytes()
    assert cli.main(arguments) == 2
    assert "error: out: expected a new file, or --force" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert cli.main([*arguments, "--force"]) == 0
    assert cli.main(["simulate", "--out", str(tmp_path / "s.mat")]) == 2
    assert cli.main(["simulate", "--out", str(tmp_path / "none" / "s.nwb")]) == 2
    new = ["simulate", "--out", str(tmp_path / "new.nwb")]
    assert cli.main([*new, "--json", str(tmp_path / "none" / "s.json")]) == 2
    assert cli.main([*new, "--minutes", "0"]) == 2
    capsys.readouterr()
    assert cli.main([*new, "--json", str(tmp_path)]) == 2
    assert "error: --json: expected a file to write" in capsys.readouterr().err
    long = tmp_path / ("s" * 249 + ".nwb")  # no room for the name that it has until it is whole
    assert cli.main(["simulate", "--out", str(long), "--minutes", "0.1", "--units", "4"]) == 2
    assert "error: --out: expected a file that can be written" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.json", "s.nwb"]
