"""``ilqr-vae experiment``: the paper's experiments on simulated data, and ones on a recording."""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
import typer
from typer.core import TyperGroup

from ilqr_training.another_day_cli import (
    ADAPT_EXAMPLE,
    DAYS_EXAMPLE,
    adapt_experiment,
    days_experiment,
)
from ilqr_training.decode_cli import EXAMPLE as DECODE_EXAMPLE
from ilqr_training.decode_cli import decode
from ilqr_training.experiments import NAMES, SUMMARIES, find
from ilqr_training.experiments.driver import ExperimentResult
from ilqr_training.options import Threads, use_threads
from ilqr_training.turnover_cli import EXAMPLE as TURNOVER_EXAMPLE
from ilqr_training.turnover_cli import turnover_experiment
from ilqr_vae.errors import ConfigError, did_you_mean
from ilqr_vae.files import STDOUT, check_writable, read_toml, replacing, write_whole
from ilqr_vae.progress import Bar, duration
from ilqr_vae.report.table import Section, number, show_sections
from ilqr_vae.terminal import console


class _Named(TyperGroup):
    """A command group that lists the experiments if one is unknown."""

    # typer ships its own copy of click's types
    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        found = super().get_command(ctx, cmd_name)
        names = (*NAMES, "decode", "adapt", "days", "turnover")
        if found is None:
            raise ConfigError(
                "experiment",
                expected=f"one of {', '.join(names)}",
                got=f"{cmd_name!r}{did_you_mean(cmd_name, names)}",
            )
        return found


app = typer.Typer(
    cls=_Named,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Run an experiment of the paper on simulated data, or compare decoders on a recording.",
    epilog="ilqr-vae experiment COMMAND --help says what one takes, with an example.",
)


def settings_of(name: str, config: Path | None) -> msgspec.Struct:
    """Return the settings of an experiment: its defaults with the overrides of a TOML file.

    Raises:
        ConfigError: there is no such experiment, or the file is missing or invalid.
    """
    kind = find(name).settings
    return kind() if config is None else read_toml(config, kind)


def _picture(outcome: ExperimentResult, path: Path) -> None:
    from matplotlib.figure import Figure

    if outcome.draw is None:
        return
    figure = Figure(figsize=(11, 4), layout="constrained")
    outcome.draw(figure)
    with replacing(path) as part:
        figure.savefig(part, dpi=130)


def run_paper(
    name: str, seed: int, config: Path | None, json_file: Path | None, threads: int | None
) -> None:
    """Run an experiment of the paper and print its figures. Raises ConfigError."""
    settings = settings_of(name, config)
    check_writable(json_file, "--json")
    use_threads(threads)
    with Bar() as bar:
        outcome = find(name).run(settings, seed, bar)
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
        if json_file != STDOUT:
            _picture(outcome, json_file.with_suffix(".png"))
    if json_file != STDOUT:
        rows = tuple((k.replace("_", " "), _shown(k, v)) for k, v in outcome.figures.items())
        show_sections([Section(f"Experiment {name}", rows)], console(soft_wrap=True))


def _shown(name: str, value: Any) -> str:
    """Format a figure for the terminal."""
    if isinstance(value, dict):
        return "; ".join(f"{k} {_shown(k, v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_shown(name, v) for v in value)
    if name == "seconds":
        return duration(value)
    if not isinstance(value, float):
        return str(value)
    return number(value) if "r2" in name or "bits" in name else f"{value:.4g}"


def _register(name: str) -> None:
    @app.command(
        name,
        help=SUMMARIES[name],
        short_help=SUMMARIES[name],
        epilog=f"Example: ilqr-vae experiment {name} --seed 0 --json {name}.json",
    )
    def run(
        seed: Annotated[int, typer.Option(min=0, help="Seed of the data and of training.")] = 0,
        config: Annotated[
            Path | None, typer.Option(help="Settings (TOML); see configs/experiments/.")
        ] = None,
        json_file: Annotated[
            Path | None,
            typer.Option("--json", help="Write the numbers here, and a picture beside it."),
        ] = None,
        threads: Threads = None,
    ) -> None:
        run_paper(name, seed, config, json_file, threads)


for _name in NAMES:
    _register(_name)
app.command(
    "decode", epilog=DECODE_EXAMPLE, short_help="Compare decoders on a recording, several seeds."
)(decode)
app.command(
    "adapt",
    epilog=ADAPT_EXAMPLE,
    short_help="Compare decoders on a recording whose units are replaced.",
)(adapt_experiment)
app.command(
    "days", epilog=DAYS_EXAMPLE, short_help="Compare decoders on the days after they were trained."
)(days_experiment)
app.command(
    "turnover",
    epilog=TURNOVER_EXAMPLE,
    short_help="Reach on in a closed loop while units are replaced.",
)(turnover_experiment)
