"""The closed loop: task arithmetic, and lock-step through the real service."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ilqr_clients.closed_loop import (
    Reaching,
    Trace,
    own_hand,
    run_loop,
    unit_columns,
    without_decoder,
)
from ilqr_clients.closed_loop_cli import reaches_table
from ilqr_clients.sdk import ServiceClient
from ilqr_service.server import Service
from ilqr_vae.cli import main
from ilqr_vae.errors import ConfigError, ServiceError
from ilqr_vae.simulated.centre_out import CentreOut, TrialRecord
from ilqr_vae.simulated.subject import Subject
from rig import BIN_S, make_model, serving

N_UNITS = 6
NAMES = tuple(f"unit{i:03d}" for i in range(N_UNITS))


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    model = make_model(
        tmp_path_factory.mktemp("model") / "m.safetensors", n_units=N_UNITS, names=NAMES
    )
    with serving(model) as running:
        yield running


def test_a_perfect_decoder_reaches_every_target_and_its_shuffle_few() -> None:
    subject, task, trace = Subject(0, units=4, bin_width=BIN_S), CentreOut(0), Trace(BIN_S)
    cursor, velocities = np.zeros(2), list[np.ndarray[tuple[int], np.dtype[np.float64]]]()
    while len(task.trials) < 12:
        trace.add(cursor)
        cue = task.step(cursor, BIN_S)
        velocities.append(subject.step(cursor, cue.target, go=cue.go).intended)
        cursor = cursor + velocities[-1] * BIN_S
    perfect = trace.reaching(task.trials).summary()
    assert perfect["success_rate"] == 1.0
    assert perfect["time_to_target_s"] < 1.5
    assert 0.8 < perfect["path_efficiency"] <= 1.0
    chance = without_decoder(list(velocities), CentreOut(0), trials=12, width=BIN_S, seed=0)
    assert chance.summary()["success_rate"] <= 0.25


def test_the_own_hand_is_the_ceiling() -> None:
    hand = own_hand(Subject(0, units=2), CentreOut(0), trials=8).summary()
    assert hand["trials"] == 8
    assert hand["success_rate"] == 1.0
    assert hand["path_efficiency"] > 0.9


def test_efficiency_is_straight_over_travelled() -> None:
    trace = Trace(0.1)
    for at in ([0, 0], [3, 0], [3, 4], [9, 9]):
        trace.add(np.array(at, dtype=np.float64))
    record = TrialRecord(0.0, 0, (3.0, 4.0), 0.0, 0.0, 0.2, 0.3, True)
    assert trace.efficiency(record) == pytest.approx(5 / 7)
    failed = TrialRecord(0.0, 0, (3.0, 4.0), 0.0, 0.0, float("nan"), 0.3, False)
    assert np.isnan(trace.efficiency(failed))
    summary = trace.reaching([record, failed]).summary()
    assert summary["success_rate"] == 0.5
    assert summary["time_to_target_s"] == pytest.approx(0.2)
    assert summary["successes"] == 1


def test_the_time_of_one_success_is_not_shown() -> None:
    record = TrialRecord(0.0, 0, (0.1, 0.0), 0.0, 1.0, 1.05, 1.3, True)
    failed = replace(record, acquired=float("nan"), success=False)
    once = Reaching((record, *[failed] * 23), (1.0,))
    thrice = Reaching((record,) * 3, (0.9, 0.8, 0.7))
    assert reaches_table({"chance": once, "decoder": thrice}).rows == (
        ("chance", "1 of 24 (4.2 %)", "–", "–", "–"),
        ("decoder", "3 of 3 (100.0 %)", "0.05", "0.05 to 0.05", "0.80"),
    )


def test_a_model_of_other_units_is_refused() -> None:
    assert unit_columns(("unit002", "unit000"), 3).tolist() == [2, 0]
    with pytest.raises(ConfigError, match="simulated subject"):
        unit_columns(("unit7",), 3)


@pytest.mark.parametrize(("deadline", "held"), [(60.0, False), (1e-6, True)])
def test_answers_past_the_deadline_leave_the_velocity_as_it_was(
    service: Service, deadline: float, held: bool
) -> None:
    task = CentreOut(1, timeout=0.5)
    with (
        ServiceClient(service.ingest) as client,
        client.open("loop", units=NAMES, bin_width=BIN_S, deadline=60.0) as session,
    ):
        reaching, log = run_loop(
            session,
            Subject(0, units=N_UNITS, bin_width=BIN_S),
            task,
            trials=2,
            columns=unit_columns(NAMES, N_UNITS),
            deadline=deadline,
            speed=100.0 if held else None,
            patience=60.0,
        )
    assert len(reaching.trials) == 2
    assert len(log.velocities) == log.bins
    own = (np.array(log.velocities) == log.stream.kinematics[: log.bins, :2]).all(axis=1)
    assert log.held == (~own).sum()  # how many were late is the machine's affair
    if not held:
        assert log.held == 0
        assert log.statuses == {"ok": log.bins}


def test_a_loop_that_runs_ahead_waits_for_room(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m.safetensors", n_units=N_UNITS, names=NAMES)
    with (
        serving(model, credits=2) as narrow,
        ServiceClient(narrow.ingest) as client,
        client.open("ahead", units=NAMES, bin_width=BIN_S, deadline=60.0) as session,
    ):
        reaching, log = run_loop(
            session,
            Subject(0, units=N_UNITS, bin_width=BIN_S),
            CentreOut(1, timeout=0.5),
            trials=2,
            columns=unit_columns(NAMES, N_UNITS),
            deadline=1e-6,
            speed=None,
            patience=60.0,
        )
    assert len(reaching.trials) == 2
    assert len(log.velocities) == log.bins
    own = (np.array(log.velocities) == log.stream.kinematics[: log.bins, :2]).all(axis=1)
    assert log.held == (~own).sum()


def test_a_service_that_does_not_answer_in_time_ends_it(service: Service) -> None:
    with (
        ServiceClient(service.ingest) as client,
        client.open("gone", units=NAMES, bin_width=BIN_S, deadline=60.0) as session,
        pytest.raises(ServiceError, match="an answer within 1e-09 s, got none"),
    ):
        run_loop(
            session,
            Subject(0, units=N_UNITS, bin_width=BIN_S),
            CentreOut(1),
            trials=2,
            columns=unit_columns(NAMES, N_UNITS),
            deadline=1e-6,
            speed=100.0,
            patience=1e-9,
        )


def test_the_verb_reports_beside_chance_and_hand(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "loop.json"
    options = ["--to", service.ingest, "--trials", "2", "--units", str(N_UNITS), "--json", str(out)]
    assert main(["closed-loop", *options, "--speed", "max"]) == 0
    result = json.loads(out.read_text())
    assert result["decoder"]["trials"] == 2
    assert 0 <= result["decoder"]["successes"] <= 2
    assert result["own_hand"]["success_rate"] == 1.0
    assert {"chance", "statuses", "held", "latency_ms"} <= result.keys()
    assert "own hand" in capsys.readouterr().out
    assert main(["closed-loop", "--to", service.ingest, "--units", "3"]) == 2
    assert "simulated subject" in capsys.readouterr().err


def test_no_service_ends_with_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nobody = f"ipc://{tmp_path}/nobody"
    assert main(["closed-loop", "--to", nobody, "--timeout", "0.2"]) == 3
    assert "nobody" in capsys.readouterr().err
