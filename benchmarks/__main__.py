"""``python -m benchmarks NAME --json F [--quick]``, and ``table`` and ``pictures`` for the page."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

from benchmarks import pictures, rows, stream, table

NAMES = ("lqr", "stream", "train", "service", "gpu")


def _measure(name: str, quick: bool, file: Path) -> None:
    machine = rows.machine()
    found = importlib.import_module(f"benchmarks.{name}").run(quick)
    content = {"benchmark": name, "quick": quick, "machine": machine, "rows": found}
    file.write_text(json.dumps(content, indent=1) + "\n")
    print(table.table(found))


def _page(files: list[Path], page: Path) -> None:
    shown: dict[str, Path] = {}
    for file in files:
        content = json.loads(file.read_text())
        if content["quick"]:
            continue
        if content["benchmark"] == "stream":
            shown["stream"] = page.with_name("performance.png")
            stream.picture(content["rows"], shown["stream"])
        elif content["benchmark"] in pictures.PICTURES:
            shown[content["benchmark"]] = pictures.beside(page, content["benchmark"])
    table.write(files, page, shown)
    pictures.draw(page)


def main() -> int:
    """Run a benchmark, or write the page from results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in NAMES:
        one = commands.add_parser(name, help=table.TITLES[name])
        one.add_argument("--json", type=Path, required=True, help="where the rows go")
        one.add_argument("--quick", action="store_true", help="few sizes and samples, under 60 s")
    page = commands.add_parser("table", help="write docs/performance.md from result files")
    page.add_argument("results", type=Path, nargs="+")
    page.add_argument("--page", type=Path, required=True)
    again = commands.add_parser("pictures", help="draw the page's pictures from its tables")
    again.add_argument("--page", type=Path, required=True)
    given = parser.parse_args()
    if given.command == "table":
        _page(given.results, given.page)
    elif given.command == "pictures":
        pictures.draw(given.page)
    else:
        _measure(given.command, given.quick, given.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
