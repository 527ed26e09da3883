"""A member of a fleet: a Ray actor that runs servers.

A server is a ``Service`` with its own journal folder. A member starts with one and takes over those
of members that died: their sessions continue as after a restart.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import psutil
from prometheus_client import generate_latest

from ilqr_service.fleet.replica import Copier, Store
from ilqr_service.server import Service
from ilqr_service.settings import ServiceSettings
from ilqr_service.solving.engine import Engine
from ilqr_vae.errors import ServiceError
from ilqr_vae.protocol.keys import read_server_key

_WARM_UP_S = 600.0
_LOCKED_S, _AGAIN_S = 10.0, 0.05
_SWITCH_INTERVAL_S = 2e-4


class Server(msgspec.Struct, frozen=True):
    """A server of a fleet: its name, which is that of its journal folder, and its addresses."""

    name: str
    ingest: str
    results: str


class Measured(msgspec.Struct, frozen=True):
    """CPU seconds used by a member's process, at a time of its monotonic clock.

    ``failing``: servers of whose journal it cannot write its copy.
    """

    cpu_s: float
    at_s: float
    memory: int
    failing: frozenset[str] = frozenset()


class Place(msgspec.Struct, frozen=True):
    """A process in the cluster: its node in Ray, its id and start time, and its journal store."""

    node: str
    pid: int
    began_s: float
    store: str = ""


class Member:
    """Runs servers. All methods are called through Ray.

    Args:
        settings: settings of every server, except addresses and journal.
        root: folder of the journals, shared or local.
        secret: secret of the fleet if journals are copied to a second node; else empty.
    """

    def __init__(self, settings: ServiceSettings, root: str, secret: bytes = b"") -> None:
        self._settings, self._root, self._secret = settings, Path(root), secret
        self._key = read_server_key(Path(settings.keys)) if settings.keys else None
        self._copiers: dict[str, Copier] = {}
        self._store: Store | None = None
        if secret:
            host, _, _ = settings.ingest.removeprefix("tcp://").rpartition(":")
            self._store = Store(host, secret, self._key)
            self._root /= f"{self._node()}-{os.getpid()}"
        self._services: dict[str, Service] = {}
        self._ended = threading.Event()
        sys.setswitchinterval(_SWITCH_INTERVAL_S)

    def start(self, name: str, models: dict[str, str], model: str) -> Server:
        """Start a server on the journal of this name, possibly that of a dead server.

        Args:
            models: model files by id, for sessions of models that are no longer served.
            model: id of the model to serve.

        Raises:
            ServiceError: the server could not start, or the journal is still in use.
        """
        settings = msgspec.structs.replace(self._settings, journal=str(self._root / name))

        def find(wanted: str) -> Engine | None:
            return Engine.load(Path(models[wanted]), settings) if wanted in models else None

        engine, end = Engine.load(Path(models[model]), settings), time.monotonic() + _LOCKED_S
        copier = Copier(name, self._secret, self._key) if self._secret else None
        if self._store is not None:
            self._store.release(name)
        while True:
            try:
                service = Service(engine, settings, find=find, copy=copier)
                break
            except ServiceError as error:  # the previous process may still be exiting
                if error.field != "journal" or time.monotonic() > end:
                    raise
                time.sleep(_AGAIN_S)
        service.start()
        if not service.wait_ready(_WARM_UP_S):
            service.stop()
            raise ServiceError("server", expected="warm", got=f"{name}: still not")
        self._services[name] = service
        if copier is not None:
            self._copiers[name] = copier
            service.telemetry.registry.register(copier)
        gc.collect()
        gc.freeze()
        return Server(name, _seen(service.ingest), _seen(service.results))

    def stop(self, name: str, *, leave: bool) -> None:
        """Stop a server; with ``leave`` its sessions stay open in the journal for another one."""
        self._services.pop(name).stop(leave=leave)
        if (copier := self._copiers.pop(name, None)) is not None:
            copier.close()

    def hold(self, name: str) -> str:
        """Keep a copy of a server's journal from now on; return the address to send it to."""
        assert self._store is not None
        self._store.hold(name, self._root / name)
        return _seen(self._store.address)

    def release(self, name: str) -> None:
        """Keep a copy of a server's journal no longer."""
        assert self._store is not None
        self._store.release(name)

    def aim(self, name: str, address: str) -> None:
        """Copy a server's journal to this store; "" for none."""
        if (copier := self._copiers.get(name)) is not None:
            copier.aim(address)

    def in_step(self) -> dict[str, str]:
        """Return the stores with a complete copy of a server's journal, by server."""
        return {name: at for name, copier in list(self._copiers.items()) if (at := copier.in_step)}

    def close(self) -> None:
        """Stop all servers, end their sessions, and let ``lives`` return."""
        for name in list(self._services):
            self.stop(name, leave=False)
        if self._store is not None:
            self._store.close()
        self._ended.set()

    def lives(self) -> bool:
        """Return when the member is closed; the call fails when it dies."""
        return self._ended.wait()

    def measured(self) -> Measured:
        """Return the CPU time used so far."""
        process = psutil.Process()
        times = process.cpu_times()
        memory = process.memory_info().rss
        failing = frozenset[str]() if self._store is None else self._store.failing
        return Measured(times.user + times.system, time.monotonic(), memory, failing)

    def metrics(self) -> dict[str, bytes]:
        """Return the metrics of each server by name."""
        return {n: generate_latest(s.telemetry.registry) for n, s in self._services.items()}

    def place(self) -> Place:
        """Return where it runs."""
        began_s = psutil.Process().create_time()
        store = "" if self._store is None else _seen(self._store.address)
        return Place(self._node(), os.getpid(), began_s, store)

    def _node(self) -> str:
        import ray

        return ray.get_runtime_context().get_node_id()


def _seen(address: str) -> str:
    """Return an address as seen from other machines.

    A server that binds to all addresses is reached at its node's address in Ray.
    """
    import ray

    host, _, port = address.removeprefix("tcp://").rpartition(":")
    if host not in {"*", "0.0.0.0", "[::]"}:
        return address
    node = ray.util.get_node_ip_address()
    return f"tcp://{f'[{node}]' if ':' in node else node}:{port}"


def actor(cpus: float, gpus: float) -> Any:
    """Return the Ray actor class of a member with these resources."""
    import ray

    made: Any = ray.remote(Member)
    return made.options(
        num_cpus=cpus,
        num_gpus=gpus,
        max_concurrency=8,
        scheduling_strategy="SPREAD",
    )


def end(made: Any, place: Place) -> None:
    """Kill a member's process in any state, without waiting.

    Ray first asks a process to exit, which takes seconds if it hangs. So the process is also killed
    directly, if it runs on this machine, and by a task on its node.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    _kill(place)
    ray.kill(made)
    there = NodeAffinitySchedulingStrategy(place.node, soft=False)
    beside: Any = ray.remote(_kill)
    beside.options(num_cpus=0, max_retries=0, scheduling_strategy=there).remote(place)


def _kill(place: Place) -> None:
    with suppress(psutil.Error):
        process = psutil.Process(place.pid)
        if process.create_time() == place.began_s:
            process.kill()
