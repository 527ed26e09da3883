"""Settings of the service: defaults, overridden by a TOML file, overridden by options."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from ilqr_vae.errors import ConfigError, ServiceError
from ilqr_vae.files import naming, read_toml, to_struct, unit

_DAY_S = 86_400.0


class ServiceSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How to serve a model.

    Attributes:
        ingest: ZeroMQ address for feeders and requests; ``tcp://127.0.0.1:*`` takes a free port.
        results: ZeroMQ address for subscribers.
        http: HOST:PORT of /metrics, /healthz and /readyz; port 0 takes a free one; "" for none.
        device: cpu, cuda, cuda:N, or auto (cuda if available).
        threads: threads that share the bins solved together; 0 for all cores. A single bin uses
            one.
        iterations, horizon: override the model's own; 0 keeps them.
        deadline_ms: deadline of sessions that state none; 0 is the bin width.
        credits: number of bins that a feeder may have unanswered.
        gap_limit: longest gap, in bins, that is answered bin by bin.
        max_sessions: largest number of open sessions.
        idle_s: a session that is silent for longer ends.
        drain_s: longest time to answer queued bins when stopped.
        max_message_bytes: a larger message is refused; one of more than four times that disconnects
            its sender.
        results_queue: number of results kept for a subscriber that does not read.
        log: plain lines or JSON.
        journal: folder of the journal; "" for none.
        journal_sync: ``always`` (an fsync before anything counts), ``interval`` (each second),
            ``never``.
        journal_segment_mb: size in megabytes at which a new file is started.
        journal_keep: number of files to keep; 0 for all.
        snapshot_every: bins of a session between snapshots.
        keys: folder of CURVE keys and the allow-list (``ilqr-vae keys``); "" is open to all on
            loopback.
        control_rate: requests other than bins per second and sender.
        models: folder from which models are loaded; "" is that of the first model.
        keep_warm_ms: after this time without a bin a hidden step keeps caches and clocks warm; 0 is
            never.
        cpus: cores for the I/O and solver threads, e.g. ``2-3``; "" for any.
        slice_ms: time slice of the I/O and solver threads. The shorter it is, the sooner Linux
            schedules them; 0 keeps the default.
        realtime: SCHED_FIFO priority of these threads; 0 for none.
        lock_memory: keep all memory out of swap.
        malloc: ``keep`` lets the C library retain up to 64 MB of freed memory, if supported;
            ``auto`` is its default.
        gc: ``idle`` collects garbage while nothing is queued, or at the latest each minute;
            ``auto`` is Python's default.
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
    """Load settings from a TOML file, if any, and apply the overrides that are not None.

    Raises:
        ConfigError: there is no such file, it is not TOML, a key is unknown, or a value has the
            wrong type or range.
    """
    values: dict[str, Any] = {} if path is None else read_toml(path, dict[str, Any])
    values |= {key: value for key, value in overrides.items() if value is not None}
    try:
        for key, value in values.items():
            if isinstance(value, str) and ("\0" in value or not _encodable(value)):
                raise ConfigError(key, expected="text in UTF-8, without NUL", got=ascii(value))
        return to_struct(values, ServiceSettings, "config")
    except ConfigError as error:
        if path is None or overrides.get(error.field) is not None:
            raise
        with naming(path):
            raise


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a command line may hold bytes that are not UTF-8
        return False
    return True


_ENDPOINT = re.compile(r"tcp://(\[[0-9a-fA-F:]+\]|[A-Za-z0-9.-]+|\*):(\d{1,5}|\*)")


def loopback_endpoint(field: str, endpoint: str, *, secured: bool = False) -> str:
    """Return ``endpoint`` in the form of libzmq; port 0 becomes ``*`` (a free port).

    Raises:
        ServiceError: it is not tcp://HOST:PORT, or is beyond loopback while the service has no keys
            and cannot tell who connects.
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
    """Split HOST:PORT. Raises ServiceError if it is malformed."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        raise ServiceError("http", expected="HOST:PORT", got=repr(address))
    return host.strip("[]"), int(port)
