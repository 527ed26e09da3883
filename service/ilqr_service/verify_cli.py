"""``ilqr-vae verify``: run a journal again and compare every answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import msgspec
import torch
import typer

from ilqr_service.engine import Engine
from ilqr_service.settings import ServiceSettings
from ilqr_service.verify import Verdict, header_of, verify
from ilqr_vae.errors import ConfigError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command("verify")
def command(
    journal: Annotated[Path, typer.Argument(help="a service's journal folder")],
    model: Annotated[list[Path], typer.Option(help="a model file it served; repeat for several")],
    tolerance: Annotated[
        float, typer.Option(min=0.0, help="largest difference allowed; 0 is bit for bit")
    ] = 0.0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="write the numbers here; - is stdout")
    ] = None,
) -> None:
    """Run everything a service took once more, offline, and compare with what it answered.

    Example: ilqr-vae verify journal/ --model model.safetensors

    On the build and device that served, answers are the same to the last bit; elsewhere state a
    --tolerance (1e-6 is usual). Exit codes: 0 the same, 1 different, 2 wrong input.
    """
    torch.set_num_threads(1)
    kept = header_of(journal).settings
    try:
        settings = msgspec.convert(
            {k: kept[k] for k in ("device", "horizon", "iterations")}, ServiceSettings
        )
    except (KeyError, msgspec.ValidationError) as error:
        raise ConfigError("journal", expected="settings of a service", got=str(error)) from error
    verdict = verify(journal, [Engine.load(path, settings) for path in model])
    text = json.dumps(msgspec.to_builtins(verdict), indent=2)
    if json_file is not None and str(json_file) != "-":
        json_file.write_text(text + "\n")
    typer.echo(text if str(json_file) == "-" else summary(verdict))
    if verdict.largest > tolerance or (verdict.identical < verdict.answers and not tolerance):
        raise typer.Exit(1)


def summary(verdict: Verdict) -> str:
    """One line for people."""
    said = (
        f"{verdict.answers} answers of {verdict.runs} runs: {verdict.identical} identical to the "
        f"last bit"
    )
    if verdict.skipped:
        said += f", {verdict.skipped} not comparable (their state was not written)"
    if verdict.first:
        said += f"; first difference at {verdict.first}, largest {verdict.largest:.3g}"
    return said
