"""``ilqr-vae adapt``: adapt a model to other units of the same brain, without labels."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from ilqr_training.adaptation.adapt import Adaptation, adapt
from ilqr_training.adaptation.labels import intended
from ilqr_training.adaptation.units import UnitVerdict
from ilqr_training.options import JsonFile, RecordingFile, Threads, use_threads
from ilqr_vae.artifact import Artifact, Manifest, load_artifact, save_artifact
from ilqr_vae.errors import ConfigError, RecordingError, TrainingError
from ilqr_vae.files import STDOUT, check_writable, write_whole
from ilqr_vae.progress import Bar
from ilqr_vae.recordings import Recording, load_at
from ilqr_vae.terminal import console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

EXAMPLE = (
    "Example: ilqr-vae adapt mon.safetensors --recording tue.nwb --out tue.safetensors\n"
    "On its first five minutes alone: ... --seconds 0 300"
)


def read_streamed(path: Path, manifest: Manifest | None = None) -> Recording:
    """Read bins that `ilqr-vae follow` wrote; with intended velocities if it wrote targets.

    Args:
        manifest: names the channels of the decodes in the file; None ignores decodes and targets.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            mask = np.asarray(file["mask"], bool)
            labels: dict[str, Any] = {}
            if manifest is not None and "aims" in file:
                aims = np.asarray(file["aims"], np.float64)
                decoded = np.asarray(file["decoded"], np.float64)
                kinematics, scored = intended(decoded, aims[:, :2], aims[:, 2:4], aims[:, 4])
                labels = {
                    "kinematics": kinematics,
                    "scored": scored,
                    "kinematic_names": manifest.kinematic_names,
                    "kinematic_units": manifest.kinematic_units,
                }
            return Recording(
                name=path.stem,
                bin_width=float(file["bin_width"]),
                counts=np.asarray(file["counts"], np.uint16),
                unit_names=tuple(map(str, file["names"])),
                valid=np.asarray(mask.any(1)),
                observed=mask,
                **labels,
            )
    except (OSError, ValueError, KeyError, TypeError, IndexError, zipfile.BadZipFile) as error:
        raise RecordingError(
            f"recording {path.name}", expected="bins that `follow` wrote", got=str(error)
        ) from error


def _recording(
    artifact: Artifact, path: Path, seconds: tuple[float, float]
) -> tuple[Recording, tuple[int, int]]:
    """Return the recording, with the units to stream, and the bins to fit on."""
    manifest = artifact.manifest
    if path.suffix == ".npz":
        read = read_streamed(path, manifest)
        read.require_bin_width(manifest.bin_width)
    else:
        read = load_at(path, manifest.data.as_it_ran(), manifest.bin_width)
    start, stop = (round(s / manifest.bin_width) for s in seconds)
    stop = len(read) if stop == 0 else stop
    if not 0 <= start < stop <= len(read):
        raise ConfigError(
            "--seconds",
            expected=f"a start and a later end within {len(read) * read.bin_width:g} s",
            got=f"{seconds[0]:g} and {seconds[1]:g}",
        )
    rate = read.mean_counts(start, stop) / read.bin_width
    known = set(manifest.unit_names)
    names = [
        name
        for name, hz in zip(read.unit_names, rate, strict=True)
        if name in known or hz >= max(manifest.data.min_rate, 1e-9)
    ]
    return read.select_units(tuple(names)), (start, stop)


def _lines(made: Adaptation) -> list[str]:
    lines = [f"{made.count(verdict):>5} units: {verdict.value}" for verdict in UnitVerdict]
    if made.gone:
        lines.append(f"{len(made.gone):>5} units of the model that the recording lacks")
    was, now = made.bits
    lines.append(f"bits per bin over mean rates, on held-out bins: {was:.3f} for the previous")
    lines.append(f"model, {now:.3f} for the adapted one")
    return lines


@app.command(epilog=EXAMPLE)
def run(
    model: Annotated[Path, typer.Argument(help="A model file (.safetensors).")],
    recording: RecordingFile,
    out: Annotated[Path, typer.Option(help="The adapted model file to write (.safetensors).")],
    seconds: Annotated[
        tuple[float, float],
        typer.Option(help="Start and end of what to fit on; an end of 0 is the recording's."),
    ] = (0.0, 0.0),
    seed: Annotated[int, typer.Option(min=0, help="Seed of folds and draws.")] = 0,
    json_file: JsonFile = None,
    threads: Threads = None,
) -> None:
    """Fit a model's observation rows to the units of a new recording, without labels.

    Dynamics, priors and readout do not change. Units that still fit anchor the latents, and the
    rows of the others are learnt from them. A candidate is refused (exit code 4) and nothing is
    written unless it predicts the last quarter of the bins better than the previous model.
    """
    check_writable(out, "--out")
    check_writable(json_file, "--json")
    use_threads(threads)
    artifact = load_artifact(model)
    read, bins = _recording(artifact, recording, seconds)
    with Bar() as bar:
        labelled = recording.suffix == ".npz" and read.kinematics is not None
        made = adapt(artifact, read, bins, labelled=labelled, seed=seed, progress=bar)
    if json_file is not None:
        numbers = {
            "units": {name: verdict.name.lower() for name, verdict in made.verdicts.items()},
            "gone": list(made.gone),
            "bits_before": made.bits[0],
            "bits_after": made.bits[1],
            "outside": made.outside,
            "refused": made.refused,
        }
        write_whole(json_file, json.dumps(numbers, indent=1) + "\n")
    if json_file != STDOUT:
        for line in _lines(made):
            console(soft_wrap=True).print(line, markup=False, highlight=False)
    if made.refused:
        raise TrainingError("adapt", expected="rows that fit", got=f"none: {made.refused}")
    a = made.artifact
    written = (a.readout, a.mean_rate, a.seen, a.intervals, a.others, a.classes)
    save_artifact(out, a.manifest, a.model, *written)
