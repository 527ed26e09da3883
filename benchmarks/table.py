"""Writes docs/performance.md from the JSON files of the benchmarks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.rows import Row

TITLES = {
    "lqr": "LQR alone",
    "stream": "One bin of a stream",
    "train": "Training",
    "service": "End to end through the service",
    "gpu": "GPU",
}
NOTES = {
    "lqr": "One call, tensors in, tensors out; `error` is of dz against the float64 reference. "
    "diffilqrax is given the initial state that the others have to find, which is less work. "
    "`solve alone`: everything is where the solver wants it, before and after; HPIPM's matrices in "
    "its own layout; it and PIQP run on one core, in turns with ours, and solve a batch in a row. "
    "`GFLOP/s`: the operations of the square-root recursion (`lqr.operations`) over the median; "
    "`share of product`: that over what one core reaches in a product of large matrices.",
    "stream": "One moving-horizon step, two iterations, the window full. `parts`: moving the "
    "window, solving, answering, and Python around them. Rows with `members`: models streamed as "
    "one, each with the default readout; the others have no readout.",
    "train": "One gradient step of 32 crops of 40 bins (made-up data), solves warm. "
    "`train solves`: such a batch solved from zero inputs, alone; diffilqrax is given the "
    "initial state and the number of iterations ours took.",
    "service": "Open-loop load, timed from the intended send to the arrival of the answer; streams "
    "begin at times of their own, and their first 25 bins are not counted. Service, load generator "
    "and echo are processes of their own on the same cores. `beside solve`: from the intended "
    "send to publishing, without the solve itself, so with the wait for the solves of others. "
    "`over solve and echo`: p99 of the whole, less p99 of the solve and p99 of a bare ZeroMQ echo "
    "under the same load. `late`, `predicted` (answered without the bin's data), `shed`, `refused` "
    "and `unanswered` are numbers of bins; the deadline is the bin width.",
    "gpu": "`share of floor`: the least time that moving each number once and doing the "
    "arithmetic would take at the card's published peaks, over the time measured.",
}
#: Columns in order: (key, heading).
COLUMNS = {
    "benchmark": "benchmark", "implementation": "implementation", "n": "n", "m": "m", "T": "T",
    "H": "H", "units": "units", "streams": "streams", "members": "members", "batch": "batch",
    "threads": "threads",
    "dtype": "dtype", "axis": "size", "exponent": "exponent", "iterations": "iterations",
    "min_us": "min µs", "median_us": "median µs", "p99_us": "p99 µs", "p999_us": "p99.9 µs",
    "max_us": "max µs", "samples": "samples", "error": "error",
    "gflops": "GFLOP/s", "share_of_product": "share of product", "parts_us": "parts µs",
    "bound": "bound", "seconds_to_bound": "s to bound", "solve_p99_us": "solve p99 µs",
    "beside_solve_median_us": "beside solve median µs",
    "beside_solve_p99_us": "beside solve p99 µs",
    "p99_over_solve_and_echo_us": "over solve and echo µs", "queue_p99_us": "queue p99 µs",
    "publish_p99_us": "publish p99 µs", "bins_a_step": "bins a step", "late": "late",
    "predicted": "predicted", "shed": "shed", "refused": "refused", "unanswered": "unanswered",
    "cpu_us": "CPU µs a bin", "feeder_cpu_us": "feeder's CPU µs a bin",
    "feeder_late_p99_us": "feeder late p99 µs",
    "floor_us": "floor µs", "share_of_floor": "share of floor",
    "not_measured": "not measured because", "load": "load",
}  # fmt: skip


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        return ", ".join(f"{k} {v:g}" for k, v in value.items())
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value).replace("|", "/")


def table(rows: list[Row]) -> str:
    """Return rows as a Markdown table, with the columns that any of them has."""
    keys = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    lines = [
        "| " + " | ".join(COLUMNS[key] for key in keys) + " |",
        "|" + "---|" * len(keys),
        *("| " + " | ".join(_cell(row.get(key)) for key in keys) + " |" for row in rows),
    ]
    return "\n".join(lines)


def _where(machine: Row) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items())
    return (
        f"{machine['processor']}, {machine['cores']} cores, GPU {machine['gpu']}; "
        f"{machine['system']}, Python {machine['python']}, {versions}, {machine['compiler']}; "
        f"commit {machine['commit']}, {machine['time']}, "
        f"load average at the start {machine['load_at_start']:g}"
    )


#: Captions of the pictures at the head of the page, by benchmark.
CAPTIONS = {
    "service": "Latency through the service, from the intended send to the answer, by the number "
    "of streams; beside it a bare ZeroMQ echo under the same load",
    "stream": "Time of one bin of a stream, by the size of the model",
    "lqr": "One linear-quadratic problem, the core of each iteration, beside other implementations "
    "(double precision)",
}


def write(files: list[Path], page: Path, pictures: dict[str, Path]) -> None:
    """Write the page from result files: first the pictures, then the tables as in ``TITLES``."""
    found = {content["benchmark"]: content for content in map(_read, files)}
    parts = [
        "# Performance\n",
        "One machine, measured as said with each table; `python -m benchmarks` measures yours.\n",
        *(
            f"![{text}]({pictures[n].name})\n\n*{text}.*\n"
            for n, text in CAPTIONS.items()
            if n in pictures
        ),
        "## Where the numbers come from\n",
        "Written by `python -m benchmarks table RESULTS... --page docs/performance.md`, from what "
        "`python -m benchmarks lqr|stream|train|service|gpu --json F` measured; no number here was "
        "typed by hand. `load` is the load average when a row was measured: where it is above one "
        "or two the machine was shared, and times are worse than on a quiet one.\n",
    ]
    for name, title in TITLES.items():
        content = found.get(name)
        if content is None:
            parts.append(f"## {title}\n\nNot measured.\n")
            continue
        how = " **Quick run: few sizes and samples.**" if content["quick"] else ""
        parts.append(f"## {title}\n\n{NOTES[name]}{how}\n\n{_where(content['machine'])}.\n")
        parts.append(table(content["rows"]) + "\n")
    page.write_text("\n".join(parts))


def _read(path: Path) -> Row:
    return json.loads(path.read_text())
