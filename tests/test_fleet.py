"""A fleet on two nodes: sessions follow to their server, and outlive a node that is killed."""

from __future__ import annotations

import os
import signal
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from feeder import UNITS, spikes
from ilqr_clients import ServiceClient
from ilqr_clients.session import Session
from ilqr_service.fleet.fleet import Fleet
from ilqr_service.fleet.placement import Load, cost, place, room
from ilqr_service.journal.verify import verify
from ilqr_service.settings import ServiceSettings
from ray_rig import NODE
from rig import BIN_S

FULL = os.environ.get("CHAOS") == "full"
SESSIONS = 20
BINS = 200 if FULL else 40


@contextmanager
def fleet(model: Path, root: Path, count: int = 2, **settings: Any) -> Iterator[Fleet]:
    given = {"ingest": "tcp://127.0.0.1:*", "results": "tcp://127.0.0.1:*", "device": "cpu"}
    made = ServiceSettings(**(given | {"http": "127.0.0.1:0"} | settings))
    running = Fleet(model, made, root, fewest=count, cpus=2.0)
    try:
        yield running
    finally:
        running.close()


def opened(client: ServiceClient, name: str) -> Session:
    return client.open(name, units=UNITS, bin_width=BIN_S, deadline=60.0)


def test_twenty_sessions_outlive_a_killed_node(
    nodes: Any, model_file: Path, tmp_path: Path
) -> None:
    counts = spikes(BINS)
    with (
        fleet(model_file, tmp_path / "j") as running,
        ServiceClient(running.gateway.ingest) as client,
    ):
        sessions = [opened(client, f"s{k}") for k in range(SESSIONS)]
        where = {info.session: server.name for server, info in running.gateway.infos()}
        assert sorted(where) == sorted(f"s{k}" for k in range(SESSIONS))
        assert set(where.values()) == {s.name for s in running.servers()}
        seen: dict[str, dict[int, tuple[int, bytes]]] = {f"s{k}": {} for k in range(SESSIONS)}

        def note(name: str, answer: Any) -> None:
            assert answer.index not in seen[name], "answered twice"
            seen[name][answer.index] = (answer.revision, answer.latent.tobytes())

        half = BINS // 2
        for i in range(half):
            for k, session in enumerate(sessions):
                note(f"s{k}", session.step(i, counts[i], timeout=30.0))
        worker = next(n for n in nodes.list_all_nodes() if not n.head)
        killed = time.monotonic()
        gone = running.pids_on(worker.node_id)
        assert len(gone) == 1
        os.kill(gone[0], signal.SIGKILL)  # as the power going: node and server at once
        nodes.remove_node(worker, allow_graceful=False)
        for session in sessions:
            session.send(half, counts[half])
        late = {f"s{k}": 0.0 for k in range(SESSIONS)}
        waiting = set(range(SESSIONS))
        while waiting and time.monotonic() - killed < 60:
            for k in list(waiting):
                for answer in sessions[k].receive(0.02):
                    note(f"s{k}", answer)
                    late[f"s{k}"] = time.monotonic() - killed
                    waiting.discard(k)
        assert not waiting
        print("answered again after", max(late.values()), running.takeovers)
        assert max(late.values()) < (5.0 if FULL else 30.0)
        for i in range(half + 1, BINS):
            for k, session in enumerate(sessions):
                note(f"s{k}", session.step(i, counts[i], timeout=30.0))
        assert all(sorted(answers) == list(range(BINS)) for answers in seen.values())
        # one model, the same counts: every session answers with the same bits
        assert len({tuple(sorted(answers.items())) for answers in seen.values()}) == 1
        ((taken, down),) = running.takeovers
        assert down > 0
        moved = [k for k in range(SESSIONS) if where[f"s{k}"] == taken]
        assert moved
        for k in moved:
            assert any("down" in notice for notice in sessions[k].notices)
        with urllib.request.urlopen(f"http://{running.http}/metrics", timeout=20) as page:
            text = page.read().decode()
        assert "ilqr_fleet_takeovers 1.0" in text
        assert all(f'server="{s.name}"' in text for s in running.servers())
        for session in sessions:
            session.close()
    nodes.add_node(**NODE)
    for folder in (tmp_path / "j").iterdir():
        verdict = verify(folder, [model_file])
        assert verdict.answers == verdict.identical > 0
        assert not verdict.damaged


def test_sessions_go_where_there_is_room() -> None:
    even = [Load(2, 0.2, 2), Load(2, 0.1, 1), Load(4, 0.2, 3)]
    assert place(even) == 1
    assert cost(even) == pytest.approx(0.5 / 6)
    # what was placed and not measured yet takes room at the average cost
    assert room(Load(2, 1.0, 12, 2), 0.1) == pytest.approx(0.6)
    busy = [Load(2, 1.6, 4), Load(2, 1.4, 9), Load(2, 1.79, 1)]
    assert place(busy) == 1
    assert place([Load(1, 0.95, 10), Load(1, 0.89, 10)]) is None
    assert place([]) is None
