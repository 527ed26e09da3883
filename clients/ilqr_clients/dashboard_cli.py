"""``ilqr-vae dashboard``: a running service as a page in a browser."""

from __future__ import annotations

import os
import secrets
import socket
import webbrowser
from contextlib import suppress
from importlib.util import find_spec
from threading import Thread
from typing import Annotated

import typer

from ilqr_vae.errors import ConfigError
from ilqr_vae.terminal import console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

EXAMPLE = "Example: ilqr-vae dashboard --to tcp://127.0.0.1:5555 --http 127.0.0.1:8080"
LOOPBACK = frozenset(("127.0.0.1", "localhost", "::1"))
MOST_CONNECTIONS = 256


def open_behind(address: str) -> None:
    """Open the address in a browser; a browser that this starts has idle priority.

    Call it in a separate thread: child processes inherit the thread's scheduling policy, which
    cannot be restored without privileges.
    """
    if hasattr(os, "SCHED_IDLE"):
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    webbrowser.open(address)


def _bound(http: str) -> tuple[socket.socket, str]:
    """Return a socket that listens at HOST:PORT, and the host. Raises ConfigError."""
    host, colon, port = http.rpartition(":")
    host = host.strip("[]")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError("--http", expected="HOST:PORT, e.g. 127.0.0.1:8080", got=repr(http))
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        made = socket.create_server((host, int(port)), family=family)
    except OSError as error:
        raise ConfigError(
            "--http", expected="an address to bind", got=f"{http}: {error}"
        ) from error
    return made, host


@app.command(epilog=EXAMPLE)
def dashboard(
    to: Annotated[str, typer.Option(help="The service's address.")] = "tcp://127.0.0.1:5555",
    http: Annotated[
        str, typer.Option(help="HOST:PORT of the page; port 0 takes a free one.")
    ] = "127.0.0.1:8080",
    open_browser: Annotated[
        bool, typer.Option("--open", help="Open the page in a browser.")
    ] = False,
    what_if: Annotated[
        bool,
        typer.Option(
            "--what-if",
            help="Let viewers steer a replay or closed loop on this machine (its --steer).",
        ),
    ] = False,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to wait for the service.")] = 3.0,
) -> None:
    """Show a running service live in a browser: decodes, rates, latents, latency, alarms.

    It only listens, and does not affect the service. Beyond loopback the address contains a token,
    without which nothing is shown. Ends with Ctrl-C (exit code 0).
    """
    missing = [name for name in ("starlette", "uvicorn") if find_spec(name) is None]
    if missing:
        raise ConfigError(
            "dashboard",
            expected="the extra 'live' (pip install '.[live]')",
            got=f"no {missing[0]}",
        )
    import uvicorn

    from ilqr_clients.live.app import application
    from ilqr_clients.live.feed import LiveFeed

    bound, host = _bound(http)
    inside = host in LOOPBACK
    token = "" if inside else secrets.token_urlsafe(18)
    feed = LiveFeed(to, timeout=timeout, what_if=what_if)
    page = application(feed, hosts=LOOPBACK if inside else frozenset(), token=token)
    name = f"[{host}]" if ":" in host else host
    address = f"http://{name}:{bound.getsockname()[1]}/{f'?token={token}' if token else ''}"
    console(soft_wrap=True).print(f"live page of {to}: {address}   (Ctrl-C ends)")
    if hasattr(os, "nice"):
        os.nice(10)  # a service on this machine has priority
    if open_browser:
        Thread(target=open_behind, args=(address,), daemon=True).start()
    feed.start()
    try:
        config = uvicorn.Config(
            page,
            http="h11",  # limits the size of a request's head
            ws="none",
            log_level="warning",
            access_log=False,
            limit_concurrency=MOST_CONNECTIONS,
            timeout_graceful_shutdown=1,
            lifespan="off",
        )
        with suppress(KeyboardInterrupt):  # uvicorn ends by itself, and raises it again
            uvicorn.Server(config).run(sockets=[bound])
    finally:
        feed.close()
        bound.close()
