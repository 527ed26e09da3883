"""Pictures of docs/performance.md, drawn from the tables on the page."""

from __future__ import annotations

import re
from pathlib import Path

from matplotlib.figure import Figure

from ilqr_vae import plots

TABLE = re.compile(r"(?:^\|.*\n)+", re.MULTILINE)


def rows(page: Path) -> list[dict[str, str]]:
    """Return the rows of each benchmark table of a page, with cells by heading."""
    found: list[dict[str, str]] = []
    for block in TABLE.findall(page.read_text()):
        head, _, *body = ([c.strip() for c in line.split("|")[1:-1]] for line in block.splitlines())
        if "benchmark" in head:
            found += [dict(zip(head, cells, strict=True)) for cells in body]
    return found


def lqr(measured: list[dict[str, str]]) -> Figure:
    """Draw the median time of one LQR problem in double precision, by size and implementation."""
    groups: dict[str, dict[str, float]] = {}
    for row in measured:
        alone = row["benchmark"] == "lqr" and row.get("batch") == "1" and row["dtype"] == "float64"
        if alone and row.get("T") and row["median µs"]:
            size = f"n = {row['n']}, m = {row['m']}, T = {row['T']}"
            groups.setdefault(size, {})[row["implementation"]] = float(row["median µs"]) / 1e3
    made = plots.bars(groups, xlabel="one LQR problem, median (ms)", digits=2)
    made.axes[0].set_xscale("log")
    return made


def service(measured: list[dict[str, str]]) -> Figure:
    """Draw the latency from the intended send to the answer, by the number of streams."""
    made = Figure(figsize=(7.2, 3.2), layout="constrained")
    ax = made.subplots()
    for name in ("ilqr-vae serve", "bare ZeroMQ echo"):
        of = [r for r in measured if r["benchmark"] == "service" and r["implementation"] == name]
        streams = [int(r["streams"]) for r in of]
        for quantile, style in (("median µs", "-"), ("p99 µs", "--")):
            ax.plot(
                streams,
                [float(r[quantile]) / 1e3 for r in of],
                style,
                color="C0" if name == "ilqr-vae serve" else "0.5",
                marker="o",
                label=f"{name}, {quantile.removesuffix(' µs')}",
            )
    ax.set(xlabel="streams at once", ylabel="send to answer (ms)", ylim=(0, None))
    ax.legend(frameon=False)
    return made


PICTURES = {"lqr": lqr, "service": service}


def beside(page: Path, benchmark: str) -> Path:
    """Return the file of the picture of a benchmark."""
    return page.with_name(f"performance-{benchmark}.png")


def draw(page: Path) -> None:
    """Write the pictures of the page."""
    measured, text = rows(page), page.read_text()
    for name, picture in PICTURES.items():
        if f"]({beside(page, name).name})" in text:
            picture(measured).savefig(beside(page, name), dpi=120, metadata={"Software": None})
