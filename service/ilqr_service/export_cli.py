"""``ilqr-vae export``: a session of a journal as NWB."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ilqr_service.journal.export import choose, runs_of, write
from ilqr_vae.files import check_writable
from ilqr_vae.recordings.nwb.write import SubjectInfo
from ilqr_vae.terminal import console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def export(
    journal: Annotated[Path, typer.Argument(help="a service's journal folder")],
    out: Annotated[Path, typer.Option(help="the .nwb file to write")],
    session: Annotated[str | None, typer.Option(help="needed where there are several")] = None,
    epoch: Annotated[int | None, typer.Option(help="needed where there are several")] = None,
    run: Annotated[int | None, typer.Option(help="its number; where names are not enough")] = None,
    subject: Annotated[str, typer.Option(help="who was recorded")] = "",
    species: Annotated[str, typer.Option(help="Latin binomial")] = "",
    sex: Annotated[str, typer.Option(help="M, F, O or U")] = "U",
    age: Annotated[str, typer.Option(help="ISO 8601, e.g. P8Y")] = "",
    experimenter: Annotated[str, typer.Option(help="Last, First")] = "",
    institution: Annotated[str, typer.Option(help="where")] = "",
    force: Annotated[bool, typer.Option("--force", help="replace an existing file")] = False,
) -> None:
    """Write a session as NWB: its bins, the answers, the model's manifest and the settings.

    Example: ilqr-vae export journal/ --session rat-7 --out rat-7.nwb
    """
    check_writable(out, "--out")
    damage: list[str] = []
    runs, manifests = runs_of(journal, damage)
    for line in damage:
        console(stderr=True, soft_wrap=True).print(f"warning: {line}")
    chosen = choose(runs, session, epoch, run)
    who = None
    if subject:
        who = SubjectInfo(subject, species, sex, age, "recorded subject")
    write(
        out,
        chosen,
        manifests,
        subject=who,
        experimenter=experimenter,
        institution=institution,
        force=force,
    )
    session = chosen.opened.request.session
    console(soft_wrap=True).print(f"{out}: {len(chosen.results)} bins of session {session}")
