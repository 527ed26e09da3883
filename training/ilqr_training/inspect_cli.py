"""``ilqr-vae inspect``: what is inside a model file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.table import Table

from ilqr_vae.artifact import Manifest, read_manifest
from ilqr_vae.files import STDOUT, check_writable, write_whole
from ilqr_vae.terminal import console

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


def _table(manifest: Manifest) -> Table:
    table = Table(title=f"model {manifest.model_id}", show_header=False)
    spec = manifest.model
    groups = ", ".join(f"{k} ({g.family}, {g.channels})" for k, g in spec.groups.items())
    decodes = ", ".join(
        f"{n} [{u}]"
        for n, u in zip(manifest.kinematic_names, manifest.kinematic_units, strict=True)
    )
    rows = {
        "schema": str(manifest.schema),
        "sha256": manifest.sha256,
        "dynamics": f"{spec.dynamics}, n = {spec.latents}, m = {spec.inputs}, {spec.prior} inputs",
        "observations": groups,
        "decodes": decodes or "nothing: latents and rates only",
        "bin width": f"{manifest.bin_width * 1e3:g} ms",
        "units": f"{len(manifest.unit_names)}: {', '.join(manifest.unit_names[:6])}"
        + (" ..." if len(manifest.unit_names) > 6 else ""),
        "estimator": f"horizon {manifest.horizon.horizon} bins, "
        f"{manifest.horizon.iterations} iterations a bin",
    }
    rows |= {f"score {k}": f"{v:.4f}" for k, v in manifest.measured.items()}
    rows |= dict(manifest.provenance)
    rows |= {f"warning {w.name}": w.text for w in manifest.warnings}
    for name, value in rows.items():
        table.add_row(name, value)
    return table


@app.command(epilog="Example: ilqr-vae inspect reach.safetensors --json manifest.json")
def inspect(
    model: Annotated[Path, typer.Argument(help="A model file.")],
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the whole manifest here; - is stdout.")
    ] = None,
) -> None:
    """Check a model file and show what it is: shapes, units, scores, where it came from."""
    check_writable(json_file, "--json")
    manifest = read_manifest(model)
    if json_file is not None:
        write_whole(json_file, msgspec.json.format(msgspec.json.encode(manifest)).decode() + "\n")
    console(soft_wrap=True, stderr=json_file == STDOUT).print(_table(manifest))
