"""Figures of trials: firing and inputs around events, paths, latents in their plane."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from ilqr_vae.arrays import Inference
from ilqr_vae.errors import ShapeError
from ilqr_vae.plots.style import (
    BLUE,
    GREY,
    INK,
    MUTED,
    PANEL,
    Array,
    Colour,
    alike,
    axes_of,
    blank,
    figure_of,
    hue,
    legend,
    series,
    shades,
    short,
    styled,
)
from ilqr_vae.scoring.aligned import aligned, mean_of, telling_apart

MAX_POINTS = 4000

Trials = Sequence[tuple[int, int]]
"""Half-open ranges of bins."""


def condition_colours(
    conditions: Sequence[str], directions: Mapping[str, float] | None
) -> list[Colour]:
    """Return a colour for each condition, by its direction in radians if all are known."""
    known = directions or {}
    if conditions and all(np.isfinite(known.get(name, np.nan)) for name in conditions):
        return [hue(known[name]) for name in conditions]
    return shades(len(conditions))


@styled
def averages(
    time: ArrayLike,
    counted: ArrayLike,
    modelled: ArrayLike | None = None,
    *,
    conditions: Sequence[str] = (),
    directions: Mapping[str, float] | None = None,
    event: str = "the event",
    ax: Axes | None = None,
) -> Figure:
    """One unit's trial-averaged firing by condition: counted thin, modelled thick.

    Args:
        time: (L,) seconds from the event.
        counted, modelled: (C, L) spikes per second.
        conditions: C names.
        directions: directions of the conditions in radians; if all are known, they set the colours.
        event: name of the event at time zero.
        ax: where to draw; default a figure of its own.

    Raises:
        ShapeError: arrays of other shapes.
    """
    y = series(counted, "counted")
    model = None if modelled is None else alike(modelled, y, "modelled")
    t = np.asarray(time, dtype=np.float64)
    ax = axes_of(ax, PANEL)
    names = conditions or [""] * len(y)
    for c, colour in enumerate(condition_colours(names, directions)):
        thin = model is not None
        label = short(names[c], 24) if names[c] else None
        ax.plot(
            t,
            y[c],
            color=colour,
            lw=0.6 if thin else 1.4,
            alpha=0.75 if thin else 1.0,
            label=None if thin else label,
        )
        if model is not None:
            ax.plot(t, model[c], color=colour, lw=1.7, label=label)
    ax.axvline(0, color=MUTED, lw=0.7)
    ax.set_ylim(bottom=0)
    ax.set_xlabel(f"time from {short(event)} (s)")
    ax.set_ylabel("rate (spikes/s)")
    return figure_of(ax)


@styled
def psth(
    counts: Inference | ArrayLike,
    at: ArrayLike,
    rates: ArrayLike | None = None,
    *,
    bin_width: float,
    conditions: Sequence[str] = (),
    directions: Mapping[str, float] | None = None,
    window: tuple[float, float] = (-0.4, 0.8),
    shown: int = 6,
    units: Sequence[str] = (),
    event: str = "the event",
) -> Figure:
    """Peristimulus time histograms of the units that best separate the conditions, one panel each.

    Args:
        counts: (T, N) spikes per bin, or an ``infer`` result (its rates are then the model's).
        at: (K,) bin of the event in each of K trials; NaN for none.
        rates: (T, N) expected spikes per bin, drawn over the counts.
        bin_width: seconds.
        conditions: K names; default: a single condition.
        directions: see ``averages``.
        window: seconds around the event.
        shown: largest number of units.
        units: N names.
        event: what it is.

    Raises:
        ShapeError: arrays of other shapes, or no trial with the whole window inside the bins.
    """
    y = series(counts, "counts")
    if rates is None and isinstance(counts, Inference):
        rates = counts.rates
    model = None if rates is None else alike(rates, y, "rates")
    when = np.asarray(at, dtype=np.float64)
    kinds = np.array(conditions or ["all"] * len(when))
    if when.ndim != 1 or len(kinds) != len(when):
        raise ShapeError("conditions", expected=f"{when.size}, one a trial", got=str(len(kinds)))
    time, around = aligned(y, when, bin_width, window)
    names = list(dict.fromkeys(kinds.tolist()))
    counted = np.stack([mean_of(around[kinds == name], 1) for name in names]) / bin_width
    known = np.isfinite(counted).all(axis=(0, 2))
    if not known.any():
        raise ShapeError("at", expected="events whose windows lie inside the bins", got="none")
    counted, time, modelled = counted[:, known], time[known], None
    if model is not None:
        _, expected = aligned(model, when, bin_width, window)
        means = [mean_of(expected[kinds == name], 1) for name in names]
        modelled = np.stack(means)[:, known] / bin_width
    chosen = telling_apart(counted if modelled is None else modelled)[:shown]
    columns = min(3, len(chosen))
    rows = -(-len(chosen) // columns)
    made = blank((PANEL[0] * columns, 0.35 + 2.3 * rows))
    axes = made.subplots(rows, columns, sharex=True, squeeze=False).ravel()
    for ax, unit in zip(axes, chosen, strict=False):
        averages(
            time,
            counted[:, :, unit],
            None if modelled is None else modelled[:, :, unit],
            conditions=names,
            directions=directions,
            event=event,
            ax=ax,
        )
        ax.set_title(short(units[unit], 24) if units else f"unit {unit}")
    for ax in axes[len(chosen) :]:
        ax.set_visible(False)
    for ax in axes[:-columns]:
        ax.set_xlabel("")
    if len(names) > 1:
        legend(axes[0])
    return made


@styled
def input_size(
    time: ArrayLike,
    mean: ArrayLike,
    error: ArrayLike,
    *,
    event: str = "the event",
    ax: Axes | None = None,
) -> Figure:
    """Size of the inferred inputs around an event, with its standard error.

    Args:
        time: (L,) seconds from the event.
        mean, error: (L,) mean over trials of the inputs' norm, and its standard error.
        event, ax: see ``averages``.
    """
    t, y, e = (np.asarray(x, dtype=np.float64) for x in (time, mean, error))
    ax = axes_of(ax, PANEL)
    ax.fill_between(t, y - e, y + e, color=BLUE, alpha=0.25, lw=0)
    ax.plot(t, y, color=BLUE)
    ax.axvline(0, color=MUTED, lw=0.7)
    ax.set_ylim(bottom=0)
    ax.set_xlabel(f"time from {short(event)} (s)")
    ax.set_ylabel("size of the inputs (a.u.)")
    return figure_of(ax)


def paths_of(velocity: Array, trials: Trials, bin_width: float) -> list[Array]:
    """Integrate the first two channels of each trial: positions (L + 1, 2) from the origin."""
    made: list[Array] = []
    for a, b in trials:
        steps = np.nan_to_num(velocity[a:b, :2]) * bin_width
        made.append(np.concatenate([np.zeros((1, 2)), np.cumsum(steps, axis=0)]))
    return made


@styled
def paths(
    paths: Sequence[ArrayLike],
    *,
    unit: str = "",
    colours: Sequence[Colour] = (),
    targets: ArrayLike | None = None,
    radius: float = 0.0,
    reach: float | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Movements in the plane, such as reaches of a hand or a cursor.

    Args:
        paths: (L, 2) positions of each.
        unit: unit of the positions.
        colours: one per path; default: by its final direction.
        targets: (K, 2) circles, of ``radius``.
        reach: half of the width shown; default: large enough for everything.
        ax: where to draw; default a figure of its own.

    Raises:
        ShapeError: a path of another shape.
    """
    lines = [series(path, "paths") for path in paths]
    if any(line.shape[1] != 2 for line in lines):
        raise ShapeError("paths", expected="(bins, 2) each", got="another number of columns")
    ax = axes_of(ax, (PANEL[0], PANEL[0]))
    ends = [line[-1] - line[0] if len(line) else np.zeros(2) for line in lines]
    drawn = colours or [hue(float(np.arctan2(end[1], end[0]))) for end in ends]
    for line, colour in zip(lines, drawn, strict=True):
        ax.plot(line[:, 0], line[:, 1], color=colour, lw=1.0, alpha=0.8)
    circles = np.zeros((0, 2)) if targets is None else series(targets, "targets")
    for x, y in circles:
        ax.add_patch(Circle((x, y), radius, fill=False, ec=INK, lw=0.9))
    far = [float(np.nanmax(np.abs(x), initial=0.0)) for x in [*lines, circles + radius]]
    size = reach if reach is not None else 1.05 * max(far, default=1.0) or 1.0
    ax.set_box_aspect(1)
    ax.set_xlim(-size, size)
    ax.set_ylim(-size, size)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.yaxis.set_major_locator(MaxNLocator(5))
    ax.set_xlabel(f"x ({short(unit, 16)})" if unit else "x")
    ax.set_ylabel(f"y ({short(unit, 16)})" if unit else "y")
    return figure_of(ax)


def principal(latents: Array) -> tuple[Array, Array]:
    """Return the first two principal components (T, 2) and their shares of the variance."""
    rows = np.isfinite(latents).all(axis=1)
    centred = latents - latents[rows].mean(axis=0)
    _, s, vt = np.linalg.svd(centred[rows], full_matrices=False)
    plane, share = np.zeros((len(latents), 2)), np.zeros(2)
    k = min(2, len(vt))
    plane[:, :k] = centred @ vt[:k].T
    plane[~rows] = np.nan
    share[:k] = (s**2 / max(float((s**2).sum()), 1e-300))[:k]
    return plane, share


@styled
def latent_plane(
    latents: Inference | ArrayLike,
    trials: Trials = (),
    *,
    colours: Sequence[Colour] = (),
    ax: Axes | None = None,
) -> Figure:
    """Latents in the plane of most variance, their first two principal components.

    Args:
        latents: (T, n), or an ``infer`` result.
        trials: ranges of bins to draw over the whole; default: one line.
        colours: one per trial.
        ax: where to draw; default a figure of its own.

    Raises:
        ShapeError: the array has another shape, or fewer than two bins are known.
    """
    z = series(latents, "latents")
    if np.isfinite(z).all(axis=1).sum() < 2 or not z.shape[1]:
        raise ShapeError("latents", expected="at least two bins of one latent", got="fewer")
    plane, share = principal(z)
    ax = axes_of(ax, (PANEL[0], PANEL[0]))
    behind = plane[:: max(1, len(plane) // MAX_POINTS)]
    ax.plot(behind[:, 0], behind[:, 1], color=GREY, lw=0.4, alpha=0.35)
    ranges = trials or [(0, len(z))]
    drawn = colours or [BLUE] * len(ranges)
    for (a, b), colour in zip(ranges, drawn, strict=True):
        ax.plot(plane[a:b, 0], plane[a:b, 1], color=colour, lw=0.9, alpha=0.8)
    ax.set_xlabel(f"PC 1 (a.u., {100 * share[0]:.0f} % of the variance)")
    ax.set_ylabel(f"PC 2 (a.u., {100 * share[1]:.0f} %)")
    return figure_of(ax)
