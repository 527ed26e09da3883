"""``ilqr-vae replay``: stream a recording through a running service and report."""

from __future__ import annotations

import secrets
import shlex
import sys
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import typer
from rich.console import Console
from rich.text import Text

from ilqr_clients.replay_report import Ending, Run, arrays_of, report_of
from ilqr_clients.replay_view import LiveReplay, status_text
from ilqr_clients.sdk import Model, ServiceClient, Session, model_of
from ilqr_clients.span import part_of
from ilqr_clients.stream import stream
from ilqr_vae.errors import ConfigError
from ilqr_vae.files import STDOUT, read_toml
from ilqr_vae.recordings import RecordingSpec
from ilqr_vae.recordings.split import parse_span, plan_drops, warmup_start
from ilqr_vae.report import Outputs, ReportData, distribution
from ilqr_vae.report.table import number
from ilqr_vae.terminal import console

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)

EXAMPLE = (
    "Example: ilqr-vae replay reach.nwb --to tcp://127.0.0.1:5555 --speed max --span test "
    "--json r.json --html r.html"
)

NANOSECOND_MS, HOUR_MS = 1e-6, 3.6e6
"""Shortest and longest deadline: what the wire can say, and what a service takes."""


def parse_speed(text: str) -> float | None:
    """A multiple of real time, or None for ``max``. Raises ConfigError."""
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
    """Seconds; default the bin width. Raises ConfigError."""
    if milliseconds is None:
        return bin_width
    if not NANOSECOND_MS <= milliseconds <= HOUR_MS:  # NaN is neither
        raise ConfigError(
            "--deadline-ms",
            expected=f"milliseconds above zero, at most {HOUR_MS:g} (an hour)",
            got=str(milliseconds),
        )
    return milliseconds / 1e3


class _Config(msgspec.Struct):
    """The part of a training configuration that says how to read a recording."""

    data: RecordingSpec = msgspec.field(default_factory=RecordingSpec)


def spec_from(config: Path | None, model: Model) -> RecordingSpec:
    """How to read the recording: the config's ``[data]``, else as the model was trained.

    Raises:
        ConfigError: the file cannot be read, is not TOML, or ``[data]`` has an unknown key.
    """
    return model.data if config is None else read_toml(config, _Config).data


def _summary(screen: Console, data: ReportData) -> None:
    screen.print(f"{data.title}, {len(data.counts)} bins", style="bold")
    if data.scores is not None:
        for name, values in data.scores.methods.items():
            each = "  ".join(
                f"{k.removeprefix('r2.')} {number(v)}"
                for k, v in values.items()
                if k.startswith("r2.")
            )
            covers = values.get("coverage_90")
            tail = "" if covers is None else f"   90 % interval covers {100 * covers:.1f} %"
            screen.print(f"  {name:<14} R2 {number(values['r2'])}  ({each}){tail}")
    screen.print(f"  bits per spike {number(data.bits_per_spike)}")
    for stage, values in data.latency_ms.items():
        d = distribution(values)
        if d["n"]:
            bound = data.latency_uncertainty_ms.get(stage, 0.0)
            screen.print(
                f"  {stage:<8} ms  p50 {d['p50']:.2f}  p99 {d['p99']:.2f}  "
                f"p99.9 {d['p99.9']:.2f}  max {d['max']:.2f}  (n {d['n']})"
                + (f"  ± {bound:.3f}" if bound else "")
            )
    if data.clock:
        screen.print(f"  clocks: {data.clock}")
    screen.print(Text("  ") + status_text(data.statuses))
    for note in (*data.warnings, *data.notes):
        screen.print(f"  {note}")


def _ending(service: ServiceClient, session: Session) -> Ending:
    name = session.request.session
    flagged = next((s.flagged for s in service.sessions() if s.session == name), ())
    said = tuple(n for n in session.notices if n.startswith("unit "))
    return Ending(clock=service.clock(), flagged=flagged, unit_notices=said)


@app.command(epilog=EXAMPLE)
def replay(
    recording: Annotated[
        Path, typer.Argument(help="A .nwb or .mat recording.", show_default=False)
    ],
    to: Annotated[str, typer.Option(help="The service's address.")] = "tcp://127.0.0.1:5555",
    speed: Annotated[
        str, typer.Option(help="Multiple of real time, or max: as fast as the service takes them.")
    ] = "1",
    span: Annotated[
        str, typer.Option(help="Part of the recording: train, validation, test or all.")
    ] = "test",
    drop: Annotated[
        float, typer.Option(min=0.0, max=0.99, help="Share of bins to leave out, 0 to 0.99.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of which bins are left out.")] = 0,
    deadline_ms: Annotated[
        float | None,
        typer.Option(help="From a bin's arrival to its answer; default the bin width."),
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
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the numbers here; - is stdout.")
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
            help="TOML whose \\[data] says how to read the recording; default the model's."
        ),
    ] = None,
    session: Annotated[str | None, typer.Option(help="Session name; default a fresh one.")] = None,
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds to wait for any one answer.")
    ] = 10.0,
) -> None:
    """Stream a recording through a running service, bin by bin, and report decodes and latency.

    The recording is read the way the served model was trained. Decodes are scored beside a Wiener
    filter's on the same bins. A connection that breaks, and a service that is restarted with its
    journal, are survived within --timeout. Exit codes: 0 done, 2 wrong input, 3 no service or it
    refused.
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
    screen = console(stderr=True)
    try:
        with ServiceClient(to, timeout=timeout) as service:
            described = service.describe()
            model = model_of(described)
            part = part_of(model, recording, spec_from(config, model), chosen)
            read, start, stop = part.recording, part.start, part.stop
            first = warmup_start(start)
            run = Run(
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
            )
            live = LiveReplay(
                screen,
                total=stop - first,
                warm_up=start - first,
                truth=None if read.kinematics is None else read.kinematics[first:stop],
                scored=read.scored[first:stop],
                names=model.kinematic_names,
                enabled=screen.is_terminal,
            )
            with (
                service.open(
                    run.session,
                    units=model.unit_names,
                    bin_width=model.bin_width,
                    deadline=run.deadline,
                    anytime=anytime,
                    watch_units=watch_units,
                    patience=timeout,
                ) as opened,
                live,
            ):
                log = stream(
                    opened,
                    read.counts[first:stop],
                    mask=read.mask()[first:stop],
                    dropped=run.dropped,
                    interval=None if pace is None else read.bin_width / pace,
                    watch=live,
                    patience=timeout,
                )
                ending = _ending(service, opened)
    except KeyboardInterrupt:
        screen.print("interrupted: nothing written")
        raise typer.Exit(130) from None
    data = report_of(run, log, ending)
    outputs.write(data, arrays_of(run, log))
    _summary(console(soft_wrap=True, stderr=json_file == STDOUT), data)
