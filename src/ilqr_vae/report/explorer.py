"""The run bin by bin, as data for the interactive charts of the page."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilqr_vae.plots.style import (
    BLUE,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    RED,
    STATUS_COLOURS,
    Z90,
    Array,
    short,
)
from ilqr_vae.report.data import ReportData
from ilqr_vae.scoring.score import OURS, WIENER
from ilqr_vae.terminal import visible

MOST_NUMBERS = 200_000
"""Largest total number of values, two bytes each, so that a page stays below 2 MB."""
MOST_EVENTS = 5000
_MISSING, _GREATEST = -32768, 32767


def _packed(values: Array) -> dict[str, Any]:
    """Pack numbers as 16-bit steps between minimum and maximum; NaN as ``_MISSING``."""
    known = np.isfinite(values)
    low = float(values[known].min()) if known.any() else 0.0
    high = float(values[known].max()) if known.any() else 0.0
    step = (high - low) / (2 * _GREATEST) or 1.0
    steps = np.full(len(values), _MISSING, dtype="<i2")
    steps[known] = np.round((values[known] - low) / step - _GREATEST).astype("<i2")
    return {"b64": _text(steps), "low": low, "step": step}


def _text(values: NDArray[Any]) -> str:
    return base64.b64encode(values.tobytes()).decode()


def _line(name: str, colour: str, values: Array, **more: Any) -> dict[str, Any]:
    shown = "var(--ink)" if colour == INK else colour
    return {"name": visible(name), "colour": shown, "values": values} | more


def charts(data: ReportData) -> list[dict[str, Any]]:
    """Return a chart per decoded channel (at most 4), then latents, inputs, firing, latency."""
    made: list[dict[str, Any]] = []
    for d, name in enumerate(data.names[:4] if data.decoded is not None else ()):
        assert data.decoded is not None  # as above
        lines: list[dict[str, Any]] = []
        if data.decoded_std is not None:
            band = Z90 * data.decoded_std[:, d]
            lines.append(_line("90 % from", BLUE, data.decoded[:, d] - band, edge=True))
            lines.append(_line("to", BLUE, data.decoded[:, d] + band, edge=True, fills=True))
        if data.truth is not None:
            lines.append(_line("measured", INK, data.truth[:, d]))
        if WIENER in data.baselines:
            lines.append(_line(WIENER, ORANGE, data.baselines[WIENER][:, d], hidden=True))
        lines.append(_line(OURS, BLUE, data.decoded[:, d]))
        made.append({"title": name, "unit": data.units[d], "lines": lines})
    if data.latents.shape[1] and np.isfinite(data.latents).any():
        order = np.argsort(-np.nan_to_num(np.nanvar(data.latents, axis=0)))[:4]
        colours = (BLUE, ORANGE, GREEN, PURPLE)
        made.append(
            {
                "title": "latents of largest variance",
                "unit": "a.u.",
                "lines": [
                    _line(f"z{k}", colour, data.latents[:, k])
                    for k, colour in zip(order, colours, strict=False)
                ],
            }
        )
    if data.inputs is not None and data.inputs.shape[1]:
        size = np.sqrt((data.inputs**2).sum(axis=1))
        lines = [_line("norm of the inputs", BLUE, size)]
        made.append({"title": "inferred inputs", "unit": "a.u.", "lines": lines})
    if data.counts.shape[1]:
        counted = np.asarray(data.counts, dtype=np.float64).mean(axis=1) / data.bin_width
        lines = [_line("counted", INK, counted)]
        if data.rates is not None:
            rates = np.asarray(data.rates, dtype=np.float64).mean(axis=1) / data.bin_width
            lines.append(_line("modelled", BLUE, rates))
        made.append({"title": "firing, mean of all units", "unit": "spikes/s", "lines": lines})
    stages = {k: data.latency_ms[k] for k in ("total", "solve") if k in data.latency_ms}
    if any(np.isfinite(v).any() for v in stages.values()):
        lines = [
            _line(name, {"total": BLUE, "solve": GREEN}[name], v) for name, v in stages.items()
        ]
        if data.deadline_ms is not None:
            deadline = np.full(len(data.counts), data.deadline_ms)
            lines.append(_line("deadline", RED, deadline))
        made.append({"title": "latency", "unit": "ms", "lines": lines})
    return made


def run_data(data: ReportData) -> dict[str, Any] | None:
    """Return the middle of the run, as many bins as ``MOST_NUMBERS`` allows; None without bins."""
    made = charts(data)
    bins = len(data.counts)
    if bins < 2 or not made:
        return None
    lines = sum(len(chart["lines"]) for chart in made)
    length = min(bins, MOST_NUMBERS // (lines + 1))
    first = (bins - length) // 2
    shown = slice(first, first + length)
    for chart in made:
        chart["title"], chart["unit"] = short(chart["title"], 60), short(chart["unit"], 16)
        for line in chart["lines"]:
            line |= _packed(line.pop("values")[shown])
    kinds = list(data.statuses)
    codes = np.array([kinds.index(s or "unanswered") for s in data.status[shown]], dtype="u1")
    begin = data.start + first * data.bin_width
    marks = [(t, name) for t, name in data.marks if begin <= t < begin + length * data.bin_width]
    return {
        "events": [[round(t, 4), short(name, 24)] for t, name in marks[:MOST_EVENTS]],
        "start": data.start + first * data.bin_width,
        "step": data.bin_width,
        "bins": length,
        "of": bins,
        "charts": made,
        "status": _text(codes),
        "statuses": [
            [name, "var(--ink)" if (c := STATUS_COLOURS.get(name, INK)) == INK else c]
            for name in kinds
        ],
    }


def as_json(found: dict[str, Any]) -> str:
    """Return JSON for an inline script element, without characters that could end it."""
    text = json.dumps(found, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
