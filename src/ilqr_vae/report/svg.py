"""Figures as inline SVG with the page's text colour, readable on light and dark pages."""

from __future__ import annotations

import io
import re

import matplotlib as mpl
from matplotlib.figure import Figure

from ilqr_vae.plots.style import GRID, INK, MUTED, style

_VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)"}


def to_svg(made: Figure, name: str) -> str:
    """Inline SVG whose ids start with ``name`` and whose ink follows the page."""
    buffer = io.StringIO()
    with style(), mpl.rc_context({"svg.hashsalt": name}):
        made.savefig(buffer, format="svg", transparent=True, metadata={"Date": None}, dpi=150)
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
        # a hundredth of a point is finer than any screen, and halves the page
        inside = re.sub(r"(?<=\d)(\.\d\d)\d+", r"\1", inside)
        inside = re.sub(r'id="([^"]+)"', rf'id="{name}-\1"', inside)
        return re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", inside)

    text = re.sub(r"<(?!!)[^>]*>", tag, text)
    # Scale with the page: the viewBox keeps the proportions.
    return re.sub(r'<svg ([^>]*?)height="[^"]*" ([^>]*?)width="[^"]*"', r"<svg \1\2", text, count=1)
