"""The report's pictures. Each gives inline SVG, or None where the data for it are not there."""

from __future__ import annotations

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from ilqr_vae.report.analyses import psths as psths_of
from ilqr_vae.report.analyses import residuals as residuals_of
from ilqr_vae.report.analyses import triggered_inputs
from ilqr_vae.report.data import ReportData
from ilqr_vae.report.svg import (
    BLUE,
    GREEN,
    GREY,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    RED,
    figure,
    short,
    to_svg,
)
from ilqr_vae.scoring.score import OURS, WIENER

Array = NDArray[np.float64]

EXCERPT_BINS = 300
MAX_TRIALS = 150
MAX_POINTS = 4000
Z90 = 1.6448536269514722


def excerpt(data: ReportData) -> slice:
    """The bins shown in time courses: the middle of the run."""
    n = len(data.counts)
    length = min(n, max(EXCERPT_BINS, round(15.0 / data.bin_width)), 1200)
    start = (n - length) // 2
    return slice(start, start + length)


def is_velocity(data: ReportData) -> bool:
    """True where the first two decoded channels can be integrated to a path."""
    return len(data.units) >= 2 and all(u.strip().endswith("/s") for u in data.units[:2])


def time_course(data: ReportData) -> str | None:
    """Decoded with its 90 % band over the truth, one row a channel."""
    if data.decoded is None:
        return None
    channels = min(len(data.names), 4)
    shown, time = excerpt(data), data.time
    made = figure(9.6, 0.7 + 1.75 * channels)
    rows = made.subplots(channels, 1, sharex=True, squeeze=False)[:, 0]
    for d, ax in enumerate(rows):
        decoded, t = data.decoded[shown, d], time[shown]
        if data.decoded_std is not None:
            band = Z90 * data.decoded_std[shown, d]
            ax.fill_between(
                t, decoded - band, decoded + band, color=BLUE, alpha=0.22, lw=0, label="90 % band"
            )
        if data.truth is not None:
            ax.plot(t, data.truth[shown, d], color=INK, lw=1.0, zorder=3, label="measured")
        if WIENER in data.baselines:
            ax.plot(
                t, data.baselines[WIENER][shown, d], color=ORANGE, lw=0.9, alpha=0.85, label=WIENER
            )
        ax.plot(t, decoded, color=BLUE, lw=1.5, label=OURS)
        ax.set_ylabel(short(f"{data.names[d]} ({data.units[d]})"))
        ax.margins(x=0)
    handles, labels = rows[0].get_legend_handles_labels()
    made.legend(handles, labels, loc="outside upper right", ncols=len(labels))
    rows[-1].set_xlabel("time (s)")
    return to_svg(made, "course")


def _path(velocity: Array, bin_width: float) -> Array:
    return np.concatenate([np.zeros((1, 2)), np.cumsum(velocity * bin_width, axis=0)])


def _directions(data: ReportData) -> tuple[list[tuple[int, int]], Array]:
    """The outward part of each trial shown, as bin ranges, and its direction in radians.

    A trial ends here where the measured hand is farthest from where it began.
    """
    trials, truth = data.trials, data.truth
    if trials is None or truth is None or not is_velocity(data):
        return [], np.empty(0)
    ranges: list[tuple[int, int]] = []
    angles: list[float] = []
    for a, b in zip(trials.start.tolist(), trials.stop.tolist(), strict=True):
        if not 0 <= a < b <= len(data.counts):
            continue
        path = _path(truth[a:b, :2], data.bin_width)
        farthest = int(np.argmax(np.hypot(path[:, 0], path[:, 1])))
        if farthest >= 2:
            ranges.append((a, a + farthest))
            angles.append(float(np.arctan2(path[farthest, 1], path[farthest, 0])))
    return ranges[:MAX_TRIALS], np.array(angles[:MAX_TRIALS])


def _hue(angle: float) -> tuple[float, float, float]:
    r, g, b, _ = colormaps["hsv"]((angle / (2 * np.pi)) % 1.0)
    # Pull towards a middle grey: pure yellow and pure blue vanish on one page or the other.
    return (0.12 + 0.72 * r, 0.12 + 0.66 * g, 0.16 + 0.76 * b)


