"""The service's settings: defaults, a TOML file, and options on the command line, in that order."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from ilqr_vae.errors import ConfigError, ServiceError
from ilqr_vae.files import read_toml, to_struct, unit

_DAY_S = 86_400.0


class ServiceSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How to serve a model.

    Attributes:
        ingest: ZeroMQ address for feeders and requests; ``tcp://127.0.0.1:*`` takes a free port.
        results: ZeroMQ address for subscribers.
        http: HOST:PORT of /metrics, /healthz and /readyz; port 0 takes a free one; "" for none.
        device: cpu, cuda, cuda:N, or auto (cuda where torch sees one).
        threads: that share the bins solved together; 0 is as many as there are cores. A bin that
            is solved alone takes one.
        iterations, horizon: instead of the model's own; 0 keeps them.
        deadline_ms: for sessions that state none; 0 is the bin width.
        credits: bins a feeder may have unanswered.
        gap_limit: longest gap answered bin by bin.
        max_sessions: open at once.
        idle_s: a session silent for longer ends.
        drain_s: longest time to answer what is queued when it is stopped.
        max_message_bytes: a larger message is refused; one beyond four times that cuts its sender
            off.
        results_queue: results kept for a subscriber that does not read.
        log: plain lines or JSON ones.
        journal: folder of the journal; "" is none.
        journal_sync: ``always`` (an fsync before anything counts), ``interval`` (each second),
            ``never``.
        journal_segment_mb: megabytes after which a new file is begun.
        journal_keep: files kept; 0 is all.
        snapshot_every: bins of a session between snapshots.
        keys: folder of CURVE keys and the allow-list (``ilqr-vae keys``); "" is open to all on
            loopback.
        control_rate: requests other than bins a second, of one sender.
        models: folder that models are loaded from; "" is that of the first.
        keep_warm_ms: a step that nobody sees is made after so long without a bin; 0 is never.
        cpus: cores for the I/O and solver threads, e.g. ``2-3``; "" is any.
        slice_ms: processor time that the I/O and solver threads ask for at a stretch. The shorter,
            the sooner Linux lets them run once there is something to do; 0 does not ask.
        realtime: SCHED_FIFO priority of those threads; 0 is none.
        lock_memory: keep all memory out of swap.
        malloc: ``keep`` has the C library keep up to 64 MB of freed memory for what comes next,
            where it can; ``auto`` leaves it alone.
        gc: ``idle`` collects garbage while nothing is queued, at the latest each minute; ``auto``
            is Python's own way.
    """

    ingest: str = "tcp://127.0.0.1:5555"
    results: str = "tcp://127.0.0.1:5556"
    http: str = "127.0.0.1:9464"
    device: str = "auto"
    threads: Annotated[int, msgspec.Meta(ge=0, le=4096), unit("threads")] = 0
    iterations: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 0
    horizon: Annotated[int, msgspec.Meta(ge=0, le=10_000), unit("bins")] = 0
    deadline_ms: Annotated[float, msgspec.Meta(ge=0, le=3_600_000), unit("ms")] = 0.0
    credits: Annotated[int, msgspec.Meta(gt=0, le=100_000), unit("bins")] = 64
    gap_limit: Annotated[int, msgspec.Meta(ge=0, le=100_000), unit("bins")] = 100
    max_sessions: Annotated[int, msgspec.Meta(gt=0, le=100_000), unit("sessions")] = 256
    idle_s: Annotated[float, msgspec.Meta(gt=0, le=365 * _DAY_S), unit("s")] = 600.0
    drain_s: Annotated[float, msgspec.Meta(ge=0, le=_DAY_S), unit("s")] = 5.0
    max_message_bytes: Annotated[int, msgspec.Meta(ge=1024, le=1 << 30), unit("bytes")] = 1 << 20
    results_queue: Annotated[int, msgspec.Meta(gt=0, le=10_000_000), unit("results")] = 10_000
    log: Literal["plain", "json"] = "plain"
    journal: str = ""
    journal_sync: Literal["always", "interval", "never"] = "interval"
    journal_segment_mb: Annotated[float, msgspec.Meta(ge=0.001, le=1e6), unit("MB")] = 256.0
    journal_keep: Annotated[int, msgspec.Meta(ge=0, le=1_000_000), unit("files")] = 0
    snapshot_every: Annotated[int, msgspec.Meta(gt=0, le=64), unit("bins")] = 50
    keys: str = ""
    control_rate: Annotated[float, msgspec.Meta(ge=0.001, le=1e9), unit("requests/s")] = 1000.0
    models: str = ""
    keep_warm_ms: Annotated[float, msgspec.Meta(ge=0, le=_DAY_S * 1e3), unit("ms")] = 200.0
    cpus: str = ""
    slice_ms: Annotated[float, msgspec.Meta(ge=0, le=100), unit("ms")] = 0.1
    realtime: Annotated[int, msgspec.Meta(ge=0, le=99)] = 0
    lock_memory: bool = False
    malloc: Literal["keep", "auto"] = "keep"
    gc: Literal["idle", "auto"] = "idle"


def load_settings(path: Path | None, overrides: dict[str, Any]) -> ServiceSettings:
    """Settings from a TOML file (or none), with overrides that are not None on top.

    Raises:
        ConfigError: no such file, not TOML, an unknown key, a value of the wrong type or range.
    """
    values: dict[str, Any] = {} if path is None else read_toml(path, dict[str, Any])
    values |= {key: value for key, value in overrides.items() if value is not None}
    for key, value in values.items():
        if isinstance(value, str) and ("\0" in value or not _encodable(value)):
            raise ConfigError(key, expected="text in UTF-8, without NUL", got=ascii(value))
    return to_struct(values, ServiceSettings, "config")


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes of a command line that are not UTF-8
        return False
    return True


_ENDPOINT = re.compile(r"tcp://(\[[0-9a-fA-F:]+\]|[A-Za-z0-9.-]+|\*):(\d{1,5}|\*)")


def loopback_endpoint(field: str, endpoint: str, *, secured: bool = False) -> str:
    """``endpoint`` as libzmq binds it; port 0 becomes ``*`` (a free port).

    Raises:
        ServiceError: not tcp://HOST:PORT, or beyond loopback, which is refused where the service
            cannot tell who connects (it has no keys).
    """
    match = _ENDPOINT.fullmatch(endpoint)
    port = match[2] if match else ""
    if match is None or (port != "*" and int(port) > 65535):
        raise ServiceError(field, expected="tcp://HOST:PORT", got=repr(endpoint))
    host = match[1].strip("[]")
    if host != "localhost":
        try:
            local = ipaddress.ip_address(host).is_loopback
        except ValueError:
            local = False
        if not (local or secured):
            raise ServiceError(
                field,
                expected="a loopback address such as tcp://127.0.0.1:5555 "
                "or --keys (without, anyone who reaches the port could feed)",
                got=repr(endpoint),
            )
    name = "127.0.0.1" if host == "localhost" else match[1]
    return f"tcp://{name}:{'*' if port in {'0', '*'} else port}"


def http_address(address: str) -> tuple[str, int]:
    """Host and port of HOST:PORT. Raises ServiceError where it is not that."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        raise ServiceError("http", expected="HOST:PORT", got=repr(address))
    return host.strip("[]"), int(port)
