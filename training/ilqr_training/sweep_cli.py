"""``ilqr-vae sweep``: search over settings and seeds, by Ray Tune."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from ilqr_training.config import load_config, overridden
from ilqr_training.distributed.space import parse
from ilqr_training.distributed.sweep import (
    Method,
    Objective,
    SweepPlan,
    Trial,
    stamp_of,
    table,
    tuner_of,
)
from ilqr_training.options import Cpus, Gpus, JsonFile, RecordingFile, Steps
from ilqr_vae.cluster import Address, check_ray, connected
from ilqr_vae.errors import ConfigError, TrainingError
from ilqr_vae.files import STDOUT, check_folder, check_writable, replacing, write_whole
from ilqr_vae.recordings import load_recording
from ilqr_vae.report.outputs import check_html
from ilqr_vae.report.table import Table, number, show
from ilqr_vae.terminal import console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

EXAMPLE = (
    "Example: ilqr-vae sweep mine.toml --recording session.nwb --out sweep/ \\\n"
    "    --search 'model.latents=[10, 20, 30]' \\\n"
    "    --search 'training.learning_rate=log(1e-3, 3e-2)'"
)


@app.command(epilog=EXAMPLE)
def sweep(
    config: Annotated[
        Path, typer.Argument(help="The training configuration (TOML), as for train.")
    ],
    recording: RecordingFile,
    out: Annotated[Path, typer.Option(help="Folder of the results; a second run continues.")],
    search: Annotated[
        list[str],
        typer.Option(
            help="KEY=[a, b, ...], KEY=uniform(a, b) or KEY=log(a, b), KEY by its path in the "
            "configuration; repeat for several."
        ),
    ],
    method: Annotated[
        Method,
        typer.Option(
            help="How points are chosen; bayesian is a tree of Parzen estimators (Optuna)."
        ),
    ] = "random",
    trials: Annotated[
        int, typer.Option(min=1, help="Number of points, or size of the population.")
    ] = 16,
    seeds: Annotated[
        int, typer.Option(min=1, help="Number of seeds of each point, counted from the config's.")
    ] = 1,
    objective: Annotated[
        Objective | None,
        typer.Option(
            help="What is to be high on the validation part.",
            show_default="r2 with kinematics, else bits_per_spike",
        ),
    ] = None,
    early_stop: Annotated[bool, typer.Option(help="Stop trials that are behind (ASHA).")] = True,
    steps: Steps = None,
    cpus: Cpus = 1,
    gpus: Gpus = 0.0,
    address: Address = None,
    json_file: JsonFile = None,
) -> None:
    """Search for the settings whose models score best on the validation part, side by side.

    The test part is never used. --out receives best.safetensors (the model of the best seed of the
    best trial), sweep.json (all trials) and sweep.png (their picture). After an interruption the
    same command continues. On a cluster --out and --recording must be the same on every node.
    """
    check_ray("sweep")
    settings = overridden(load_config(config), steps=steps)
    axes = parse(search, settings)
    read = load_recording(recording, settings.data)
    plan = SweepPlan(
        config=settings,
        recording=str(recording.absolute()),
        stamp=stamp_of(recording),
        axes=axes,
        trials=trials,
        seeds=seeds,
        method=method,
        objective=objective or ("bits_per_spike" if read.kinematics is None else "r2"),
        early_stop=early_stop,
        cpus=cpus,
        gpus=gpus,
    ).checked()
    if plan.objective == "r2" and read.kinematics is None:
        raise ConfigError("--objective", expected="bits_per_spike without kinematics", got="r2")
    check_folder(out, "--out")
    check_writable(json_file, "--json")
    check_html(out / "sweep.png" if out.is_dir() else None, "--out")
    from ilqr_training.distributed.live import LiveTable  # Ray is installed

    with connected(address):
        tuner = tuner_of(plan, out, [LiveTable(tuple(axis.key for axis in axes))])
        rows = table(tuner.fit(), plan)
    content = msgspec.json.format(msgspec.json.encode(rows)) + b"\n"
    write_whole(out / "sweep.json", content)
    if json_file is not None:
        write_whole(json_file, content)
    _draw(rows, plan, out / "sweep.png")
    screen = console(soft_wrap=True, stderr=json_file == STDOUT)
    show(_shown(rows, plan), screen)
    best = rows[0]
    if best.state != "done":
        raise TrainingError("sweep", expected="a trial that is done", got=best.state)
    with replacing(out / "best.safetensors") as part:
        shutil.copyfile(best.model, part)
    console(stderr=json_file == STDOUT, soft_wrap=True).print(
        f"wrote {out / 'best.safetensors'}: {plan.objective} {number(best.score)} on the "
        f"validation part, at {best.point}"
    )


def _shown(rows: list[Trial], plan: SweepPlan) -> Table:
    keys = tuple(axis.key for axis in plan.axes)
    cells = tuple(
        (
            row.state,
            *(f"{v:.4g}" if isinstance(v := row.point[k], float) else str(v) for k in keys),
            str(row.validations),
            str(len(row.seeds)),
            number(row.score),
        )
        for row in rows
    )
    return Table("Trials", "", ("state", *keys, "validations", "seeds", plan.objective), cells)


def _draw(rows: list[Trial], plan: SweepPlan, path: Path) -> None:
    from ilqr_vae import plots

    scored = [row for row in rows if row.score is not None]
    figure = plots.trials(
        {axis.key: [row.point[axis.key] for row in scored] for axis in plan.axes},
        [row.score or 0.0 for row in scored],
        [row.curve for row in scored],
        name=plan.objective,
        logarithmic=[axis.key for axis in plan.axes if axis.kind == "log"],
        best=0,  # the first that is done; one that was stopped early may have scored higher
    )
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=130)
