"""The tables of docs/capacity.md, written from what ``benchmarks.capacity`` measured.

Each stands between two comments, ``<!-- capacity: NAME -->`` and ``<!-- end -->``; all else of the
page is written by hand.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.rows import Row

STREAMS = (10**3, 10**5, 10**6)
KINDS = ("model", "interrupted", "measured")
CORES = 64
"""Cores of a machine."""


def _table(columns: Sequence[str], cells: Sequence[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join(f"| {' | '.join(map(_text, line))} |" for line in lines)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _of(rows: Sequence[Row], kind: str) -> list[Row]:
    return [r for r in rows if r["benchmark"] == kind]


def _machine(content: Row) -> str:
    machine, rows = content["machine"], content["rows"]
    loads = [r["load"] for r in rows]
    return (
        f"Measured in {content['minutes']} minutes on {machine['cores']} cores of "
        f"{machine['processor']}, {machine['time'][:10]}, commit {machine['commit']}. Load average "
        f"{machine['load_at_start']:g} before, {min(loads):g} to {max(loads):g} meanwhile, this "
        "measurement's own processes (1 to 2) included."
    )


def _one_core(rows: Sequence[Row]) -> str:
    memory = {r["implementation"]: r for r in _of(rows, "memory")}
    cells = [
        (
            *(r["implementation"], r["n"], r["units"], r["horizon"]),
            *(round(r["core_us_a_bin"]), round(r["core_us_a_bin_most"]), r["streams_a_core"]),
            r["bytes_s_a_stream"],
            round(memory[r["implementation"]]["kib_a_session"]),
            memory[r["implementation"]]["server_mib"],
        )
        for r in _of(rows, "capacity")
    ]
    columns = (
        *("model", "n", "units", "H", "core µs a bin, 12 streams", "at the highest load"),
        *("streams a core", "bytes/s a stream", "KiB a session", "MiB a server"),
    )
    return _table(columns, cells)


def _core(rows: Sequence[Row]) -> str:
    cells: list[Sequence[Any]] = []
    for r in _of(rows, "capacity"):
        t = {name: round(us) for name, us in r["times_us"].items()}
        cells.append(
            (
                *(r["implementation"], ", ".join(map(str, r["calibrated_at"])), t["read"]),
                f"{t['solve']} + {t['each']} k",
                f"{t['gap']} + {t['telling']} k",
                f"{t['told']} + {t['answer']} k",
                *(round(r["way_in_us"]), round(r["way_out_us"]), round(r["most_streams"])),
            )
        )
    columns = (
        *("model", "streams", "read a bin", "solve k", "to the next solve", "to the last answer"),
        *("way there", "way back", "streams if always busy"),
    )
    return _table(columns, cells)


def _waiting(rows: Sequence[Row]) -> str:
    cells = [
        (
            *(r["implementation"], r["share"], r["streams"], r["busy"], r["bins_a_step"]),
            *(" / ".join(_ms(r[f"{kind}_p{q}_ms"]) for kind in KINDS) for q in (50, 90, 99)),
            f"{r['interruptions']}, {r['interrupted_ms']:.0f} ms",
            f"{r['late_share'] * 100:.2g} %",
        )
        for r in _of(rows, "queue")
    ]
    columns = (
        *("model", "load", "streams", "core busy", "bins a step", "p50", "p90", "p99"),
        *("interruptions", "late"),
    )
    return _table(columns, cells)


def _ms(value: float | None) -> str:
    return "–" if value is None else _text(float(value))


def agreement(rows: Sequence[Row], kind: str, share: float) -> dict[int, float]:
    """The largest factor between a model and measurement at a load, either way, by percentile."""
    found: dict[int, float] = {}
    for q in (50, 90, 99):
        ratios = [
            r[f"{kind}_p{q}_ms"] / r[f"measured_p{q}_ms"]
            for r in _of(rows, "queue")
            if r["share"] == share and r[f"measured_p{q}_ms"] and r[f"{kind}_p{q}_ms"]
        ]
        found[q] = max((max(x, 1 / x) for x in ratios), default=float("nan"))
    return found


def _agrees(rows: Sequence[Row]) -> str:
    cells = [
        (share, *(f"{plain[q]:.2g} / {taken[q]:.2g}" for q in plain))
        for share in sorted({r["share"] for r in _of(rows, "queue")})
        for plain in [agreement(rows, "model", share)]
        for taken in [agreement(rows, "interrupted", share)]
    ]
    return _table(("load", "p50", "p90", "p99"), cells)


def _fleet(rows: Sequence[Row]) -> str:
    opened = [
        (f"open {r['implementation']}", r["median_us"] / 1e3, r["p99_us"] / 1e3, r["samples"])
        for r in _of(rows, "open")
    ]
    copied = [
        (
            f"answer, {r['streams']} streams, {r['implementation']}",
            *(_ms(r[f"latency_p{q}_ms"]) for q in (50, 99)),
            "",
        )
        for r in _of(rows, "copy")
    ]
    lag = [
        (
            "write to copy acknowledged",
            *(f"at most {r[f'copy_p{q}_ms_at_most']:g}" for q in (50, 99)),
            f"{r['pieces']:,.0f} pieces of {r['bytes_a_piece']:,} bytes",
        )
        for r in _of(rows, "copy")
        if "pieces" in r
    ]
    return _table(("ms", "p50", "p99", "of"), [*opened, *copied, *lag])


def carried(measured: list[Row], streams: int) -> list[Row]:
    """Cores, network and the fleet's address for so many streams, by what one core does."""
    found: list[Row] = []
    for one in measured:
        if one["benchmark"] != "capacity":
            continue
        cores = -(-streams // one["streams_a_core"])
        memory = next(
            r
            for r in measured
            if r["benchmark"] == "memory" and r["implementation"] == one["implementation"]
        )
        found.append(
            {
                "model": one["implementation"],
                "streams": streams,
                "cores": cores,
                f"machines of {CORES} cores": -(-cores // CORES),
                "Gbit/s in all": round(8 * streams * one["bytes_s_a_stream"] / 1e9, 2),
                "Mbit/s a machine": round(
                    8 * min(streams, CORES * one["streams_a_core"]) * one["bytes_s_a_stream"] / 1e6
                ),
                "GiB of memory": round(
                    (streams * memory["kib_a_session"] / 1024 + cores * memory["server_mib"])
                    / 1024,
                    1,
                ),
            }
        )
    return found


def _carried(rows: Sequence[Row]) -> str:
    found = [line for streams in STREAMS for line in carried(list(rows), streams)]
    return _table(tuple(found[0]), [tuple(line.values()) for line in found]) if found else ""


def tables(content: Row) -> dict[str, str]:
    """Every table and sentence of numbers, by its name on the page."""
    rows = content["rows"]
    return {
        "machine": _machine(content),
        "one core": _one_core(rows),
        "core": _core(rows),
        "waiting": _waiting(rows),
        "agreement": _agrees(rows),
        "fleet": _fleet(rows),
        "carried": _carried(rows),
    }


def write(content: Row, page: Path | None) -> None:
    """Print the tables, and put them in their places on the page."""
    text = "" if page is None else page.read_text()
    for name, table in tables(content).items():
        print(f"{name}\n\n{table}\n")
        between = re.compile(rf"(<!-- capacity: {name} -->\n).*?(\n<!-- end -->)", re.DOTALL)
        text = between.sub(lambda m, t=table: f"{m[1]}\n{t}\n{m[2]}", text)
    if page is not None:
        page.write_text(text)
