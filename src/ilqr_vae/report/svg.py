"""Figures as inline SVG that takes its ink from the page, so it reads on light and on dark."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from ilqr_vae.terminal import visible

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
    "text.parse_math": False,  # a dollar sign in a name is no formula
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
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        # of glyphs that its own font lacks and the reader's has, and of room a long name takes
        warnings.simplefilter("ignore", UserWarning)
        yield


def figure(width: float = 9.0, height: float = 3.0) -> Figure:
    """A figure of this many inches; no window, no global state."""
    made = Figure(figsize=(width, height))
    FigureCanvasSVG(made)
    return made


def short(name: str, most: int = 32) -> str:
    """A name as a label: on one line, and no longer than a figure has room for."""
    name = visible(name)
    return name if len(name) <= most else f"{name[: most - 1]}…"


def to_svg(made: Figure, name: str) -> str:
    """Inline SVG whose ids start with ``name`` and whose ink follows the page."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):
        made.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)

    def tag(found: re.Match[str]) -> str:
        """A tag, alone: what stands between tags are names, which stay as they are."""
        inside = found[0]
        for placeholder, variable in _VARIABLES.items():
            inside = inside.replace(placeholder, variable)
        # Presentation attributes do not take variables, style attributes do.
        inside = re.sub(r'(fill|stroke)="(var\(--\w+\))"', r'style="\1: \2"', inside)
        inside = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--font)", inside)
        inside = re.sub(r'id="([^"]+)"', rf'id="{name}-\1"', inside)
        return re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", inside)

    text = re.sub(r"<(?!!)[^>]*>", tag, text)
    # Scale with the page: the viewBox keeps the proportions.
    return re.sub(r'<svg ([^>]*?)height="[^"]*" ([^>]*?)width="[^"]*"', r"<svg \1\2", text, count=1)
