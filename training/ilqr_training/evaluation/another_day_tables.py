"""The results of ``experiment adapt`` and ``experiment days`` as a table and a picture."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ilqr_training.evaluation.another_day import (
    ADAPTED,
    DECODERS,
    FROZEN,
    GRU_FROZEN,
    GRU_LABELLED,
    KALMAN_FROZEN,
    LABELLED,
    regained,
)
from ilqr_training.evaluation.stabiliser import NAME as ALIGNED
from ilqr_vae.plots.style import BLUE, GREEN, GREY, INK, ORANGE, PANEL, blank, legend, styled
from ilqr_vae.report import Table
from ilqr_vae.report.table import number, once, percent

UNCHANGED = "nothing"
"""Name of the unchanged stream."""

_LOOKS: dict[str, dict[str, Any]] = {
    FROZEN: {"color": BLUE, "ls": ":"},
    ADAPTED: {"color": BLUE, "lw": 2.2},
    LABELLED: {"color": BLUE, "ls": "--"},
    ALIGNED: {"color": GREEN},
    GRU_FROZEN: {"color": ORANGE, "ls": ":"},
    GRU_LABELLED: {"color": ORANGE, "ls": "--"},
    KALMAN_FROZEN: {"color": GREY, "ls": ":"},
}


def mean_of(result: dict[str, Any], change: str, decoder: str, *path: str | int) -> float:
    """Return the mean of one number over seeds; NaN if it is not known."""
    values: list[float] = []
    for seed in result["seeds"]:
        for stream in seed["streams"]:
            value: Any = stream["decoders"].get(decoder) if stream["change"] == change else None
            for key in path:
                short = isinstance(key, int) and value is not None and key >= len(value)
                value = None if value is None or short else value[key]
            if value is not None:
                values.append(float(value))
    return float(np.mean(values)) if values else math.nan


def share_of(result: dict[str, Any], change: str, decoder: str) -> float:
    """Return the share of the frozen model's R2 loss that a decoder regains."""
    found, frozen = (mean_of(result, change, d, "settled") for d in (decoder, FROZEN))
    return regained(found, frozen, mean_of(result, UNCHANGED, FROZEN, "settled"))


def _changes(result: dict[str, Any]) -> list[str]:
    return [s["change"] for s in result["seeds"][0]["streams"] if s["decoders"]]


def _decoders(result: dict[str, Any]) -> list[str]:
    """Return the decoders of the result, in order."""
    found = next(s["decoders"] for s in _first(result) if s["decoders"])
    return [decoder for decoder in DECODERS if decoder in found]


def scores_table(result: dict[str, Any]) -> Table:
    """Return the table of R2 by change and decoder, averaged over seeds."""
    changes, after = _changes(result), result["after"]
    count = max(len(s["decoders"][FROZEN]["minutes"]) for s in _first(result) if s["decoders"])
    rows = [(change, decoder) for change in changes for decoder in _decoders(result)]
    return Table(
        f"R2 after units changed, {result['recording']}",
        f"{result['scored']} {len(result['seeds'])} seeds, means. Regained: of the R2 that the "
        f"frozen model loses after {after:g} s.",
        (
            "what changes",
            "decoder",
            *(f"minute {k + 1}" for k in range(count)),
            f"from {after:g} s",
            "last quarter",
            "regained",
        ),
        tuple(
            (
                what,
                decoder,
                *(number(mean_of(result, change, decoder, "minutes", k), 3) for k in range(count)),
                number(mean_of(result, change, decoder, "settled")),
                number(mean_of(result, change, decoder, "last_quarter")),
                "" if decoder == FROZEN else percent(share_of(result, change, decoder)),
            )
            for what, (change, decoder) in zip(once([c for c, _ in rows]), rows, strict=True)
        ),
        words=2,
    )


def attempts_table(result: dict[str, Any]) -> Table:
    """Return the table of all fits without labels and their outcomes."""
    rows = [
        (f"seed {seed['seed']}", stream["change"], attempt)
        for seed in result["seeds"]
        for stream in seed["streams"]
        for attempt in stream["attempts"]
    ]
    return Table(
        "Fits without labels",
        "Bits predicted of a bin in the shadow, by the model that served and by the candidate.",
        ("", "what changes", "at (s)", "outcome", "bits"),
        tuple(
            (
                seed,
                change,
                number(a["at"], 0),
                f"{a['outcome']}: {a['why']}" if a["why"] else a["outcome"],
                "" if a["bits"] is None else " and ".join(number(b, 2) for b in a["bits"]),
            )
            for seed, change, a in rows
        ),
        words=2,
    )


def _first(result: dict[str, Any]) -> list[dict[str, Any]]:
    return result["seeds"][0]["streams"]


@styled
def picture(result: dict[str, Any]) -> Figure:
    """Draw R2 over time, averaged over seeds, one panel per change."""
    changes = _changes(result)
    figure = blank((PANEL[0] * 1.25 * min(len(changes), 4), PANEL[1] * 1.4))
    panels = figure.subplots(1, len(changes), sharey=True, squeeze=False)[0]
    for ax, change in zip(panels, changes, strict=True):
        times = next(s["times"] for s in _first(result) if s["change"] == change)
        for decoder in _decoders(result):
            curve = [mean_of(result, change, decoder, "over_time", k) for k in range(len(times))]
            ax.plot(times, np.maximum(curve, -0.5), label=decoder, **_LOOKS[decoder])
        ax.axvline(0, color=INK, lw=0.8)
        ax.set_title(change)
        ax.set_xlabel("time since the change (s)")
    panels[0].set_ylabel("R2 of 30 s around, down to -0.5")
    legend(panels[0])
    return figure


# ---- a closed loop -----------------------------------------------------------------------------


def reaches_table(result: dict[str, Any]) -> Table:
    """Return the table of success rates before the turnover and after it, averaged over seeds."""
    parts = result["parts"]

    def mean(decoder: str, part: str) -> float:
        return float(np.nanmean([seed[decoder]["success"][part] for seed in result["seeds"]]))

    return Table(
        "Successful reaches",
        f"{result['share']:.0%} of the units are replaced at {result['change']:g} s; "
        f"{len(result['seeds'])} seeds, means.",
        ("model", *parts),
        tuple(
            (decoder, *(percent(mean(decoder, part)) for part in parts))
            for decoder in (FROZEN, ADAPTED)
        ),
        words=1,
    )


@styled
def reaches_picture(result: dict[str, Any]) -> Figure:
    """Draw the success rate over time, averaged over seeds, and the swaps."""
    figure = blank((2 * PANEL[0], PANEL[1]))
    ax = figure.subplots()
    for decoder in (FROZEN, ADAPTED):
        rates = np.array([seed[decoder]["over_time"] for seed in result["seeds"]], dtype=np.float64)
        known = np.isfinite(rates)
        mean = np.where(known, rates, 0).sum(0) / np.maximum(known.sum(0), 1)
        ax.plot(
            result["times"],
            np.where(known.any(0), mean, np.nan),
            label=decoder,
            **_LOOKS[decoder],
        )
    ax.axvline(result["change"], color=INK, lw=0.8)
    swaps = [at for seed in result["seeds"] for at in seed[ADAPTED]["swaps"]]
    ax.plot(swaps, np.full(len(swaps), 0.02), "^", color=BLUE, ms=5, label="swapped in")
    ax.set_ylim(0, 1.03)
    ax.set_xlabel("time (s)")
    ax.set_ylabel(f"successful reaches in {result['around']:g} s")
    legend(ax)
    return figure
