"""A member of a fleet: a process on some node that runs servers, as a Ray actor.

A server is a ``Service`` with a journal folder of its own. A member begins with one, and takes up
those of members that died: what is in the folder goes on as after a restart.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import psutil
from prometheus_client import generate_latest

from ilqr_service.server import Service
from ilqr_service.settings import ServiceSettings
from ilqr_service.solving.engine import Engine
from ilqr_vae.errors import ServiceError

_WARM_UP_S = 600.0
_LOCKED_S, _AGAIN_S = 10.0, 0.1
_SWITCH_INTERVAL_S = 2e-4


class Server(msgspec.Struct, frozen=True):
    """A server of a fleet: its name (that of its journal folder) and its addresses."""

    name: str
    ingest: str
    results: str


class Measured(msgspec.Struct, frozen=True):
    """Seconds of CPU that a member's process has used, at a time of its monotonic clock."""

    cpu_s: float
    at_s: float
    memory: int


class Member:
    """Runs servers; every method is called through Ray.

    Args:
        model: file; each server loads it.
        settings: of every server; addresses and journal are its own.
        root: folder of the journals, which every node sees.
    """

    def __init__(self, model: str, settings: ServiceSettings, root: str) -> None:
        self._model, self._settings, self._root = Path(model), settings, Path(root)
        self._services: dict[str, Service] = {}
        self._ended = threading.Event()
        sys.setswitchinterval(_SWITCH_INTERVAL_S)

    def start(self, name: str, model: str = "") -> Server:
        """Start a server on the journal of that name, which may be a dead one's.

        Args:
            model: file that it serves instead of the first.

        Raises:
            ServiceError: it cannot start, or the journal is still in use.
        """
        path = Path(model) if model else self._model
        settings = msgspec.structs.replace(self._settings, journal=str(self._root / name))
        engine, end = Engine.load(path, settings), time.monotonic() + _LOCKED_S
        while True:
            try:
                service = Service(engine, settings, folder=path.parent)
                break
            except ServiceError as error:  # who held it may still be dying
                if error.field != "journal" or time.monotonic() > end:
                    raise
                time.sleep(_AGAIN_S)
        service.start()
        if not service.wait_ready(_WARM_UP_S):
            service.stop()
            raise ServiceError("server", expected="warm", got=f"{name}: still not")
        self._services[name] = service
        gc.collect()
        gc.freeze()
        return Server(name, service.ingest, service.results)

    def stop(self, name: str, *, leave: bool) -> None:
        """Stop a server; with ``leave`` its sessions stay open in the journal, for another."""
        self._services.pop(name).stop(leave=leave)

    def close(self) -> None:
        """Stop all servers and end ``lives``."""
        for name in list(self._services):
            self.stop(name, leave=False)
        self._ended.set()

    def lives(self) -> bool:
        """Returns when the member is closed; fails when it dies."""
        return self._ended.wait()

    def measured(self) -> Measured:
        """What it costs so far."""
        process = psutil.Process()
        times = process.cpu_times()
        memory = process.memory_info().rss
        return Measured(times.user + times.system, time.monotonic(), memory)

    def metrics(self) -> dict[str, bytes]:
        """What each server's /metrics would show, by its name."""
        return {n: generate_latest(s.telemetry.registry) for n, s in self._services.items()}

    def place(self) -> tuple[str, int]:
        """The node, by Ray's name, and the process."""
        import ray

        return ray.get_runtime_context().get_node_id(), os.getpid()


def actor(cpus: float, gpus: float) -> Any:
    """The Ray actor class of a member that has so many cores and GPUs."""
    import ray

    made: Any = ray.remote(Member)
    return made.options(
        num_cpus=cpus,
        num_gpus=gpus,
        max_concurrency=8,
        scheduling_strategy="SPREAD",
    )
