"""The service's pure parts: policy, settings, addresses, histogram edges, quantiles."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from ilqr_service.metrics.histogram import Recent
from ilqr_service.metrics.telemetry import edges
from ilqr_service.settings import (
    ServiceSettings,
    http_address,
    load_settings,
    loopback_endpoint,
)
from ilqr_service.solving.policy import Cost, Policy, steps
from ilqr_service.solving.thread import SolverThread
from ilqr_service.work import NO_SOLVE, Insert, Solve, SwapModel, Work
from ilqr_vae.errors import ConfigError, ServiceError

MS = 1_000_000


def cost(_: str) -> Cost:
    return Cost(50 * MS, horizon=5, most=64, start=0.0, each=0.0)


def work(run: int, index: int, due: int, sheds: bool = False) -> Solve:
    return Solve(
        run=run,
        index=index,
        counts=np.zeros(3),
        received_ns=due - 50 * MS,
        due_ns=due,
        sheds=sheds,
    )


def late(run: int, index: int, due: int) -> Insert:
    return Insert(run=run, index=index, counts=np.zeros(3), due_ns=due)


@settings(max_examples=100, deadline=None)
@given(
    pushes=st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 500), st.integers(0, 600), st.booleans()),
        max_size=60,
    ),
    batch=st.integers(1, 4),
    gone=st.integers(0, 3),
)
def test_policy_keeps_order_within_a_run_and_loses_nothing(
    pushes: list[tuple[int, int, int, bool]], batch: int, gone: int
) -> None:
    policy = Policy(cost)
    expected: dict[int, list[int]] = {}
    taken: dict[int, list[int]] = {}

    def took(works: list[Work]) -> None:
        assert len({w.run for w in works}) == len(works)
        for w in works:
            taken.setdefault(w.run, []).append(w.index)

    for i, (run, due, now, takes) in enumerate(pushes):
        policy.push(late(run, i, 7) if due == 7 else work(run, i, due * MS, sheds=run > 0))
        expected.setdefault(run, []).append(i)
        if takes:
            for works in policy.shed(now * MS, 5):
                took(works)
            if now % 2:
                took(policy.take(batch))
    held = len(expected.get(gone, [])) - len(taken.get(gone, []))
    assert policy.forget(gone) == held
    expected[gone] = taken.setdefault(gone, [])
    while len(policy):
        works = policy.take(batch)
        assert 0 < len(works) <= batch
        took(works)
    assert {run: w for run, w in taken.items() if w} == {r: w for r, w in expected.items() if w}
    assert policy.take(batch) == []


def test_a_backlog_gives_way_to_a_stream_in_real_time() -> None:
    policy = Policy(cost)
    for i in range(64):  # a replay at full speed
        policy.push(work(0, i, 100 * MS))
    assert [w.run for w in policy.take(1)] == [0]
    policy.push(work(1, 0, 101 * MS))  # one bin of a live stream, due a little later
    assert [w.run for w in policy.take(1)] == [1]


def test_a_flood_that_is_late_anyway_gives_way_to_a_stream_in_real_time() -> None:
    policy = Policy(lambda _: Cost(50 * MS, horizon=5, most=64, each=MS))
    for run in range(1, 41):  # due as they are sent
        for i in range(8):
            policy.push(work(run, i, 100 * MS, sheds=True))
    policy.push(work(0, 0, 150 * MS))
    solved, *shed = policy.next(110 * MS, limit=64, shed=64)
    assert [(w.run, w.index) for step in solved for w in step] == [(0, 0)]
    unsolved = [w.run for steps in shed for step in steps for w in step]
    assert Counter(unsolved) == dict.fromkeys(range(1, 25), 2) | dict.fromkeys(range(25, 41), 1)
    # what nobody reads yet is not added to; then it is the others' turn
    assert policy.next(110 * MS, limit=64, shed=0) == []
    ((first,), *_) = policy.next(110 * MS, limit=64, shed=24)
    assert {w.run for w in first} == set(range(25, 41)) | set(range(1, 9))
    alone = Policy(lambda _: Cost(50 * MS, horizon=5, most=64, each=MS))
    for i in range(200):
        alone.push(work(1, i, 100 * MS, sheds=True))
    assert 1 < len(alone.next(110 * MS, limit=64, shed=128)) < 32  # then others are looked for


def test_a_session_faster_than_real_time_keeps_its_place_with_an_empty_queue() -> None:
    policy = Policy(cost)
    for i in range(8):  # each when the one before it is answered
        policy.push(work(0, i, 100 * MS))
        assert [w.run for w in policy.take(1)] == [0]
    policy.push(work(0, 8, 100 * MS))
    policy.push(work(1, 0, 149 * MS))
    assert [w.run for w in policy.take(2)] == [1, 0]
    for i in range(100):  # in real time again: soon among the others as before
        policy.push(work(0, 9 + i, (150 + 50 * i) * MS))
        policy.take(1)
    policy.push(work(0, 109, 5150 * MS))
    policy.push(work(1, 1, 5160 * MS))
    assert [w.run for w in policy.take(2)] == [0, 1]


def test_what_would_be_late_gives_way_to_the_newest_of_its_run() -> None:
    policy = Policy(cost)
    for i in range(4):
        policy.push(work(0, i, (100 + i) * MS, sheds=True))
        policy.push(work(1, i, (100 + i) * MS))  # does not shed
        policy.push(work(2, i, (200 + i) * MS, sheds=True))  # can be in time
        policy.push(work(3, i, (100 + i) * MS, sheds=True) if i != 2 else late(3, i, 102 * MS))
    assert policy.shed(99 * MS, 99) == []
    rounds = policy.shed(100 * MS, 99)
    assert [[(w.run, w.index) for w in works] for works in rounds] == [
        [(0, 0), (3, 0)],
        [(0, 1), (3, 1)],
        [(0, 2)],
    ]
    assert {w.budget for works in rounds for w in works if isinstance(w, Solve)} == {NO_SOLVE}
    # in the order of what is due, as if what was shed had never been
    assert [(w.run, w.index) for w in policy.take(4)] == [(1, 0), (0, 3), (2, 0), (3, 2)]
    policy.overran(1)
    (rounds,) = zip(*policy.shed(101 * MS, 99), strict=True)
    assert [(w.run, w.index) for w in rounds] == [(1, 1), (1, 2)]
    assert len(policy) == 5
    policy.overran(7)  # one that is not queued


@pytest.mark.parametrize("when", ["before it waits", "while it waits"])
def test_what_was_held_is_shed_whenever_the_answers_are_read(when: str) -> None:
    """Nobody wakes the solver where they are read after the I/O thread has looked whether to."""

    def costs(_: str) -> Cost:
        return Cost(50 * MS, horizon=5, most=64, each=MS)

    engines: Any = SimpleNamespace(cost=costs, batch=64)
    thread = SolverThread(engines, wake=lambda: None)
    asked: list[int] = []

    class Asked(Policy):
        def next(self, now_ns: int, limit: int, shed: int) -> list[list[list[Work]]]:
            found = super().next(now_ns, limit, shed)
            asked.append(shed)
            if when == "before it waits":
                thread._answers.clear()
            return found

    class Waited(threading.Condition):
        def wait(self, timeout: float | None = None) -> bool:
            assert timeout
            thread._answers.clear()
            return super().wait(timeout)

    thread._policy, thread._changed = Asked(costs), Waited()
    thread._answers.extend([None] * 128)
    thread.submit([work(0, i, -100 * MS, sheds=True) for i in range(3)])
    found = thread._next()
    assert found is not None
    assert [w.index for steps in found[1] for step in steps for w in step] == [0, 1]
    assert asked == [0, 128]


def test_a_batch_is_split_into_steps_of_one_model_and_one_kind() -> None:
    def costs(model: str) -> Cost:
        return Cost(50 * MS, horizon=5, most={"alone": 1, "few": 2}.get(model, 64))

    solved = [replace(work(run, 0, 0), model=model) for run, model in enumerate("abab")]
    shed = replace(work(9, 0, 0), model="a", budget=NO_SOLVE)
    few = [replace(work(run, 0, 0), model="few") for run in range(20, 23)]
    alone = [replace(work(run, 0, 0), model="alone") for run in range(30, 32)]
    one, swap = late(40, 0, 0), SwapModel(run=41, index=0, model="a", to="b")
    a, b = solved[::2], solved[1::2]
    assert steps([swap, *solved, one, *alone, shed, *few], costs) == [
        a, b, [shed], few[:2], few[2:], [swap], [one], alone[:1], alone[1:]
    ]  # fmt: skip


def test_settings_file_is_checked_and_overridden(tmp_path: Path) -> None:
    path = tmp_path / "service.toml"
    path.write_text('device = "cpu"\ncredits = 5\n')
    loaded = load_settings(path, {"credits": 7, "device": None})
    assert (loaded.device, loaded.credits) == ("cpu", 7)
    shipped = Path(__file__).parents[1] / "configs" / "service.toml"
    assert load_settings(shipped, {}) == ServiceSettings()
    for text, field in [
        ("credit = 5\n", "credit"),
        ('credits = "many"\n', "credits"),
        ("credits = 0\n", "credits"),
        ('log = "xml"\n', "log"),
        ("credits = \n", "TOML"),
    ]:
        path.write_text(text)
        with pytest.raises(ConfigError, match=field):
            load_settings(path, {})
    with pytest.raises(ConfigError, match="config"):
        load_settings(tmp_path / "absent.toml", {})


@pytest.mark.parametrize(
    "text",
    [
        *(
            f"{name} = {value}"
            for name in ("idle_s", "drain_s")
            for value in ("nan", "inf", "1e300")
        ),
        *(f"keep_warm_ms = {value}" for value in ("nan", "inf", "1e15")),
        *(f"control_rate = {value}" for value in ("nan", "inf", "1e-300")),
        *(f"journal_segment_mb = {value}" for value in ("nan", "inf", "1e-300")),
        *("deadline_ms = nan", "results_queue = 3000000000", "max_sessions = 1000000000"),
        *("max_message_bytes = 9223372036854775807", "threads = 1000000", "journal_keep = -1"),
        *("iterations = 100000", "horizon = 1000000"),
        *('journal = "a\\u0000b"', 'keys = "a\\u0000b"', 'models = "a\\u0000b"'),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "service.toml"
    path.write_text(text + "\n")
    with pytest.raises(ConfigError, match=text.split(" ")[0]):
        load_settings(path, {})


def test_a_path_that_is_not_utf8_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="journal: expected text in UTF-8"):
        load_settings(None, {"journal": "\udcff-j"})


def test_only_loopback_is_bound() -> None:
    assert loopback_endpoint("ingest", "tcp://127.0.0.1:0") == "tcp://127.0.0.1:*"
    assert loopback_endpoint("ingest", "tcp://localhost:5555") == "tcp://127.0.0.1:5555"
    assert loopback_endpoint("ingest", "tcp://[::1]:5555") == "tcp://[::1]:5555"
    for endpoint in (
        "tcp://0.0.0.0:5555",
        "tcp://*:5555",
        "tcp://192.168.1.2:5555",
        "tcp://lab-pc:5555",
        "tcp://127.0.0.1",
        "tcp://127.0.0.1:70000",
        "ipc:///tmp/x",
    ):
        with pytest.raises(ServiceError, match="ingest"):
            loopback_endpoint("ingest", endpoint)
    assert http_address("127.0.0.1:0") == ("127.0.0.1", 0)
    for address in ("9464", "host:", "host:http", "host:70000"):
        with pytest.raises(ServiceError, match="http"):
            http_address(address)


def test_edges_hold_the_bin_width_and_are_finer_than_5_ms() -> None:
    for width in (0.005, 0.02, 0.05):
        values = edges(width)
        assert width in values
        assert list(values) == sorted(set(values))
        assert sum(e < 0.005 for e in values) >= 10


def test_quantiles_are_of_the_newest() -> None:
    recent = Recent(4)
    assert recent.quantiles(0.5) == (0,)
    for value in (100, 1, 2, 3, 4):
        recent.add(value)
    assert recent.quantiles(0.0, 0.5, 0.99, 1.0) == (1, 2, 4, 4)
