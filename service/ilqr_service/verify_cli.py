"""``ilqr-vae verify``: recompute all answers in a journal and compare."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import msgspec
import torch
import typer

from ilqr_service.journal.verify import Comparison, verify
from ilqr_vae.errors import ConfigError, number_of
from ilqr_vae.files import STDOUT, check_writable, write_whole
from ilqr_vae.progress import Bar
from ilqr_vae.terminal import console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

EXAMPLE = "Example: ilqr-vae verify journal/ --model model.safetensors"


@app.command("verify", epilog=EXAMPLE)
def command(
    journal: Annotated[Path, typer.Argument(help="A service's journal folder.")],
    model: Annotated[list[Path], typer.Option(help="A model file it served; repeat for several.")],
    tolerance: Annotated[
        float, typer.Option(min=0.0, help="Largest difference allowed; 0 is bit for bit.")
    ] = 0.0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the numbers here; - is standard output.")
    ] = None,
) -> None:
    """Recompute all answers in a journal offline, and compare.

    Each part is run with the settings of its service. On the same build and device, answers are
    identical to the last bit; elsewhere give a --tolerance (1e-6 is usual). Exit codes: 0
    identical, 1 different, 2 wrong input: not a journal, or a model is missing.
    """
    if not math.isfinite(tolerance):
        raise ConfigError("--tolerance", expected="a finite number", got=str(tolerance))
    check_writable(json_file, "--json")
    torch.set_num_threads(1)
    with Bar() as bar:
        verdict = verify(journal, model, bar)
    # JSON has no infinity: it becomes null
    text = msgspec.json.format(msgspec.json.encode(verdict), indent=2).decode()
    if json_file is not None:
        write_whole(json_file, text + "\n")
    if json_file != STDOUT:
        console(soft_wrap=True).print(summary(verdict))
    if not verdict.within(tolerance):
        raise typer.Exit(1)


def summary(verdict: Comparison) -> str:
    """Return a line that summarises the result."""
    text = (
        f"{number_of(verdict.answers, 'answer')} of {number_of(verdict.runs, 'run')}: "
        f"{verdict.identical} identical to the last bit"
    )
    if verdict.skipped:
        text += f", {verdict.skipped} skipped (their state is not in the journal)"
    if verdict.first:
        text += f"; first difference at {verdict.first}, largest {verdict.largest:.3g}"
    if verdict.versions and verdict.identical < verdict.answers:
        written = ", ".join(f"{name} {value}" for name, value in verdict.versions.items())
        text += f"; written with {written}: other bits are expected, give a --tolerance"
    if verdict.changed:
        text += f"; {verdict.changed} solves ended otherwise"
    if verdict.damaged:
        text += "; the journal is not whole: " + ", ".join(verdict.damaged)
    return text
