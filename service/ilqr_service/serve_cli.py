"""``ilqr-vae serve``: load a model and answer spike bins until a signal stops it."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from ilqr_service import logs
from ilqr_service.hygiene import Hygiene
from ilqr_service.server import Service
from ilqr_service.settings import ServiceSettings, load_settings
from ilqr_service.solving.engine import Engine
from ilqr_vae.errors import ConfigError, IlqrVaeError, ServiceError
from ilqr_vae.files import write_whole
from ilqr_vae.machine import address_space, file_limits, raise_file_limit
from ilqr_vae.terminal import STOP_SIGNALS

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
_DEFAULTS = ServiceSettings()

EXAMPLE = (
    "Example: ilqr-vae serve model.safetensors --http 127.0.0.1:9464\n"
    "From a script, with free ports:\n"
    "  ilqr-vae serve model.safetensors --ingest 'tcp://127.0.0.1:*' \\\n"
    "    --results 'tcp://127.0.0.1:*' --http 127.0.0.1:0 --ready-file ready.json"
)

# The solver holds the interpreter lock between torch calls; the I/O thread should not wait the
# default 5 ms for it.
_SWITCH_INTERVAL_S = 2e-4
_WARM_UP_S = 600.0
_DESCRIPTORS = 64
"""File descriptors that a service with a few clients needs."""
_ADDRESSES_MB = 1200
"""Address space for the libraries and a small model, in MB; LLVM aborts without it."""


@app.command(epilog=EXAMPLE)
def serve(
    model: Annotated[Path, typer.Argument(help="A model file (.safetensors).")],
    ingest: Annotated[
        str | None,
        typer.Option(
            help="Address for feeders; tcp://127.0.0.1:* takes a free port.",
            show_default=str(_DEFAULTS.ingest),
        ),
    ] = None,
    results: Annotated[
        str | None,
        typer.Option(help="Address for subscribers.", show_default=str(_DEFAULTS.results)),
    ] = None,
    http: Annotated[
        str | None,
        typer.Option(
            help='HOST:PORT of /metrics, /healthz, /readyz; "" for none.',
            show_default=str(_DEFAULTS.http),
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="Device to compute on: auto, cpu, cuda or cuda:N.",
            show_default=str(_DEFAULTS.device),
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            help="Threads that share the bins solved together; 0 is all cores.",
            show_default=str(_DEFAULTS.threads),
        ),
    ] = None,
    iterations: Annotated[
        int | None,
        typer.Option(
            help="Iterations per bin; 0 is the model's own.", show_default=str(_DEFAULTS.iterations)
        ),
    ] = None,
    horizon: Annotated[
        int | None,
        typer.Option(
            help="Bins in the window; 0 is the model's own.", show_default=str(_DEFAULTS.horizon)
        ),
    ] = None,
    deadline_ms: Annotated[
        float | None,
        typer.Option(
            help="Deadline, in ms, of sessions that state none; 0 is the bin width.",
            show_default=str(_DEFAULTS.deadline_ms),
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="Settings (TOML); options override them.")
    ] = None,
    ready_file: Annotated[
        str | None,
        typer.Option(
            help="Once ready, write the addresses here as one JSON line; - is standard output."
        ),
    ] = None,
    log: Annotated[
        str | None,
        typer.Option(
            help="Format of the log on standard error: plain or json.",
            show_default=str(_DEFAULTS.log),
        ),
    ] = None,
    slot: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=FILE: a further model, for sessions that ask for it; repeat for several."
        ),
    ] = None,
    journal: Annotated[
        str | None,
        typer.Option(
            help="Folder to record everything in; sessions resume from it.", show_default="none"
        ),
    ] = None,
    keys: Annotated[
        str | None,
        typer.Option(help="Folder of ilqr-vae keys; needed beyond loopback.", show_default="none"),
    ] = None,
    cpus: Annotated[
        str | None,
        typer.Option(help="Cores of the I/O and solver threads, e.g. 2-3.", show_default="any"),
    ] = None,
    realtime: Annotated[
        int | None,
        typer.Option(
            help="SCHED_FIFO priority of those threads; 0 is none.",
            show_default=str(_DEFAULTS.realtime),
        ),
    ] = None,
    lock_memory: Annotated[
        bool | None, typer.Option("--lock-memory", help="Lock all memory into RAM.")
    ] = None,
) -> None:
    """Load a model and answer spike bins over ZeroMQ until SIGINT, SIGTERM or SIGHUP.

    When stopped, it answers queued bins, notifies feeders and subscribers, logs latency quantiles
    and exits with 0; while it warms up, it exits at once. Exit codes: 2 wrong model, setting or
    usage; 3 an address cannot be used, or the service failed.
    """
    overrides: dict[str, Any] = {
        "ingest": ingest,
        "results": results,
        "http": http,
        "device": device,
        "threads": threads,
        "iterations": iterations,
        "horizon": horizon,
        "deadline_ms": deadline_ms,
        "log": log,
        "journal": journal,
        "keys": keys,
        "cpus": cpus,
        "realtime": realtime,
        "lock_memory": lock_memory,
    }
    settings = load_settings(config, overrides)
    _check_limits()
    logs.configure(settings.log)
    hygiene = Hygiene(settings)
    hygiene.process()
    with stop_on_signals() as stop:
        service = Service(
            Engine.load(model, settings),
            settings,
            more=_more(slot or [], settings),
            folder=model.parent,
            hygiene=hygiene,
        )
        service.start()
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        try:
            if await_ready(service, stop):
                gc.collect()
                gc.freeze()
                ready = {
                    "ingest": service.ingest,
                    "results": service.results,
                    "http": service.http,
                    "model": service.model,
                    "device": service.device,
                    "pid": os.getpid(),
                    "hygiene": hygiene.report,
                }
                logs.info("ready", **ready)
                if ready_file is not None:
                    write_whole(
                        Path(ready_file), msgspec.json.encode(ready) + b"\n", "--ready-file"
                    )
            elif stop.is_set() and service.warming:
                # Kernels may compile for minutes, in a thread that cannot be interrupted. Nothing
                # was accepted, and open sessions may stay open in the journal.
                logs.info("stopped while warming up")
                os._exit(0)
            while not stop.is_set() and not service.ended.is_set():
                stop.wait(0.2)
        finally:
            service.stop()
            logs.info("stopped", **service.telemetry.summary())
    if isinstance(service.failure, IlqrVaeError):
        raise service.failure
    if service.failure is not None:
        raise ServiceError(
            "service", expected="to run until stopped", got=f"{service.failure!r}"
        ) from service.failure


def _check_limits() -> None:
    """Raise the limit of file descriptors: each client needs two.

    Raises ServiceError if there are too few for any client, or too little address space."""
    _, most = file_limits()
    if most < _DESCRIPTORS:
        raise ServiceError(
            "file descriptors", expected=f"at least {_DESCRIPTORS} (ulimit -n)", got=f"{most:g}"
        )
    raise_file_limit()
    if (space := address_space()) < _ADDRESSES_MB << 20:
        raise ServiceError(
            "address space",
            expected=f"at least {_ADDRESSES_MB} MB (ulimit -v)",
            got=f"{space / 2**20:.0f} MB",
        )


@contextlib.contextmanager
def stop_on_signals() -> Generator[threading.Event]:
    """Yield an event that SIGINT, SIGTERM and SIGHUP set, instead of their default action.

    Under nohup SIGHUP stays ignored.
    """
    stop = threading.Event()
    hung_up = getattr(signal, "SIGHUP", None)  # not on Windows
    before = {
        number: signal.signal(number, lambda *_: stop.set())
        for number in STOP_SIGNALS
        if number != hung_up or signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _more(slots: list[str], settings: ServiceSettings) -> dict[str, Engine]:
    """Load the engines of further slots. Raises ConfigError, ArtifactError."""
    more: dict[str, Engine] = {}
    for text in slots:
        name, equals, path = text.partition("=")
        if not (name and equals and path) or name in more or name == "main":
            raise ConfigError("slot", expected="NAME=FILE, each name once", got=repr(text))
        more[name] = Engine.load(Path(path), settings)
    return more


def await_ready(service: Service, stop: threading.Event) -> bool:
    """Wait until bins are answered; return False if it is stopped or ends before.

    Raises:
        ServiceError: warming up takes too long.
    """
    waited = 0.0
    while not service.wait_ready(0.1):
        waited += 0.1
        if stop.is_set() or service.ended.is_set():
            return False
        if waited > _WARM_UP_S:
            raise ServiceError("warm-up", expected=f"done within {_WARM_UP_S:g} s", got="still not")
    return not stop.is_set()
