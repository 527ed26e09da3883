"""``ilqr-vae export``: a session of a journal as NWB."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ilqr_service.journal.export import choose, runs_of, write
from ilqr_vae.files import check_writable
from ilqr_vae.progress import Bar
from ilqr_vae.recordings.nwb.write import SubjectInfo
from ilqr_vae.terminal import console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def export(
    journal: Annotated[Path, typer.Argument(help="A service's journal folder.")],
    out: Annotated[Path, typer.Option(help="The .nwb file to write.")],
    session: Annotated[str | None, typer.Option(help="Needed where there are several.")] = None,
    epoch: Annotated[int | None, typer.Option(help="Needed where there are several.")] = None,
    run: Annotated[
        int | None, typer.Option(help="The session's run number, where names are not enough.")
    ] = None,
    subject: Annotated[str, typer.Option(help="Who was recorded.")] = "",
    species: Annotated[str, typer.Option(help="The subject's species, a Latin binomial.")] = "",
    sex: Annotated[str, typer.Option(help="The subject's sex: M, F, O or U.")] = "U",
    age: Annotated[
        str, typer.Option(help="The subject's age as an ISO 8601 duration, e.g. P8Y.")
    ] = "",
    experimenter: Annotated[str, typer.Option(help="Who recorded: Last, First.")] = "",
    institution: Annotated[str, typer.Option(help="Where it was recorded.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write a session as NWB: its bins, the answers, the model's manifest and the settings.

    Example: ilqr-vae export journal/ --session rat-7 --out rat-7.nwb
    """
    check_writable(out, "--out")
    damage: list[str] = []
    with Bar() as bar:
        runs, manifests = runs_of(journal, damage, bar)
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
