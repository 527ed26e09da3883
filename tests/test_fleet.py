"""A fleet on two nodes: sessions follow to their server, and outlive it, its node, its model."""

from __future__ import annotations

import os
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from feeder import UNITS, Feeder, spikes
from ilqr_clients import ServiceClient
from ilqr_clients.session import Session
from ilqr_service.fleet.fleet import Fleet
from ilqr_service.fleet.member import Server
from ilqr_service.fleet.rolling import Rolling
from ilqr_service.journal.verify import verify
from ilqr_service.settings import ServiceSettings
from ilqr_vae.errors import ProtocolError, RequestRefusedError
from ilqr_vae.protocol import messages
from ilqr_vae.protocol.keys import add_client, read_client_key
from ray_rig import NODE
from rig import BIN_S, make_model, serving

FULL = os.environ.get("CHAOS") == "full"
SESSIONS = 20
MOST = 15
BINS = 200 if FULL else 24
WAIT_S = 240.0  # a new member takes minutes on a busy machine
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, keys, and journals, which all nodes see."""
    made = tmp_path_factory.mktemp("fleet")
    for k in range(2):
        make_model(made / f"{k}.safetensors", n_units=len(UNITS), names=UNITS, seed=k)
    make_model(made / "other.safetensors", n_units=3)
    add_client(made / "keys", "fleet", ("feed", "read", "control"))
    add_client(made / "keys", "rig", ("feed", "read"))
    return made


@pytest.fixture(scope="module", params=[False, True] if FULL else [False])
def replicate(request: pytest.FixtureRequest) -> bool:
    """Whether journals are copied to a second node, instead of in a folder that all nodes see."""
    return bool(request.param)


@pytest.fixture(scope="module")
def running(nodes: Any, folder: Path, replicate: bool) -> Iterator[Fleet]:
    settings = ServiceSettings(
        ingest="tcp://127.0.0.1:*",
        results="tcp://127.0.0.1:*",
        http="127.0.0.1:0",
        max_sessions=MOST,
        keys=str(folder / "keys"),
    )
    made = Fleet(
        folder / "0.safetensors",
        settings,
        folder / f"journals{replicate:d}",
        replicate=replicate,
        fewest=2,
        cpus=2.0,
        gpus=0.25,
        key=read_client_key(folder / "keys/fleet.key"),
    )
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def client(running: Fleet, folder: Path, replicate: bool) -> Iterator[ServiceClient]:
    """A client of two members, which may still be replaced; the fleet has heard both."""
    pulses = running._members._health._pulses
    waited(lambda: len(running.servers()) >= 2 == len(running))
    waited(lambda: all(s in pulses and pulses[s].ever for s in running.servers()))
    waited(lambda: running.copies == len(running.servers()) * replicate)
    key = read_client_key(folder / "keys/rig.key")
    with ServiceClient(running.gateway.ingest, key=key, timeout=WAIT_S) as made:
        yield made


def waited(so: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not so():
        assert time.monotonic() < end
        time.sleep(0.02)


def gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


class Streams:
    """Sessions fed with the same counts, and their answers."""

    def __init__(self, client: ServiceClient, names: list[str]) -> None:
        self.sessions: dict[str, Session] = {}
        for name in names:
            waited(lambda name=name: self._open(client, name))
        self.seen: dict[str, dict[int, tuple[int, bytes]]] = {name: {} for name in names}
        self.models: dict[str, list[str]] = {name: [] for name in names}
        self._counts = spikes(BINS)

    def _open(self, client: ServiceClient, name: str) -> bool:
        """Open a session; False while what the processor just did leaves no server room."""
        try:
            made = client.open(name, units=UNITS, bin_width=BIN_S, deadline=60.0, patience=WAIT_S)
        except RequestRefusedError as error:
            if "room for one more" not in str(error):
                raise
            return False
        assert isinstance(made, Session)
        self.sessions[name] = made
        return True

    def note(self, name: str, answer: Any) -> None:
        assert answer.index not in self.seen[name], "answered twice"
        self.seen[name][answer.index] = (answer.revision, answer.latent.tobytes())
        self.models[name].append(answer.model)

    def step(self, bins: range) -> None:
        for i in bins:
            for name, session in self.sessions.items():
                self.note(name, session.step(i, self._counts[i], timeout=WAIT_S))

    def after(self, index: int, since: float) -> dict[str, float]:
        """Send one bin, and wait for all answers; seconds after ``since`` at which they came."""
        for session in self.sessions.values():
            session.send(index, self._counts[index])
        late: dict[str, float] = {}
        while len(late) < len(self.sessions) and time.monotonic() - since < WAIT_S:
            for name in self.sessions.keys() - late.keys():
                for answer in self.sessions[name].receive(0.01):
                    self.note(name, answer)
                    late[name] = time.monotonic() - since
        assert len(late) == len(self.sessions)
        return late

    def close(self) -> None:
        for session in self.sessions.values():
            session.close()


def homes(running: Fleet, streams: Streams) -> dict[str, str]:
    """The server of each session, once all have told theirs."""
    found = dict[str, str]()

    def known() -> bool:
        found.update((info.session, server.name) for server, info in running.gateway.infos())
        return found.keys() >= streams.sessions.keys()

    waited(known)
    return {name: found[name] for name in streams.sessions}


def test_a_model_is_tried_on_all_servers_before_any_swaps(
    running: Fleet, client: ServiceClient, folder: Path
) -> None:
    with pytest.raises(RequestRefusedError, match="role"):
        client.load("1.safetensors")
    streams = Streams(client, ["a", "b"])
    assert len(set(homes(running, streams).values())) == 2
    streams.step(range(3))
    key = read_client_key(folder / "keys/fleet.key")
    with ServiceClient(running.gateway.ingest, key=key, timeout=WAIT_S) as control:
        before = control.models()
        with pytest.raises(RequestRefusedError, match=r"server 0001 .*nothing has changed"):
            control.load("other.safetensors")
        assert control.models() == before
        after = control.load("1.safetensors")
        assert {m.role for m in after} == {"serving", "before"}
        streams.step(range(3, 6))
        served = {m.model for m in after if m.role == "serving"}
        assert {m for models in streams.models.values() for m in models[3:]} == served
        with pytest.raises(RequestRefusedError, match="another than is served"):
            control.load("1.safetensors")
    streams.close()


def test_a_server_that_hangs_is_killed_and_replaced(running: Fleet, client: ServiceClient) -> None:
    import ray

    share = pytest.approx(2 - 2 * 0.25)
    waited(lambda: ray.available_resources().get("GPU") == share)
    streams = Streams(client, ["c", "d"])
    streams.step(range(4))
    (place, names), *_ = running.places()
    process, before = psutil.Process(place.pid), len(running.takeovers)
    stopped = time.monotonic()
    process.suspend()
    late = streams.after(4, stopped)
    print("answered again after", late, running.takeovers)
    waited(lambda: gone(process))  # no answer waits for it where both sessions are elsewhere
    streams.step(range(5, 8))
    assert len({tuple(sorted(answers.items())) for answers in streams.seen.values()}) == 1
    waited(lambda: {name for name, _ in running.takeovers[before:]} >= set(names))
    streams.close()


def test_twenty_sessions_outlive_a_killed_node(
    nodes: Any, running: Fleet, client: ServiceClient
) -> None:
    streams = Streams(client, [f"s{k}" for k in range(SESSIONS)])
    where = homes(running, streams)
    assert all(set(where.values()) & set(names) for _, names in running.places())
    half = BINS // 2
    streams.step(range(half))
    worker = next(n for n in nodes.list_all_nodes() if not n.head)
    ((gone, names),) = [p for p in running.places() if p[0].node == worker.node_id]
    before = len(running.takeovers)
    killed = time.monotonic()
    os.kill(gone.pid, signal.SIGKILL)  # as the power going: node and server at once
    nodes.remove_node(worker, allow_graceful=False)
    removed = time.monotonic() - killed
    late = streams.after(half, killed)
    print("answered again after", max(late.values()), "removed", removed, running.takeovers)
    if FULL:
        assert max(late.values()) < 5.0
    streams.step(range(half + 1, BINS))
    assert all(sorted(answers) == list(range(BINS)) for answers in streams.seen.values())
    # one model, the same counts: every session answers with the same bits
    assert len({tuple(sorted(answers.items())) for answers in streams.seen.values()}) == 1
    taken = running.takeovers[before:]
    assert {name for name, _ in taken} >= set(names)
    assert all(down > 0 for _, down in taken)
    moved = [name for name in streams.sessions if where[name] in names]
    assert moved
    for name in moved:
        assert any("down" in notice for notice in streams.sessions[name].notices)

    def measured() -> bool:
        with urllib.request.urlopen(f"http://{running.http}/metrics", timeout=WAIT_S) as page:
            text = page.read().decode()
        assert f"ilqr_fleet_takeovers {len(running.takeovers):.1f}" in text
        return all(f'server="{s.name}"' in text for s in running.servers())

    waited(measured)  # a server may take longer to answer than a page waits
    streams.close()
    nodes.add_node(**NODE)


def test_a_member_that_goes_hands_its_sessions_over(
    running: Fleet, client: ServiceClient, folder: Path, replicate: bool
) -> None:
    import ray

    streams = Streams(client, ["e", "f", "g"])
    streams.step(range(4))
    waited(lambda: running.busy < 0.3)  # of what they began with; else they would be full
    running.most = 1
    smaller = threading.Thread(target=running.scale, args=(1,))
    smaller.start()
    opened = list[Streams]()
    while smaller.is_alive() and len(opened) < MOST:
        opened.append(Streams(client, [f"meanwhile{len(opened)}"]))
    smaller.join()
    assert len(running) == 1
    streams.after(4, time.monotonic())
    streams.step(range(5, 8))
    assert len({tuple(sorted(answers.items())) for answers in streams.seen.values()}) == 1
    for one in opened:
        one.step(range(2))
    waited(lambda: running.busy < 0.3)
    # all servers are full: one more begins, on the node that is free
    running.most = 2
    waited(lambda: ray.available_resources().get("CPU", 0.0) >= 2.0)
    full = len(running.servers()) * MOST - len(streams.sessions) - len(opened)
    crowd = Streams(client, [f"full{k}" for k in range(full)])
    last = Streams(client, ["one-more"])
    assert len(running) == 2
    last.step(range(3))
    for one in (streams, crowd, last, *opened):
        one.close()
    running.close()
    models = [folder / f"{k}.safetensors" for k in range(2)]
    files = (folder / f"journals{replicate:d}").rglob("*.journal")
    verdicts = [verify(path, models) for path in {file.parent for file in files}]
    assert sum(v.answers for v in verdicts) == sum(v.identical for v in verdicts) > 0
    assert not [line for v in verdicts for line in v.damaged]


def asked(server: Feeder, message: messages.Message) -> messages.ModelList:
    server.send(message)
    reply = server.reply()
    if isinstance(reply, messages.Refused):
        raise ProtocolError(reply.field, expected=reply.expected, got=reply.got)
    assert isinstance(reply, messages.ModelList)
    return reply


@pytest.mark.parametrize("meddled", [False, True])
def test_a_server_that_refuses_to_swap_takes_the_others_back(tmp_path: Path, meddled: bool) -> None:
    """Between the trial and its swap server 2 loses the shadow, and the file is gone. Where server
    1 cannot go back, since a shadow was loaded there meanwhile, it is said what serves where."""
    for k in range(3):
        make_model(tmp_path / f"{k}.safetensors", n_units=len(UNITS), names=UNITS, seed=k)
    with (
        serving(tmp_path / "0.safetensors") as one,
        serving(tmp_path / "0.safetensors") as two,
        Feeder(one.ingest, one.results) as first,
        Feeder(two.ingest, two.results) as second,
    ):
        servers = [Server(f"000{k}", s.ingest, s.results) for k, s in ((1, one), (2, two))]
        feeders = {"0001": first, "0002": second}
        old, swapped = one.model, list[str]()

        def served(name: str, listed: messages.ModelList, path: str) -> None:
            swapped.append(listed.models[0].model)
            if len(swapped) == 1:
                asked(second, messages.Rollback())
                (tmp_path / "1.safetensors").unlink()
                if meddled:
                    asked(first, messages.Load(path="2.safetensors", shadow=True))

        rolling = Rolling(lambda s, m: asked(feeders[s.name], m), lambda: servers, served)
        with pytest.raises(ProtocolError, match=r"path: .*server 0002 ") as refused:
            rolling.changed(messages.Load(path="1.safetensors"))
        new = swapped[0]
        assert new != old
        serve = [asked(f, messages.Models()).models for f in feeders.values()]
        assert [m[0].model for m in serve] == [new if meddled else old, old]
        assert {m.role for models in serve for m in models} <= {"serving", "before"}
        said = f"now 0001 serves {new}, 0002 serves {old}"
        assert (said if meddled else "every server serves what it did before") in str(refused.value)
