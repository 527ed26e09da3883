"""``ilqr-vae experiment decode``: recipe and rivals on a recording, several seeds, one table."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ilqr_training.config import TrainConfig, load_config
from ilqr_training.evaluation.comparison import Plan, compare
from ilqr_training.evaluation.stress import StressPlan
from ilqr_training.evaluation.tables import rows_of, stress_rows, tables
from ilqr_training.fit.train import Watcher
from ilqr_training.train_cli import Terminal, overridden, use_threads
from ilqr_vae.errors import ConfigError
from ilqr_vae.files import STDOUT, check_folder, check_writable, write_whole
from ilqr_vae.recordings import load_recording
from ilqr_vae.report.data import plain
from ilqr_vae.report.table import WIDTH, shown
from ilqr_vae.terminal import console, progress

EXAMPLE = (
    "Example: ilqr-vae experiment decode configs/stevenson.toml --recording StevensonV2.mat "
    "--out decode-stevenson"
)


class _Watch:
    """Pieces as lines, what goes on within one as a bar."""

    def __init__(self, console: Console, config: TrainConfig) -> None:
        self.console, self.config = console, config
        self.bar = progress(console)
        self.task = self.bar.add_task("", total=1)

    @contextmanager
    def training(self, what: str) -> Generator[Watcher]:
        self.bar.stop()  # one live display at a time
        terminal = Terminal(self.console, self.config)
        with terminal.bar:
            yield terminal
        self.bar.start()

    def say(self, what: str, done: int, of: int) -> None:
        self.bar.update(self.task, description=what, completed=done, total=of)

    def piece(self, name: str, again: bool) -> None:
        self.console.print(f"{name}{': there already' if again else ''}")


def decode(
    config: Annotated[Path, typer.Argument(help="TOML of the recipe, as for train.")],
    recording: Annotated[Path, typer.Option(help="A .nwb, .mat or .h5 recording.")],
    out: Annotated[
        Path, typer.Option(help="Folder of models and pieces; run again, it goes on from there.")
    ],
    seeds: Annotated[int, typer.Option(help="How many, from the config's on.")] = Plan.seeds,
    span: Annotated[
        str,
        typer.Option(
            help="validation: a rehearsal that cuts the test part off first. test: once, at the "
            "end."
        ),
    ] = Plan.span,
    fraction: Annotated[
        float, typer.Option(help="Share of the recording to learn from where it is little; 0: not.")
    ] = Plan.fraction,
    held_out: Annotated[
        float, typer.Option(help="Share of the units held out in co-smoothing; 0: none.")
    ] = Plan.held_out,
    silent: Annotated[float, typer.Option(help="Share of units silent.")] = StressPlan.silent,
    lost: Annotated[
        list[float] | None,
        typer.Option(help="Share of bins lost; several times; default 0.1 and 0.3."),
    ] = None,
    draws: Annotated[int, typer.Option(help="Of units and of bins a seed.")] = StressPlan.draws,
    gru: Annotated[bool, typer.Option(help="Whether to fit GRUs, which takes minutes.")] = True,
    steps: Annotated[int | None, typer.Option(help="Instead of the config's.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write everything here; - for stdout.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; default one per core.")
    ] = None,
) -> None:
    """Train the recipe and its rivals on a recording, several seeds, and hold them side by side."""
    if span not in ("validation", "test"):
        raise ConfigError("--span", expected="validation or test", got=repr(span))
    shares = StressPlan.lost if lost is None else tuple(lost)
    plan = Plan(
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
    watch = _Watch(console(stderr=True), settings)
    read = load_recording(recording, settings.data)
    with watch.bar:
        result = compare(settings, read, out, plan, watch)
    result |= {"rows": rows_of(result), "stress": stress_rows(result)}
    content = json.dumps(plain(result), indent=1) + "\n"
    write_whole(out / "decode.json", content)
    if json_file is not None:
        write_whole(json_file, content)
    if json_file != STDOUT:
        screen = console(soft_wrap=True)
        for made in tables(result):
            screen.print(f"{made.title}. {made.text}")
            console(width=max(screen.width, WIDTH + 10 * seeds)).print(shown(made))
