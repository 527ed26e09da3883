"""``ilqr-vae inspect``: the contents of a model file, a recording, or a journal."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from ilqr_vae.commands.inspect import recording_sections
from ilqr_vae.errors import ConfigError
from ilqr_vae.files import STDOUT, check_writable, read_toml, write_whole
from ilqr_vae.recordings import RecordingSpec
from ilqr_vae.recordings.contents import contents_of
from ilqr_vae.report.table import Section, named, number, show_sections
from ilqr_vae.terminal import console

if TYPE_CHECKING:  # torch is needed for models only
    from ilqr_vae.artifact import Manifest

GROUP = "ilqr_vae.inspect"
"""Entry points of other packages that inspect folders; each is called with the path."""

_SCORES = {
    "r2": "causal R2, mean",
    "bits_per_spike": "bits per spike",
    "iterations": "iterations per bin",
    "class_accuracy": "bins whose class is right, share",
}
"""Labels of the scores in a manifest."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class _Config(msgspec.Struct):
    """The part of a training configuration that controls how to read a recording."""

    data: RecordingSpec = msgspec.field(default_factory=RecordingSpec)


def model_sections(manifest: Manifest) -> list[Section]:
    """Return the manifest of a model file as sections."""
    spec = manifest.model
    groups = ", ".join(f"{k} ({g.family}, {g.channels})" for k, g in spec.groups.items())
    channels = zip(manifest.kinematic_names, manifest.kinematic_units, strict=True)
    features = manifest.features or ()
    names = manifest.unit_names[: len(manifest.unit_names) - len(features)]
    units = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
    model = {
        "dynamics": f"{spec.dynamics}, n = {spec.latents}, m = {spec.inputs}, {spec.prior} inputs",
        "members": f"{1 + len(manifest.members)}, averaged" if manifest.members else "1",
        "observations": groups,
        "decodes": ", ".join(named(n, u) for n, u in channels) or "latents and rates only",
        "classes": ", ".join(manifest.classes or ()) or "none",
        "bin width": f"{manifest.bin_width * 1e3:g} ms",
        "units": f"{len(names)}: {units}",
        "features": ", ".join(features) or "none",
        "estimator": f"horizon {manifest.horizon.horizon} bins, {manifest.horizon.iterations} "
        "iterations a bin",
        "schema": str(manifest.schema),
        "sha256": manifest.sha256,
    }
    scores = {
        _SCORES.get(k, f"R2 {k.removeprefix('r2.')}"): number(v)
        for k, v in manifest.measured.items()
    }
    warnings = {w.name: w.text for w in manifest.warnings}
    sections = {
        f"model {manifest.model_id}": model,
        "Scores": scores,
        "Where it came from": {k.replace("_", " "): v for k, v in manifest.provenance.items()},
        "Warnings of its recording": warnings,
    }
    return [Section(title, tuple(rows.items())) for title, rows in sections.items() if rows]


def _looked_into(path: Path, config: Path | None) -> tuple[Any, list[Section]]:
    """Return the contents for JSON, and as sections."""
    if path.is_dir():
        found = next(iter(entry_points(group=GROUP, name="journal")), None)
        if found is None:
            raise ConfigError("path", expected="a file; no package reads folders", got=str(path))
        return found.load()(path)
    if path.suffix.lower() not in (".nwb", ".mat", ".h5", ".hdf5"):
        from ilqr_vae.artifact import read_manifest

        manifest = read_manifest(path)
        return manifest, model_sections(manifest)
    spec = RecordingSpec() if config is None else read_toml(config, _Config).data
    contents = contents_of(path, spec)
    return contents, recording_sections(contents)


@app.command(epilog="Example: ilqr-vae inspect session.nwb --config mine.toml")
def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            help="A model (.safetensors), a recording (.nwb, .mat, .h5) or a journal's folder."
        ),
    ],
    config: Annotated[
        Path | None,
        typer.Option(help="TOML whose [data] says how to read a recording."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write everything here; - is standard output.")
    ] = None,
) -> None:
    """Show what is inside a model, a recording or a journal.

    For a model: shapes, units, scores and provenance; the file is checked. For a recording: units,
    series and trials, and what would be read with the defaults or with --config, and why. For a
    journal: sessions, models and answers. Exit codes: 0 shown, 2 not readable.
    """
    check_writable(json_file, "--json")
    found, sections = _looked_into(path, config)
    if json_file is not None:
        write_whole(json_file, msgspec.json.format(msgspec.json.encode(found)).decode() + "\n")
    show_sections(sections, console(soft_wrap=True, stderr=json_file == STDOUT))
