"""The service's pure parts: scheduler, settings, addresses, histogram edges, quantiles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ilqr_service.scheduler import Scheduler
from ilqr_service.session import Recent
from ilqr_service.settings import (
    ServiceSettings,
    http_address,
    load_settings,
    loopback_endpoint,
)
from ilqr_service.telemetry import edges
from ilqr_service.work import Work
from ilqr_vae.errors import ConfigError, ServiceError

MS = 1_000_000


def work(run: int, index: int, due: int) -> Work:
    return Work(run, index, np.zeros(3), None, False, 0, due - 50 * MS, due, False)


@settings(max_examples=100, deadline=None)
@given(
    pushes=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 500)), max_size=60),
    batch=st.integers(1, 4),
    gone=st.integers(0, 3),
)
def test_scheduler_keeps_order_within_a_run_and_loses_nothing(
    pushes: list[tuple[int, int]], batch: int, gone: int
) -> None:
    scheduler = Scheduler(50 * MS)
    expected: dict[int, list[int]] = {}
    for i, (run, due) in enumerate(pushes):
        scheduler.push(work(run, i, due * MS))
        expected.setdefault(run, []).append(i)
    assert scheduler.forget(gone) == len(expected.pop(gone, []))
    taken: dict[int, list[int]] = {}
    while len(scheduler):
        works = scheduler.take(batch)
        assert 0 < len({w.run for w in works}) == len(works) <= batch
        for w in works:
            taken.setdefault(w.run, []).append(w.index)
    assert taken == expected
    assert scheduler.take(batch) == []


def test_a_backlog_gives_way_to_a_stream_in_real_time() -> None:
    scheduler = Scheduler(50 * MS)
    for i in range(64):  # a replay at full speed
        scheduler.push(work(0, i, 100 * MS))
    assert [w.run for w in scheduler.take(1)] == [0]
    scheduler.push(work(1, 0, 101 * MS))  # one bin of a live stream, due a little later
    assert [w.run for w in scheduler.take(1)] == [1]


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
