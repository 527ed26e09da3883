"""``ilqr-vae closed-loop``: a simulated subject reaches for targets through a running service."""

from __future__ import annotations

import json
import secrets
import shlex
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.live import Live
from rich.text import Text

from ilqr_clients.closed_loop import (
    ENDLESS,
    LoopLog,
    Reaching,
    metres_per_second,
    own_hand,
    run_loop,
    unit_columns,
    without_decoder,
)
from ilqr_clients.replay_cli import parse_deadline, parse_speed, rivals_of, said, script_of
from ilqr_clients.replay_view import status_text
from ilqr_clients.sdk import Model, ServiceClient, model_of
from ilqr_clients.steering import OURS, Conductor, Steering
from ilqr_clients.stream import CROSSING
from ilqr_vae.errors import ConfigError, number_of
from ilqr_vae.files import STDOUT, check_writable, write_whole
from ilqr_vae.protocol.clock import ClockTrack
from ilqr_vae.report import (
    Reaches,
    ReportData,
    add_cursor,
    check_html,
    distribution,
    render_html,
)
from ilqr_vae.report.data import plain
from ilqr_vae.report.table import Table, latency_table, number, percent, show
from ilqr_vae.simulated.centre_out import FEWEST_SUCCESSES, CentreOut
from ilqr_vae.simulated.disturbance import Change
from ilqr_vae.simulated.subject import Subject
from ilqr_vae.terminal import console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

EXAMPLE = "Example: ilqr-vae closed-loop --trials 24 --speed max --json loop.json"


def check_velocity(model: Model) -> None:
    """Raise ConfigError unless the model's first two channels are velocities."""
    if len(model.kinematic_units) < 2 or None in metres_per_second(model.kinematic_units):
        raise ConfigError(
            "model.kinematic_units",
            expected="a model whose first two channels are velocities, in m/s or a unit like it",
            got=", ".join(model.kinematic_units) or "no kinematics",
        )


def reaches_table(each: dict[str, Reaching]) -> Table:
    """Return the table of reaches; times and efficiency need ``FEWEST_SUCCESSES`` successes."""
    rows: list[tuple[str, ...]] = []
    for name, reaching in each.items():
        s = reaching.summary()
        success = f"{s['successes']} of {s['trials']} ({percent(s['success_rate'])})"
        cells = ("–", "–", "–")
        if s["successes"] >= FEWEST_SUCCESSES:
            median, low, high = (
                number(s[f"time_to_target_{key}"], 2) for key in ("s", "p25_s", "p75_s")
            )
            cells = (median, f"{low} to {high}", number(s["path_efficiency"], 2))
        rows.append((name, success, *cells))
    columns = ("", "success", "time to target (s)", "middle half (s)", "path efficiency")
    return Table("Reaches", "", columns, tuple(rows))


def report_of(
    model: Model,
    log: LoopLog,
    cursor: dict[str, Reaches],
    *,
    latency: dict[str, NDArray[np.float64]],
    now: dict[str, Any],
) -> ReportData:
    """The run as a report; ``now`` is its JSON form."""
    rows, stream = slice(0, log.bins), log.stream
    ours = now["decoder"]
    return ReportData(
        title="Closed loop with a simulated subject",
        kind="closed-loop",
        bin_width=model.bin_width,
        start=0.0,
        counts=np.array(log.counts[: log.bins]).reshape(log.bins, len(model.unit_names)),
        status=tuple(stream.status[rows]),
        latents=stream.latent[rows],
        latents_std=stream.latent_std[rows],
        rates=stream.rates[rows].astype(np.float64),
        learning=model.learning,
        bits_per_spike=now["bits_per_spike"],
        unit_names=model.unit_names,
        names=model.kinematic_names,
        units=model.kinematic_units,
        decoded=stream.kinematics[rows],
        decoded_std=stream.kinematics_std[rows],
        latency_ms=latency,
        deadline_ms=now["deadline_ms"],
        cursor=cursor,
        radius=CentreOut(now["seed"]).radius,
        facts={
            "reaches that succeed": f"{ours['successes']} of {ours['trials']}",
            "median time to target": f"{number(ours['time_to_target_s'], 2)} s",
            "bins moved by an older velocity": str(log.held),
        },
        provenance={
            "model": model.model_id,
            "command": shlex.join(["ilqr-vae", "closed-loop", *sys.argv[2:]]),
        },
    )


