"""``ilqr-vae archive``: train on, evaluate or decode every recording of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from ilqr_training.config import load_config
from ilqr_training.distributed.archive import Task, jobs_of, run, table_of
from ilqr_training.options import Cpus, Gpus, JsonFile
from ilqr_vae.cluster import Address, check_ray, connected
from ilqr_vae.errors import ConfigError, number_of
from ilqr_vae.files import STDOUT, check_folder, check_writable, write_whole
from ilqr_vae.progress import Bar
from ilqr_vae.recordings.split import parse_span
from ilqr_vae.report.outputs import check_html, render_tables
from ilqr_vae.report.table import show
from ilqr_vae.terminal import console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

EXAMPLE = "Example: ilqr-vae archive sessions/ --task train --config mine.toml --out results/"


@app.command(epilog=EXAMPLE)
def archive(
    folder: Annotated[
        Path,
        typer.Argument(help="A folder of recordings, or a text file that lists one path a line."),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the results; a second run continues.")],
    task: Annotated[Task, typer.Option(help="What to do with each recording.")] = "evaluate",
    config: Annotated[
        Path | None, typer.Option(help="To train: the configuration (TOML), as for train.")
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            help="To evaluate or decode: a model file, or a folder that --task train wrote.",
            show_default="--out",
        ),
    ] = None,
    span: Annotated[
        str | None,
        typer.Option(
            help="Part of each recording.", show_default="test to evaluate, all to decode"
        ),
    ] = None,
    cpus: Cpus = 1,
    gpus: Gpus = 0.0,
    address: Address = None,
    json_file: JsonFile = None,
) -> None:
    """Train on, evaluate or decode every recording of a folder, side by side, as Ray tasks.

    Each recording has one result file in --out. A second run does only what is missing or has
    changed. A failing recording is named and does not affect the others. The summary is
    summary.json and summary.html in --out. Exit codes: 0 all done; 1 some failed; 2 wrong input or
    usage. On a cluster all paths must be the same on every node.
    """
    check_ray("archive")
    if (task == "train") != (config is not None):
        got = "none" if config is None else f"--config with --task {task}"
        raise ConfigError("--config", expected="a configuration with --task train alone", got=got)
    chosen = span or ("all" if task == "decode" else "test")
    parse_span(chosen)
    check_folder(out, "--out")
    check_writable(json_file, "--json")
    settings = None if config is None else load_config(config)
    jobs = jobs_of(folder, task, out, config=settings, model=model, span=chosen, cpus=cpus)
    out.mkdir(parents=True, exist_ok=True)
    page = out / "summary.html"
    check_html(page, "--out")
    with connected(address), Bar() as bar:
        outcomes = run(jobs, gpus=gpus, progress=bar)
    failed = [o for o in outcomes if o.error]
    facts = {"recordings": str(len(outcomes)), "failed": str(len(failed))}
    brief = [msgspec.structs.replace(o, report={}) for o in outcomes]
    content = msgspec.json.format(msgspec.json.encode(brief)) + b"\n"
    table = table_of(outcomes)
    write_whole(out / "summary.json", content)
    write_whole(page, render_tables(f"Archive {folder.name}: {task}", facts, (table,)))
    if json_file is not None:
        write_whole(json_file, content)
    on_stderr = json_file == STDOUT
    screen = console(stderr=on_stderr, soft_wrap=True)
    show(table, screen)
    done = len(outcomes) - len(failed)
    screen.print(
        f"{done} of {number_of(len(outcomes), 'recording')} done, "
        f"{len(failed)} failed; summary in {page}"
    )
    if failed:
        raise typer.Exit(1)
