"""``ilqr-vae replay``: stream a recording through a running service and report."""

from __future__ import annotations

import secrets
import shlex
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import typer
from rich.console import Console
from rich.text import Text

from ilqr_clients.player import Player, as_played
from ilqr_clients.replay_report import Ending, Replay, arrays_of, report_of
from ilqr_clients.replay_view import LiveReplay, status_text
from ilqr_clients.sdk import Model, ServiceClient, Session, model_of
from ilqr_clients.span import part_of
from ilqr_clients.steering import Conductor, Steering
from ilqr_clients.stream import StreamLog, stream_from
from ilqr_vae.errors import ConfigError, number_of
from ilqr_vae.files import STDOUT, read_toml
from ilqr_vae.recordings import RecordingSpec
from ilqr_vae.recordings.split import parse_span, plan_drops, warmup_start
from ilqr_vae.report import Outputs, ReportData, distribution
from ilqr_vae.report.table import latency_table, number, scores_table, show
from ilqr_vae.scoring.online import OnlineDecoder, Rivals
from ilqr_vae.simulated.disturbance import Change, Script
from ilqr_vae.terminal import console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

EXAMPLE = "Example: ilqr-vae replay reach.nwb --speed max --json report.json --html report.html"

NANOSECOND_MS, HOUR_MS = 1e-6, 3.6e6
"""Shortest and longest deadline, limited by the protocol and by the service."""


def parse_speed(text: str) -> float | None:
    """Parse a multiple of real time, or None for ``max``. Raises ConfigError."""
    if text == "max":
        return None
    try:
        speed = float(text)
    except ValueError:
        speed = float("nan")
    if not (np.isfinite(speed) and speed > 0):
        raise ConfigError("--speed", expected="a number above zero, or max", got=repr(text))
    return speed


def parse_deadline(milliseconds: float | None, bin_width: float) -> float:
    """Return a deadline in seconds; default: the bin width. Raises ConfigError."""
    if milliseconds is None:
        return bin_width
    if not NANOSECOND_MS <= milliseconds <= HOUR_MS:  # also rejects NaN
        raise ConfigError(
            "--deadline-ms",
            expected=f"milliseconds above zero, at most {HOUR_MS:g} (an hour)",
            got=str(milliseconds),
        )
    return milliseconds / 1e3


class _Config(msgspec.Struct):
    """The part of a training configuration that controls how to read a recording."""

    data: RecordingSpec = msgspec.field(default_factory=RecordingSpec)


def spec_from(config: Path | None, model: Model) -> RecordingSpec:
    """Return how to read the recording: by the config's ``[data]``, else as in training.

    Raises:
        ConfigError: the file is not readable or not TOML, or ``[data]`` has an unknown key.
    """
    return model.data if config is None else read_toml(config, _Config).data


def rivals_of(path: Path | None, model: Model) -> dict[str, OnlineDecoder]:
    """Load decoders to run beside the model, by name.

    Raises ConfigError if the file has none, or they are of another recording.
    """
    if path is None:
        return {}
    read = Rivals.load(path)
    read.require(model.unit_names, model.kinematic_names)
    return read.decoders()


def script_of(path: Path | None) -> tuple[Change, ...]:
    """Read the changes of a script. Raises ConfigError."""
    return () if path is None else read_toml(path, Script, "--script").change


def said(change: Change) -> dict[str, Any]:
    """Describe a change and its time."""
    fields = msgspec.to_builtins(change)
    return {name: value for name, value in fields.items() if value is not None and value != ""}


def _summary(screen: Console, data: ReportData) -> None:
    screen.print(f"{data.title}, {number_of(len(data.counts), 'bin')}", style="bold")
    if data.scores is not None:
        show(scores_table("Causal decodes", data.scores.methods, data.scores.intervals), screen)
    screen.print(f"  bits per spike {number(data.bits_per_spike)}")
    stages = {stage: distribution(values) for stage, values in data.latency_ms.items()}
    show(latency_table(stages, data.latency_uncertainty_ms), screen)
    if data.clock:
        screen.print(f"  clocks: {data.clock}")
    screen.print(Text("  ") + status_text(data.statuses))
    for note in (*data.warnings, *data.notes):
        screen.print(f"  {note}")


def _ending(service: ServiceClient, session: Session) -> Ending:
    name = session.request.session
    flagged = next((s.flagged for s in service.sessions() if s.session == name), ())
    said = tuple(n for n in session.notices if n.startswith("unit "))
    events = tuple((e.bin, e.name) for e in session.events if e.name != "kinematics")  # one per bin
    return Ending(clock=service.clock(), flagged=flagged, unit_notices=said, events=events)


def _as_played(run: Replay, log: StreamLog, player: Player, steering: Steering) -> Replay:
    """Return the run as it was steered, if it was."""
    played = player.played
    others = {name: np.array(values) for name, values in played.decoders.items()}
    if not steering.applied and len(played.rows) == run.stop - run.first:
        return replace(run, others=others)
    part, dropped = as_played(run.part, run.first, played)
    log.grow(part.stop - 1)
    changes = tuple(said(change) for change in steering.applied)
    return replace(run, part=part, first=0, dropped=dropped, others=others, changes=changes)


