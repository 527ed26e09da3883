"""``ilqr-vae models``: what a running service serves, and putting another model in its place."""

from __future__ import annotations

from typing import Annotated

import typer

from ilqr_clients.sdk import ServiceClient
from ilqr_vae.errors import ConfigError
from ilqr_vae.terminal import console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
PATIENCE_S = 3.0
ACTIONS = ("list", "load", "shadow", "swap", "rollback")


@app.command()
def models(
    action: Annotated[str, typer.Argument(help=", ".join(ACTIONS))] = "list",
    path: Annotated[
        str, typer.Argument(help="For load and shadow: a file in the service's model folder.")
    ] = "",
    to: Annotated[str, typer.Option(help="The service's address.")] = "tcp://127.0.0.1:5555",
    slot: Annotated[str, typer.Option(help="Default the service's first.")] = "",
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds that load and shadow may take.")
    ] = 120.0,
) -> None:
    """List, load, swap or roll back the models of a running service.

    load serves a file once it is warm; shadow runs it beside what is served, so that both scores
    can be compared (list); swap then serves it; rollback drops a shadow, else serves what served
    before. Sessions change over at their next bin. A refused file changes nothing. Where nothing
    answers at the address, that is said within seconds.

    Example: ilqr-vae models shadow newer.safetensors; ilqr-vae models; ilqr-vae models swap
    """
    if action not in ACTIONS:
        raise ConfigError("action", expected=", ".join(ACTIONS), got=repr(action))
    if action in ("load", "shadow") and not path:
        raise ConfigError("path", expected="a model file", got="none")
    with ServiceClient(to, timeout=min(timeout, PATIENCE_S)) as service:
        match action:
            case "load" | "shadow":
                service.describe()  # is there one? A model may take long
                infos = service.load(path, slot=slot, shadow=action == "shadow", timeout=timeout)
            case "swap":
                infos = service.swap(slot)
            case "rollback":
                infos = service.roll_back(slot)
            case _:
                infos = service.models()
    screen = console(soft_wrap=True)
    for info in infos:
        score = f"  {info.bits_per_spike:.4f} bits/spike over {info.bins} bins" if info.bins else ""
        screen.print(f"{info.slot:<12} {info.role:<8} {info.model}{score}")
