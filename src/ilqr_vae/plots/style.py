"""Colours, sizes and axes shared by all figures."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec

import matplotlib as mpl
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from ilqr_vae.arrays import Inference
from ilqr_vae.errors import ShapeError
from ilqr_vae.terminal import visible

P = ParamSpec("P")
Array = NDArray[np.float64]
Colour = tuple[float, float, float] | str

# The light theme. A report replaces these three by variables of its page.
INK, MUTED, GRID = "#1b2430", "#8993a1", "#e4e8ee"

# Middle tones, readable on white and on near-black.
BLUE, ORANGE, GREEN, RED, PURPLE, GREY = (
    "#2f7fe6",
    "#e0832a",
    "#2fa36b",
    "#dd4b4b",
    "#9a6be0",
    "#8b929c",
)
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, RED, GREY)
STATUS_COLOURS = {
    "ok": GREEN,
    "degraded": ORANGE,
    "late": RED,
    "missing": GREY,
    "extrapolated": PURPLE,
    "unanswered": INK,
}

WIDE, PANEL = (9.6, 2.6), (3.6, 2.7)
"""Width in inches of a figure over time, and of one panel among several."""

Z90 = 1.6448536269514722
"""Standard deviations on either side of the mean that hold 90 % of a Gaussian."""

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
    "axes.titlesize": 9.5,
    "axes.axisbelow": True,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.3,
    "lines.solid_capstyle": "round",
    "savefig.dpi": 150,
    "svg.fonttype": "none",
    "text.color": INK,
    "text.parse_math": False,  # a dollar sign in a name does not start a formula
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "xtick.labelsize": 8,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
    "ytick.labelsize": 8,
}


class Picture(Figure):
    """A matplotlib figure without window or global state, which notebooks display."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=110)
        return buffer.getvalue()


@contextmanager
def style() -> Generator[None]:
    """A context for drawing in the style of all figures."""
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        # warnings about missing glyphs, which the reader's font may have, and about long names
        warnings.simplefilter("ignore", UserWarning)
        yield


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Wrap a plot function to draw in this style."""

    @wraps(draw)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with style():
            return draw(*args, **kwargs)

    return wrapped


def blank(size: tuple[float, float]) -> Picture:
    """Return an empty figure of this width and height in inches."""
    made = Picture(figsize=size)
    FigureCanvasAgg(made)
    return made


def axes_of(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """Return the given axes, or those of a new figure."""
    return blank(size).subplots() if ax is None else ax


def rows_of(
    axes: Sequence[Axes] | None, rows: int, field: str, *, width: float = WIDE[0]
) -> list[Axes]:
    """Return one axes per row with shared time; new ones if none are given.

    Raises:
        ShapeError: another number of axes.
    """
    if axes is None:
        made = blank((width, 0.75 + 1.6 * rows))
        return list(made.subplots(rows, 1, sharex=True, squeeze=False)[:, 0])
    if len(axes) != rows:
        raise ShapeError("axes", expected=f"{rows}, one for each of {field}", got=str(len(axes)))
    return list(axes)


def figure_of(ax: Axes) -> Figure:
    """Return the figure of axes."""
    made = ax.get_figure(root=True)
    assert made is not None  # axes always have one
    return made


def short(name: str, most: int = 32) -> str:
    """Shorten a name to a label on one line that fits into a figure."""
    name = visible(name)
    return name if len(name) <= most else f"{name[: most - 1]}…"


def quantity(name: str, unit: str) -> str:
    """Return ``name (unit)``, or only the name if the unit is not known."""
    return f"{short(name)} ({short(unit, 16)})" if unit else short(name)


def legend(ax: Axes) -> None:
    """Draw the legend of ``ax`` above it, in as many columns as fit.

    In a new figure it is above all axes, where it does not overlap a title.
    """
    handles, labels = ax.get_legend_handles_labels()
    if not labels:
        return
    made = figure_of(ax)
    ours = isinstance(made, Picture)
    inches = made.get_figwidth() * (1.0 if ours else ax.get_position().width)
    column = 0.5 + 0.075 * max(len(label) for label in labels)
    options: Any = {
        "ncols": max(1, min(len(labels), int(inches / column))),
        "columnspacing": 1.2,
        "handlelength": 1.5,
    }
    if ours:
        made.legend(handles, labels, loc="outside upper right", **options)
    else:
        ax.legend(
            handles, labels, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2, **options
        )


def series(values: Inference | ArrayLike, field: str, name: str = "") -> Array:
    """Return numbers (T, K): a ``field`` of an ``infer`` result, or the array itself.

    Args:
        name: name of the argument in errors; default: the field's.

    Raises:
        ShapeError: it is a batch of trials, or an array with another number of axes.
    """
    if isinstance(values, Inference):
        if values.batched:
            raise ShapeError(name or field, expected="one trial (see .trial(i))", got="a batch")
        values = getattr(values, field)
    made = np.asarray(values, dtype=np.float64)
    made = made[:, None] if made.ndim == 1 else made
    if made.ndim != 2:
        raise ShapeError(name or field, expected="(bins, channels)", got=f"shape {made.shape}")
    return made


def spread(
    values: Inference | ArrayLike, std: ArrayLike | None, field: str, like: Array
) -> Array | None:
    """Return the given standard deviations, or those of an ``infer`` result, or None.

    Raises:
        ShapeError: the shape differs from that of ``like``.
    """
    if std is None and isinstance(values, Inference):
        std = getattr(values, f"{field}_std")
    return None if std is None else alike(std, like, f"{field}_std")


def alike(values: ArrayLike, like: Array, name: str) -> Array:
    """Return ``values`` as (T, K). Raises ShapeError if the shape differs from ``like``."""
    made = series(values, name)
    if made.shape != like.shape:
        raise ShapeError(name, expected=f"shape {like.shape}", got=f"shape {made.shape}")
    return made


def seconds(bins: int, bin_width: float, start: float) -> Array:
    """Return the left edge (T,) of each bin."""
    return start + np.arange(bins, dtype=np.float64) * bin_width


def hue(angle: float) -> Colour:
    """Return the colour of a direction in radians, the same in all figures."""
    r, g, b, _ = colormaps["hsv"]((angle / (2 * np.pi)) % 1.0)
    # Blend with grey: pure yellow and pure blue are hard to see on light or dark pages.
    return (0.12 + 0.72 * r, 0.12 + 0.66 * g, 0.16 + 0.76 * b)


def shades(number: int) -> list[Colour]:
    """Return colours for ordered or unordered items."""
    steps = np.linspace(0.12, 0.82, max(number, 1))[:number]
    return [tuple(colormaps["viridis"](float(s))[:3]) for s in steps]  # pyright: ignore[reportReturnType]
