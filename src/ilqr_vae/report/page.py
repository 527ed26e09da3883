"""The HTML page of a report."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ilqr_vae.errors import ConfigError
from ilqr_vae.plots.style import GREY, INK, STATUS_COLOURS
from ilqr_vae.report import figures
from ilqr_vae.report.data import Reaches, ReportData, distribution
from ilqr_vae.report.explorer import as_json, run_data
from ilqr_vae.report.table import Table, classes_table, number
from ilqr_vae.scoring.score import OURS, BySpeed
from ilqr_vae.terminal import visible

_FIGURES: tuple[tuple[str, str, Callable[[ReportData], figures.Drawn | None]], ...] = (
    (
        "Decoded movement over time",
        "What was decoded from each bin as it came, nothing later, against what was measured.",
        figures.time_course,
    ),
    (
        "Reaches",
        "Velocity integrated from the start of each trial to where the measured hand is farthest "
        "away; colour is the measured direction.",
        figures.reaches,
    ),
    (
        "Agreement and calibration",
        "Every bin against what was measured (dashed: equality), and how often the measured value "
        "fell inside the interval the decoder stated (dashed: perfect; shaded: within 5 %).",
        figures.agreement,
    ),
    (
        "Classes",
        "The largest probability of each bin against how often that class was right (dashed: "
        "perfect; shaded: within 5 %).",
        figures.classes,
    ),
    (
        "Residuals over time",
        "Root mean square error of each block of the run, beside the standard deviation the "
        "decoder stated. A decoder that goes stale climbs.",
        figures.residual_course,
    ),
    (
        "Firing around the movement",
        "Mean rate of the units whose rates differ most between conditions (over time where there "
        "is one): counted (thin) and as the model has it from each bin and those before (thick).",
        figures.psth,
    ),
    (
        "Inferred inputs around events",
        "Size of the inputs the dynamics need to explain the spikes, mean over trials with its "
        "standard error.",
        figures.inputs_around,
    ),
    (
        "Latent state",
        "The state that explains the spikes: the latents of largest variance with one standard "
        "deviation, and the plane of the first two principal components.",
        figures.latents,
    ),
    ("Spikes", "Counts per bin over the same seconds as the time courses.", figures.raster),
    ("Latency", "Per bin; total runs from the intended send to the answer.", figures.latency),
    ("Learning curves", "What was followed while the model was trained.", figures.learning),
)
_CURSOR = (
    "Closed loop: paths of the cursor",
    "From the go to the end of each reach. Colour is the direction of the target; a failed reach "
    "is grey. Targets are circles.",
)
_AFTER_FIGURES = "<!-- further figures -->"
_HERE = files("ilqr_vae.report")
_UPLOT = "uplot/uPlot.iife.min.js"


def _range(found: tuple[float, float] | None) -> str:
    return "–" if found is None else f"{number(found[0])} to {number(found[1])}"


def _latency_rows(data: ReportData) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for stage, values in data.latency_ms.items():
        summary = distribution(values)
        if summary["n"]:
            cells = [number(summary[k], 2) for k in ("p50", "p99", "p99.9", "max")]
            bound = data.latency_uncertainty_ms.get(stage, 0.0)
            name = f"{stage} (± {number(bound, 3)})" if bound else stage
            rows.append({"stage": name, "n": summary["n"], "cells": cells})
    return rows


def _score_table(data: ReportData) -> dict[str, Any] | None:
    if data.scores is None:
        return None
    methods = data.scores.methods
    columns = [k for k in methods[OURS] if k != "coverage_90"]
    labels = ["R² mean", *(c.removeprefix("r2.") for c in columns[1:])]
    rows = [
        {
            "name": name,
            "cells": [number(values.get(c)) for c in columns],
            "interval": _range(data.scores.intervals.get(name, {}).get("r2")),
            "ahead": _range(data.scores.intervals.get(name, {}).get("ahead")),
            "coverage": f"{100 * values['coverage_90']:.1f} %" if "coverage_90" in values else "–",
        }
        for name, values in methods.items()
    ]
    return {
        "labels": labels,
        "rows": rows,
        "n": data.scores.n,
        "resampled": data.scores.resampled,
    }


def _tables(data: ReportData) -> tuple[Table, ...]:
    classes = () if data.classes is None else (classes_table(data.classes),)
    if data.scores is None:
        return (*classes, *data.tables)
    both = {"true": data.scores.by_speed, "decoded": data.scores.by_decoded_speed}
    by_speed = (_by_speed(which, by) for which, by in both.items() if by is not None)
    return (*by_speed, *classes, *data.tables)


def _by_speed(which: str, by: BySpeed) -> Table:
    lower = (0.0, *by.upto[:-1])
    rows = [
        (f"{a:.3g} to {b:.3g}" if b > a else f"{b:.3g}", f"{100 * c:.1f} %", f"{ratio:.2f}")
        for a, b, c, ratio in zip(lower, by.upto, by.coverage, by.ratio, strict=True)
    ]
    text = (
        "From the slowest quarter of the bins to the fastest; quarters that end at one speed share "
        "a row. Stated over actual error, root mean squares: 1 is right, above 1 is too wide."
    )
    columns = (by.what, "90 % interval covers", "stated over actual error")
    return Table(f"Calibration by {which} speed", text, columns, tuple(rows))


def _statuses(data: ReportData) -> list[dict[str, Any]]:
    total = max(1, len(data.status))
    return [
        {
            "name": name,
            "n": n,
            "share": f"{100 * n / total:.1f} %",
            "width": f"{100 * n / total:.3f}",
            "colour": "var(--ink)"
            if STATUS_COLOURS.get(name) == INK
            else STATUS_COLOURS.get(name, GREY),
        }
        for name, n in data.statuses.items()
    ]


def _figure(title: str, text: str, drawn: figures.Drawn | None) -> dict[str, Any] | None:
    if drawn is None:
        return None
    # the SVG was made here, from numbers and escaped labels
    return {
        "title": title,
        "text": f"{text} {drawn.text}".strip(),
        "wide": Markup(drawn.wide),
        "narrow": Markup(drawn.narrow),
        "panels": [Markup(panel) for panel in drawn.panels],
        "key": drawn.key,
    }


def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("ilqr_vae.report", "."),
        autoescape=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _cursor_figures(cursor: Mapping[str, Reaches], radius: float) -> list[dict[str, Any]]:
    made = _figure(*_CURSOR, figures.cursor_paths(cursor, radius))
    return [] if made is None else [made]


def render(data: ReportData) -> str:
    """Render a self-contained page, which loads nothing and runs only its own script."""
    drawn = [_figure(title, text, draw(data)) for title, text, draw in _FIGURES]
    shown = _cursor_figures(data.cursor, data.radius) + [one for one in drawn if one is not None]
    run = run_data(data)
    script = (_HERE / _UPLOT).read_text("utf-8") + (_HERE / "explorer.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            data=data,
            seconds=len(data.counts) * data.bin_width,
            figures=shown,
            after_figures=Markup(_AFTER_FIGURES),
            run=run,
            run_json=None if run is None else Markup(as_json(run)),
            script=Markup(script),
            script_hash=digest,
            uplot_css=Markup((_HERE / "uplot/uPlot.min.css").read_text("utf-8")),
            scores=_score_table(data),
            tables=_tables(data),
            statuses=_statuses(data),
            latency=_latency_rows(data),
        )
    )


def render_tables(
    title: str,
    facts: Mapping[str, str],
    tables: tuple[Table, ...],
    drawn: Mapping[str, tuple[str, figures.Drawn]],
) -> str:
    """A page of tables, below figures by their titles, each with a sentence on it."""
    shown = [_figure(name, text, figure) for name, (text, figure) in drawn.items()]
    template = _environment().get_template("summary.html.j2")
    return template.render(title=title, facts=facts, tables=tables, figures=shown)


def with_cursor(page: str, cursor: Mapping[str, Reaches], radius: float) -> str:
    """A report's page with the section of a closed loop put after its figures.

    Raises:
        ConfigError: the page is no report, or has this section already.
    """
    if page.count(_AFTER_FIGURES) != 1 or _CURSOR[0] in page:
        raise ConfigError(
            "report",
            expected="a page that replay or evaluate wrote, without a section of a closed loop",
            got="another one",
        )
    module: Any = _environment().get_template("figure.html.j2").module
    sections = "".join(str(module.figure(one)) for one in _cursor_figures(cursor, radius))
    return page.replace(_AFTER_FIGURES, f"{sections}{_AFTER_FIGURES}")