def reaches(data: ReportData) -> str | None:
    """Integrated velocity of every trial, coloured by the direction of the measured reach."""
    ranges, angles = _directions(data)
    if not ranges or data.decoded is None or data.truth is None:
        return None
    panels: list[tuple[str, Array]] = [("measured", data.truth), (OURS, data.decoded)]
    panels += [(name, values) for name, values in data.baselines.items()]
    made = figure(9.6, 0.5 + 9.0 / max(3, len(panels)))
    axes = made.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    unit = short(data.units[0].removesuffix("/s").strip())
    paths = [
        [_path(np.nan_to_num(velocity[a:b, :2]), data.bin_width) for a, b in ranges]
        for _, velocity in panels
    ]
    reach = 1.05 * max(float(np.abs(path).max()) for panel in paths for path in panel)
    for ax, (name, _), panel in zip(axes, panels, paths, strict=True):
        for path, angle in zip(panel, angles, strict=True):
            ax.plot(path[:, 0], path[:, 1], color=_hue(angle), lw=0.9, alpha=0.8)
        ax.set_box_aspect(1)
        ax.set_xlim(-reach, reach)
        ax.set_ylim(-reach, reach)
        ax.xaxis.set_major_locator(MaxNLocator(5))
        ax.yaxis.set_major_locator(MaxNLocator(5))
        ax.set_title(name)
        ax.set_xlabel(f"x ({unit})")
    axes[0].set_ylabel(f"y ({unit})")
    return to_svg(made, "reaches")


def agreement(data: ReportData) -> str | None:
    """Decoded against measured, one panel a channel, and the calibration curve beside them."""
    if data.decoded is None or data.truth is None:
        return None
    channels = min(len(data.names), 3)
    calibrated = data.scores is not None and bool(data.scores.nominal)
    made = figure(9.6, 9.6 / (channels + calibrated) if channels + calibrated > 2 else 3.6)
    axes = made.subplots(1, channels + calibrated, squeeze=False)[0]
    for d, ax in enumerate(axes[:channels]):
        truth, decoded = data.truth[:, d], data.decoded[:, d]
        ax.scatter(truth, decoded, s=4, color=BLUE, alpha=0.35, lw=0, rasterized=True)
        low, high = np.nanpercentile(np.concatenate([truth, decoded]), [0.1, 99.9])
        ax.plot([low, high], [low, high], color=INK, lw=0.8, ls=(0, (4, 3)))
        ax.set_box_aspect(1)
        ax.set_xlabel(short(f"measured {data.names[d]} ({data.units[d]})"))
        ax.set_ylabel("decoded" if d == 0 else "")
    if calibrated:
        _reliability(axes[-1], data)
    return to_svg(made, "agreement")


def _reliability(ax: Axes, data: ReportData) -> None:
    assert data.scores is not None
    ax.plot([0, 1], [0, 1], color=MUTED, lw=0.9, ls=(0, (4, 3)))
    ax.fill_between([0, 1], [-0.05, 0.95], [0.05, 1.05], color=GREY, alpha=0.18, lw=0)
    ax.plot(data.scores.nominal, data.scores.actual, color=BLUE, marker="o", ms=4)
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1)
    ax.set_box_aspect(1)
    ax.set_xlabel("nominal coverage of the interval")
    ax.set_ylabel("actual coverage")


def _components(latents: Array) -> tuple[Array, Array]:
    """Principal components (T, k <= 2) and the share of variance of each; NaN rows stay NaN."""
    rows = np.isfinite(latents).all(axis=1)
    centred = latents - latents[rows].mean(axis=0)
    _, s, vt = np.linalg.svd(centred[rows], full_matrices=False)
    share = s**2 / max(float((s**2).sum()), 1e-300)
    return centred @ vt[:2].T, share[:2]


def latents(data: ReportData) -> str | None:
    """Latents over time, and their plane of most variance."""
    finite = np.isfinite(data.latents).all(axis=1)
    if data.latents.shape[1] == 0 or finite.sum() < 3:
        return None
    shown = excerpt(data)
    order = np.argsort(-np.nanvar(data.latents, axis=0))[:6]
    made = figure(9.6, 3.4)
    left, right = made.subplots(1, 2, width_ratios=(2.1, 1))
    spread = 5.0 * float(np.nanmedian(np.nanstd(data.latents[:, order], axis=0)) or 1.0)
    cmap = colormaps["viridis"]
    for row, k in enumerate(order):
        colour = cmap(0.15 + 0.7 * row / max(1, len(order) - 1))
        level = -row * spread
        values = data.latents[shown, k] - np.nanmean(data.latents[:, k])
        left.plot(data.time[shown], values + level, color=colour, lw=1.1)
        if data.latents_std is not None:
            std = data.latents_std[shown, k]
            left.fill_between(
                data.time[shown],
                values + level - std,
                values + level + std,
                color=colour,
                alpha=0.2,
                lw=0,
            )
    left.set_yticks([-row * spread for row in range(len(order))], [f"z{k}" for k in order])
    left.margins(x=0)
    left.set_xlabel("time (s)")
    left.set_title("latents of largest variance, one standard deviation shaded")
    _plane(right, data)
    return to_svg(made, "latents")


