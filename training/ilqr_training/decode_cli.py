"""``ilqr-vae experiment decode``: a model and baselines on a recording over several seeds."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ilqr_training.config import load_config, overridden
from ilqr_training.evaluation.comparison import ComparisonPlan, compare
from ilqr_training.evaluation.stress_scores import StressPlan
from ilqr_training.evaluation.tables import rows_of, stress_rows, tables
from ilqr_training.options import (
    Draws,
    JsonFile,
    Lost,
    RecordingFile,
    Silent,
    Steps,
    Threads,
    use_threads,
)
from ilqr_vae.errors import ConfigError
from ilqr_vae.files import STDOUT, check_folder, check_writable, write_whole
from ilqr_vae.progress import Bar
from ilqr_vae.recordings import load_recording
from ilqr_vae.report.data import plain
from ilqr_vae.report.table import show
from ilqr_vae.terminal import console

EXAMPLE = (
    "Example: ilqr-vae experiment decode configs/stevenson.toml \\\n"
    "  --recording StevensonV2.mat --out decode-stevenson"
)


def decode(
    config: Annotated[
        Path, typer.Argument(help="The training configuration (TOML), as for train.")
    ],
    recording: RecordingFile,
    out: Annotated[
        Path,
        typer.Option(
            help="Folder for models and partial results; a second run continues from them."
        ),
    ],
    seeds: Annotated[
        int, typer.Option(help="Number of seeds, counted from the config's.")
    ] = ComparisonPlan.seeds,
    span: Annotated[
        str,
        typer.Option(
            help="validation, a nested split without the test part; or test, for the final run."
        ),
    ] = ComparisonPlan.span,
    fraction: Annotated[
        float, typer.Option(help="Share of the recording in the small training part; 0 for none.")
    ] = ComparisonPlan.fraction,
    held_out: Annotated[
        float, typer.Option(help="Share of units held out in co-smoothing; 0 for none.")
    ] = ComparisonPlan.held_out,
    silent: Silent = StressPlan.silent,
    lost: Lost = None,
    draws: Draws = StressPlan.draws,
    gru: Annotated[bool, typer.Option(help="Fit GRUs too, which takes minutes.")] = True,
    steps: Steps = None,
    json_file: JsonFile = None,
    threads: Threads = None,
) -> None:
    """Train a model and baselines on a recording with several seeds, and compare them."""
    if span not in ("validation", "test"):
        raise ConfigError("--span", expected="validation or test", got=repr(span))
    shares = StressPlan.lost if lost is None else tuple(lost)
    plan = ComparisonPlan(
        span=span,
        seeds=seeds,
        fraction=fraction,
        held_out=held_out,
        stress=StressPlan(silent, shares, draws),
        gru=gru,
    ).checked()
    check_writable(json_file, "--json")
    check_folder(out, "--out")
    settings = overridden(load_config(config), steps=steps)
    use_threads(threads)
    read = load_recording(recording, settings.data)
    read.require_counts("experiment decode")
    with Bar() as bar:
        result = compare(settings, read, out, plan, bar)
    result |= {"rows": rows_of(result), "stress": stress_rows(result)}
    result["warnings"] = [asdict(warning) for warning in read.warnings]
    content = json.dumps(plain(result), indent=1) + "\n"
    write_whole(out / "decode.json", content)
    if json_file is not None:
        write_whole(json_file, content)
    if json_file != STDOUT:
        screen = console(soft_wrap=True)
        for made in tables(result):
            show(made, screen)
