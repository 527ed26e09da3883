"""``ilqr-vae record``: a session as NWB, written while it runs."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Annotated

import typer

from ilqr_clients.record import Recorder, log_of
from ilqr_vae.commands.about import (
    Age,
    Experimenter,
    Institution,
    Sex,
    Species,
    Subject,
    about,
)
from ilqr_vae.errors import number_of
from ilqr_vae.terminal import console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

EXAMPLE = "Example: ilqr-vae record rat-7 --out rat-7.nwb --follow"


@app.command(epilog=EXAMPLE)
def record(
    session: Annotated[str, typer.Argument(help="The session's name; it need not be open yet.")],
    out: Annotated[Path, typer.Option(help="The .nwb file to write.")],
    to: Annotated[str, typer.Option(help="The service's address.")] = "tcp://127.0.0.1:5555",
    follow: Annotated[
        bool,
        typer.Option(
            "--follow",
            help="Keep the file up to date while the session runs, and go on with its next run.",
        ),
    ] = False,
    duration: Annotated[
        float | None,
        typer.Option(min=0.1, help="Seconds to record for.", show_default="until the session ends"),
    ] = None,
    subject: Subject = "",
    species: Species = "",
    sex: Sex = "U",
    age: Age = "",
    experimenter: Experimenter = "",
    institution: Institution = "",
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Record a session's answers and events as NWB, from any machine that may read it.

    Messages are stored in OUT.log at once. The NWB file is written when the session ends or the
    recorder is stopped; with --follow also about once a second, and later runs of the session
    become NAME-2.nwb and so on. After a crash, the same command continues from OUT.log.
    """
    screen, stop = console(stderr=True, soft_wrap=True), threading.Event()
    said = about(subject, species, sex, age, experimenter, institution)
    timer = threading.Timer(duration or 0.0, stop.set)
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        recorder = Recorder(
            to,
            session,
            out,
            about=said,
            follow=follow,
            force=force,
            say=lambda line: screen.print(line, markup=False),
        )
        with recorder:
            screen.print(f"records session {session} to {out}; Ctrl-C ends it")
            if duration is not None:
                timer.start()
            try:
                recorder.run(stop)
            except KeyboardInterrupt:
                stop.set()
    except KeyboardInterrupt:  # while connecting, or again while the file is written
        log = log_of(out)
        kept = f"{log.name} has what came, the same command continues from it"
        screen.print(f"interrupted: {kept if log.exists() else 'nothing came'}")
        raise typer.Exit(130) from None
    finally:
        timer.cancel()
        signal.signal(signal.SIGTERM, before)
    for path, bins in recorder.written.items():
        console(soft_wrap=True).print(
            f"{path}: {number_of(bins, 'bin')} of session {session}", markup=False
        )
    if not recorder.written:
        console(soft_wrap=True).print(f"{session}: nothing came", markup=False)
