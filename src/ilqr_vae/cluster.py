"""Work on many machines: the way to Ray, for every verb that uses it.

Ray schedules; nothing here does. It is the extra ``ray``: verbs that need it say so, all others
work without. A cluster that runs already is found by its address; else one is started on this
machine, and ended with the ``with`` statement.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Generator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Annotated, Any

import typer

from ilqr_vae.errors import ConfigError, ServiceError
from ilqr_vae.files import MIB

Address = Annotated[
    str | None,
    typer.Option(
        help="Address of a Ray cluster: HOST:PORT or auto.", show_default="this machine alone"
    ),
]

_REACH_S = 5.0
_STORE = 256 * MIB
"""Of the object store of a cluster on this machine: models, tables and settings go through it."""


def check_ray(verb: str) -> None:
    """Refuse to begin what needs Ray. Raises ConfigError: the extra ``ray`` is not installed."""
    if find_spec("ray") is None:
        raise ConfigError(verb, expected="the package ray; try: pip install '.[ray]'", got="none")


@contextmanager
def connected(address: str | None = None, *, cpus: int | None = None) -> Generator[None]:
    """A connection to a Ray cluster; one that this process has already is used as it is.

    Args:
        address: of a cluster that runs; None starts one on this machine, without a dashboard.
        cpus: cores that the one on this machine counts; None is all.

    Raises:
        ServiceError: no cluster can be reached there, or none can be started here.
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


def _check_listening(address: str | None) -> None:
    """Ray itself tries for minutes. Raises ServiceError: nothing listens at HOST:PORT."""
    host, _, port = (address or "").rpartition(":")
    if not (host and port.isdigit()) or "/" in host:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_S).close()
    except (OSError, OverflowError) as error:
        raise ServiceError(
            "--address", expected="a Ray cluster that can be reached", got=f"{address} ({error})"
        ) from error
