"""A fleet's gateway, health and placement, without nodes or processes."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import zmq

from ilqr_clients import ServiceClient
from ilqr_service.fleet.gateway import Gateway
from ilqr_service.fleet.health import Health
from ilqr_service.fleet.member import Server
from ilqr_service.fleet.placement import (
    BURST_S,
    Busy,
    ServerLoad,
    change,
    cost,
    place,
    room,
)
from ilqr_service.settings import ServiceSettings
from ilqr_vae.errors import ProtocolError, RequestRefusedError, ServiceUnreachableError
from rig import make_model, serving, until


def test_a_client_waits_for_a_fleet_whose_servers_do_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ServiceSettings(ingest="tcp://127.0.0.1:*", results="tcp://127.0.0.1:*")
    there: list[Server] = []
    some = Gateway._some  # pyright: ignore[reportPrivateUsage]

    with serving(make_model(tmp_path / "m.safetensors", n_units=3)) as one:

        def refused_at_first(*arguments: Any) -> Any:
            try:
                return some(*arguments)
            except ProtocolError:
                there.append(Server("0001", one.ingest, one.results))
                raise

        monkeypatch.setattr(Gateway, "_some", refused_at_first)
        gateway = Gateway(
            settings,
            None,
            servers=lambda: there,
            place=lambda _: there[0],
            took_up=lambda _: 0,
            missing=lambda: False,
            served=lambda *_: None,
            size=threading.Lock(),
        )
        gateway.start()
        try:
            with ServiceClient(gateway.ingest, timeout=240.0) as client:
                assert client.describe().model == one.model
            del there[:]
            with (
                ServiceClient(gateway.ingest, timeout=0.1) as client,
                pytest.raises((RequestRefusedError, ServiceUnreachableError)),
            ):
                client.describe()
        finally:
            gateway.close()


def test_silence_counts_while_the_fleet_itself_runs_and_another_server_answers() -> None:
    now, step = 0.0, 1 / 16
    context: zmq.Context[Any] = zmq.Context()
    sockets = [context.socket(zmq.ROUTER) for _ in range(2)]
    ports = [socket.bind_to_random_port("tcp://127.0.0.1") for socket in sockets]
    servers = [Server(str(port), f"tcp://127.0.0.1:{port}", "") for port in ports]
    made = [Health(None, patience=3.0, clock=lambda: now) for _ in range(3)]

    def heard(health: Health, k: int) -> bool:
        """Answer what has come, and look again at the same time."""
        while sockets[k].poll(0):
            sockets[k].send_multipart([sockets[k].recv_multipart()[0], b"there"])
        health.look(servers)
        pulse = health._pulses[servers[k]]
        return pulse.ever and pulse.silent_s == 0

    def looks(health: Health, count: int, *answering: int, every: float = step) -> set[Server]:
        nonlocal now
        dead: set[Server] = set()
        for _ in range(count):
            now += every
            dead = set(health.look(servers))
            for k in answering:
                if health._pulses[servers[k]].silent_s > 4 * step:  # it was just asked
                    until("the reply is read", lambda k=k: heard(health, k))
        return dead

    try:
        # a server that has never answered, beside one that does
        looks(made[2], 1)
        until("one is heard", lambda: heard(made[2], 1))
        assert looks(made[2], 958, 1) == set()
        assert looks(made[2], 1, 1) == {servers[0]}
        assert not made[2].answered(servers[0])
        for health in made[:2]:
            looks(health, 2)
            until("both are heard", lambda h=health: heard(h, 0) and heard(h, 1))
        assert looks(made[0], 47, 1) == set()
        assert looks(made[0], 1, 1) == {servers[0]}
        # a process that is held for 10 s at a time, and then no server at all
        assert looks(made[1], 10, every=10.0) == set()
        assert looks(made[1], 127) == set()
        assert looks(made[1], 1) == set(servers)
    finally:
        for health in made:
            health.close()
        context.destroy(linger=0)


def test_sessions_go_where_there_is_room() -> None:
    even = [ServerLoad(2, 0.2, 2), ServerLoad(2, 0.1, 1), ServerLoad(4, 0.2, 3)]
    assert place(even) == 1
    assert cost(even) == pytest.approx(0.5 / 6)
    # what was placed and not measured yet takes room at the average cost
    assert room(ServerLoad(2, 1.0, 12, 2), 0.1) == pytest.approx(0.6)
    busy = [ServerLoad(2, 1.6, 4), ServerLoad(2, 1.4, 9), ServerLoad(2, 1.79, 1)]
    assert place(busy) == 1
    assert place([ServerLoad(1, 0.95, 10), ServerLoad(1, 0.89, 10)]) is None
    assert place([]) is None
    assert change([], 1, 4) == 0
    assert change(even[:2], 3, 3) == 1
    assert change(busy, 1, 4) == 1  # little room
    assert change(busy, 1, 3) == 0
    dear = ServerLoad(1, 0.5, 1)  # room enough, but not for one more of those
    assert change([dear, dear], 1, 4) == 1
    assert change(even, 1, 4) == -1
    assert change(even, 3, 4) == 0


def test_sessions_are_refused_only_after_a_burst_has_passed() -> None:
    busy, full, free = Busy(), [ServerLoad(1, 0.95, 10)], [ServerLoad(1, 0.5, 10)]
    assert not any(busy.lasts(full, float(t)) for t in range(int(BURST_S)))
    assert not busy.lasts(free, BURST_S - 0.5)
    assert not busy.lasts(full, BURST_S)
    assert not busy.lasts(full, 2 * BURST_S - 0.5)
    assert busy.lasts(full, 2 * BURST_S)
    assert not busy.lasts(free, 2 * BURST_S + 0.5)
