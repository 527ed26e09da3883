"""The results of ``comparison.compare`` as tables, and in long form with one number per row."""

from __future__ import annotations

from typing import Any

import numpy as np

from ilqr_training.evaluation.comparison import FULL, LESS, Piece
from ilqr_training.evaluation.stress import CLEAN
from ilqr_vae.report import Table
from ilqr_vae.report.table import number, once
from ilqr_vae.scoring.score import OURS

Row = dict[str, Any]

_DIGITS = {"training, s": 0}


Path = tuple[str | int, ...]
"""Path of a number in the results of a seed: keys of dicts and indices of lists."""


def _row(result: Piece, path: Path, **cells: str) -> Row:
    """Return a number for each seed, NaN if it is not known, and their mean."""
    seeds = [_number(seed, path) for seed in result["seeds"]]
    return {**cells, "seeds": seeds, "mean": float(np.mean(seeds))}


def _number(piece: Any, path: Path) -> float:
    *parents, last = path
    for key in parents:
        piece = piece[key]
    value = piece[last] if isinstance(last, int) else piece.get(last)
    return float("nan") if value is None else float(value)


def rows_of(result: Piece) -> list[Row]:
    """Return rows ``what``, ``decoder``, ``measure``, ``seeds``, ``mean``, without stress."""
    rows: list[Row] = []
    first: Piece = result["seeds"][0]
    whats = {FULL: "full training part", LESS: _share(result)}
    for amount in (a for a in (FULL, LESS) if a in first):
        scores, what = (amount, "decode", "scores"), whats[amount]
        for decoder in first[amount]["decode"]["scores"]:
            path = (*scores, decoder, "r2")
            rows.append(_row(result, path, what=what, decoder=decoder, measure="R2"))
        ours: dict[str, Path] = {"coverage of 90 %": (*scores, OURS, "coverage_90")}
        for quarter in range(len(first[amount]["decode"]["coverage_by_speed"] or ())):
            path = (amount, "decode", "coverage_by_speed", quarter)
            ours[f"coverage, speed quarter {quarter + 1}"] = path
        ours["training, s"] = (amount, "train", "seconds")
        rows += [_row(result, p, what=what, decoder=OURS, measure=m) for m, p in ours.items()]
    for method in first[FULL].get("cosmoothing", {}).get("bits_per_spike", {}):
        path = (FULL, "cosmoothing", "bits_per_spike", method)
        cells = {"what": "co-smoothing", "decoder": method, "measure": "bits per spike"}
        rows.append(_row(result, path, **cells))
    return rows


def stress_rows(result: Piece) -> list[Row]:
    """Return rows ``condition``, ``decoder``, ``given``, ``r2`` and ``loss`` (``seeds``, ``mean``).

    ``our_loss_of_its`` is our mean loss over the decoder's; NaN unless that is positive.
    """
    rows: list[Row] = []
    # all seeds have the same conditions, decoders and fillings, in the same order
    for i, at in enumerate(result["seeds"][0][FULL]["stress"]["rows"]):
        if at["condition"] != CLEAN:
            row = {key: at[key] for key in ("condition", "decoder", "given")}
            path = (FULL, "stress", "rows", i)
            rows.append(row | {key: _row(result, (*path, key)) for key in ("r2", "loss")})
    ours = {row["condition"]: row["loss"]["mean"] for row in rows if row["decoder"] == OURS}
    for row in rows:
        loss = row["loss"]["mean"]
        row["our_loss_of_its"] = ours[row["condition"]] / loss if loss > 0 else float("nan")
    return rows


def _share(result: Piece) -> str:
    return f"first {100 * result['plan']['fraction']:g} % of the recording"


def tables(result: Piece) -> tuple[Table, Table]:
    """Return the tables of scores and of scores under stress: means and single seeds."""
    names = [f"seed {seed['seed']}" for seed in result["seeds"]]
    scored = "the test part"
    if result["span"] == "validation":
        scored = "the validation part, in a nested split: nothing here saw the test part"
    rows = rows_of(result)
    whats = once([row["what"] for row in rows])
    main = Table(
        f"Decoding {result['recording']}",
        f"Scored on {scored}.",
        ("", "decoder", "", "mean", *names),
        tuple(
            (
                what,
                row["decoder"],
                row["measure"],
                *(number(v, _DIGITS.get(row["measure"], 3)) for v in (row["mean"], *row["seeds"])),
            )
            for what, row in zip(whats, rows, strict=True)
        ),
        words=3,
    )
    lossy = stress_rows(result)
    whats = once([row["condition"] for row in lossy])
    stress = Table(
        "Units silent, bins lost",
        "Means over seeds; R2 lost of each seed.",
        ("", "decoder", "given", "R2", "R2 lost", "our loss of its", *names),
        tuple(
            (
                what,
                row["decoder"],
                row["given"],
                number(row["r2"]["mean"]),
                number(row["loss"]["mean"]),
                "" if row["decoder"] == OURS else number(row["our_loss_of_its"], 2),
                *(number(v) for v in row["loss"]["seeds"]),
            )
            for what, row in zip(whats, lossy, strict=True)
        ),
        words=3,
    )
    return main, stress
