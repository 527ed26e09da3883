"""``ilqr-vae evaluate``: score a model's causal decodes on a span of a recording, offline."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from ilqr_training.evaluation.baselines import GRU, KALMAN, Rival, fit_rivals
from ilqr_training.evaluation.cosmoothing import CoSmoothing, cosmooth, held_out_units
from ilqr_training.evaluation.report import Evaluated, say
from ilqr_training.evaluation.stress import Stress, StressPlan, under_stress
from ilqr_training.fit.curves import learning_curves
from ilqr_training.readout.causal import Causal, causal_pass
from ilqr_training.train_cli import use_threads
from ilqr_vae.artifact import Artifact, load_artifact
from ilqr_vae.errors import ConfigError
from ilqr_vae.files import STDOUT
from ilqr_vae.recordings import Recording, load_matching
from ilqr_vae.recordings.split import parse_span, plan_drops, warmup_start
from ilqr_vae.report import Outputs, Table
from ilqr_vae.scoring.score import WIENER, Scores, score_decodes
from ilqr_vae.terminal import console, progress

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)

EXAMPLE = (
    "Example: ilqr-vae evaluate reach.safetensors --recording reach.nwb --span test --json e.json"
)


def read_for(artifact: Artifact, path: Path) -> Recording:
    """The recording as the model was trained on one, its units alone. Raises RecordingError."""
    manifest = artifact.manifest
    return load_matching(
        path,
        manifest.data,
        bin_width=manifest.bin_width,
        unit_names=manifest.unit_names,
        kinematic_names=manifest.kinematic_names,
        kinematic_units=manifest.kinematic_units,
    )


def _run(
    artifact: Artifact, recording: Recording, start: int, stop: int, drops: NDArray[np.bool_]
) -> Causal:
    """The exact stream, with a progress bar: warm-up, then every bin of the span."""
    first = warmup_start(start)
    with progress(console(stderr=True)) as bar:
        task = bar.add_task("streaming offline", total=stop - first)
        return causal_pass(
            artifact.estimator(),
            recording,
            start,
            stop,
            run_in=start - first,
            dropped=drops,
            progress=lambda done, _of: bar.update(task, completed=done),
        )


def _scores(
    artifact: Artifact,
    recording: Recording,
    bins: tuple[int, int],
    result: Causal,
    drops: NDArray[np.bool_],
    others: dict[str, NDArray[np.float64]],
) -> Scores | None:
    if not _decodes(artifact, recording):
        return None
    return score_decodes(
        recording,
        artifact.manifest.data.split,
        bins=bins,
        decoded=result.kinematics,
        std=result.kinematics_std,
        seen=~drops[bins[0] : bins[1]],
        others=others,
    )


def _decodes(artifact: Artifact, recording: Recording) -> bool:
    return recording.kinematics is not None and bool(artifact.manifest.kinematic_names)


def _fitted(artifact: Artifact, recording: Recording, gru: bool) -> dict[str, Rival]:
    names = (WIENER, KALMAN, GRU) if gru else (WIENER, KALMAN)
    with progress(console(stderr=True)) as bar:
        task = bar.add_task("fitting rivals")
        return fit_rivals(
            recording,
            artifact.manifest.data.split,
            names,
            say=lambda what, done, of: bar.update(
                task, description=f"fitting the {what}", completed=done, total=of
            ),
        )


def decodes_of(
    rivals: dict[str, Rival], bins: tuple[int, int], drops: NDArray[np.bool_]
) -> dict[str, NDArray[np.float64]]:
    """What ``score_decodes`` does not fit itself; ``drops`` (T,) are the bins left out."""
    missing = drops[:, None]
    made = {name: r.decode(bins, missing=missing) for name, r in rivals.items() if name != WIENER}
    if drops.any() and GRU in rivals:
        held = rivals[GRU].decode(bins, missing=missing, filling="last value")
        made[f"{GRU}, last value held"] = held
    return made


def _stressed(
    artifact: Artifact,
    recording: Recording,
    bins: tuple[int, int],
    rivals: dict[str, Rival],
    plan: StressPlan,
    clean: NDArray[np.float64] | None,
) -> Stress:
    with progress(console(stderr=True)) as bar:
        task = bar.add_task("stress")
        return under_stress(
            artifact.estimator(),
            recording,
            bins,
            tuple(rivals.values()),
            plan,
            clean=clean,
            say=lambda what, done, of: bar.update(task, description=what, completed=done, total=of),
        )


def _cosmoothed(
    artifact: Artifact,
    recording: Recording,
    bins: tuple[int, int],
    held_out: NDArray[np.bool_],
    said: str,
) -> CoSmoothing:
    with progress(console(stderr=True)) as bar:
        task = bar.add_task("co-smoothing")
        return cosmooth(
            artifact,
            recording,
            artifact.manifest.data.split,
            bins,
            held_out,
            said,
            say=lambda what, done, of: bar.update(
                task, description=f"co-smoothing: {what}", completed=done, total=of
            ),
        )


@app.command(epilog=EXAMPLE)
def evaluate(
    model: Annotated[Path, typer.Argument(help="A model file.")],
    recording: Annotated[Path, typer.Option(help="A .nwb, .mat or .h5 recording.")],
    span: Annotated[str, typer.Option(help="train, validation, test or all.")] = "test",
    drop: Annotated[
        float, typer.Option(min=0.0, max=0.99, help="Share of bins to leave out.")
    ] = 0.0,
    seed: Annotated[
        int, typer.Option(min=0, help="Of what is drawn: bins left out, and draws of --stress.")
    ] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the numbers here; - for stdout.")
    ] = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", help="Write one self-contained page here.")
    ] = None,
    arrays_file: Annotated[
        Path | None, typer.Option("--arrays", help="Write every answer here (.npz).")
    ] = None,
    rivals: Annotated[
        bool, typer.Option(help="Fit and score a Kalman filter and a GRU too; takes minutes.")
    ] = False,
    gru: Annotated[
        bool, typer.Option(help="Whether the GRU, which takes the minutes, is among them.")
    ] = True,
    stress: Annotated[
        bool,
        typer.Option(
            "--stress", help="Score all of them with units silent and with bins lost too."
        ),
    ] = False,
    silent: Annotated[
        float, typer.Option(help="With --stress: share of units that fall silent.")
    ] = StressPlan.silent,
    lost: Annotated[
        list[float] | None,
        typer.Option(help="With --stress: share of bins lost; several times; default 0.1 and 0.3."),
    ] = None,
    held_out: Annotated[
        float | None,
        typer.Option(
            help="Co-smoothing: hold out this share of the units (those the file names, where it "
            "names some) and predict them offline from the others, beside two baselines."
        ),
    ] = None,
    draws: Annotated[
        int, typer.Option(help="With --stress: draws averaged, of --seed and those after it.")
    ] = StressPlan.draws,
) -> None:
    """Score causal decodes on a span, beside a Wiener filter's on the same bins.

    The estimator is the one the service streams with, so its answers are the same.
    """
    chosen = parse_span(span)
    outputs = Outputs(json_file=json_file, html_file=html_file, arrays_file=arrays_file)
    outputs.check()
    plan = StressPlan(silent, StressPlan.lost if lost is None else tuple(lost), draws, seed)
    plan = plan.checked()
    use_threads(None)
    artifact = load_artifact(model)
    read = read_for(artifact, recording)
    decodes = _decodes(artifact, read)
    if stress and not decodes:
        raise ConfigError("--stress", expected="kinematics to decode", got="none")
    out = None if held_out is None else held_out_units(read, held_out, seed)
    start, stop = artifact.manifest.data.split.occupied(chosen, read)
    first = warmup_start(start)
    drops = np.zeros(len(read), dtype=bool)
    drops[first:stop] = plan_drops(stop - first, drop, seed)
    began = time.monotonic()
    result = _run(artifact, read, start, stop, drops)
    seconds = time.monotonic() - began
    bins = start, stop
    fitted = _fitted(artifact, read, gru) if decodes and (rivals or stress) else {}
    scores = _scores(artifact, read, bins, result, drops, decodes_of(fitted, bins, drops))
    tables, more = list[Table](), dict[str, Any]()
    if stress:
        clean = None if drops.any() else result.kinematics
        found = _stressed(artifact, read, bins, fitted, plan, clean)
        tables.append(found.table())
        more["stress"] = found.to_json()
    if out is not None:
        smoothed = _cosmoothed(artifact, read, bins, *out)
        tables.append(smoothed.table())
        more["cosmoothing"] = smoothed.to_json()
    done = Evaluated(
        artifact,
        read,
        chosen,
        bins,
        result,
        scores,
        drops,
        seconds,
        *learning_curves(model, artifact.manifest),
        tuple(tables),
        more,
    )
    report = done.report()
    outputs.write(report, done.arrays())
    if json_file != STDOUT:
        say(report)
