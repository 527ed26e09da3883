"""``ilqr-vae export``: a session of a journal as NWB."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ilqr_service.journal.export import choose, runs_of, write
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
from ilqr_vae.files import check_writable
from ilqr_vae.progress import Bar
from ilqr_vae.terminal import console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

EXAMPLE = "Example: ilqr-vae export journal/ --session rat-7 --out rat-7.nwb"


@app.command(epilog=EXAMPLE)
def export(
    journal: Annotated[Path, typer.Argument(help="A service's journal folder.")],
    out: Annotated[Path, typer.Option(help="The .nwb file to write.")],
    session: Annotated[
        str | None, typer.Option(help="Name of the session.", show_default="the only one")
    ] = None,
    epoch: Annotated[
        int | None, typer.Option(help="Epoch of the session.", show_default="the only one")
    ] = None,
    run: Annotated[
        int | None,
        typer.Option(
            help="Run of the session, where its name is not enough.", show_default="the only one"
        ),
    ] = None,
    subject: Subject = "",
    species: Species = "",
    sex: Sex = "U",
    age: Age = "",
    experimenter: Experimenter = "",
    institution: Institution = "",
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write a session as NWB: bins, answers, the manifest of the model and the settings."""
    check_writable(out, "--out")
    damage: list[str] = []
    with Bar() as bar:
        runs, manifests = runs_of(journal, damage, bar)
    for line in damage:
        console(stderr=True, soft_wrap=True).print(f"warning: {line}")
    chosen = choose(runs, session, epoch, run)
    said = about(subject, species, sex, age, experimenter, institution)
    write(
        out,
        chosen,
        manifests,
        subject=said.subject,
        experimenter=experimenter,
        institution=institution,
        force=force,
    )
    session = chosen.opened.request.session
    console(soft_wrap=True).print(
        f"{out}: {number_of(len(chosen.results), 'bin')} of session {session}"
    )
