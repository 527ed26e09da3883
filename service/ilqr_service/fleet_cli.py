"""``ilqr-vae fleet``: many servers on the nodes of a Ray cluster, behind one address."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from ilqr_service import logs
from ilqr_service.fleet import PATIENCE_S
from ilqr_service.serve_cli import stop_on_signals
from ilqr_service.settings import load_settings
from ilqr_vae.cluster import Address, check_ray, connected
from ilqr_vae.errors import ConfigError
from ilqr_vae.files import write_whole
from ilqr_vae.protocol.keys import read_client_key

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

EXAMPLE = "Example: ilqr-vae fleet model.safetensors --journal /shared/journals --servers 2:8"


@app.command(epilog=EXAMPLE)
def fleet(
    model: Annotated[Path, typer.Argument(help="A model file (.safetensors).")],
    journal: Annotated[
        Path, typer.Option(help="Folder of the journals, which every node sees; sessions resume.")
    ],
    servers: Annotated[
        str, typer.Option(help="How many, or FEWEST:MOST to follow the load.")
    ] = "2",
    cpus: Annotated[float, typer.Option(min=0.1, help="Cores of each server.")] = 1.0,
    gpus: Annotated[float, typer.Option(min=0.0, help="GPUs of each server, or a share.")] = 0.0,
    address: Address = None,
    ingest: Annotated[str | None, typer.Option(help="The fleet's address for clients.")] = None,
    results: Annotated[
        str | None, typer.Option(help="The fleet's address for subscribers.")
    ] = None,
    http: Annotated[str | None, typer.Option(help="HOST:PORT of the /metrics of all.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="Settings of every server in TOML, as for serve.")
    ] = None,
    keys: Annotated[
        str | None, typer.Option(help="Folder of ilqr-vae keys; needed beyond loopback.")
    ] = None,
    key: Annotated[
        Path | None, typer.Option(help="With --keys: the fleet's own key, of all roles.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address that servers bind to on their node; 0.0.0.0 with --keys.")
    ] = "127.0.0.1",
    replicate: Annotated[
        bool,
        typer.Option(
            "--replicate",
            help="--journal is a folder of each machine's own; copy it to a second one.",
        ),
    ] = False,
    patience: Annotated[
        float,
        typer.Option(
            min=1.0,
            help="Seconds without a reply until a server is given up; "
            "three times as long while no server replies.",
        ),
    ] = PATIENCE_S,
    ready_file: Annotated[
        Path | None, typer.Option(help="Once ready, write the addresses here as one JSON line.")
    ] = None,
) -> None:
    """Serve a model by many servers on a Ray cluster, behind one address, until a signal stops it.

    A client opens a session at the fleet's address and is redirected to its server. If a server
    dies or hangs, another one takes over its sessions from its journal. Monitor, dashboard and
    models use the fleet's address; a new model is tried on all servers, then served by one after
    the other. Model, journals and keys must be visible to every node at the same path. Without a
    shared folder for journals, --replicate copies each to a second node as it is written.
    """
    check_ray("fleet")
    overrides: dict[str, Any] = {"ingest": ingest, "results": results, "http": http, "keys": keys}
    settings = load_settings(config, overrides)
    fewest, _, most = servers.partition(":")
    if not (fewest.isdigit() and int(fewest) > 0 and (most or "1").isdigit()):
        raise ConfigError("--servers", expected="a number, or FEWEST:MOST", got=repr(servers))
    if bool(settings.keys) != (key is not None):
        raise ConfigError("--key", expected="a key with --keys, and none without", got=str(key))
    logs.configure(settings.log)
    from ilqr_service.fleet.fleet import Fleet  # importing Ray takes seconds

    # Ray sets a handler of SIGTERM as it connects, so they are set once more
    with stop_on_signals() as early, connected(address), stop_on_signals() as stop:
        if early.is_set():
            return
        running = Fleet(
            model,
            settings,
            journal,
            fewest=int(fewest),
            most=int(most or fewest),
            cpus=cpus,
            gpus=gpus,
            key=None if key is None else read_client_key(key),
            host=host,
            patience=patience,
            replicate=replicate,
        )
        try:
            ready = {
                "ingest": running.gateway.ingest,
                "results": running.gateway.results,
                "http": running.http,
                "servers": [msgspec.structs.asdict(server) for server in running.servers()],
                "pid": os.getpid(),
            }
            logs.info("ready", **ready)
            if ready_file is not None:
                write_whole(ready_file, msgspec.json.encode(ready) + b"\n", "--ready-file")
            stop.wait()
        finally:
            running.close()
            logs.info("stopped")
