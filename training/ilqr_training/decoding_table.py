"""What ``decoding.compare`` found, as tables and as one number a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ilqr_training.decoding import FULL, LESS, Piece
from ilqr_vae.report import Table
from ilqr_vae.report.score import OURS

Row = dict[str, Any]


def rows_of(result: Piece) -> list[Row]:
    """Every row of the tables: ``what``, ``decoder``, ``given``, ``measure``, ``seeds``, ``mean``.

    A measure that a seed does not know is NaN there, and so is the mean.
    """
    rows: list[Row] = []

    def add(
        what: str, decoder: str, given: str, measure: str, pick: Callable[[Piece], Any]
    ) -> None:
        found = [pick(seed) for seed in result["seeds"]]
        seeds = [float("nan") if value is None else float(value) for value in found]
        mean = float(np.mean(seeds))
        cells = {"what": what, "decoder": decoder, "given": given, "measure": measure}
        rows.append({**cells, "seeds": seeds, "mean": mean})

    first: Piece = result["seeds"][0]
    for amount in (FULL, LESS):
        if amount not in first:
            continue
        what = "full training part" if amount == FULL else _share(result)
        for decoder in first[amount]["decode"]["scores"]:
            add(what, decoder, "", "R2", _scores(amount, decoder, "r2"))
        add(what, OURS, "", "coverage of 90 %", _scores(amount, OURS, "coverage_90"))
        for quarter in range(len(first[amount]["decode"]["coverage_by_speed"] or ())):
            said = f"coverage, speed quarter {quarter + 1}"
            add(what, OURS, "", said, _quarter(amount, quarter))
        add(what, OURS, "", "training, s", lambda s, a=amount: s[a]["train"]["seconds"])
    for i, row in enumerate(first[FULL]["stress"]["rows"]):
        if row["condition"] == "nothing wrong":
            continue
        for measure, key in (("R2", "r2"), ("R2 lost", "loss"), ("our loss of its", _SHARE)):
            if not (key == _SHARE and row["decoder"] == OURS):
                add(row["condition"], row["decoder"], row["given"], measure, _stress(i, key))
    for method in first[FULL].get("cosmoothing", {}).get("bits_per_spike", {}):
        add("co-smoothing", method, "", "bits per spike", _bits(method))
    return rows


_SHARE = "our_loss_of_its"


def _share(result: Piece) -> str:
    return f"first {100 * result['plan']['fraction']:g} % of the recording"


def _scores(amount: str, decoder: str, key: str) -> Callable[[Piece], Any]:
    return lambda seed: seed[amount]["decode"]["scores"][decoder].get(key)


def _quarter(amount: str, quarter: int) -> Callable[[Piece], Any]:
    return lambda seed: seed[amount]["decode"]["coverage_by_speed"][quarter]


def _stress(row: int, key: str) -> Callable[[Piece], Any]:
    # conditions, decoders and fillings are the same for every seed, in the same order
    return lambda seed: seed[FULL]["stress"]["rows"][row][key]


def _bits(method: str) -> Callable[[Piece], Any]:
    return lambda seed: seed[FULL]["cosmoothing"]["bits_per_spike"][method]


def table(result: Piece) -> Table:
    """All rows: the mean over seeds, then each seed."""
    names = [f"seed {seed['seed']}" for seed in result["seeds"]]
    made: list[tuple[str, ...]] = []
    before = ""
    for row in rows_of(result):
        digits = {"training, s": 0, "bits per spike": 4}.get(row["measure"], 3)
        numbers = [f"{value:.{digits}f}" for value in (row["mean"], *row["seeds"])]
        what = "" if row["what"] == before else row["what"]
        before = row["what"]
        made.append((what, row["decoder"], row["given"], row["measure"], *numbers))
    scored = "the test part"
    if result["span"] == "validation":
        scored = "the validation part in a rehearsal: nothing here saw the test part"
    return Table(
        f"Decoding {result['recording']}",
        f"Scored on {scored}.",
        ("", "decoder", "given", "", "mean", *names),
        tuple(made),
        words=4,
    )
