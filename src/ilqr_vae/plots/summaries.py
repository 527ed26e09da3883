"""Figures of a whole run: agreement, calibration, latency, learning, scores as bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from numpy.typing import ArrayLike

from ilqr_vae.arrays import Inference
from ilqr_vae.errors import ShapeError
from ilqr_vae.plots.style import (
    BLUE,
    CYCLE,
    GREEN,
    GREY,
    INK,
    MUTED,
    PANEL,
    RED,
    WIDE,
    alike,
    axes_of,
    blank,
    figure_of,
    legend,
    quantity,
    series,
    short,
    spread,
    styled,
)
from ilqr_vae.scoring.score import LEVELS
from ilqr_vae.scoring.score import calibration as coverage_of

MAX_POINTS = 4000
_FEW_VALUES = 6
"""Up to so many values of an axis are its ticks."""


@styled
def agreement(
    truth: ArrayLike,
    decoded: ArrayLike,
    *,
    name: str = "",
    unit: str = "",
    ax: Axes | None = None,
) -> Figure:
    """One decoded channel against the measured one; the dashed line is equality.

    Args:
        truth, decoded: (T,).
        name, unit: of the channel.
        ax: where to draw; default a figure of its own.

    Raises:
        ShapeError: arrays of different shapes, or of several channels.
    """
    x = series(truth, "truth")
    y = alike(decoded, x, "decoded")
    if x.shape[1] != 1:
        raise ShapeError("truth", expected="one channel", got=str(x.shape[1]))
    ax = axes_of(ax, (PANEL[0], PANEL[0]))
    every = max(1, len(x) // MAX_POINTS)
    points = np.column_stack([x, y])[::every]
    ax.scatter(*points.T, s=4, color=BLUE, alpha=0.35, lw=0, rasterized=True)
    known = np.concatenate([x, y])[np.isfinite(np.concatenate([x, y]))]
    if known.size:
        low, high = (float(v) for v in np.percentile(known, [0.1, 99.9]))
        ax.plot([low, high], [low, high], color=INK, lw=0.8, ls=(0, (4, 3)))
    ax.set_box_aspect(1)
    ax.set_title(short(name, 36) if name else "")
    ax.set_xlabel(quantity("measured", unit))
    ax.set_ylabel(quantity("decoded", unit))
    return figure_of(ax)


@styled
def reliability(
    nominal: ArrayLike,
    actual: ArrayLike,
    *,
    of: Literal["intervals", "classes"] = "intervals",
    ax: Axes | None = None,
) -> Figure:
    """A reliability curve: actual against nominal shares, with 5 % either way shaded.

    The shares are those of true values inside intervals of each nominal level, or of right classes
    of each stated probability.

    Args:
        nominal, actual: (K,) shares, 0 to 1.
        of: name of the quantity.
        ax: where to draw; default a figure of its own.
    """
    ax = axes_of(ax, (PANEL[0], PANEL[0]))
    ax.plot([0, 1], [0, 1], color=MUTED, lw=0.9, ls=(0, (4, 3)))
    ax.fill_between([0, 1], [-0.05, 0.95], [0.05, 1.05], color=GREY, alpha=0.18, lw=0)
    ax.plot(np.asarray(nominal), np.asarray(actual), color=BLUE, marker="o", ms=4)
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1)
    ax.set_box_aspect(1)
    intervals = of == "intervals"
    ax.set_xlabel("nominal coverage of the interval (share)" if intervals else "stated probability")
    ax.set_ylabel("actual coverage (share)" if intervals else "right (share)")
    return figure_of(ax)


def calibration(
    truth: ArrayLike,
    decoded: Inference | ArrayLike,
    std: ArrayLike | None = None,
    *,
    ax: Axes | None = None,
) -> Figure:
    """Calibration curve: how often the truth lies inside the stated central intervals.

    Args:
        truth: (T, D); unknown bins are ignored.
        decoded: (T, D), or an ``infer`` result.
        std: (T, D); default that of the ``infer`` result.
        ax: where to draw; default a figure of its own.

    Raises:
        ShapeError: shapes differ, or there is no standard deviation.
    """
    y = series(decoded, "kinematics", "decoded")
    deviation = spread(decoded, std, "kinematics", y)
    if deviation is None:
        raise ShapeError("std", expected="standard deviations of the decodes", got="none")
    x = alike(truth, y, "truth")
    rows = np.isfinite(x).all(axis=1) & np.isfinite(y).all(axis=1)
    rows &= np.isfinite(deviation).all(axis=1)
    if not rows.any():
        raise ShapeError("truth", expected="a bin with a truth and a decode", got="none")
    return reliability(LEVELS, coverage_of(x[rows], y[rows], deviation[rows]), ax=ax)


@styled
def latency(
    latency_ms: Mapping[str, ArrayLike] | ArrayLike,
    *,
    deadline_ms: float | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Histogram of latencies on logarithmic axes, with the deadline marked.

    Args:
        latency_ms: (T,) milliseconds per bin, possibly by stage; NaN is ignored.
        deadline_ms: the deadline to mark.
        ax: where to draw; default a figure of its own.

    Raises:
        ShapeError: there are no latencies.
    """
    given = latency_ms if isinstance(latency_ms, Mapping) else {"total": latency_ms}
    stages = {name: np.asarray(v, dtype=np.float64) for name, v in given.items()}
    stages = {name: v[np.isfinite(v)] for name, v in stages.items()}
    stages = {name: v for name, v in stages.items() if v.size}
    if not stages:
        raise ShapeError("latency_ms", expected="milliseconds of some bins", got="none")
    ax = axes_of(ax, WIDE)
    everything = np.concatenate(list(stages.values()))
    low = max(1e-3, float(everything.min()) * 0.8)
    high = max(float(everything.max()) * 1.25, deadline_ms or 0.0, low * 10)
    edges = [float(e) for e in np.geomspace(low, high, 70)]
    colours = {"solve": GREEN, "total": BLUE}
    for (name, values), other in zip(stages.items(), CYCLE[1:] * 9, strict=False):
        colour = colours.get(name, other)
        ax.hist(values, bins=edges, color=colour, alpha=0.55, label=short(name), lw=0)
    if deadline_ms is not None:
        ax.axvline(deadline_ms, color=RED, lw=1.4, label=f"deadline {deadline_ms:g} ms")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_ylim(bottom=0.7)
    ax.set_xlabel("latency (ms)")
    ax.set_ylabel("bins")
    _plain_numbers(ax.xaxis, 1.0, 2.0, 5.0)
    _plain_numbers(ax.yaxis, 1.0)
    legend(ax)
    return figure_of(ax)


