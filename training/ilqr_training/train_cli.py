"""``ilqr-vae train``: fit a model to a recording."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console

from ilqr_training.config import TrainConfig, load_config, overridden
from ilqr_training.evaluation.baselines import fit_baselines, fit_rivals, names_of
from ilqr_training.fit.crops import Prepared
from ilqr_training.fit.curves import log_folder
from ilqr_training.fit.joint import session_path, train_sessions
from ilqr_training.fit.origin import begun_from
from ilqr_training.fit.train import checkpoint_path, train
from ilqr_training.options import JsonFile, Steps, Threads, use_threads
from ilqr_training.plan import TrainingPlan, plan_of, sections_of
from ilqr_vae.artifact import Manifest, load_artifact
from ilqr_vae.cluster import check_ray, connected
from ilqr_vae.errors import ConfigError, ShapeError, number_of
from ilqr_vae.files import STDOUT, check_folder, check_writable, write_whole
from ilqr_vae.kernels.backend import device_of
from ilqr_vae.progress import Bar, duration
from ilqr_vae.report.table import number, scores_table, show, show_sections
from ilqr_vae.scoring.score import OURS
from ilqr_vae.terminal import console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

_RIVAL_STEPS = 600
"""Largest number of gradient steps of the rivals' GRU, which then takes seconds to fit."""

EXAMPLE = "Example: ilqr-vae train mine.toml --recording reach.nwb --out reach.safetensors"