def _plane(ax: Axes, data: ReportData) -> None:
    plane, share = _components(data.latents)
    if plane.shape[1] < 2:
        plane = np.column_stack([plane[:, 0], np.zeros(len(plane))])
        share = np.array([share[0], 0.0])
    ranges, angles = _directions(data)
    if ranges:
        for (a, b), angle in zip(ranges, angles, strict=True):
            ax.plot(plane[a:b, 0], plane[a:b, 1], color=_hue(angle), lw=0.8, alpha=0.75)
        ax.set_title("first two components, by direction")
    elif is_velocity(data) and data.truth is not None:
        speed = np.hypot(data.truth[:, 0], data.truth[:, 1])
        moving = np.flatnonzero(speed > 0.2 * np.percentile(speed, 99))[:MAX_POINTS]
        angle = np.arctan2(data.truth[moving, 1], data.truth[moving, 0])
        ax.plot(plane[:, 0], plane[:, 1], color=GREY, lw=0.4, alpha=0.35, rasterized=True)
        ax.scatter(
            plane[moving, 0],
            plane[moving, 1],
            s=5,
            c=[_hue(float(a)) for a in angle],
            lw=0,
            rasterized=True,
        )
        ax.set_title("first two components, by direction")
    else:
        shown = excerpt(data)
        ax.plot(plane[:, 0], plane[:, 1], color=GREY, lw=0.4, alpha=0.35, rasterized=True)
        ax.plot(plane[shown, 0], plane[shown, 1], color=BLUE, lw=0.9)
        ax.set_title("first two components")
    ax.set_xlabel(f"PC 1 ({100 * share[0]:.0f} %)")
    ax.set_ylabel(f"PC 2 ({100 * share[1]:.0f} %)")


def raster(data: ReportData) -> str | None:
    """Spike counts of all units over the excerpt, most active on top."""
    shown = excerpt(data)
    counts = np.asarray(data.counts[shown], dtype=np.float64)
    counts = counts[:, np.argsort(-counts.mean(axis=0), kind="stable")]
    top = max(1.0, float(np.percentile(counts, 99.5)))
    image = np.zeros((*counts.T.shape, 4))
    image[..., :3] = to_rgb(BLUE)
    image[..., 3] = np.clip(counts.T / top, 0, 1) ** 0.6
    made = figure(9.6, 2.9)
    ax = made.subplots()
    time = data.time[shown]
    ax.imshow(
        image,
        aspect="auto",
        interpolation="nearest",
        extent=(time[0], time[-1] + data.bin_width, counts.shape[1], 0),
    )
    ax.grid(visible=False)
    ax.set_xlabel("time (s)")
    ax.set_ylabel("unit, by rate")
    return to_svg(made, "raster")


def latency(data: ReportData) -> str | None:
    """Histogram of latencies on a log count axis, the deadline marked."""
    stages = {k: v[np.isfinite(v)] for k, v in data.latency_ms.items() if k in {"solve", "total"}}
    stages = {k: v for k, v in stages.items() if v.size}
    if not stages:
        return None
    made = figure(9.6, 2.8)
    ax = made.subplots()
    everything = np.concatenate(list(stages.values()))
    low = max(1e-3, float(everything.min()) * 0.8)
    high = max(float(everything.max()) * 1.25, data.deadline_ms or 0.0, low * 10)
    edges = [float(e) for e in np.geomspace(low, high, 70)]
    for name, colour in (("solve", GREEN), ("total", BLUE)):
        if name in stages:
            ax.hist(stages[name], bins=edges, color=colour, alpha=0.55, label=name, lw=0)
    if data.deadline_ms is not None:
        ax.axvline(data.deadline_ms, color=RED, lw=1.4, label=f"deadline {data.deadline_ms:g} ms")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_ylim(bottom=0.7)
    ax.set_xlabel("milliseconds")
    ax.set_ylabel("bins")
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    ax.xaxis.set_minor_formatter(NullFormatter())
    made.legend(loc="outside upper right", ncols=3)
    return to_svg(made, "latency")


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
        ax.set_ylabel(short(f"{data.names[d]} ({data.units[d]})"))
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
            label = f"{short(name)} ({found.trials[c]})" if place == 0 else None
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