@app.command(epilog=EXAMPLE)
def replay(
    recording: Annotated[
        Path, typer.Argument(help="A .nwb or .mat recording.", show_default=False)
    ],
    to: Annotated[str, typer.Option(help="The service's address.")] = "tcp://127.0.0.1:5555",
    speed: Annotated[
        str, typer.Option(help="A multiple of real time, or max: as fast as the service answers.")
    ] = "1",
    span: Annotated[
        str, typer.Option(help="Part of the recording to stream: train, validation, test or all.")
    ] = "test",
    drop: Annotated[
        float, typer.Option(min=0.0, max=0.99, help="Share of bins to leave out.")
    ] = 0.0,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the bins left out and of what --script does.")
    ] = 0,
    script: Annotated[
        Path | None,
        typer.Option(
            help="TOML of what goes wrong when: units silent or swapped, drift, noise, bins "
            "dropped, latency, pauses and jumps."
        ),
    ] = None,
    loop: Annotated[
        bool, typer.Option("--loop", help="Begin again at the end of the span, until Ctrl-C.")
    ] = False,
    steer: Annotated[
        str | None,
        typer.Option(
            help="Take such changes while it runs, from the live page for instance: an address "
            "to bind, e.g. tcp://127.0.0.1:*."
        ),
    ] = None,
    rivals: Annotated[
        Path | None,
        typer.Option(help="Decode with a GRU and a Kalman filter too (of train --rivals)."),
    ] = None,
    deadline_ms: Annotated[
        float | None,
        typer.Option(
            help="Deadline from a bin's arrival to its answer.", show_default="the bin width"
        ),
    ] = None,
    anytime: Annotated[
        bool, typer.Option("--anytime", help="Let the deadline cut a solve short.")
    ] = False,
    watch_units: Annotated[
        bool,
        typer.Option(
            "--watch-units", help="Mask units that are dead, saturated or drifting, and say which."
        ),
    ] = False,
    lag: Annotated[
        int,
        typer.Option(
            min=0, help="Have each bin decoded once more after so many later ones, and score both."
        ),
    ] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the numbers here; - is standard output.")
    ] = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", help="Write one self-contained page here.")
    ] = None,
    arrays_file: Annotated[
        Path | None, typer.Option("--arrays", help="Write every answer here (.npz).")
    ] = None,
    picture_file: Annotated[
        Path | None, typer.Option("--picture", help="Write a picture of the run here (.png).")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="TOML whose [data] says how to read the recording.",
            show_default="the model's",
        ),
    ] = None,
    session: Annotated[
        str | None, typer.Option(help="Name of the session.", show_default="a fresh one")
    ] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to wait for an answer.")] = 10.0,
) -> None:
    """Stream a recording through a running service, bin by bin, and report decodes and latency.

    The recording is read as in the training of the served model. Decodes are scored beside those of
    a Wiener filter on the same bins. The replay survives a broken connection, and a service that is
    restarted with its journal, for up to --timeout. Exit codes: 0 done, 2 wrong input, 3 no service
    or it refused.
    """
    if recording.suffix.lower() in (".h5", ".hdf5"):
        raise ConfigError(
            "recording",
            expected="a .nwb or .mat file (trials of an HDF5 file cannot be streamed: nothing says "
            "what lay between them; see evaluate)",
            got=recording.name,
        )
    pace = parse_speed(speed)
    chosen = parse_span(span)
    outputs = Outputs(
        json_file=json_file,
        html_file=html_file,
        arrays_file=arrays_file,
        picture_file=picture_file,
    )
    outputs.check()
    publishes = pace is not None or steer is not None  # a replay at full speed is too fast to watch
    screen = console(stderr=True)
    try:
        with ServiceClient(to, timeout=timeout) as service:
            described = service.describe()
            model = model_of(described)
            part = part_of(model, recording, spec_from(config, model), chosen)
            read, start, stop = part.recording, part.start, part.stop
            first = warmup_start(start)
            run = Replay(
                part=part,
                model=model,
                first=first,
                dropped=plan_drops(stop - first, drop, seed),
                speed=pace,
                deadline=parse_deadline(deadline_ms, read.bin_width),
                session=session or f"replay-{secrets.token_hex(4)}",
                clock=service.clock(),
                device=described.device,
                command=shlex.join(["ilqr-vae", "replay", *sys.argv[2:]]),
                lag=lag,
            )
            played_part = read.slice(first, stop)
            steering = Steering(
                read.counted,
                read.bin_width,
                kind="replay",
                seed=seed,
                changes=script_of(script),
                decoders=rivals_of(rivals, model),
                length=(stop - first) * read.bin_width,
                loop=loop,
            )
            player = Player(
                played_part,
                steering,
                None if pace is None else read.bin_width / pace,
                run.dropped,
            )
            live = LiveReplay(
                screen,
                total=stop - first,
                warm_up=start - first,
                truth=played_part.kinematics,
                scored=played_part.scored,
                names=model.kinematic_names,
                enabled=screen.is_terminal,
                rows=player.played.rows,
            )
            with (
                service.open(
                    run.session,
                    units=model.unit_names,
                    bin_width=model.bin_width,
                    deadline=run.deadline,
                    anytime=anytime,
                    watch_units=watch_units,
                    lag=lag,
                    patience=timeout,
                    hear_details=True,
                    hear_events=True,
                ) as opened,
                (
                    Conductor.of(opened, steering, control=steer, say=screen.print)
                    if publishes
                    else nullcontext()
                ),
                live,
            ):
                log = stream_from(opened, player, stop - first, watch=live, patience=timeout)
                ending = _ending(service, opened)
    except KeyboardInterrupt:
        screen.print("interrupted: nothing written")
        raise typer.Exit(130) from None
    run = _as_played(run, log, player, steering)
    data = report_of(run, log, ending)
    outputs.write(data, arrays_of(run, log))
    _summary(console(soft_wrap=True, stderr=json_file == STDOUT), data)