@app.command(epilog=EXAMPLE)
def train_command(
    config: Annotated[
        Path, typer.Argument(help="The training configuration (TOML); see configs/.")
    ],
    out: Annotated[Path, typer.Option(help="The model file to write (.safetensors).")],
    recording: Annotated[
        list[Path] | None,
        typer.Option(
            help="A .nwb, .mat or .h5 recording. Several: their dynamics are shared, and each "
            "session gets a model file of its own units beside --out. Needed, except with --check."
        ),
    ] = None,
    origin: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="A model of another session: its dynamics stay, and rows and readout are trained "
            "for this one's units, in fewer steps.",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the checkpoint beside --out.")
    ] = False,
    seed: Annotated[
        int | None, typer.Option(help="Seed of everything drawn.", show_default="the config's")
    ] = None,
    steps: Steps = None,
    fraction: Annotated[
        float | None,
        typer.Option(
            help="Train and validate on this first share of the recording only; the test part "
            "stays the same.",
            show_default="the config's",
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="Device of the gradient steps: cpu, cuda, cuda:N or auto.",
            show_default="the config's",
        ),
    ] = None,
    log_dir: Annotated[
        Path | None,
        typer.Option(help="Folder for TensorBoard events.", show_default="beside --out"),
    ] = None,
    threads: Threads = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="Train the members of an ensemble on a Ray cluster: HOST:PORT or auto. --out must "
            "be the same on every node.",
            show_default="this machine, without Ray",
        ),
    ] = None,
    baselines: Annotated[
        bool,
        typer.Option(help="Also fit a Wiener and a Kalman filter and show their scores."),
    ] = True,
    gru: Annotated[
        bool, typer.Option("--gru", help="Also fit a GRU, which takes minutes.")
    ] = False,
    rivals: Annotated[
        Path | None,
        typer.Option(
            help="Also fit a Kalman filter and a small GRU and write them here (.npz), to decode "
            "beside the model in replay and closed-loop."
        ),
    ] = None,
    check_only: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Show what training would do, then exit. Without --recording only the config "
            "is checked.",
        ),
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Fit a model to a recording: its latent dynamics, and a causal readout of its kinematics.

    Trains on the first part of the recording, makes all choices on the validation part and never
    uses the test part. Interrupted runs continue with --resume, to the same result.
    """
    if out.suffix != ".safetensors":
        raise ConfigError("--out", expected="a name ending in .safetensors", got=str(out))
    settings = overridden(
        load_config(config), seed=seed, steps=steps, device=device, fraction=fraction
    )
    began_with = None if origin is None else load_artifact(origin)
    if began_with is not None:
        settings = begun_from(settings, began_with, steps)
        if recording and len(recording) > 1:
            raise ConfigError("--from", expected="one --recording", got=str(len(recording)))
    device_of(settings.training.device)
    if check_only and not recording:
        console().print("The configuration is valid. Without --recording nothing else is checked.")
        return
    if not recording:
        raise ConfigError("--recording", expected="a .nwb, .mat or .h5 file", got="none")
    check_writable(out, "--out")
    check_writable(json_file, "--json")
    check_writable(rivals, "--rivals")
    if rivals is not None and len(recording) != 1:
        raise ConfigError("--rivals", expected="one --recording", got=str(len(recording)))
    events = log_dir or log_folder(out)
    check_folder(events, "--log-dir")
    if check_only:
        _say_plan(plan_of(settings, recording), json_file)
        return
    if address is not None:
        check_ray("--address")
    use_threads(threads)
    began = time.monotonic()
    own: dict[str, Manifest] = {}
    beside: dict[str, float] = {}
    try:
        with Bar() as bar, nullcontext() if address is None else connected(address):

            def before(data: Prepared) -> None:
                beside.update(_baselines(data, settings, gru, bar) if baselines else {})
                if rivals is not None:
                    _save_rivals(data, settings, rivals, bar)

            if len(recording) == 1:
                done = train(
                    settings,
                    recording[0],
                    out,
                    bar,
                    resume=resume,
                    log_dir=events,
                    before=before,
                    origin=began_with,
                )
            else:
                done, own = train_sessions(
                    settings, recording, out, bar, resume=resume, log_dir=events
                )
            seconds = time.monotonic() - began
    except KeyboardInterrupt:
        kept = checkpoint_path(out)
        hint = f"; continue with --resume ({kept.name})" if kept.exists() else ""
        console(stderr=True).print(f"interrupted{hint}")
        raise typer.Exit(130) from None
    if json_file is not None:
        content = {
            "model": done.manifest.model_id,
            "scores": done.manifest.scores,
            "baselines": {name: {"r2": score} for name, score in beside.items()},
            "provenance": done.manifest.provenance,
            "warnings": done.manifest.warnings,
            "steps": done.steps,
            "best_step": done.best_step,
            "history": done.history,
            "seconds": done.seconds,
        }
        write_whole(json_file, msgspec.json.format(msgspec.json.encode(content)).decode() + "\n")
    on_stderr = json_file == STDOUT
    screen = console(soft_wrap=True, stderr=on_stderr)
    screen.print(
        f"wrote {out} (model {done.manifest.model_id}) after {number_of(done.steps, 'step')}, "
        f"best at {done.best_step}, {duration(seconds)}"
    )
    _show_scores(done.manifest, beside, screen)
    for name, manifest in own.items():
        screen.print(f"wrote {session_path(out, name)} (model {manifest.model_id})")
        _show_scores(manifest, {}, screen)


def _show_scores(manifest: Manifest, beside: dict[str, float], screen: Console) -> None:
    """Print the scores on the validation part, on which all choices were made."""
    scores = manifest.measured
    if "r2" in scores:
        methods = {OURS: scores} | {name: {"r2": score} for name, score in beside.items()}
        show(
            scores_table(
                "Causal decodes of the validation part, on which everything was chosen", methods
            ),
            screen,
        )
    screen.print(f"  bits per spike {number(scores['bits_per_spike'])}")


def _say_plan(plan: TrainingPlan, json_file: Path | None) -> None:
    if json_file is not None:
        write_whole(json_file, msgspec.json.format(msgspec.json.encode(plan)).decode() + "\n")
    show_sections(sections_of(plan), console(soft_wrap=True, stderr=json_file == STDOUT))


def _baselines(data: Prepared, settings: TrainConfig, gru: bool, bar: Bar) -> dict[str, float]:
    """Return the mean R2 of each baseline on the validation part."""
    if data.recording.kinematics is None:
        return {}
    try:
        fitted = fit_baselines(
            data.recording,
            settings.data.split,
            names_of(gru),
            seed=settings.training.seed,
            progress=bar,
        )
    except ShapeError as error:  # the model's scores are shown even if a baseline cannot be fitted
        bar.log(f"no baselines: {error}")
        return {}
    return {name: baseline.validation_r2 for name, baseline in fitted.items()}


def _save_rivals(data: Prepared, settings: TrainConfig, path: Path, bar: Bar) -> None:
    if data.recording.kinematics is None:
        bar.log("no rivals: the recording has no kinematics")
        return
    if data.recording.features:
        bar.log("no rivals: they would read the features too")
        return
    try:
        fitted = fit_rivals(
            data.recording,
            settings.data.split,
            steps=min(settings.training.steps, _RIVAL_STEPS),
            seed=settings.training.seed,
            progress=bar,
        )
    except ShapeError as error:
        bar.log(f"no rivals: {error}")
        return
    fitted.save(path)
