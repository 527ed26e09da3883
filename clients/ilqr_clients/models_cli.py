"""``ilqr-vae models``: list and replace the models of a running service."""

from __future__ import annotations

from typing import Annotated

import typer

from ilqr_clients.sdk import ServiceClient
from ilqr_vae.errors import ConfigError
from ilqr_vae.report.table import Table, number, show
from ilqr_vae.terminal import console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

EXAMPLE = (
    "Example: ilqr-vae models shadow newer.safetensors\n  ilqr-vae models\n  ilqr-vae models swap"
)
PATIENCE_S = 3.0
ACTIONS = ("list", "load", "shadow", "swap", "rollback")


@app.command(epilog=EXAMPLE)
def models(
    action: Annotated[str, typer.Argument(help=f"What to do: {', '.join(ACTIONS)}.")] = "list",
    path: Annotated[
        str,
        typer.Argument(
            help="With load and shadow: a file in the service's model folder.", show_default=False
        ),
    ] = "",
    to: Annotated[str, typer.Option(help="The service's address.")] = "tcp://127.0.0.1:5555",
    slot: Annotated[str, typer.Option(help="The slot.", show_default="the service's first")] = "",
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds to wait for load and shadow.")
    ] = 120.0,
) -> None:
    """List, load, swap or roll back the models of a running service.

    load serves a file once it is warm. shadow runs it beside the served model, so that their scores
    can be compared (list). swap then serves it. rollback drops a shadow, or serves the previous
    model. Sessions switch at their next bin. A refused file changes nothing. If no service answers,
    the command fails within seconds.
    """
    if action not in ACTIONS:
        raise ConfigError("action", expected=", ".join(ACTIONS), got=repr(action))
    if action in ("load", "shadow") and not path:
        raise ConfigError("path", expected="a model file", got="none")
    with ServiceClient(to, timeout=min(timeout, PATIENCE_S)) as service:
        match action:
            case "load" | "shadow":
                service.describe()  # check that it answers: a model may take long
                infos = service.load(path, slot=slot, shadow=action == "shadow", timeout=timeout)
            case "swap":
                infos = service.swap(slot)
            case "rollback":
                infos = service.roll_back(slot)
            case _:
                infos = service.models()
    screen = console(soft_wrap=True)
    rows = [
        (
            info.slot,
            info.role,
            info.model,
            str(info.bins),
            number(info.bits_per_spike if info.bins else None),
        )
        for info in infos
    ]
    columns = ("slot", "role", "model", "bins", "bits per spike")
    show(Table(f"Models of {to}", "", columns, tuple(rows), words=3), screen)
