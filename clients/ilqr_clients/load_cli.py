"""``ilqr-vae load``: put load on a running service and report its latencies."""

from __future__ import annotations

import gc
import json
import secrets
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ilqr_clients.load import Generator
from ilqr_clients.load_schedule import Faults, LoadSize
from ilqr_clients.replay_cli import parse_deadline
from ilqr_clients.sdk import ServiceClient, model_of
from ilqr_vae.files import STDOUT, check_writable, write_whole
from ilqr_vae.report.table import Section, latency_table, show, show_sections
from ilqr_vae.terminal import console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

EXAMPLE = "Example: ilqr-vae load --sessions 20 --duration 30 --drop 0.1 --json -"


@app.command("load", epilog=EXAMPLE)
def command(
    to: Annotated[str, typer.Option(help="The service's address.")] = "tcp://127.0.0.1:5555",
    sessions: Annotated[
        int, typer.Option(min=1, max=10_000, help="Number of concurrent sessions.")
    ] = 1,
    duration: Annotated[float, typer.Option(min=0.01, help="Seconds to send for.")] = 10.0,
    speed: Annotated[float, typer.Option(min=0.001, help="A multiple of real time.")] = 1.0,
    deadline_ms: Annotated[
        float, typer.Option(min=0.0, help="Deadline from arrival to answer; 0 is the bin width.")
    ] = 0.0,
    clocked: Annotated[
        bool,
        typer.Option("--clocked", help="Have overdue bins answered at once, as missing."),
    ] = False,
    anytime: Annotated[
        bool, typer.Option("--anytime", help="Let the deadline cut a solve short.")
    ] = False,
    rate: Annotated[float, typer.Option(min=0.0, help="Mean spikes per unit and bin.")] = 1.0,
    warm_up: Annotated[
        int, typer.Option(min=0, help="Bins sent first to each session and not timed.")
    ] = 0,
    drop: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of bins not sent.")] = 0.0,
    duplicate: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of bins sent twice.")
    ] = 0.0,
    reorder: Annotated[
        int, typer.Option(min=0, help="Largest number of places by which a bin is sent late.")
    ] = 0,
    jitter: Annotated[float, typer.Option(min=0.0, help="Largest delay, in bin widths.")] = 0.0,
    stall: Annotated[
        float, typer.Option(min=0.0, help="Seconds without a send, half-way through.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of all random draws.")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the numbers here; - is standard output.")
    ] = None,
) -> None:
    """Send synthetic bins to a running service; latency counts from the intended send (open loop).

    Exit codes: 0 done, 2 wrong usage, 3 no service or it refused.
    """
    check_writable(json_file, "--json")
    deadline = parse_deadline(deadline_ms or None, 0.0)
    with ServiceClient(to) as service:
        width = model_of(service.describe()).bin_width
    load = LoadSize(
        sessions=sessions,
        bins=warm_up + max(1, round(duration * speed / width)),
        warm_up=warm_up,
        speed=speed,
        deadline=deadline,
        clocked=clocked,
        anytime=anytime,
        rate=rate,
    )
    faults = Faults(
        drop=drop, duplicate=duplicate, reorder=reorder, jitter=jitter, stall=stall, seed=seed
    )
    with Generator(to, load, faults, prefix=f"load-{secrets.token_hex(3)}") as generator:
        generator.open()
        gc.collect()
        gc.disable()  # a collection would pause the sends, and there are no cycles to collect
        try:
            outcome = generator.run().to_json()
        finally:
            gc.enable()
    if json_file is not None:
        write_whole(json_file, json.dumps(outcome, indent=2) + "\n")
    if json_file != STDOUT:
        show_outcome(outcome, console(soft_wrap=True))


def show_outcome(outcome: dict[str, Any], screen: Console) -> None:
    """Print an outcome's JSON: its counts, and quantiles of the times."""
    stages = {k.removesuffix("_ms"): v for k, v in outcome.items() if k.endswith("_ms")}
    show(latency_table(stages), screen)
    rows = {
        key.replace("_", " "): ", ".join(f"{k} {v}" for k, v in value.items()) or "none"
        if isinstance(value, dict)
        else str(value)
        for key, value in outcome.items()
        if not key.endswith("_ms") and value is not None
    }
    show_sections([Section("Bins", tuple(rows.items()))], screen)
