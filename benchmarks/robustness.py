"""A bar chart of the R2 lost with silent units and with lost bins, from saved results.

    python -m benchmarks.robustness docs/decoding.md docs/robustness.png
    python -m benchmarks.robustness DIR/decode.json picture.png

A page holds the table of ``ilqr-vae experiment decode configs/stevenson.toml --recording
StevensonV2.mat --out DIR --seeds 3 --span test``; ``decode.json`` is what such a run leaves.
"""

from __future__ import annotations

import json
import re
import sys
from itertools import takewhile
from pathlib import Path

from ilqr_vae import plots
from ilqr_vae.plots.style import BLUE, GREY, ORANGE
from ilqr_vae.scoring.score import OURS

Losses = dict[str, dict[str, float]]
UNTOLD, TOLD = "GRU, not told", "GRU, told"


def of_page(text: str) -> Losses:
    """Read the first table of losses in docs/decoding.md.

    "Not told" is the GRU that receives zeros. "Told" is the one that receives the units' mean
    counts or, for lost bins, the last value.
    """
    lines = text[text.index("\n| R2 lost") + 1 :].splitlines()
    table = [
        [cell.strip() for cell in line.strip("| \n").split("|")]
        for line in takewhile(lambda line: line.startswith("|"), lines)
    ]
    found: Losses = {}
    shares, kind = "", ""
    for name, *cells in table:
        at = re.match(r"(R2 lost, )?(\d+ %)( of [\w ]+)?|announced", name)
        if at is None or len(cells) < 2:
            continue
        if at[1] or (at[2] and shares):
            kind = at[3] or kind
            shares = f"{at[2]}{kind}"
            ours, *_ = _numbers(cells[0])
            found[shares] = {OURS: ours}
        if not shares:
            continue
        losses = _numbers(cells[1])
        if at[2]:
            found[shares][UNTOLD] = losses[0]
        if len(losses) > 1:
            found[shares][TOLD] = losses[1]
    return found


def _numbers(cell: str) -> list[float]:
    return [float(part.strip("* ")) for part in cell.split(";")]


def of_result(result: dict[str, object]) -> Losses:
    """Read ``decode.json``: means over seeds."""
    found: Losses = {}
    rows: list[dict[str, object]] = result["stress"]  # pyright: ignore[reportAssignmentType]
    for row in rows:
        what = str(row["condition"]).removesuffix(", unannounced").removesuffix(", announced")
        loss = float(row["loss"]["mean"])  # pyright: ignore[reportIndexIssue]
        told = str(row["condition"]).endswith(", announced")
        if row["decoder"] == OURS and not told and "nothing wrong" not in what:
            found.setdefault(what, {})[OURS] = loss
        elif row["decoder"] == "GRU" and row["given"] == "zeros" and not told:
            found.setdefault(what, {})[UNTOLD] = loss
        elif row["decoder"] == "GRU" and row["given"] == ("mean counts" if told else "last value"):
            found.setdefault(what, {})[TOLD] = loss
    return found


def draw(losses: Losses, path: Path) -> None:
    """Draw the chart."""
    made = plots.bars(losses, xlabel="R² lost (less is better)", colours=(BLUE, ORANGE, GREY))
    made.savefig(path, dpi=130)


def main() -> int:
    """Draw."""
    source, picture = (Path(argument) for argument in sys.argv[1:3])
    text = source.read_text("utf-8")
    draw(of_result(json.loads(text)) if source.suffix == ".json" else of_page(text), picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
