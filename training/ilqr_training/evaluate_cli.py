"""``ilqr-vae evaluate``: score a model's causal decodes on a span of a recording, offline."""

from __future__ import annotations

import platform
import shlex
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from ilqr_training.causal import Causal, causal_pass
from ilqr_training.followed import learning_curves
from ilqr_training.rivals import decode_rivals
from ilqr_training.train_cli import use_threads
from ilqr_vae.artifact import Artifact, load_artifact
from ilqr_vae.recordings import Recording, load_matching
from ilqr_vae.recordings.spec import Span, parse_span, plan_drops, warmup_start
from ilqr_vae.report import STDOUT, Outputs, ReportData, Scores, score_decodes
from ilqr_vae.report.score import OURS, WIENER

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
    )


def _run(
    artifact: Artifact, recording: Recording, start: int, stop: int, drops: NDArray[np.bool_]
) -> Causal:
    """The exact stream, with a progress bar: warm-up, then every bin of the span."""
    first = warmup_start(start)
    with Progress(console=Console(stderr=True), transient=True) as bar:
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


def _rivals(
    artifact: Artifact, recording: Recording, bins: tuple[int, int], drops: NDArray[np.bool_]
) -> dict[str, NDArray[np.float64]]:
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("fitting rivals")
        return decode_rivals(
            recording,
            artifact.manifest.data.split,
            bins,
            ~drops,
            say=lambda what, done, of: bar.update(
                task, description=f"fitting the {what}", completed=done, total=of
            ),
        )


def _report(
    artifact: Artifact,
    recording: Recording,
    span: Span,
    bins: tuple[int, int],
    result: Causal,
    scores: Scores | None,
    drops: NDArray[np.bool_],
    seconds: float,
    learning: dict[str, tuple[tuple[int, float], ...]],
) -> ReportData:
    manifest, (start, stop) = artifact.manifest, bins
    part = recording.slice(start, stop)
    names = manifest.kinematic_names
    missing = drops[start:stop] | ~recording.valid[start:stop]
    facts = {"bits per spike, one step ahead": f"{result.bits_per_spike:.3f}"}
    if scores is not None:
        facts["causal R2, mean"] = f"{scores.methods[OURS]['r2']:.3f}"
        if WIENER in scores.methods:
            facts["Wiener filter, same bins"] = f"{scores.methods[WIENER]['r2']:.3f}"
        facts["90 % interval covers"] = f"{100 * scores.methods[OURS]['coverage_90']:.1f} %"
    notes = scores.notes if scores is not None else ("Nothing to score decodes on.",)
    notes += recording.notes
    if len(recording.breaks):
        notes += ("Trials are laid end to end: times leave out what lay between them.",)
    sha = recording.sha256
    return ReportData(
        title=f"Offline causal evaluation on {recording.name}",
        kind="evaluate",
        bin_width=recording.bin_width,
        start=part.start_time,
        counts=part.counts,
        status=tuple("missing" if m else "ok" for m in missing),
        latents=result.window[:, : manifest.latents],
        latents_std=result.latent_std,
        rates=result.rates,
        inputs=result.inputs,
        learning=learning,
        bits_per_spike=result.bits_per_spike,
        names=names,
        units=manifest.kinematic_units,
        truth=part.kinematics if names else None,
        decoded=result.kinematics if names else None,
        decoded_std=result.kinematics_std if names else None,
        baselines={} if scores is None or scores.wiener is None else {WIENER: scores.wiener},
        trials=part.trials,
        scores=scores,
        facts=facts,
        provenance={
            "model": manifest.model_id,
            "recording": recording.name + (f", sha256 {sha}" if sha else ""),
            "span": f"{span}: bins {start} to {stop - 1}, after {start - warmup_start(start)} "
            "bins of warm-up",
            "versions": f"ilqr-vae {version('ilqr-vae')}, Python {platform.python_version()}, "
            f"torch {torch.__version__}",
            "command": shlex.join(["ilqr-vae", "evaluate", *sys.argv[2:]]),
        },
        notes=notes,
        extra={
            "model": manifest.model_id,
            "solver": result.statuses,
            "iterations": result.iterations,
            "seconds": seconds,
            "validation_scores": manifest.scores,
        },
    )


def _arrays(start: int, result: Causal, latents: int) -> dict[str, NDArray[Any]]:
    return {
        "index": np.arange(start, start + len(result.bits)),
        "kinematics": result.kinematics,
        "kinematics_std": result.kinematics_std,
        "latents": result.window[:, :latents],
        "latents_std": result.latent_std,
        "inputs": result.inputs,
        "bits": result.bits,
        "spikes": result.spikes,
    }


def _say(report: ReportData) -> None:
    console = Console(soft_wrap=True)
    console.print(f"[bold]{report.title}[/], {len(report.counts)} bins", highlight=False)
    if report.scores is not None:
        for name, values in report.scores.methods.items():
            shown = "  ".join(f"{k} {v:.4f}" for k, v in values.items())
            found = report.scores.intervals.get(name, {}).get("r2")
            if found is not None:
                shown += f"  r2 95 % interval {found[0]:.4f} to {found[1]:.4f}"
            console.print(f"  {name:<14} {shown}", highlight=False, markup=False)
    console.print(f"  bits per spike {report.bits_per_spike:.4f}", highlight=False)
    for note in report.notes:
        console.print(f"  {note}", highlight=False, markup=False)


@app.command(epilog=EXAMPLE)
def evaluate(
    model: Annotated[Path, typer.Argument(help="A model file.")],
    recording: Annotated[Path, typer.Option(help="A .nwb or .mat recording.")],
    span: Annotated[str, typer.Option(help="train, validation, test or all.")] = "test",
    drop: Annotated[
        float, typer.Option(min=0.0, max=0.99, help="Share of bins to leave out.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of which bins are left out.")] = 0,
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
) -> None:
    """Score causal decodes on a span, beside a Wiener filter's on the same bins.

    The estimator is the one the service streams with, so its answers are the same.
    """
    chosen = parse_span(span)
    outputs = Outputs(json_file=json_file, html_file=html_file, arrays_file=arrays_file)
    outputs.check()
    use_threads(None)
    artifact = load_artifact(model)
    read = read_for(artifact, recording)
    start, stop = artifact.manifest.data.split.occupied(chosen, read)
    first = warmup_start(start)
    drops = np.zeros(len(read), dtype=bool)
    drops[first:stop] = plan_drops(stop - first, drop, seed)
    began = time.monotonic()
    result = _run(artifact, read, start, stop, drops)
    seconds = time.monotonic() - began
    others: dict[str, NDArray[np.float64]] = {}
    if rivals and _decodes(artifact, read):
        others = _rivals(artifact, read, (start, stop), drops)
    scores = _scores(artifact, read, (start, stop), result, drops, others)
    curves = learning_curves(model, artifact.manifest)
    report = _report(artifact, read, chosen, (start, stop), result, scores, drops, seconds, curves)
    outputs.write(report, _arrays(start, result, artifact.manifest.latents))
    if json_file != STDOUT:
        _say(report)
