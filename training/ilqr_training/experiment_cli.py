"""``ilqr-vae experiment``: the paper's experiments on made-up data, and decoding a recording."""

from __future__ import annotations

import json
import platform
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
import typer
from rich.console import Console
from rich.progress import TaskID
from typer.core import TyperGroup

from ilqr_training.decode_cli import EXAMPLE as DECODE_EXAMPLE
from ilqr_training.decode_cli import decode
from ilqr_training.experiments import NAMES, find
from ilqr_training.experiments.driver import Outcome
from ilqr_training.train_cli import use_threads
from ilqr_vae.errors import ConfigError
from ilqr_vae.files import check_writable, write_whole
from ilqr_vae.terminal import console, progress


class _Named(TyperGroup):
    """Says which experiments there are in this project's own words."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # click's types: typer ships its own
        found = super().get_command(ctx, cmd_name)
        if found is None:
            known = f"one of {', '.join((*NAMES, 'decode'))}"
            raise ConfigError("experiment", expected=known, got=repr(cmd_name))
        return found


app = typer.Typer(
    cls=_Named, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
)


class _Terminal:
    """Shows each part of an experiment as a progress bar."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar = progress(console, transient=False, note=True)
        self.task: TaskID | None = None

    def begin(self, what: str, total: int) -> None:
        self.task = self.bar.add_task(what, total=total, note="")

    def advance(self, done: int, note: str = "") -> None:
        if self.task is not None:
            self.bar.update(self.task, completed=done, note=note)

    def say(self, text: str) -> None:
        self.console.print(text)


def settings_of(name: str, config: Path | None) -> msgspec.Struct:
    """An experiment's settings: its defaults, with what a TOML file overrides.

    Raises:
        ConfigError: no such experiment, no such file, not TOML, an unknown key or a wrong type.
    """
    kind = find(name).settings
    if config is None:
        return kind()
    try:
        return msgspec.convert(tomllib.loads(config.read_text()), kind)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(
            f"config {config.name}", expected="a readable TOML file", got=str(error)
        ) from error
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"config {config.name}", expected="known keys of the right types", got=str(error)
        ) from error


def _picture(outcome: Outcome, path: Path) -> None:
    from matplotlib.figure import Figure

    if outcome.draw is None:
        return
    figure = Figure(figsize=(11, 4), layout="constrained")
    outcome.draw(figure)
    figure.savefig(path, dpi=130)


def run_paper(
    name: str, seed: int, config: Path | None, json_file: Path | None, threads: int | None
) -> None:
    """Run one of the paper's experiments and say what it came to. Raises ConfigError."""
    settings = settings_of(name, config)
    check_writable(json_file, "--json")
    use_threads(threads)
    terminal = _Terminal(console(stderr=True))
    with terminal.bar:
        outcome = find(name).run(settings, seed, terminal)
    figures = {
        **outcome.figures,
        "experiment": name,
        "seed": seed,
        "settings": msgspec.to_builtins(settings),
        "versions": {
            "ilqr_vae": version("ilqr-vae"),
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
    }
    if json_file is not None:
        write_whole(json_file, json.dumps(figures, indent=2) + "\n")
        if str(json_file) != "-":
            _picture(outcome, json_file.with_suffix(".png"))
    if str(json_file) != "-":
        out = console(soft_wrap=True)
        for key, value in outcome.figures.items():
            shown = f"{value:.4f}" if isinstance(value, float) else str(value)
            out.print(f"  {key:<24} {shown}")


def _register(name: str) -> None:
    @app.command(name, epilog=f"Example: ilqr-vae experiment {name} --seed 0 --json {name}.json")
    def run(
        seed: Annotated[int, typer.Option(min=0, help="Of the data and of training.")] = 0,
        config: Annotated[
            Path | None, typer.Option(help="TOML with overrides; see configs/experiments.")
        ] = None,
        json_file: Annotated[
            Path | None, typer.Option("--json", help="Write the figures here, a picture beside it.")
        ] = None,
        threads: Annotated[
            int | None, typer.Option(min=1, help="CPU threads; default one per core.")
        ] = None,
    ) -> None:
        """On made-up data: see docs/experiments.md."""
        run_paper(name, seed, config, json_file, threads)


for _name in NAMES:
    _register(_name)
app.command("decode", epilog=DECODE_EXAMPLE)(decode)