@app.command("closed-loop", epilog=EXAMPLE)
def closed_loop(
    to: Annotated[str, typer.Option(help="The service's address.")] = "tcp://127.0.0.1:5555",
    trials: Annotated[int, typer.Option(min=0, help="Number of reaches; 0 until Ctrl-C.")] = 24,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the targets and of this run's noise.")
    ] = 0,
    subject: Annotated[
        int,
        typer.Option(min=0, help="The subject: the --seed that its recording was simulated with."),
    ] = 0,
    units: Annotated[int, typer.Option(min=1, help="Number of units of that subject.")] = 120,
    speed: Annotated[
        str, typer.Option(help="A multiple of real time, or max: as fast as the service answers.")
    ] = "1",
    deadline_ms: Annotated[
        float | None,
        typer.Option(
            help="Deadline of an answer; a later one does not move the cursor in time.",
            show_default="the bin width",
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the numbers here; - is standard output.")
    ] = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", help="Write one self-contained page here.")
    ] = None,
    add_to: Annotated[
        Path | None,
        typer.Option(help="Add the cursor's paths to this page of replay or evaluate."),
    ] = None,
    watch_units: Annotated[
        bool, typer.Option("--watch-units", help="Mask units that misbehave, as for replay.")
    ] = False,
    script: Annotated[
        Path | None, typer.Option(help="TOML of what goes wrong when, as for replay.")
    ] = None,
    steer: Annotated[
        str | None,
        typer.Option(help="Take such changes while it runs: an address to bind, as for replay."),
    ] = None,
    rivals: Annotated[
        Path | None,
        typer.Option(help="A GRU and a Kalman filter (of train --rivals) that may steer instead."),
    ] = None,
    decoder: Annotated[
        str, typer.Option(help="The decoder that steers: iLQR-VAE, GRU or Kalman filter.")
    ] = OURS,
    session: Annotated[
        str | None, typer.Option(help="Name of the session.", show_default="a fresh one")
    ] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to wait for an answer.")] = 5.0,
) -> None:
    """Run a centre-out task in which the service's decodes move a simulated subject's cursor.

    For comparison: the same cursor movements in shuffled order (chance) and the subject's own hand
    (upper bound). Exit codes: 0 done, 2 wrong input or model, 3 no service or it refused.
    """
    pace = parse_speed(speed)
    check_writable(json_file, "--json")
    check_html(html_file, "--html")
    check_html(add_to, "--add-to")
    publishes = pace is not None or steer is not None
    chosen = () if decoder == OURS else (Change(decoder=decoder),)
    screen = console(stderr=True)
    drawn = time.monotonic()
    try:
        with ServiceClient(to, timeout=timeout) as service:
            model = model_of(service.describe())
            model.require_counts("closed-loop")
            check_velocity(model)
            columns = unit_columns(model.unit_names, units)
            deadline = parse_deadline(deadline_ms, model.bin_width)
            steering = Steering(
                len(columns),
                model.bin_width,
                kind="closed-loop",
                seed=seed,
                changes=(*script_of(script), *chosen),
                decoders=rivals_of(rivals, model),
            )
            before = service.clock()
            with (
                service.open(
                    session or f"closed-loop-{secrets.token_hex(4)}",
                    units=model.unit_names,
                    bin_width=model.bin_width,
                    deadline=deadline,
                    watch_units=watch_units,
                    patience=timeout,
                ) as opened,
                Live(console=screen, auto_refresh=False, transient=True) as live,
                (
                    Conductor.of(opened, steering, control=steer, say=screen.print)
                    if publishes
                    else nullcontext()
                ),
            ):

                def watch(log: LoopLog, task: CentreOut) -> None:
                    nonlocal drawn
                    if not screen.is_terminal or time.monotonic() - drawn < 0.5:
                        return
                    drawn = time.monotonic()
                    hits = sum(t.success for t in task.trials)
                    so_far = f"reaches {len(task.trials)} of {trials or '-'}, {hits} successful   "
                    live.update(
                        Text.assemble(
                            f"{so_far}bins {log.bins}   ",
                            status_text(log.statuses),
                            f"   held {log.held}",
                        ),
                        refresh=True,
                    )

                reaching, log = run_loop(
                    opened,
                    Subject(subject, units=units, bin_width=model.bin_width, run=seed + 1),
                    CentreOut(seed),
                    trials=trials or ENDLESS,
                    columns=columns,
                    deadline=deadline,
                    speed=pace,
                    patience=timeout,
                    watch=watch,
                    steering=steering,
                )
                clock = ClockTrack(before, service.clock())
    except KeyboardInterrupt:
        screen.print("interrupted: nothing written")
        raise typer.Exit(130) from None
    width = model.bin_width
    chance = without_decoder(log.velocities, CentreOut(seed), trials=trials, width=width, seed=seed)
    hand = own_hand(Subject(subject, units=units, run=seed + 1), CentreOut(seed), trials=trials)
    rows = slice(0, log.bins)
    latency = {k: distribution(v) for k, v in log.stream.latency_ms(rows, clock).items()}
    for stage in CROSSING:
        latency[stage]["clock_uncertainty"] = clock.uncertainty_ns / 1e6
    result: dict[str, Any] = {
        "schema": 1,
        "kind": "closed-loop",
        "model": model.model_id,
        "subject": subject,
        "seed": seed,
        "speed": pace,
        "steered_by": steering.decoder,
        "changes": [said(change) for change in steering.applied],
        "bins": log.bins,
        "simulated_s": log.bins * width,
        "decoder": reaching.summary(),
        "chance": {"how": "the same velocities in shuffled half-second pieces"} | chance.summary(),
        "own_hand": hand.summary(),
        "statuses": log.statuses,
        "held": log.held,
        "deadline_ms": deadline * 1e3,
        "bits_per_spike": log.stream.bits_per_spike(rows),
        "latency_ms": latency,
        "clock": clock.to_json(),
    }
    if json_file is not None:
        write_whole(json_file, json.dumps(plain(result), indent=2) + "\n")
    cursor = {"decoder": reaching.shown(), "own hand": hand.shown(), "chance": chance.shown()}
    if html_file is not None:
        data = report_of(model, log, cursor, latency=log.stream.latency_ms(rows, clock), now=result)
        write_whole(html_file, render_html(data))
    if add_to is not None:
        add_cursor(add_to, cursor, CentreOut(seed).radius)
    out = console(soft_wrap=True, stderr=json_file == STDOUT)
    out.print(
        f"Closed loop, {number_of(len(reaching.trials), 'reach')}, {number_of(log.bins, 'bin')}",
        style="bold",
    )
    show(reaches_table({"decoder": reaching, "chance": chance, "own hand": hand}), out)
    show(latency_table({"total": latency["total"]}), out)
    bits = log.stream.bits_per_spike(rows)
    out.print(Text("  statuses: ") + status_text(log.statuses))
    out.print(f"  bits per spike {number(bits)}; bins moved by an older velocity: {log.held}")
    if np.isfinite(bits) and bits < 0:
        out.print("  the model explains these spikes worse than their mean: another subject?")
