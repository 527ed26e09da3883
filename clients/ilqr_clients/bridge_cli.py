"""``ilqr-vae bridge``: feed a session from a lab's streams, and return the decodes."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Annotated, Any

import typer

from ilqr_clients.bridges.core import Bridge
from ilqr_vae.errors import ConfigError
from ilqr_vae.terminal import console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

EXAMPLE = "Example: ilqr-vae bridge openephys --stream tcp://127.0.0.1:5556 --session rat-7"


def _lsl(*arguments: Any, markers: str, out: str, threshold: float, **options: Any) -> Bridge:
    from ilqr_clients.bridges.lsl import LslBridge

    return LslBridge(*arguments, markers=markers, out=out, **options)


def _openephys(*arguments: Any, markers: str, out: str, threshold: float, **options: Any) -> Bridge:
    from ilqr_clients.bridges.openephys import OpenEphysBridge

    return OpenEphysBridge(*arguments, **options)


def _synapse(*arguments: Any, markers: str, out: str, threshold: float, **options: Any) -> Bridge:
    from ilqr_clients.bridges.synapse import SynapseBridge

    return SynapseBridge(*arguments, threshold=threshold, **options)


KINDS: dict[str, Callable[..., Bridge]] = {
    "lsl": _lsl,
    "openephys": _openephys,
    "synapse": _synapse,
}


@app.command(epilog=EXAMPLE)
def bridge(
    kind: Annotated[str, typer.Argument(help=f"Where the stream comes from: {', '.join(KINDS)}.")],
    stream: Annotated[
        str,
        typer.Option(help="Name of the LSL stream; address of the Open Ephys plugin or the tap."),
    ],
    session: Annotated[str, typer.Option(help="The session to feed.")],
    to: Annotated[str, typer.Option(help="The service's address.")] = "tcp://127.0.0.1:5555",
    markers: Annotated[
        str, typer.Option(help="lsl: name of a stream of markers, which become events.")
    ] = "",
    out: Annotated[
        str,
        typer.Option(help="lsl: name of the stream of decodes.", show_default="SESSION-decodes"),
    ] = "",
    threshold: Annotated[
        float,
        typer.Option(
            min=1.0, help="synapse: threshold of spikes in broadband data, in sd of the noise."
        ),
    ] = 4.5,
    duration: Annotated[
        float | None, typer.Option(min=0.1, help="Seconds to run for.", show_default="until Ctrl-C")
    ] = None,
) -> None:
    """Feed a session from a stream of the lab streaming layer, Open Ephys or Synapse.

    lsl: a stream with a channel per unit contains bins, numbered by a channel bin_index or by their
        time stamps. A stream with a single channel contains spikes, each sample the position of a
        unit. Decodes are streamed out. openephys: spikes and TTL events of the ZMQ Interface
        plugin. synapse: spike trains or broadband data of a tap.

    The bridge waits for a source or service that goes away, until Ctrl-C or SIGTERM; it ends if
    another client opens its session. Losses are reported when they occur,
    and counted at the end.
    """
    if kind not in KINDS:
        raise ConfigError("kind", expected=f"one of {', '.join(KINDS)}", got=repr(kind))
    screen, stop = console(stderr=True, soft_wrap=True), threading.Event()
    timer = threading.Timer(duration or 0.0, stop.set)
    with KINDS[kind](
        to,
        stream,
        session,
        markers=markers,
        out=out or f"{session}-decodes",
        threshold=threshold,
        say=lambda line: screen.print(line, markup=False),
    ) as running:
        screen.print(f"feeds session {session} from {stream}; Ctrl-C ends it")
        if duration is not None:
            timer.start()
        before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
        try:
            running.run(stop)
        except KeyboardInterrupt:
            stop.set()
        finally:
            signal.signal(signal.SIGTERM, before)
            timer.cancel()
            counts = ", ".join(f"{n} {what}" for what, n in sorted(running.tally.items()) if n)
            console(soft_wrap=True).print(f"{stream}: {counts or 'nothing came'}", markup=False)
