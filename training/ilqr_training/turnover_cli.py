"""``ilqr-vae experiment turnover``: a closed loop while units are replaced."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import msgspec
import numpy as np
import typer

from ilqr_training.another_day_cli import (
    ConfigFile,
    Least,
    Out,
    Results,
    Seeds,
    Trial,
    Window,
    begin,
    by_seed,
    model_of,
)
from ilqr_training.evaluation.another_day import ADAPTED, FROZEN, Schedule
from ilqr_training.evaluation.another_day_tables import reaches_picture, reaches_table
from ilqr_training.evaluation.changed import divided
from ilqr_training.evaluation.reaching import Turnover, reach, replaced
from ilqr_training.fit.crops import prepare
from ilqr_training.options import JsonFile, Steps, Threads
from ilqr_vae.progress import Bar
from ilqr_vae.simulated.subject import simulate_session

EXAMPLE = "Example: ilqr-vae experiment turnover configs/demo.toml --out turnover"

_AROUND_S = 20.0
"""Half the seconds over which a success rate is computed."""


def turnover_experiment(
    config: ConfigFile,
    out: Out,
    seeds: Seeds = 3,
    units: Annotated[int, typer.Option(min=6, help="Number of the subject's units.")] = 150,
    minutes: Annotated[float, typer.Option(min=1, help="Minutes of training data.")] = 10.0,
    share: Annotated[
        float, typer.Option(min=0, max=0.5, help="Share of the units that are replaced.")
    ] = 0.3,
    before: Annotated[
        float, typer.Option(min=60, help="Seconds of reaching before the change.")
    ] = 120.0,
    then: Annotated[
        float, typer.Option(min=120, help="Seconds of reaching after the change.")
    ] = 240.0,
    least: Least = Schedule.least,
    window: Window = Schedule.window,
    trial: Trial = Schedule.trial,
    steps: Steps = None,
    json_file: JsonFile = None,
    threads: Threads = None,
) -> None:
    """Let a simulated subject reach on while units are replaced, with and without adapting.

    The model is trained on two thirds of the subject's units. At the change, others replace some of
    them. The success rate is given before the change, in the minute after it, later, and over time
    as a picture.
    """
    schedule = Schedule(least, window, trial).checked()
    settings = begin(config, out, json_file, steps, threads)
    around = _AROUND_S
    content: dict[str, Any] = {
        "share": share,
        "change": before,
        "around": 2 * around,
        "times": np.arange(around, before + then - around + 1, 5.0).tolist(),
        "parts": list(parts := _parts(before, then)),
        "schedule": asdict(schedule),
        "config": msgspec.to_builtins(settings),
    }
    to = out / "turnover"
    results = Results(content, to, reaches_picture, lambda c: [reaches_table(c)], json_file)
    with Bar() as bar:
        for each in by_seed(settings, seeds):
            seed = each.training.seed
            session = simulate_session(seed, minutes=minutes, units=units, progress=bar)
            recording = session.to_recording(each.data.bin_width or 0.05)
            trained, others = divided(recording.unit_names, seed)
            base = prepare(
                recording.select_units(trained), each.data, chunk=each.training.chunk
            ).recording
            artifact = model_of(each, base, out, bar)
            index = {name: i for i, name in enumerate(recording.unit_names)}
            columns, spare = (
                np.array([index[name] for name in names], dtype=np.int64)
                for names in (base.unit_names, others)
            )
            later = replaced(columns, spare, share, seed)
            plan = Turnover(seed, units, columns, later, before, before + then, seed)
            found: dict[str, Any] = {"seed": seed, "model": artifact.manifest.model_id}
            for how, when in ((FROZEN, None), (ADAPTED, schedule)):
                made = reach(artifact, plan, when, bar)
                found[how] = {
                    "reaches": len(made.times),
                    "success": {name: made.success(*part) for name, part in parts.items()},
                    "over_time": [made.success(t - around, t + around) for t in content["times"]],
                    "fits": [asdict(fit) for fit in made.fits],
                    "swaps": [
                        before + fit.at + schedule.trial
                        for fit in made.fits
                        if fit.outcome == "swapped in"
                    ],
                }
            results.add(found)
    results.show()


def _parts(before: float, then: float) -> dict[str, tuple[float, float]]:
    """Return start and end in seconds of the parts that are scored, by name."""
    return {
        "before": (0.0, before),
        "in the minute after": (before, before + 60),
        "later": (before + 60, before + then),
        "in the last minute": (before + then - 60, before + then),
    }
