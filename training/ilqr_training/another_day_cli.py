"""``ilqr-vae experiment adapt`` and ``experiment days``: decoders while units change."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from matplotlib.figure import Figure

from ilqr_training.config import TrainConfig, load_config, overridden
from ilqr_training.evaluation.another_day import (
    Fitted,
    Schedule,
    scored,
    streamed,
)
from ilqr_training.evaluation.another_day_tables import (
    attempts_table,
    picture,
    scores_table,
)
from ilqr_training.evaluation.changed import (
    Stream,
    days_after,
    divided,
    earlier_split,
    turnover,
)
from ilqr_training.fit.crops import prepare
from ilqr_training.fit.train import train_on
from ilqr_training.options import JsonFile, RecordingFile, Steps, Threads, use_threads
from ilqr_vae.artifact import Artifact, load_artifact
from ilqr_vae.errors import ConfigError, RecordingError
from ilqr_vae.files import STDOUT, check_folder, check_writable, replacing, write_whole
from ilqr_vae.progress import Bar, Progress
from ilqr_vae.recordings import Recording, load_recording
from ilqr_vae.report import Table
from ilqr_vae.report.data import plain
from ilqr_vae.report.table import show
from ilqr_vae.terminal import console

ADAPT_EXAMPLE = (
    "Example: ilqr-vae experiment adapt configs/stevenson.toml \\\n"
    "  --recording StevensonV2.mat --out adapt-stevenson"
)
DAYS_EXAMPLE = (
    "Example: ilqr-vae experiment days mine.toml --recording mon.nwb --recording tue.nwb \\\n"
    "  --out days"
)

_GRU_STEPS = 4
"""Gradient steps of the GRU per step of the model, up to its own number."""

ConfigFile = Annotated[Path, typer.Argument(help="The training configuration (TOML).")]
Out = Annotated[
    Path, typer.Option(help="Folder for models, numbers and picture; models in it are used again.")
]
Seeds = Annotated[int, typer.Option(min=1, help="Number of seeds, counted from the config's.")]
Least = Annotated[
    float, typer.Option(help="Seconds heard before the rows are fitted for the first time.")
]
Window = Annotated[float, typer.Option(help="Seconds fitted on at most, the latest ones.")]
Trial = Annotated[float, typer.Option(help="Seconds of a candidate in the shadow.")]
Alone = Annotated[
    bool,
    typer.Option("--alone", help="Compare the unchanged model and the one adapted without labels."),
]
After = Annotated[
    float, typer.Option(min=0, help="Seconds since the change from which R2 regained counts.")
]


def adapt_experiment(
    config: ConfigFile,
    recording: RecordingFile,
    out: Out,
    seeds: Seeds = 3,
    span: Annotated[
        str,
        typer.Option(
            help="What is streamed: validation, a part as long as the test part and before it, "
            "nothing of which is trained on; or test, for the final run."
        ),
    ] = "validation",
    change: Annotated[
        list[str] | None,
        typer.Option(
            help="Only this change, beside nothing at all; repeat for several.", show_default="all"
        ),
    ] = None,
    model: Annotated[
        list[Path] | None,
        typer.Option(
            help="Use this model instead of training one; repeat for several. Replaced units then "
            "swap names with each other.",
            show_default="train one per seed",
        ),
    ] = None,
    alone: Alone = False,
    at: Annotated[
        float, typer.Option(min=0, help="Seconds of that part that are streamed unchanged.")
    ] = 0.0,
    after: After = 90.0,
    least: Least = Schedule.least,
    window: Window = Schedule.window,
    trial: Trial = Schedule.trial,
    steps: Steps = None,
    json_file: JsonFile = None,
    threads: Threads = None,
) -> None:
    """Replace units of a recording, change gains and baselines, and compare decoders.

    A third of the units is excluded from training and replaces others in the stream. The model is
    compared unchanged, adapted without labels, and adapted with labels; beside it are a Kalman
    filter, a GRU without and with labels, and an alignment of factors.
    """
    if span not in ("validation", "test"):
        raise ConfigError("--span", expected="validation or test", got=repr(span))
    if model and span != "test":
        raise ConfigError("--span", expected="test with --model, trained on the rest", got=span)
    schedule = Schedule(least, window, trial).checked()
    settings = begin(config, out, json_file, steps, threads)
    read = load_recording(recording, settings.data)
    if span == "validation":
        read = earlier_split(read, settings.data.split)
    read.require_counts("experiment adapt")
    start, stop = settings.data.split.occupied("test", read)
    first = start + round(at / read.bin_width)
    if first + round(after / read.bin_width) >= stop:
        raise ConfigError(
            "--at, --after",
            expected=f"less than the {(stop - start) * read.bin_width:g} s streamed together",
            got=f"{at:g} and {after:g}",
        )
    units = prepare(read, settings.data, chunk=settings.training.chunk).recording
    text = "Scored on the test part." if span == "test" else "Nothing here saw the test part."
    about = _about(settings, read, schedule, after, text)
    results = Results(about, out / "adapt", picture, _tables, json_file)
    with Bar() as bar:
        for k, each in enumerate(by_seed(settings, len(model) if model else seeds)):
            seed = each.training.seed
            if model:
                artifact, others = load_artifact(model[k]), None
                base = read.select_units(artifact.manifest.unit_names)
            else:
                trained, rest = divided(units.unit_names, seed)
                base, others = units.select_units(trained), units.select_units(rest)
                artifact = model_of(each, base, out, bar)
            streams = _chosen(turnover(base, others, (start, stop), first, seed), change)
            results.add(_compared(each, artifact, base, streams, schedule, after, alone, bar))
    results.show()


def days_experiment(
    config: ConfigFile,
    recording: Annotated[
        list[Path], typer.Option(help="Recordings, a day each, in order: two or more.")
    ],
    out: Out,
    seeds: Seeds = 3,
    minutes: Annotated[
        float, typer.Option(min=1, help="Minutes of each later day that are streamed.")
    ] = 10.0,
    alone: Alone = False,
    after: After = 90.0,
    least: Least = Schedule.least,
    window: Window = Schedule.window,
    trial: Trial = Schedule.trial,
    steps: Steps = None,
    json_file: JsonFile = None,
    threads: Threads = None,
) -> None:
    """Train on the first of several days and compare decoders on each later one.

    Units are matched by name. Each later day starts with the model of the first day.
    """
    if len(recording) < 2:
        raise ConfigError("--recording", expected="two days or more", got=str(len(recording)))
    names = [path.stem for path in recording]
    if len(set(names)) < len(names):
        raise RecordingError("--recording", expected="files of different names", got=str(names))
    schedule = Schedule(least, window, trial).checked()
    settings = begin(config, out, json_file, steps, threads)
    first, *later = (load_recording(path, settings.data) for path in recording)
    first.require_counts("experiment days")
    base = prepare(first, settings.data, chunk=settings.training.chunk).recording
    days = dict(zip(names[1:], map(_active(settings, base), later), strict=True))
    whole, streams = days_after(base, days, settings.data.split, minutes)
    text = f"Trained on {names[0]}."
    about = _about(settings, base, schedule, after, text)
    results = Results(about, out / "days", picture, _tables, json_file)
    with Bar() as bar:
        for each in by_seed(settings, seeds):
            artifact = model_of(each, base, out, bar)
            results.add(_compared(each, artifact, whole, streams, schedule, after, alone, bar))
    results.show()


def _chosen(streams: list[Stream], names: list[str] | None) -> list[Stream]:
    """Return the unchanged stream and the named ones. Raises ConfigError for an unknown name."""
    known = [stream.name for stream in streams]
    for name in names or ():
        if name not in known:
            raise ConfigError("--change", expected=f"one of {', '.join(known)}", got=repr(name))
    return [s for s in streams if not names or s.name in (known[0], *names)]


def _active(settings: TrainConfig, base: Recording) -> Any:
    """Select the units of a day that the model knows, or that fire often enough."""

    def of(day: Recording) -> Recording:
        rate = day.mean_counts(0, len(day)) / day.bin_width
        least = max(settings.data.min_rate, 1e-9)
        known = set(base.unit_names)
        pairs = zip(day.unit_names, rate, strict=True)
        return day.select_units(tuple(name for name, hz in pairs if name in known or hz >= least))

    return of


def begin(
    config: Path, out: Path, json_file: Path | None, steps: int | None, threads: int | None
) -> TrainConfig:
    check_writable(json_file, "--json")
    check_folder(out, "--out")
    settings = overridden(load_config(config), steps=steps)
    use_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    return settings


def by_seed(settings: TrainConfig, seeds: int) -> list[TrainConfig]:
    first = settings.training.seed
    return [overridden(settings, seed=first + i) for i in range(seeds)]


def model_of(settings: TrainConfig, base: Recording, out: Path, bar: Progress) -> Artifact:
    """Train a model on these units and bins, or load it from the folder."""
    said = [settings, base.sha256, base.unit_names, base.bounds, len(base), version("ilqr-vae")]
    digest = hashlib.sha256(msgspec.json.encode(said)).hexdigest()[:12]
    path = out / f"seed{settings.training.seed}-{digest}.safetensors"
    if not path.exists():
        train_on(settings, base, path, bar, resume=True)
    return load_artifact(path)


def _compared(
    settings: TrainConfig,
    artifact: Artifact,
    base: Recording,
    streams: list[Stream],
    schedule: Schedule,
    after: float,
    alone: bool,
    bar: Progress,
) -> dict[str, Any]:
    """Compare the decoders on all streams for one seed."""
    split, seed = settings.data.split, settings.training.seed
    steps = _GRU_STEPS * settings.training.steps
    fitted = Fitted(artifact)
    if not alone:
        fitted = Fitted.beside(artifact, base, split, steps=steps, seed=seed, progress=bar)
    made: list[dict[str, Any]] = []
    for stream in streams:
        decodes, attempts = streamed(fitted, stream, schedule, seed, bar)
        made.append(scored(stream, decodes, attempts, after))
        bar.log(f"seed {seed}, {stream.name}: {len(attempts)} fits without labels")
    return {"seed": seed, "model": artifact.manifest.model_id, "streams": made}


def _about(
    settings: TrainConfig, recording: Recording, schedule: Schedule, after: float, scored_on: str
) -> dict[str, Any]:
    """Return what the results of `experiment adapt` and `experiment days` say beside the seeds."""
    return {
        "recording": recording.name,
        "recording_sha256": recording.sha256,
        "scored": scored_on,
        "after": after,
        "schedule": asdict(schedule),
        "config": msgspec.to_builtins(settings),
        "versions": {"ilqr_vae": version("ilqr-vae")},
    }


def _tables(content: dict[str, Any]) -> list[Table]:
    return [scores_table(content), attempts_table(content)]


class Results:
    """The results so far, written after each seed as numbers and a picture.

    Args:
        content: what they say beside the seeds.
        to: files to write, without their extension.
        picture, tables: draw the content.
        json_file: where the numbers go as well in the end.
    """

    def __init__(
        self,
        content: dict[str, Any],
        to: Path,
        picture: Callable[[dict[str, Any]], Figure],
        tables: Callable[[dict[str, Any]], list[Table]],
        json_file: Path | None,
    ) -> None:
        self._seeds: list[dict[str, Any]] = []
        self._content = content | {"seeds": self._seeds}
        self._to, self._picture, self._tables, self._json = to, picture, tables, json_file

    def _numbers(self) -> str:
        return json.dumps(plain(self._content), indent=1) + "\n"

    def add(self, seed: dict[str, Any]) -> None:
        """Add the results of a seed."""
        self._seeds.append(seed)
        write_whole(self._to.with_suffix(".json"), self._numbers())
        with replacing(self._to.with_suffix(".png")) as part:
            self._picture(self._content).savefig(part, format="png", dpi=130)

    def show(self) -> None:
        """Print the tables, or the numbers as JSON."""
        if self._json is not None:
            write_whole(self._json, self._numbers())
        if self._json != STDOUT:
            screen = console(soft_wrap=True)
            for table in self._tables(self._content):
                show(table, screen)
