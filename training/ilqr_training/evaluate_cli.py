"""``ilqr-vae evaluate``: score the causal decodes of a model on a span of a recording."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from ilqr_training.evaluation.baselines import GRU, Baseline, fit_baselines, names_of
from ilqr_training.evaluation.cosmoothing import cosmooth, held_out_units
from ilqr_training.evaluation.report import EvaluationReport, show
from ilqr_training.evaluation.stress import under_stress
from ilqr_training.evaluation.stress_scores import StressPlan
from ilqr_training.fit.curves import learning_curves
from ilqr_training.options import Draws, JsonFile, Lost, RecordingFile, Silent, use_threads
from ilqr_training.readout.causal import Causal, causal_pass
from ilqr_vae.artifact import Artifact, load_artifact
from ilqr_vae.errors import ConfigError
from ilqr_vae.files import STDOUT
from ilqr_vae.progress import Bar
from ilqr_vae.recordings import Recording, load_matching
from ilqr_vae.recordings.split import parse_span, plan_drops, warmup_start
from ilqr_vae.report import Outputs, Table
from ilqr_vae.report.table import number
from ilqr_vae.scoring.score import OURS, WIENER, later_name, score_decodes

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

EXAMPLE = "Example: ilqr-vae evaluate reach.safetensors --recording reach.nwb --json e.json"


def decodes_of(
    baselines: dict[str, Baseline], bins: tuple[int, int], drops: NDArray[np.bool_]
) -> dict[str, NDArray[np.float64]]:
    """Return decodes of all baselines but the Wiener filter; ``drops`` (T,) marks dropped bins."""
    missing = drops[:, None]
    decodes = {
        name: b.decode(bins, missing=missing) for name, b in baselines.items() if name != WIENER
    }
    if drops.any() and GRU in baselines:
        held = baselines[GRU].decode(bins, missing=missing, filling="last value")
        decodes[f"{GRU}, last value held"] = held
    return decodes


def _later(
    result: Causal, read: Recording, bins: tuple[int, int]
) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Return fixed-lag decodes and their deviations by name."""
    if result.scales is None:
        return {}
    inside = (read.breaks > bins[0]) & (read.breaks < bins[1])
    breaks = read.breaks[inside] - bins[0]
    return {later_name(k): result.later(k, breaks) for k in range(1, len(result.scales) + 1)}


def _costs(fitted: dict[str, Baseline], artifact: Artifact, answer: float) -> Table:
    """Return the table of the decoders' costs."""
    trained = artifact.manifest.provenance.get("training_seconds", "")
    rows = [(OURS, "", trained, f"{1e3 * answer:.2f}")]
    rows += [
        (b.name, b.chosen, f"{b.seconds:.0f}", number(1e3 * b.answer_seconds, 2))
        for b in fitted.values()
    ]
    text = "All that each may choose was chosen on the validation part. On this machine, as it was."
    columns = ("decoder", "chosen", "s to train", "ms to answer a bin")
    return Table("What decoders take", text, columns, tuple(rows), words=2)


@app.command(epilog=EXAMPLE)
def evaluate(
    model: Annotated[Path, typer.Argument(help="A model file (.safetensors).")],
    recording: RecordingFile,
    span: Annotated[
        str, typer.Option(help="Part of the recording to score: train, validation, test or all.")
    ] = "test",
    drop: Annotated[
        float, typer.Option(min=0.0, max=0.99, help="Share of bins to leave out.")
    ] = 0.0,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the bins left out and of --stress.")
    ] = 0,
    json_file: JsonFile = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", help="Write one self-contained page here.")
    ] = None,
    arrays_file: Annotated[
        Path | None, typer.Option("--arrays", help="Write every answer here (.npz).")
    ] = None,
    rivals: Annotated[
        bool,
        typer.Option(
            help="Also fit and score a Kalman filter, a GRU, the mean of five of them, an LSTM and "
            "a transformer, which takes up to half an hour."
        ),
    ] = False,
    gru: Annotated[
        bool, typer.Option(help="Include the networks, which take nearly all of that time.")
    ] = True,
    transformer: Annotated[
        bool, typer.Option(help="Include the transformer, which takes about half of the rest.")
    ] = True,
    stress: Annotated[
        bool,
        typer.Option("--stress", help="Also score all decoders with silent units and lost bins."),
    ] = False,
    silent: Silent = StressPlan.silent,
    lost: Lost = None,
    held_out: Annotated[
        float | None,
        typer.Option(
            help="Co-smoothing: hold out this share of the units (those the file names, where it "
            "names some) and predict them offline from the others, beside two baselines."
        ),
    ] = None,
    draws: Draws = StressPlan.draws,
) -> None:
    """Score causal decodes on a span, beside those of a Wiener filter on the same bins.

    The estimator is the one that the service uses, so the estimates are the same.
    """
    chosen = parse_span(span)
    outputs = Outputs(json_file=json_file, html_file=html_file, arrays_file=arrays_file)
    outputs.check()
    plan = StressPlan(silent, StressPlan.lost if lost is None else tuple(lost), draws, seed)
    plan = plan.checked()
    use_threads(None)
    artifact = load_artifact(model)
    data, split = artifact.manifest.data, artifact.manifest.data.split
    read = load_matching(recording, data, artifact.manifest)
    if stress:
        read.require_counts("--stress")
    decodes = read.kinematics is not None and bool(artifact.manifest.kinematic_names)
    if stress and not decodes:
        raise ConfigError("--stress", expected="kinematics to decode", got="none")
    out = None if held_out is None else held_out_units(read, held_out, seed)
    start, stop = bins = split.occupied(chosen, read)
    first = warmup_start(start)
    drops = np.zeros(len(read), dtype=bool)
    drops[first:stop] = plan_drops(stop - first, drop, seed)
    scores, tables, more = None, list[Table](), dict[str, Any]()
    with Bar() as bar:
        began = time.monotonic()
        result = causal_pass(
            artifact.estimator(),
            read,
            start,
            stop,
            run_in=start - first,
            dropped=drops,
            progress=bar,
        )
        seconds = time.monotonic() - began
        fitted: dict[str, Baseline] = {}
        if decodes and (rivals or stress):
            names = names_of(gru, others=rivals, transformer=transformer)
            fitted = fit_baselines(read, split, names, progress=bar)
        if decodes:
            later = _later(result, read, bins)
            scores = score_decodes(
                read,
                split,
                bins=bins,
                decoded=result.kinematics,
                std=result.kinematics_std,
                seen=~drops[start:stop],
                others={name: decoded for name, (decoded, _) in later.items()}
                | decodes_of(fitted, bins, drops),
                others_std={name: std for name, (_, std) in later.items()},
            )
        if rivals and fitted:
            tables.append(_costs(fitted, artifact, seconds / (stop - first)))
        if stress:
            clean = None if drops.any() else result
            under = under_stress(
                artifact.estimator(),
                read,
                bins,
                tuple(fitted.values()),
                plan,
                clean=clean,
                progress=bar,
            )
            tables += [under.table(), under.intervals_table()]
            more["stress"] = under.to_json()
        if out is not None:
            smoothed = cosmooth(artifact, read, split, bins, *out, progress=bar)
            tables.append(smoothed.table())
            more["cosmoothing"] = smoothed.to_json()
    done = EvaluationReport(
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
        show(report)
