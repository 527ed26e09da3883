"""The HTML page of a report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ilqr_vae.report import figures
from ilqr_vae.report.data import ReportData, distribution
from ilqr_vae.report.svg import STATUS_COLOURS, style
from ilqr_vae.report.table import Table, number
from ilqr_vae.scoring.score import OURS
from ilqr_vae.terminal import visible

_PICTURES: tuple[tuple[str, str, Callable[[ReportData], str | None]], ...] = (
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
        "Residuals over time",
        "Root mean square of what the decoder missed by, block by block, against the size of error "
        "it stated; a decoder that goes stale climbs.",
        figures.residual_course,
    ),
    (
        "Firing around the movement",
        "Mean rate of the units whose rates differ most between conditions (over time where there "
        "is one): counted (thin) and as the model has it from each bin and those before (thick); "
        "colour is the condition.",
        figures.psth,
    ),
    (
        "Inferred inputs around events",
        "Size of the inputs the dynamics need to explain the spikes, mean over trials with its "
        "standard error.",
        figures.inputs_around,
    ),
    (
        "Learning curves",
        "What was followed while the model was trained.",
        figures.learning,
    ),
    ("Latency", "Per bin, log axes; total runs from the intended send.", figures.latency),
    ("Latent state", "The state the spikes are explained by.", figures.latents),
    ("Spikes", "Counts per bin over the same seconds as the time courses.", figures.raster),
)


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
    by = None if data.scores is None else data.scores.by_speed
    if by is None:
        return data.tables
    lower = (0.0, *by.upto[:-1])
    rows = [
        (f"{a:.3g} to {b:.3g}", f"{100 * c:.1f} %")
        for a, b, c in zip(lower, by.upto, by.coverage, strict=True)
    ]
    text = "A quarter of the bins a row, from the slowest to the fastest."
    speed = Table("Calibration by speed", text, (by.what, "90 % interval covers"), tuple(rows))
    return (speed, *data.tables)


def _statuses(data: ReportData) -> list[dict[str, Any]]:
    total = max(1, len(data.status))
    return [
        {
            "name": name,
            "n": n,
            "share": f"{100 * n / total:.1f} %",
            "width": f"{100 * n / total:.3f}",
            "colour": STATUS_COLOURS.get(name, "#8b929c"),
        }
        for name, n in data.statuses.items()
    ]


def render(data: ReportData) -> str:
    """One self-contained page: no script, nothing fetched."""
    with style():
        drawn = [(title, text, draw(data)) for title, text, draw in _PICTURES]
    pictures = [
        {
            "title": title,
            "text": text,
            "svg": Markup(svg),  # made here, from numbers and escaped labels
        }
        for title, text, svg in drawn
        if svg is not None
    ]
    environment = Environment(
        loader=PackageLoader("ilqr_vae.report", "."),
        autoescape=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2").render(
        data=data,
        seconds=len(data.counts) * data.bin_width,
        pictures=pictures,
        scores=_score_table(data),
        tables=_tables(data),
        statuses=_statuses(data),
        latency=_latency_rows(data),
    )
