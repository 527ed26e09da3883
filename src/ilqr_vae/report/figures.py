"""The figures of a report, each drawn for a wide and a narrow page.

A figure over time is drawn twice, ``wide`` and ``narrow``. A figure of several panels is drawn
once, and the page places as many side by side as fit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ilqr_vae import plots
from ilqr_vae.plots.in_trials import condition_colours, paths_of, principal
from ilqr_vae.plots.style import CYCLE, GREY, Array, Colour, blank, hue, short, style
from ilqr_vae.report.analyses import outward, triggered_inputs
from ilqr_vae.report.analyses import psths as psths_of
from ilqr_vae.report.analyses import residuals as residuals_of
from ilqr_vae.report.data import Reaches, ReportData
from ilqr_vae.report.svg import to_svg
from ilqr_vae.scoring.score import OURS, WIENER

EXCERPT_BINS = 300
MAX_TRIALS = 150
MAX_POINTS = 4000
WIDTHS = {"wide": 9.6, "narrow": 4.0}
"""Width in inches of a figure over time, by page width."""

Key = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Drawn:
    """A figure as inline SVG.

    Attributes:
        wide, narrow: one figure, for the two widths of a page; "" where there are panels alone.
        panels: small ones, side by side.
        key: legend shared by all panels.
        text: a sentence on the result.
    """

    wide: str = ""
    narrow: str = ""
    panels: tuple[str, ...] = ()
    key: Key = ()
    text: str = ""


def excerpt(data: ReportData) -> slice:
    """Return the bins to show in time courses: the middle of the run."""
    n = len(data.counts)
    length = min(n, max(EXCERPT_BINS, round(15.0 / data.bin_width)), 1200)
    start = (n - length) // 2
    return slice(start, start + length)


def _both(
    name: str, rows: int, height: float, draw: Callable[[Sequence[Axes]], object]
) -> tuple[str, str]:
    """Return the SVG, for both widths, of what ``draw`` draws into rows of axes."""
    made: list[str] = []
    for kind, width in WIDTHS.items():
        with style():
            figure = blank((width, 0.7 + height * rows))
            axes = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
        draw(list(axes))
        made.append(to_svg(figure, f"{name}-{kind}"))
    return made[0], made[1]


def _panels(name: str, figures: Sequence[Figure]) -> tuple[str, ...]:
    return tuple(to_svg(figure, f"{name}-{i}") for i, figure in enumerate(figures))


def time_course(data: ReportData) -> Drawn | None:
    """Decoded with its 90 % band over the truth, one row per channel."""
    if data.decoded is None or not data.names:
        return None
    n, shown = min(len(data.names), 4), excerpt(data)
    decoded, std, truth = (
        None if x is None else x[shown, :n] for x in (data.decoded, data.decoded_std, data.truth)
    )
    assert decoded is not None  # as above
    others = {k: v[shown, :n] for k, v in data.baselines.items() if k == WIENER}

    def draw(axes: Sequence[Axes]) -> None:
        plots.decode(
            decoded,
            std,
            truth,
            bin_width=data.bin_width,
            start=float(data.time[shown.start]),
            names=data.names[:n],
            units=data.units[:n],
            others=others,
            axes=axes,
        )
        _mark(data, shown, axes)

    wide, narrow = _both("course", n, 1.6, draw)
    names = sorted({name for _, name in _marks(data, shown)})
    return Drawn(wide, narrow, text=f"Dashed lines: {', '.join(names)}." if names else "")


def _marks(data: ReportData, shown: slice) -> list[tuple[float, str]]:
    """Return the events within the shown bins."""
    begin, end = data.time[shown.start], data.time[shown.stop - 1] + data.bin_width
    return [(t, short(name, 24)) for t, name in data.marks if begin <= t < end]


def _mark(data: ReportData, shown: slice, axes: Sequence[Axes]) -> None:
    """Draw a line for each event, labelled on the first axis if there is room."""
    free = -np.inf
    for t, name in _marks(data, shown):
        for ax in axes:
            ax.axvline(t, color=GREY, lw=0.6, ls=(0, (3, 3)), zorder=0)
        if t >= free:
            at = axes[0].get_xaxis_transform()
            axes[0].text(t, 0.99, name, transform=at, va="top", fontsize=6, clip_on=True)
            low, high = axes[0].get_xlim()
            free = t + (high - low) * 0.012 * (len(name) + 2)


def _reaches(data: ReportData) -> tuple[list[tuple[int, int]], Array]:
    """Return the outward parts of the shown trials, as ranges of bins, and their directions."""
    ranges, angles = outward(data)
    chosen = np.flatnonzero(np.isfinite(angles) & (np.diff(ranges, axis=1)[:, 0] > 2))[:MAX_TRIALS]
    return [(int(a), int(b)) for a, b in ranges[chosen]], angles[chosen]


def reaches(data: ReportData) -> Drawn | None:
    """Integrated velocity of every trial, coloured by the direction of the measured reach."""
    ranges, angles = _reaches(data)
    if not ranges or data.decoded is None or data.truth is None:
        return None
    decoders = {"measured": data.truth, OURS: data.decoded, **data.baselines}
    paths = {name: paths_of(v, ranges, data.bin_width) for name, v in decoders.items()}
    reach = 1.05 * max(float(np.abs(p).max()) for panel in paths.values() for p in panel) or 1.0
    colours = [hue(float(angle)) for angle in angles]
    unit = data.units[0].strip().removesuffix("/s").strip()
    made: list[Figure] = []
    for name, panel in paths.items():
        figure = plots.paths(panel, unit=unit, colours=colours, reach=reach)
        with style():
            figure.axes[0].set_title(short(name))
        made.append(figure)
    return Drawn(panels=_panels("reaches", made))


def agreement(data: ReportData) -> Drawn | None:
    """Decoded against measured, one panel per channel, and the calibration curve."""
    if data.decoded is None or data.truth is None:
        return None
    made = [
        plots.agreement(
            data.truth[:, d], data.decoded[:, d], name=data.names[d], unit=data.units[d]
        )
        for d in range(min(len(data.names), 3))
    ]
    if data.scores is not None and data.scores.nominal:
        made.append(plots.reliability(data.scores.nominal, data.scores.actual))
    return Drawn(panels=_panels("agreement", made))


def classes(data: ReportData) -> Drawn | None:
    """The reliability curve of the discrete output."""
    if (found := data.classes) is None:
        return None
    made = plots.reliability(found.stated, found.actual, of="classes")
    text = f"{found.n} bins of trials; stated and actual differ by {found.calibration_error:.3f}."
    return Drawn(panels=_panels("classes", [made]), text=text)


def latents(data: ReportData) -> Drawn | None:
    """Latents over time, and their plane of most variance."""
    finite = np.isfinite(data.latents).all(axis=1)
    if data.latents.shape[1] == 0 or finite.sum() < 3:
        return None
    shown = excerpt(data)
    std = None if data.latents_std is None else data.latents_std[shown]

    def draw(axes: Sequence[Axes]) -> None:
        plots.latents(
            data.latents[shown],
            std,
            bin_width=data.bin_width,
            start=float(data.time[shown.start]),
            ax=axes[0],
        )

    wide, narrow = _both("latents", 1, 2.6, draw)
    by_direction = bool(_reaches(data)[0]) or (data.has_velocity and data.truth is not None)
    text = "Colour is the direction of the movement." if by_direction else ""
    return Drawn(wide, narrow, _panels("plane", [_plane(data)]), text=text)


def _plane(data: ReportData) -> Figure:
    """Draw latents by direction if it is known, else the excerpt over the whole run."""
    ranges, angles = _reaches(data)
    colours: list[Colour] = [hue(float(angle)) for angle in angles]
    if not ranges and not (data.has_velocity and data.truth is not None):
        shown = excerpt(data)
        ranges = [(shown.start, shown.stop)]
    whole = plots.latent_plane(data.latents, ranges or [(0, 0)], colours=colours)
    if not ranges and data.truth is not None:
        speed = np.nan_to_num(np.hypot(data.truth[:, 0], data.truth[:, 1]))
        moving = np.flatnonzero(speed > 0.2 * np.percentile(speed, 99))[:MAX_POINTS]
        plane, _ = principal(data.latents)
        angle = np.arctan2(data.truth[moving, 1], data.truth[moving, 0])
        whole.axes[0].scatter(
            plane[moving, 0],
            plane[moving, 1],
            s=5,
            c=[hue(float(a)) for a in angle],
            lw=0,
            rasterized=True,
        )
    return whole


def raster(data: ReportData) -> Drawn | None:
    """Spike counts of all units over the excerpt, most active on top."""
    if not data.counts.size:
        return None
    shown = excerpt(data)
    start = float(data.time[shown.start])

    def draw(axes: Sequence[Axes]) -> None:
        plots.raster(data.counts[shown], bin_width=data.bin_width, start=start, ax=axes[0])

    return Drawn(*_both("raster", 1, 2.3, draw))


def latency(data: ReportData) -> Drawn | None:
    """Histogram of latencies, the deadline marked."""
    stages = {k: v for k, v in data.latency_ms.items() if k in ("solve", "total")}
    if not any(np.isfinite(v).any() for v in stages.values()):
        return None

    def draw(axes: Sequence[Axes]) -> None:
        plots.latency(stages, deadline_ms=data.deadline_ms, ax=axes[0])

    return Drawn(*_both("latency", 1, 2.2, draw))


def residual_course(data: ReportData) -> Drawn | None:
    """Root mean square error by block, and the stated deviation."""
    found = residuals_of(data)
    if found is None:
        return None
    n = min(len(data.names), 4)
    stated = found.stated[:, :n] if found.stated.size else None

    def draw(axes: Sequence[Axes]) -> None:
        plots.residuals(
            found.time,
            found.rms[:, :n],
            stated,
            names=data.names[:n],
            units=data.units[:n],
            axes=axes,
        )

    return Drawn(*_both("residuals", n, 1.45, draw))


def psth(data: ReportData) -> Drawn | None:
    """Counted and modelled rates by condition."""
    found = psths_of(data)
    if found is None:
        return None
    directions = dict(zip(found.conditions, found.directions, strict=True))
    made: list[Figure] = []
    for place, unit in enumerate(found.units):
        figure = plots.averages(
            found.time,
            found.counted[:, :, place],
            found.modelled[:, :, place],
            conditions=found.conditions,
            directions=directions,
            event=found.event,
        )
        with style():
            figure.axes[0].set_title(
                short(data.unit_names[unit]) if data.unit_names else f"unit {unit}"
            )
        made.append(figure)
    colours = condition_colours(found.conditions, directions)
    names = zip(found.conditions, found.trials, colours, strict=True)
    return Drawn(
        panels=_panels("psth", made),
        key=tuple((_css(colour), f"{name} ({trials} trials)") for name, trials, colour in names),
        text=f"Counted and modelled correlate {found.correlation:.2f} over {found.n_units} units.",
    )


def _css(colour: Colour) -> str:
    if isinstance(colour, str):
        return colour
    return "#" + "".join(f"{round(255 * c):02x}" for c in colour)


def inputs_around(data: ReportData) -> Drawn | None:
    """Size of the inferred inputs around each event."""
    found = triggered_inputs(data)
    if not found:
        return None
    top = 1.05 * max(float(np.nanmax(one.mean + one.error)) for one in found)
    made: list[Figure] = []
    for one in found:
        figure = plots.input_size(one.time, one.mean, one.error, event=one.event)
        with style():
            figure.axes[0].set_title(f"{one.trials} trials")
            figure.axes[0].set_ylim(0, top)  # the same scale for all
        made.append(figure)
    return Drawn(panels=_panels("inputs", made))


def learning(data: ReportData) -> Drawn | None:
    """One panel per learning curve."""
    curves = {name: np.array(points) for name, points in data.learning.items() if points}
    if not curves:
        return None
    made = [
        plots.learning(*points.T, name=name, colour=CYCLE[i % len(CYCLE)])
        for i, (name, points) in enumerate(curves.items())
    ]
    return Drawn(panels=_panels("learning", made))


def cursor_paths(cursor: Mapping[str, Reaches], radius: float) -> Drawn | None:
    """Cursor paths of reaches, coloured by the direction of their targets."""
    shown = {name: one for name, one in cursor.items() if one.paths}
    if not shown:
        return None
    far = [float(np.abs(path).max(initial=0.0)) for one in shown.values() for path in one.paths]
    far += [float(np.abs(one.targets).max(initial=0.0)) + radius for one in shown.values()]
    made: list[Figure] = []
    for name, one in shown.items():
        angles = np.arctan2(one.targets[:, 1], one.targets[:, 0])
        colours: list[Colour] = [
            hue(float(angle)) if good else GREY
            for angle, good in zip(angles, one.success, strict=True)
        ]
        figure = plots.paths(
            one.paths,
            unit="m",
            colours=colours,
            targets=np.unique(one.targets.round(6), axis=0),
            radius=radius,
            reach=1.05 * max(far),
        )
        with style():
            title = f"{short(name)}: {sum(one.success)} of {len(one.success)} succeed"
            figure.axes[0].set_title(title)
        made.append(figure)
    return Drawn(panels=_panels("cursor", made))


def picture(data: ReportData) -> Figure | None:
    """An overview of the run: decoded over the truth, and reaches. None if nothing is decoded."""
    if data.decoded is None or not data.names:
        return None
    n, shown = min(len(data.names), 2), excerpt(data)
    ranges, angles = _reaches(data)
    widths = (2, 1) if ranges else (1,)
    with style():
        made = blank((10.4, 3.7))
        parts = made.subfigures(1, len(widths), squeeze=False, width_ratios=widths)[0]
        axes = parts[0].subplots(n, 1, sharex=True, squeeze=False)[:, 0]
    plots.decode(
        data.decoded[shown, :n],
        None if data.decoded_std is None else data.decoded_std[shown, :n],
        None if data.truth is None else data.truth[shown, :n],
        bin_width=data.bin_width,
        start=float(data.time[shown.start]),
        names=data.names[:n],
        units=data.units[:n],
        axes=list(axes),
    )
    if ranges:
        with style():
            ax = parts[1].subplots()
        plots.paths(
            paths_of(data.decoded, ranges, data.bin_width),
            unit=data.units[0].strip().removesuffix("/s").strip(),
            colours=[hue(float(angle)) for angle in angles],
            ax=ax,
        )
        with style():
            ax.set_title("decoded reaches, by measured direction")
    return made
