"""``ilqr-vae keys``: create, list and revoke the keys of clients."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from ilqr_vae.errors import ConfigError
from ilqr_vae.protocol import keys as store

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

EXAMPLE = "Example: ilqr-vae keys keys/ rig-3 --role feed --role read"


@app.command(epilog=EXAMPLE)
def keys(
    folder: Annotated[
        Path, typer.Argument(help="Folder of the keys; it is made if it does not exist.")
    ],
    name: Annotated[
        str | None,
        typer.Argument(help="Name of a client.", show_default="none: the keys are listed"),
    ] = None,
    role: Annotated[
        list[str] | None,
        typer.Option(help="What the client may do: feed, read or control; repeat for several."),
    ] = None,
    revoke: Annotated[bool, typer.Option("--revoke", help="Revoke the key of NAME.")] = False,
) -> None:
    """Create a client's key, list the admitted clients, or revoke a key.

    The service reads the folder (ilqr-vae serve MODEL --keys keys/), a client its own file
    (ILQR_VAE_KEY=rig-3.key ilqr-vae replay ...). A running service applies changes of the list.
    """
    if name is None:
        store.make_server_key(folder)
        for client in store.read_authorized(folder).client:
            typer.echo(f"{client.name}  {', '.join(client.roles)}  {client.public}")
        return
    if revoke:
        store.revoke_client(folder, name)
        typer.echo(f"{name} is let in no more")
        return
    try:
        roles = msgspec.convert(tuple(role or ("feed", "read")), tuple[store.Role, ...])
    except msgspec.ValidationError as error:
        raise ConfigError(
            "role", expected=f"some of {', '.join(store.ROLES)}", got=", ".join(role or ())
        ) from error
    typer.echo(str(store.add_client(folder, name, roles)))
