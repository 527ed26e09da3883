"""Figures of a run over time: spikes, rates, latents, inputs, decodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from ilqr_vae.arrays import Inference
from ilqr_vae.errors import ShapeError
from ilqr_vae.plots.style import (
    BLUE,
    CYCLE,
    INK,
    WIDE,
    Z90,
    Array,
    alike,
    axes_of,
    figure_of,
    legend,
    quantity,
    rows_of,
    seconds,
    series,
    shades,
    short,
    spread,
    styled,
)
from ilqr_vae.scoring.score import OURS


def _image(ax: Axes, values: Array, bin_width: float, start: float, top: float) -> None:
    """Draw (T, K) in shades of blue, one row for each of K."""
    image = np.zeros((*values.T.shape, 4))
    image[..., :3] = to_rgb(BLUE)
    image[..., 3] = np.clip(np.nan_to_num(values.T) / max(top, 1e-300), 0, 1) ** 0.6
    end = start + len(values) * bin_width
    ax.imshow(
        image, aspect="auto", interpolation="nearest", extent=(start, end, values.shape[1], 0)
    )
    ax.grid(visible=False)
    ax.set_xlabel("time (s)")


@styled
def raster(
    counts: Inference | ArrayLike,
    *,
    bin_width: float,
    start: float = 0.0,
    by_rate: bool = True,
    ax: Axes | None = None,
) -> Figure:
    """Spike counts, one row per unit.

    Args:
        counts: (T, N) spikes per bin, or an ``infer`` result.
        bin_width: seconds.
        start: left edge of the first bin in seconds.
        by_rate: sort units by rate, the most active on top; if false, keep their order.
        ax: where to draw; default a figure of its own.

    Raises:
        ShapeError: counts of another shape.
    """
    y = series(counts, "counts")
    if by_rate:
        y = y[:, np.argsort(-np.nan_to_num(y).mean(axis=0), kind="stable")]
    ax = axes_of(ax, WIDE)
    top = max(1.0, float(np.percentile(np.nan_to_num(y), 99.5))) if y.size else 1.0
    _image(ax, y, bin_width, start, top)
    ax.set_ylabel("unit, by rate" if by_rate else "unit")
    return figure_of(ax)


@styled
def rates(
    rates: Inference | ArrayLike,
    *,
    bin_width: float,
    start: float = 0.0,
    by_rate: bool = True,
    ax: Axes | None = None,
) -> Figure:
    """Firing rates, one row per unit, each as a share of its maximum.

    Args:
        rates: (T, N) expected spikes per bin, or an ``infer`` result.
        bin_width, start, by_rate, ax: see ``raster``.

    Raises:
        ShapeError: rates of another shape.
    """
    y = series(rates, "rates") / bin_width
    if by_rate:
        y = y[:, np.argsort(-np.nan_to_num(y).mean(axis=0), kind="stable")]
    ax = axes_of(ax, WIDE)
    greatest = np.nan_to_num(y).max(axis=0, initial=0.0)
    _image(ax, y / np.where(greatest > 0, greatest, 1.0), bin_width, start, 1.0)
    ax.set_ylabel("unit, by rate" if by_rate else "unit")
    if greatest.size:
        ax.set_title(f"each of its own greatest rate, up to {greatest.max():.3g} spikes/s")
    return figure_of(ax)


def _stacked(
    ax: Axes, values: Array, std: Array | None, time: Array, names: Sequence[str], what: str
) -> None:
    """Draw K series above one another on the same scale, each around its own level."""
    size = 5.0 * float(np.nanmedian(np.nanstd(values, axis=0)) or 1.0)
    levels = -size * np.arange(values.shape[1])
    for level, colour, k in zip(levels, shades(len(levels)), range(len(levels)), strict=True):
        line = values[:, k] - np.nanmean(values[:, k]) + level
        if std is not None:
            band = std[:, k]
            ax.fill_between(time, line - band, line + band, color=colour, alpha=0.22, lw=0)
        ax.plot(time, line, color=colour, lw=1.1)
    ax.set_yticks(levels.tolist(), [short(name, 12) for name in names])
    ax.margins(x=0)
    ax.set_xlabel("time (s)")
    ax.set_ylabel(f"{what} (a.u., spacing {size:.2g})")


def _largest(values: Array, number: int) -> NDArray[np.intp]:
    """Return the columns of largest variance, ignoring unknown ones."""
    known = np.isfinite(values).sum(axis=0) > 1
    variance = np.array([np.nanvar(v) if k else -1.0 for v, k in zip(values.T, known, strict=True)])
    order = np.argsort(-variance, kind="stable")[:number]
    return order[variance[order] >= 0]


def _series_of(
    of: Inference | ArrayLike,
    std: ArrayLike | None,
    name: str,
    letter: str,
    time: tuple[float, float],
    shown: int,
    ax: Axes | None,
) -> Figure:
    """Draw ``latents`` or ``inputs``: the field ``name`` of a result, or an array.

    Args:
        time: bin width and start.
    """
    values = series(of, name)
    deviation = spread(of, std, name, values)
    order = _largest(values, shown)
    ax = axes_of(ax, WIDE)
    _stacked(
        ax,
        values[:, order],
        None if deviation is None else deviation[:, order],
        seconds(len(values), *time),
        [f"{letter}{k}" for k in order],
        name.removesuffix("s"),
    )
    return figure_of(ax)


@styled
def latents(
    latents: Inference | ArrayLike,
    std: ArrayLike | None = None,
    *,
    bin_width: float,
    start: float = 0.0,
    shown: int = 6,
    ax: Axes | None = None,
) -> Figure:
    """The latents of largest variance over time, one standard deviation shaded.

    Args:
        latents: (T, n), or an ``infer`` result.
        std: (T, n); default: that of the ``infer`` result, none for an array.
        shown: largest number of latents.
        bin_width, start, ax: see ``raster``.

    Raises:
        ShapeError: arrays of other shapes.
    """
    return _series_of(latents, std, "latents", "z", (bin_width, start), shown, ax)


@styled
def inputs(
    inputs: Inference | ArrayLike,
    std: ArrayLike | None = None,
    *,
    bin_width: float,
    start: float = 0.0,
    shown: int = 6,
    ax: Axes | None = None,
) -> Figure:
    """The inferred inputs of largest variance over time, one standard deviation shaded.

    Args:
        inputs: (T, m), or an ``infer`` result.
        std: (T, m); default that of the ``infer`` result, none for an array.
        shown, bin_width, start, ax: see ``latents``.

    Raises:
        ShapeError: arrays of other shapes.
    """
    return _series_of(inputs, std, "inputs", "u", (bin_width, start), shown, ax)


@styled
def decode(
    decoded: Inference | ArrayLike,
    std: ArrayLike | None = None,
    truth: ArrayLike | None = None,
    *,
    bin_width: float,
    start: float = 0.0,
    names: Sequence[str] = (),
    units: Sequence[str] = (),
    others: Mapping[str, ArrayLike] | None = None,
    axes: Sequence[Axes] | None = None,
) -> Figure:
    """Decoded kinematics with their 90 % band over the truth, one row per channel.

    Args:
        decoded: (T, D), or an ``infer`` result.
        std: (T, D); default that of the ``infer`` result, no band for an array.
        truth: (T, D), measured kinematics.
        names, units: of the D channels.
        others: (T, D) decodes of other decoders, by name.
        axes: D axes to draw in; default a figure of its own.
        bin_width, start: see ``raster``.

    Raises:
        ShapeError: arrays of other shapes, or another number of names, units or axes.
    """
    y = series(decoded, "kinematics", "decoded")
    deviation = spread(decoded, std, "kinematics", y)
    measured = None if truth is None else alike(truth, y, "truth")
    beside = {name: alike(v, y, f"others[{name!r}]") for name, v in (others or {}).items()}
    channels = y.shape[1]
    for what, given in (("names", names), ("units", units)):
        if given and len(given) != channels:
            raise ShapeError(what, expected=f"{channels}, one a channel", got=str(len(given)))
    if not channels:
        raise ShapeError("decoded", expected="at least one channel", got="none")
    rows = rows_of(axes, channels, "the channels")
    t = seconds(len(y), bin_width, start)
    for d, ax in enumerate(rows):
        if deviation is not None:
            band = Z90 * deviation[:, d]
            ax.fill_between(
                t, y[:, d] - band, y[:, d] + band, color=BLUE, alpha=0.22, lw=0, label="90 % band"
            )
        if measured is not None:
            ax.plot(t, measured[:, d], color=INK, lw=1.0, zorder=3, label="measured")
        for (name, values), colour in zip(beside.items(), CYCLE[1:] * 9, strict=False):
            ax.plot(t, values[:, d], color=colour, lw=0.9, alpha=0.85, label=short(name))
        ax.plot(t, y[:, d], color=BLUE, lw=1.5, label=OURS)
        ax.set_title(short(names[d], 48) if names else f"channel {d}")
        ax.set_ylabel(short(units[d], 16) if units and units[d] else "decoded")
        ax.margins(x=0)
    legend(rows[0])
    rows[-1].set_xlabel("time (s)")
    return figure_of(rows[0])


@styled
def residuals(
    time: ArrayLike,
    rms: ArrayLike,
    stated: ArrayLike | None = None,
    *,
    names: Sequence[str] = (),
    units: Sequence[str] = (),
    axes: Sequence[Axes] | None = None,
) -> Figure:
    """Root mean square error of K blocks of a run, beside the stated deviation.

    Args:
        time: (K,) seconds.
        rms: (K, D) error.
        stated: (K, D) standard deviation stated.
        names, units, axes: see ``decode``.

    Raises:
        ShapeError: arrays of other shapes, or another number of axes.
    """
    error = series(rms, "rms")
    expected = None if stated is None else alike(stated, error, "stated")
    t = np.asarray(time, dtype=np.float64)
    rows = rows_of(axes, error.shape[1], "the channels")
    for d, ax in enumerate(rows):
        ax.plot(t, error[:, d], color=BLUE, marker="o", ms=3, label="error, root mean square")
        if expected is not None:
            ax.plot(t, expected[:, d], color=CYCLE[1], label="stated standard deviation")
        ax.set_ylim(bottom=0)
        ax.set_title(short(names[d], 48) if names else f"channel {d}")
        ax.set_ylabel(quantity("error", units[d] if units else ""))
        ax.margins(x=0.01)
    legend(rows[0])
    rows[-1].set_xlabel("time (s)")
    return figure_of(rows[0])
