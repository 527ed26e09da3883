"""``ilqr-vae monitor``: watch a running service in the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.live import Live

from ilqr_clients.monitor import Monitor, view
from ilqr_vae.errors import ServiceError
from ilqr_vae.files import check_writable, write_whole
from ilqr_vae.terminal import console

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)

EXAMPLE = "Example: ilqr-vae monitor --to tcp://127.0.0.1:5555   Scripts: --once --json now.json"
LISTEN_ONCE_S = 0.3


@app.command(epilog=EXAMPLE)
def monitor(
    to: Annotated[str, typer.Option(help="The service's address.")] = "tcp://127.0.0.1:5555",
    once: Annotated[bool, typer.Option("--once", help="Look once and end.")] = False,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="With --once: write what was seen here; - is stdout."),
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
                    screen.print(view(shown))
                return
            with Live(view(shown), console=screen, auto_refresh=False) as live:
                while True:
                    watching.listen(every)
                    live.update(view(watching.snapshot()), refresh=True)
    except KeyboardInterrupt:
        return
    except ServiceError as error:
        if not seen:
            raise
        raise ServiceError(
            f"service at {to}", expected="to keep answering", got="no answer any more"
        ) from error
