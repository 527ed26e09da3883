"""``ilqr-vae monitor``: watch a running service in the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.text import Text

from ilqr_clients.monitor import Monitor, ServiceState, view
from ilqr_vae.errors import ServiceError
from ilqr_vae.files import check_writable, write_whole
from ilqr_vae.terminal import console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

EXAMPLE = (
    "Example: ilqr-vae monitor --to tcp://127.0.0.1:5555\n"
    "In a script: ilqr-vae monitor --once --json now.json"
)
LISTEN_ONCE_S = 0.3


@app.command(epilog=EXAMPLE)
def monitor(
    to: Annotated[str, typer.Option(help="The service's address.")] = "tcp://127.0.0.1:5555",
    once: Annotated[bool, typer.Option("--once", help="Look once, then exit.")] = False,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="With --once: write the numbers here; - is standard output."),
    ] = None,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between looks.")] = 0.5,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to wait for an answer.")] = 3.0,
) -> None:
    """Watch a running service: sessions, statuses, solve times, bits per spike, newest decodes.

    Ends with Ctrl-C (exit code 0), or with 3 and a message when the service goes away.
    """
    check_writable(json_file, "--json")
    screen = console()
    seen = False
    try:
        with Monitor(to, timeout=timeout) as watching:
            shown = watching.snapshot()
            seen = True
            if once or json_file is not None:
                watching.listen(LISTEN_ONCE_S)
                shown = watching.snapshot()
                if json_file is not None:
                    write_whole(json_file, json.dumps(shown.to_json(), indent=2) + "\n")
                else:
                    screen.print(view(shown, screen.width))
                return
            with Live(_fitting(shown, screen), console=screen, auto_refresh=False) as live:
                while True:
                    watching.listen(every)
                    live.update(_fitting(watching.snapshot(), screen), refresh=True)
    except KeyboardInterrupt:
        if not seen or once or json_file is not None:
            raise  # what was asked for was not shown
    except ServiceError as error:
        if not seen:
            raise
        raise ServiceError(
            f"service at {to}", expected="to keep answering", got="no answer any more"
        ) from error


def _fitting(shown: ServiceState, screen: Console) -> Text:
    """Return the view for the current size of the terminal."""
    return view(shown, screen.width, screen.height if screen.is_terminal else None)