def _plain_numbers(axis: Axis, *of_a_decade: float) -> None:
    """Label a logarithmic axis 1, 10, 100: powers would need formulas, which are not drawn."""
    axis.set_major_locator(LogLocator(subs=of_a_decade, numticks=12))
    axis.set_major_formatter(lambda x, _: f"{x:g}")
    axis.set_minor_formatter(NullFormatter())


@styled
def learning(
    steps: ArrayLike,
    values: ArrayLike,
    *,
    name: str = "score",
    colour: str = BLUE,
    ax: Axes | None = None,
) -> Figure:
    """A learning curve.

    Args:
        steps, values: (K,).
        name: name of the values, with their unit.
        ax: where to draw; default a figure of its own.
    """
    x, y = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
    ax = axes_of(ax, PANEL)
    ax.plot(x, y, color=colour, marker="o" if len(x) < 40 else None, ms=3)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.set_xlabel("gradient step")
    ax.set_ylabel(short(name, 40))
    return figure_of(ax)


@styled
def trials(
    values: Mapping[str, Sequence[object]],
    scores: ArrayLike,
    curves: Sequence[Sequence[tuple[int, float]]] = (),
    *,
    name: str = "score",
    logarithmic: Sequence[str] = (),
    best: int | None = None,
) -> Figure:
    """The trials of a search: learning curves, and scores over each searched key.

    Args:
        values: values of each searched key, one per trial.
        scores: (K,), higher is better.
        curves: (validations, score) of each trial.
        name: name of the score.
        logarithmic: keys to draw on a logarithmic axis.
        best: the trial to highlight; default the one with the highest score.
    """
    y = np.asarray(scores, dtype=np.float64)
    if best is None:
        best = int(np.argmax(y)) if y.size else -1
    width, height = PANEL
    figure = blank((width * (len(values) + 1), height))
    panels = figure.subplots(1, len(values) + 1, squeeze=False)
    for k, curve in enumerate(curves):
        points = np.array(curve, dtype=np.float64).reshape(-1, 2)
        own = {"color": BLUE, "lw": 1.6, "zorder": 3} if k == best else {"color": GREY, "lw": 0.8}
        panels[0, 0].plot(*points.T, **own)
    panels[0, 0].set_xlabel("validations")
    panels[0, 0].xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    panels[0, 0].set_ylabel(short(name, 40))
    colours = [BLUE if k == best else GREY for k in range(len(y))]
    for ax, (key, drawn) in zip(panels[0, 1:], values.items(), strict=True):
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in drawn)
        ax.scatter(list(drawn) if numbers else list(map(str, drawn)), y, c=colours, s=16)
        if numbers and key in logarithmic:
            ax.set_xscale("log")
            _plain_numbers(ax.xaxis, 1.0, 3.0)
        whole = {v for v in drawn if isinstance(v, int)} if numbers else set[int]()
        if 0 < len(whole) <= _FEW_VALUES and key not in logarithmic:
            ax.set_xticks(sorted(whole))
        ax.set_xlabel(short(key, 40))
    return figure


@styled
def bars(
    groups: Mapping[str, Mapping[str, float]],
    *,
    xlabel: str,
    colours: Sequence[str] = CYCLE,
    digits: int = 3,
    ax: Axes | None = None,
) -> Figure:
    """Horizontal bars in groups, each labelled with its number.

    Args:
        groups: numbers by series, by group.
        xlabel: name of the numbers, with their unit.
        colours: one per series, in order.
        digits: decimals of the labels.
        ax: where to draw; default a figure of its own.
    """
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    colour_of = dict(zip(names, list(colours) * len(names), strict=False))
    total = sum(len(group) for group in groups.values())
    ax = axes_of(ax, (7.2, 0.9 + 0.24 * total + 0.16 * len(groups)))
    y, ticks, seen = 0.0, list[float](), set[str]()
    for group in groups.values():
        first = y
        for name, value in group.items():
            label = None if name in seen else name
            seen.add(name)
            ax.barh(y, value, height=0.82, color=colour_of[name], label=label)
            ax.annotate(
                f"{value:.{digits}f}",
                (max(value, 0.0), y),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
            y += 1.0
        ticks.append((first + y - 1.0) / 2)
        y += 0.7
    ax.set_yticks(ticks, list(groups))
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False, axis="y")
    ax.invert_yaxis()
    ax.set_xlabel(xlabel)
    ax.margins(x=0.1)
    legend(ax)
    return figure_of(ax)
