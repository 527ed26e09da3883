"""The connection to Ray, for all verbs that run on several machines.

Ray does the scheduling. It is installed by the extra ``ray``: verbs that need it say so, all others
work without. A running cluster is found by its address; otherwise one is started on this machine,
and ended with the ``with`` statement.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Annotated, Any, TypeVar

import typer

from ilqr_vae.errors import ConfigError, ServiceError
from ilqr_vae.files import MIB

Address = Annotated[
    str | None,
    typer.Option(
        help="Address of a Ray cluster: HOST:PORT or auto.", show_default="this machine alone"
    ),
]

T = TypeVar("T")
TASK_RETRIES = 2
"""Retries of a task whose node or worker dies."""
_REACH_S = 5.0
_STORE = 256 * MIB
"""Size of the object store of a local cluster, for models, tables and settings."""


def check_ray(verb: str) -> None:
    """Raise ConfigError if the extra ``ray`` is not installed."""
    if find_spec("ray") is None:
        raise ConfigError(verb, expected="the package ray; try: pip install '.[ray]'", got="none")


def drives_cluster() -> bool:
    """Whether this process is connected to a Ray cluster, and is not one of its workers."""
    ray: Any = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return False
    return bool(ray.get_runtime_context().worker.mode == ray.SCRIPT_MODE)


@contextmanager
def connected(address: str | None = None, *, cpus: int | None = None) -> Generator[None]:
    """Connect to a Ray cluster, or use an existing connection of this process.

    Args:
        address: address of a running cluster; None starts one on this machine, without a dashboard.
        cpus: number of cores of a local cluster; None for all.

    Raises:
        ServiceError: no cluster can be reached at the address, or none can be started here.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    local: dict[str, Any] = {
        "num_cpus": cpus,
        "include_dashboard": False,
        "object_store_memory": _STORE,
    }
    _check_listening(address)
    try:
        ray.init(
            address=address or "local",
            log_to_driver=False,
            logging_level=logging.ERROR,
            **({} if address else local),
        )
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise ServiceError(
            "--address",
            expected="a Ray cluster that can be reached"
            if address
            else "a Ray cluster that can be started on this machine",
            got=f"{address or 'none'} ({error})",
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def as_they_end(running: dict[Any, T]) -> Iterator[tuple[Any, T]]:
    """Yield the references of tasks as they end, with their values, and take them out of it."""
    import ray

    while running:
        ended, _ = ray.wait(list(running), num_returns=1)
        for reference in ended:
            yield reference, running.pop(reference)


def _check_listening(address: str | None) -> None:
    """Raise ServiceError if nothing listens at HOST:PORT, where Ray would retry for minutes."""
    host, _, port = (address or "").rpartition(":")
    if not (host and port.isdigit()) or "/" in host:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_S).close()
    except (OSError, OverflowError) as error:
        raise ServiceError(
            "--address", expected="a Ray cluster that can be reached", got=f"{address} ({error})"
        ) from error
