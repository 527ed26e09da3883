"""Figures as inline SVG that takes its ink from the page, so it reads on light and on dark."""

from __future__ import annotations

import io
import re
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# Placeholders that become CSS variables of the page.
INK, MUTED, GRID = "#010203", "#010204", "#010205"
_VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)"}

# Middle tones, readable on white and on near-black.
BLUE, ORANGE, GREEN, RED, PURPLE, GREY = (
    "#2f7fe6",
    "#e0832a",
    "#2fa36b",
    "#dd4b4b",
    "#9a6be0",
    "#8b929c",
)
STATUS_COLOURS = {
    "ok": GREEN,
    "degraded": ORANGE,
    "late": RED,
    "missing": GREY,
    "extrapolated": PURPLE,
    "unanswered": INK,
}

_STYLE: Any = {
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.linewidth": 0.7,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "figure.constrained_layout.use": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.3,
    "lines.solid_capstyle": "round",
    "savefig.dpi": 150,
    "svg.fonttype": "none",
    "text.color": INK,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "xtick.labelsize": 8,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
    "ytick.labelsize": 8,
}


@contextmanager
def style() -> Generator[None]:
    """Draw inside this."""
    with mpl.rc_context(_STYLE):
        yield


def figure(width: float = 9.0, height: float = 3.0) -> Figure:
    """A figure of this many inches; no window, no global state."""
    made = Figure(figsize=(width, height))
    FigureCanvasSVG(made)
    return made


def to_svg(made: Figure, name: str) -> str:
    """Inline SVG whose ids start with ``name`` and whose ink follows the page."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):
        made.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for placeholder, variable in _VARIABLES.items():
        text = text.replace(placeholder, variable)
    # Presentation attributes do not take variables, style attributes do.
    text = re.sub(r'(fill|stroke)="(var\(--\w+\))"', r'style="\1: \2"', text)
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--font)", text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'id="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)
    # Scale with the page: the viewBox keeps the proportions.
    return re.sub(r'<svg ([^>]*?)height="[^"]*" ([^>]*?)width="[^"]*"', r"<svg \1\2", text, count=1)
