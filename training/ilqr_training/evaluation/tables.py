"""What ``decoding.compare`` found, as tables and as one number a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ilqr_training.evaluation.comparison import FULL, LESS, Piece
from ilqr_training.evaluation.stress import CLEAN
from ilqr_vae.report import Table
from ilqr_vae.report.table import once
from ilqr_vae.scoring.score import OURS

Row = dict[str, Any]

_DIGITS = {"training, s": 0, "bits per spike": 4}


def _row(result: Piece, pick: Callable[[Piece], Any], **cells: str) -> Row:
    """A number of every seed, NaN where it is not known, and their mean."""
    found = [pick(seed) for seed in result["seeds"]]
    seeds = [float("nan") if value is None else float(value) for value in found]
    return {**cells, "seeds": seeds, "mean": float(np.mean(seeds))}


def rows_of(result: Piece) -> list[Row]:
    """Rows ``what``, ``decoder``, ``measure``, ``seeds``, ``mean``: all but what goes wrong."""
    rows: list[Row] = []
    first: Piece = result["seeds"][0]
    for amount in (FULL, LESS):
        if amount not in first:
            continue
        what = "full training part" if amount == FULL else _share(result)
        for decoder in first[amount]["decode"]["scores"]:
            pick = _score(amount, decoder, "r2")
            rows.append(_row(result, pick, what=what, decoder=decoder, measure="R2"))
        ours = {"coverage of 90 %": _score(amount, OURS, "coverage_90")}
        for quarter in range(len(first[amount]["decode"]["coverage_by_speed"] or ())):
            ours[f"coverage, speed quarter {quarter + 1}"] = _quarter(amount, quarter)
        ours["training, s"] = lambda seed, amount=amount: seed[amount]["train"]["seconds"]
        for measure, pick in ours.items():
            rows.append(_row(result, pick, what=what, decoder=OURS, measure=measure))
    for method in first[FULL].get("cosmoothing", {}).get("bits_per_spike", {}):
        cells = {"what": "co-smoothing", "decoder": method, "measure": "bits per spike"}
        rows.append(_row(result, _bits(method), **cells))
    return rows


def stress_rows(result: Piece) -> list[Row]:
    """Rows ``condition``, ``decoder``, ``given``; ``r2`` and ``loss`` with ``seeds`` and ``mean``;
    ``our_loss_of_its``: our mean loss over its mean loss, NaN where that is not above zero."""
    rows: list[Row] = []
    for i, at in enumerate(result["seeds"][0][FULL]["stress"]["rows"]):
        if at["condition"] != CLEAN:
            said = {key: at[key] for key in ("condition", "decoder", "given")}
            rows.append({**said, **{key: _row(result, _stress(i, key)) for key in ("r2", "loss")}})
    ours = {row["condition"]: row["loss"]["mean"] for row in rows if row["decoder"] == OURS}
    for row in rows:
        loss = row["loss"]["mean"]
        row["our_loss_of_its"] = ours[row["condition"]] / loss if loss > 0 else float("nan")
    return rows


def _share(result: Piece) -> str:
    return f"first {100 * result['plan']['fraction']:g} % of the recording"


def _score(amount: str, decoder: str, key: str) -> Callable[[Piece], Any]:
    return lambda seed: seed[amount]["decode"]["scores"][decoder].get(key)


def _quarter(amount: str, quarter: int) -> Callable[[Piece], Any]:
    return lambda seed: seed[amount]["decode"]["coverage_by_speed"][quarter]


def _stress(row: int, key: str) -> Callable[[Piece], Any]:
    # conditions, decoders and fillings are the same for every seed, in the same order
    return lambda seed: seed[FULL]["stress"]["rows"][row][key]


def _bits(method: str) -> Callable[[Piece], Any]:
    return lambda seed: seed[FULL]["cosmoothing"]["bits_per_spike"][method]


def tables(result: Piece) -> tuple[Table, Table]:
    """Means over seeds and each seed; and what goes wrong."""
    names = [f"seed {seed['seed']}" for seed in result["seeds"]]
    scored = "the test part"
    if result["span"] == "validation":
        scored = "the validation part in a rehearsal: nothing here saw the test part"
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
                *(f"{v:.{_DIGITS.get(row['measure'], 3)}f}" for v in (row["mean"], *row["seeds"])),
            )
            for what, row in zip(whats, rows, strict=True)
        ),
        words=3,
    )
    wrong = stress_rows(result)
    whats = once([row["condition"] for row in wrong])
    stress = Table(
        "Units silent, bins lost",
        "Means over seeds; R2 lost of each seed.",
        ("", "decoder", "given", "R2", "R2 lost", "our loss of its", *names),
        tuple(
            (
                what,
                row["decoder"],
                row["given"],
                f"{row['r2']['mean']:.3f}",
                f"{row['loss']['mean']:.3f}",
                "" if row["decoder"] == OURS else f"{row['our_loss_of_its']:.2f}",
                *(f"{v:.3f}" for v in row["loss"]["seeds"]),
            )
            for what, row in zip(whats, wrong, strict=True)
        ),
        words=3,
    )
    return main, stress
