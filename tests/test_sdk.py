"""The client SDK against the real service on loopback."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from numpy.typing import NDArray

from ilqr_clients.answer import Answer
from ilqr_clients.monitor import Monitor, ServiceState, view
from ilqr_clients.sdk import ServiceClient, Session, model_of, reachable
from ilqr_service.server import Service
from ilqr_vae.cli import main
from ilqr_vae.errors import ProtocolError, ServiceError, ShapeError
from ilqr_vae.protocol import messages
from ilqr_vae.terminal import console
from rig import BIN_S, make_model, serving

UNITS = tuple(f"unit{i}" for i in range(5))
GENEROUS_S = 60.0


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    model = make_model(tmp_path_factory.mktemp("model") / "m.safetensors", n_units=len(UNITS))
    with serving(model) as running:
        yield running


@pytest.fixture
def client(service: Service) -> Iterator[ServiceClient]:
    with ServiceClient(service.ingest, timeout=10.0) as connected:
        yield connected


def counts(n_bins: int, seed: int = 0) -> NDArray[np.int64]:
    return np.random.default_rng(seed).poisson(1.0, (n_bins, len(UNITS)))


def open_(client: ServiceClient, name: str) -> Session:
    return client.open(name, units=UNITS, bin_width=BIN_S, deadline=GENEROUS_S)


def collect(session: Session, n: int) -> list[Answer]:
    answers: list[Answer] = []
    end = time.monotonic() + 20.0
    while len(answers) < n and time.monotonic() < end:
        answers += session.receive(0.5)
    return answers


def test_a_service_describes_its_model(client: ServiceClient, service: Service) -> None:
    described = client.describe()
    model = model_of(described)
    assert described.ready
    assert model.model_id == service.model
    assert model.unit_names == UNITS
    assert model.bin_width == BIN_S
    assert model.kinematic_names == ("vx", "vy")
    assert model.data.mat.kinematics == "velocity"


def test_the_clock_offset_of_one_machine_is_zero_within_its_uncertainty(
    client: ServiceClient,
) -> None:
    clock = client.clock(probes=10)
    assert clock.probes == 10
    assert 0 <= clock.uncertainty_ns < 1_000_000_000
    assert abs(clock.offset_ns) <= clock.uncertainty_ns


def test_no_result_is_lost_however_soon_the_first_bin_is_sent(client: ServiceClient) -> None:
    for repeat in range(20):
        with open_(client, f"prompt-{repeat}") as session:
            for index, row in enumerate(counts(3)):
                session.send(index, row)
            assert [a.index for a in collect(session, 3)] == [0, 1, 2]


def test_answers_carry_arrays_times_and_statuses(client: ServiceClient) -> None:
    with open_(client, "full") as session:
        sent = session.send(0, counts(1)[0], source_ns=123)
        session.send(3, counts(1)[0], mask=np.array([True, False, True, True, True]))
        answers = collect(session, 4)
        granted = session.opened.credits
        assert session.opened.latents == answers[0].latent.size == answers[0].latent_std.size
    assert [a.status for a in answers] == ["ok", "missing", "missing", "ok"]
    first = answers[0]
    assert first.source_ns == 123
    assert first.rates.shape == (len(UNITS),)
    assert first.kinematics.shape == first.kinematics_std.shape == (2,)
    assert first.spikes == counts(1).sum()
    times = [first.received_ns, first.solve_start_ns, first.solve_end_ns, first.published_ns]
    assert sent <= times[0] <= times[1] <= times[2] <= times[3] <= first.arrived_ns
    assert granted > 0


def test_credits_are_spent_by_sending_and_come_back(client: ServiceClient) -> None:
    with open_(client, "credits") as session:
        granted = session.credits
        for index, row in enumerate(counts(5)):
            session.send(index, row)
        assert session.credits <= granted - 1
        collect(session, 5)
        end = time.monotonic() + 10.0
        while session.credits < granted and time.monotonic() < end:
            session.receive(0.1)
        assert session.credits == granted


def test_opening_again_begins_a_new_epoch_and_never_mixes_results(client: ServiceClient) -> None:
    first = open_(client, "again")
    first.send(0, counts(1)[0])
    collect(first, 1)
    with open_(client, "again") as second:
        assert second.request.epoch == first.request.epoch + 1
        second.send(0, counts(1)[0])
        answers = collect(second, 1)
        assert [a.index for a in answers] == [0]
        assert second.receive() == []
    first.close()
    assert first.closed is not None


def test_a_closed_session_is_gone(client: ServiceClient) -> None:
    with open_(client, "brief"):
        assert "brief" in {s.session for s in client.sessions()}
    assert "brief" not in {s.session for s in client.sessions()}


def test_what_was_published_before_the_end_is_received(client: ServiceClient) -> None:
    for k in range(20):
        name = f"ends-{k}"
        with client.open(name, units=UNITS, bin_width=BIN_S, hear_events=True) as session:
            session.send(0, counts(1)[0])
            client.event(name, "reward")
        assert [event.name for event in session.events] == ["reward"]
        assert session.notices[-1].startswith("closed")


def test_sessions_in_threads_get_their_own_results(service: Service) -> None:
    got: dict[str, list[Answer]] = {}

    def feed(name: str, seed: int) -> None:
        with ServiceClient(service.ingest, timeout=10.0) as own, open_(own, name) as session:
            for index, row in enumerate(counts(10, seed)):
                session.send(index, row)
            got[name] = collect(session, 10)

    threads = [threading.Thread(target=feed, args=(f"t{i}", i)) for i in (1, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for name, seed in (("t1", 1), ("t10", 10)):
        assert [a.index for a in got[name]] == list(range(10))
        assert [a.spikes for a in got[name]] == counts(10, seed).sum(axis=1).tolist()


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"units": UNITS[:-1]}, "units"),
        ({"units": (*UNITS[:-1], "other")}, r"units\[4\]"),
        ({"bin_width": 0.02}, "bin_width_ns"),
        ({"session": "no spaces"}, "session"),
        ({"deadline": -1.0}, "deadline_ns"),
    ],
)
def test_a_refused_session_says_which_field(
    client: ServiceClient, changes: dict[str, object], field: str
) -> None:
    options: dict[str, object] = {"session": "bad", "units": UNITS, "bin_width": BIN_S}
    with pytest.raises(ServiceError, match=rf"{field} \(refused by tcp"):
        client.open(**(options | changes))  # pyright: ignore[reportArgumentType]


def test_a_refused_message_leaves_the_session_alone(client: ServiceClient) -> None:
    with open_(client, "sturdy") as session:
        session.send_raw(b"\x93nonsense")
        session.send(0, counts(1)[0])
        assert len(collect(session, 1)) == 1
        assert [r.field for r in session.refused] == ["message"]


@pytest.mark.parametrize(
    "bad",
    [np.zeros(4), np.full(5, 0.5), np.full(5, -1), np.full(5, 70_000), np.full(5, np.nan)],
    ids=["shape", "fractional", "negative", "too many", "nan"],
)
def test_counts_that_are_not_counts_are_never_sent(
    client: ServiceClient, bad: NDArray[np.float64]
) -> None:
    with open_(client, "picky") as session:
        with pytest.raises(ShapeError, match="counts: expected"):
            session.send(0, bad)
        session.send(0, counts(1)[0])
        assert [a.index for a in collect(session, 1)] == [0]


def test_counts_and_mask_may_be_plain_lists(client: ServiceClient) -> None:
    with open_(client, "plain") as session:
        session.send(0, [0, 1, 2, 0, 3])
        session.send(1, [0, 1, 2, 0, 3], mask=[True, True, False, True, True])
        first, second = collect(session, 2)
        assert (first.spikes, second.spikes) == (6, 4)
        masked = np.ma.array([1, 2, 3, 4, 5], mask=[1, 0, 0, 0, 0])
        lists = ([1, 2, 3, 4], [[1], [2, 3]], ["1", "b", "c", "d", "e"], [2**70] * 5, [1j] * 5)
        for wrong in (*lists, None, masked):
            with pytest.raises(ShapeError, match="counts: expected"):
                session.send(2, wrong)
        for wrong in ([True] * 4, [2, 1, 1, 1, 1], ["yes"] * 5):
            with pytest.raises(ShapeError, match="mask: expected"):
                session.send(2, [0] * 5, mask=wrong)


def test_a_payload_that_cannot_be_sent_is_named(client: ServiceClient) -> None:
    with pytest.raises(ProtocolError, match="message: expected integers of 64 bits"):
        client.event("odd", "cue", {"at": object()})


def test_no_service_is_said_in_time_and_by_address(tmp_path: Path) -> None:
    nobody = f"ipc://{tmp_path}/nobody"
    with ServiceClient(nobody, timeout=0.2) as client:
        began = time.monotonic()
        for _ in range(2):  # the second question is not answered by the first one's reply
            with pytest.raises(ServiceError, match=r"nobody.*expected an answer within 0\.2 s"):
                client.describe()
        assert time.monotonic() - began < 5.0
        with pytest.raises(ServiceError, match=r"expected an answer within 0\.3 s"):
            client.load("m.safetensors", timeout=0.3)


def test_models_says_that_no_service_is_there_however_long_a_load_may_take(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    nobody = f"ipc://{tmp_path}/nobody"
    assert main(["models", "load", "m.safetensors", "--to", nobody, "--timeout", "100"]) == 3
    assert "nobody: expected an answer within 3 s" in capsys.readouterr().err


def test_what_is_no_address_is_said() -> None:
    with pytest.raises(ServiceError, match="endpoint: expected an address"):
        ServiceClient("nonsense")


def test_a_manifest_that_is_none_is_said() -> None:
    described = messages.Described(
        protocol=1, model="m", ready=True, device="cpu", results="", manifest={"model_id": 3}
    )
    with pytest.raises(ProtocolError, match="manifest"):
        model_of(described)


def test_a_service_on_ipv6_is_reached(tmp_path: Path) -> None:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            pass
    except OSError as error:
        pytest.skip(f"no ::1 here ({error})")
    model = make_model(tmp_path / "m.safetensors", n_units=len(UNITS))
    with (
        serving(model, ingest="tcp://[::1]:*", results="tcp://[::1]:*") as running,
        ServiceClient(running.ingest, timeout=10.0) as client,
        open_(client, "six") as session,
    ):
        session.send(0, counts(1)[0])
        assert [a.index for a in collect(session, 1)] == [0]


@pytest.mark.parametrize(
    ("results", "endpoint", "expected"),
    [
        ("tcp://0.0.0.0:6", "tcp://lab:5", "tcp://lab:6"),
        ("tcp://*:6", "tcp://[::1]:5", "tcp://[::1]:6"),
        ("tcp://127.0.0.1:6", "tcp://127.0.0.1:5", "tcp://127.0.0.1:6"),
        ("ipc:///tmp/r", "ipc:///tmp/i", "ipc:///tmp/r"),
    ],
)
def test_a_wildcard_results_address_is_the_services_host(
    results: str, endpoint: str, expected: str
) -> None:
    assert reachable(results, endpoint) == expected


def test_the_monitor_shows_open_sessions_and_their_newest_decode(
    client: ServiceClient, service: Service, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "now.json"
    with open_(client, "watched") as session:
        for index, row in enumerate(counts(4)):
            session.send(index, row)
        newest = collect(session, 4)[-1]
        assert main(["monitor", "--to", service.ingest, "--once"]) == 0
        assert "watched" in capsys.readouterr().out
        assert main(["monitor", "--to", service.ingest, "--once", "--json", str(file)]) == 0
        assert main(["monitor", "--to", service.ingest, "--json", "-"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["model"] == service.model
    (seen,) = json.loads(file.read_text())["sessions"]
    assert (seen["session"], seen["bins"], seen["statuses"]) == ("watched", 4, {"ok": 4})
    assert seen["newest"]["index"] == 3
    assert seen["newest"]["kinematics"]["vx"] == pytest.approx(newest.kinematics[0])
    assert 0 < seen["solve_p50_ms"] <= seen["solve_p99_ms"]


def test_the_monitors_json_has_null_for_what_an_answer_lacks(client: ServiceClient) -> None:
    with open_(client, "shed") as session:
        session.send(0, counts(1)[0])
        (answer,) = collect(session, 1)
        shed = replace(answer, kinematics_std=np.full(2, np.nan))  # as of one without a solve
        shown = ServiceState(
            endpoint=client.endpoint,
            model=answer.model,
            ready=True,
            device="cpu",
            names=("vx", "vy"),
            units=("m/s", "m/s"),
            sessions=tuple(s for s in client.sessions() if s.session == "shed"),
            newest={"shed": shed},
            clock=client.clock(),
        )
    (seen,) = json.loads(json.dumps(shown.to_json(), allow_nan=False))["sessions"]
    assert seen["newest"]["kinematics_std"] == {"vx": None, "vy": None}
    assert seen["newest"]["kinematics"]["vx"] == pytest.approx(answer.kinematics[0])


def test_the_monitor_takes_no_resent_answer_for_a_fresh_one(client: ServiceClient) -> None:
    with open_(client, "idle") as session, Monitor(client.endpoint, timeout=10.0) as monitor:
        session.step(0, counts(1)[0], 20.0)
        monitor.snapshot()  # subscribes, and is sent the last answer again

        def newest() -> dict[str, Any]:
            monitor.listen(0.2)
            shown = monitor.snapshot().to_json()["sessions"]
            return next(s["newest"] or {} for s in shown if s["session"] == "idle")

        end = time.monotonic() + 20.0
        while not (seen := newest()) and time.monotonic() < end:
            pass
        assert (seen["index"], seen["wire_out"]) == (0, None)
        assert "out" not in shown_text(monitor).partition("newest answer")[2].partition("\n")[0]
        session.step(1, counts(1)[0], 20.0)
        while (seen := newest())["index"] < 1 and time.monotonic() < end:
            pass
        assert seen["wire_out"]["ms"] >= 0


def shown_text(monitor: Monitor) -> str:
    screen = console(width=80)
    with screen.capture() as captured:
        screen.print(view(monitor.snapshot()))
    return captured.get()


def test_the_monitor_says_that_no_service_is_there(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    nobody = f"ipc://{tmp_path}/nobody"
    assert main(["monitor", "--to", nobody, "--timeout", "0.2"]) == 3
    assert "nobody: expected an answer within 0.2 s" in capsys.readouterr().err
