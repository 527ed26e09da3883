"""Options for subject, experimenter and institution, for all verbs that write NWB."""

from __future__ import annotations

from typing import Annotated

import typer

from ilqr_vae.recordings.nwb.write import SubjectInfo
from ilqr_vae.report.decoded import About

Subject = Annotated[str, typer.Option(help="The subject's name.", show_default=False)]
Species = Annotated[
    str, typer.Option(help="The subject's species, a Latin binomial.", show_default=False)
]
Sex = Annotated[str, typer.Option(help="The subject's sex: M, F, O or U.")]
Age = Annotated[
    str,
    typer.Option(help="The subject's age as an ISO 8601 duration, e.g. P8Y.", show_default=False),
]
Experimenter = Annotated[str, typer.Option(help="Who recorded: Last, First.", show_default=False)]
Institution = Annotated[str, typer.Option(help="Where it was recorded.", show_default=False)]


def about(
    subject: str, species: str, sex: str, age: str, experimenter: str, institution: str
) -> About:
    """Return the values of the options."""
    who = SubjectInfo(subject, species, sex, age, "recorded subject") if subject else None
    return About(who, experimenter, institution)
