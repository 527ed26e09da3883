"""``ilqr-vae bridge``: feed a session from what a lab has, and give the decodes back to it."""

from __future__ import annotations

import threading
from typing import Annotated

import typer

from ilqr_vae.errors import ConfigError
from ilqr_vae.terminal import console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
KINDS = ("lsl",)


@app.command()
def bridge(
    kind: Annotated[str, typer.Argument(help=", ".join(KINDS))],
    stream: Annotated[str, typer.Option(help="Name of the stream of bins or spikes.")],
    session: Annotated[str, typer.Option(help="The session to feed.")],
    to: Annotated[str, typer.Option(help="The service's address.")] = "tcp://127.0.0.1:5555",
    markers: Annotated[str, typer.Option(help="A stream of markers; they become events.")] = "",
    out: Annotated[
        str, typer.Option(help="Name of the stream of decodes; default SESSION-decodes.")
    ] = "",
    duration: Annotated[
        float | None, typer.Option(min=0.1, help="Seconds; default until Ctrl-C.")
    ] = None,
) -> None:
    """Feed a session from a stream of the lab streaming layer, and stream the decodes out.

    A stream with a channel for each unit is one of bins, numbered by a channel bin_index or by
    their stamps; one of a single channel is one of spikes, each sample a unit's position. A source
    or a service that goes away is waited for. What was lost is said as it happens, and counted at
    the end.

    Example: ilqr-vae bridge lsl --stream counts --session rat-7 --markers task
    """
    if kind not in KINDS:
        raise ConfigError("kind", expected=f"one of {', '.join(KINDS)}", got=repr(kind))
    from ilqr_clients.bridges.lsl import LslBridge

    screen, stop = console(stderr=True, soft_wrap=True), threading.Event()
    timer = threading.Timer(duration or 0.0, stop.set)
    with LslBridge(
        to,
        stream,
        session,
        markers=markers,
        out=out or f"{session}-decodes",
        say=lambda line: screen.print(line, markup=False),
    ) as running:
        if duration is not None:
            timer.start()
        try:
            running.run(stop)
        except KeyboardInterrupt:
            stop.set()
        finally:
            timer.cancel()
            counts = ", ".join(f"{n} {what}" for what, n in sorted(running.tally.items()) if n)
            console(soft_wrap=True).print(f"{stream}: {counts or 'nothing came'}", markup=False)
