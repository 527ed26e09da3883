"""Pictures of trials, of errors over time and of training. Inline SVG, or None without the data."""

from __future__ import annotations

import numpy as np
from matplotlib import colormaps

from ilqr_vae.report.analyses import psths as psths_of
from ilqr_vae.report.analyses import residuals as residuals_of
from ilqr_vae.report.analyses import triggered_inputs
from ilqr_vae.report.data import ReportData
from ilqr_vae.report.svg import BLUE, GREEN, INK, MUTED, ORANGE, PURPLE, RED, figure, to_svg

_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, RED)


def residual_course(data: ReportData) -> str | None:
    """Root mean square error, block by block, and what was stated."""
    found = residuals_of(data)
    if found is None:
        return None
    channels = min(len(data.names), 4)
    made = figure(9.6, 0.6 + 1.5 * channels)
    rows = made.subplots(channels, 1, sharex=True, squeeze=False)[:, 0]
    for d, ax in enumerate(rows):
        ax.plot(found.time, found.rms[:, d], color=BLUE, marker="o", ms=3, label="missed by")
        if found.stated.size:
            ax.plot(found.time, found.stated[:, d], color=ORANGE, label="stated")
        ax.set_ylim(bottom=0)
        ax.set_ylabel(f"{data.names[d]} ({data.units[d]})")
    handles, labels = rows[0].get_legend_handles_labels()
    made.legend(handles, labels, loc="outside upper right", ncols=len(labels))
    rows[-1].set_xlabel("time (s)")
    return to_svg(made, "residuals")


def psth(data: ReportData) -> str | None:
    """Counted and modelled rates by condition."""
    found = psths_of(data)
    if found is None:
        return None
    columns = 3
    rows = -(-len(found.units) // columns)
    made = figure(9.6, 0.6 + 2.0 * rows)
    axes = made.subplots(rows, columns, sharex=True, squeeze=False).ravel()
    cmap = colormaps["viridis"]
    for place, unit in enumerate(found.units):
        ax = axes[place]
        for c, name in enumerate(found.conditions):
            colour = cmap(0.1 + 0.75 * c / max(1, len(found.conditions) - 1))
            ax.plot(found.time, found.counted[c, :, place], color=colour, lw=0.6, alpha=0.7)
            label = f"{name} ({found.trials[c]})" if place == 0 else None
            ax.plot(found.time, found.modelled[c, :, place], color=colour, lw=1.6, label=label)
        ax.axvline(0, color=MUTED, lw=0.7)
        ax.set_title(f"unit {unit}")
    for ax in axes[len(found.units) :]:
        ax.set_visible(False)
    axes[0].set_ylabel("spikes/s")
    made.supxlabel(
        f"seconds from {found.event}; counted and modelled correlate "
        f"{found.correlation:.2f} over {found.n_units} units",
        fontsize=9,
        color=INK,
    )
    handles, labels = axes[0].get_legend_handles_labels()
    made.legend(handles, labels, loc="outside upper right", ncols=min(len(labels), 8))
    return to_svg(made, "psth")


def inputs_around(data: ReportData) -> str | None:
    """Size of the inferred inputs around each event."""
    found = triggered_inputs(data)
    if not found:
        return None
    made = figure(9.6, 2.8)
    axes = made.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for ax, one in zip(axes, found, strict=True):
        ax.fill_between(
            one.time, one.mean - one.error, one.mean + one.error, color=BLUE, alpha=0.25, lw=0
        )
        ax.plot(one.time, one.mean, color=BLUE)
        ax.axvline(0, color=MUTED, lw=0.7)
        ax.set_ylim(bottom=0)
        ax.set_title(f"{one.trials} trials")
        ax.set_xlabel(f"seconds from {one.event}")
    axes[0].set_ylabel("norm of the inputs")
    return to_svg(made, "inputs")


def learning(data: ReportData) -> str | None:
    """One panel for each thing followed while training."""
    curves = {name: points for name, points in data.learning.items() if points}
    if not curves:
        return None
    made = figure(9.6, 2.8)
    axes = made.subplots(1, len(curves), squeeze=False)[0]
    for ax, (name, points), colour in zip(axes, curves.items(), _COLOURS * 9, strict=False):
        steps, values = np.array(points, dtype=np.float64).T
        ax.plot(steps, values, color=colour, marker="o" if len(steps) < 40 else None, ms=3)
        ax.set_title(name)
        ax.set_xlabel("step")
    return to_svg(made, "learning")
