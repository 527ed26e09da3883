"""Sphinx directives whose content comes from the code: keys, verbs, metrics, errors.

```{generated} configuration ilqr_training.config TrainConfig
```
"""

from __future__ import annotations

import re
from importlib import import_module
from importlib.metadata import entry_points
from inspect import getdoc, isfunction
from typing import Any

import error_texts
import structs
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from typer.cli import get_docs_for_click
from typer.main import get_command

from ilqr_service.metrics.telemetry import Telemetry
from ilqr_vae.cli import GROUP, SUMMARIES


def configuration(module: str, name: str) -> str:
    """Every key of a struct."""
    return structs.table(getattr(import_module(module), name))


def verbs() -> str:
    """Every verb's help, from its parser."""
    apps = {entry.name: entry for entry in entry_points(group=GROUP)}
    parts: list[str] = []
    for verb in SUMMARIES:
        command = get_command(apps[verb].load())
        context = command.make_context(verb, [], resilient_parsing=True)
        text = get_docs_for_click(obj=command, ctx=context, name=f"ilqr-vae {verb}", indent=1)
        text = text.replace(f"## `ilqr-vae {verb}`", f"## {verb}", 1).replace(
            "[default:", "[default"
        )
        text = re.sub(
            r"^Example: (.+)$", r"**Example**:\n\n```console\n$ \1\n```", text, flags=re.M
        )
        parts.append(text)
    return "\n".join(parts)


def metrics() -> str:
    """Every metric of a service."""
    lines = ["| metric | type | labels | meaning |", "| --- | --- | --- | --- |"]
    for metric in sorted(Telemetry(0.05).registry.collect(), key=lambda m: m.name):
        labels = sorted({name for s in metric.samples for name in s.labels} - {"le"})
        shown = metric.name + ("_total" if metric.type == "counter" else "")
        said = ", ".join(f"`{label}`" for label in labels) or "–"
        lines.append(
            f"| `{shown}` | {metric.type} | {said} | {structs.cell(metric.documentation)} |"
        )
    return "\n".join(lines)


def metric_names() -> str:
    """Every function of ``ilqr_vae.scoring.metrics``, with the first sentence of its docstring."""
    module = import_module("ilqr_vae.scoring.metrics")
    lines = ["| score | meaning |", "| --- | --- |"]
    for name, value in vars(module).items():
        if isfunction(value) and not name.startswith("_") and value.__module__ == module.__name__:
            first = " ".join((getdoc(value) or "").split("\n\n")[0].split())
            lines.append(f"| `{name}` | {structs.cell(first)} |")
    return "\n".join(lines)


MAKERS: dict[str, Any] = {
    "configuration": configuration,
    "verbs": verbs,
    "metrics": metrics,
    "scores": metric_names,
    "errors": error_texts.page,
    "warnings": error_texts.warning_table,
}


class Generated(SphinxDirective):
    """``{generated} MAKER ARGUMENTS``: the Markdown that a maker returns."""

    required_arguments = 1
    optional_arguments = 2

    def run(self) -> list[nodes.Node]:
        maker, *arguments = self.arguments
        return self.parse_text_to_nodes(MAKERS[maker](*arguments), allow_section_headings=True)


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("generated", Generated)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
