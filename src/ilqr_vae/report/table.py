"""Tables and numbers in one style, for the terminal and for pages.

R2 and bits per spike have three decimals, milliseconds two, percentages one. A unit of measure
follows its name in brackets. Unknown values are a dash.
"""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from ilqr_vae.scoring.classes import THRESHOLDS, ClassScores

WIDTH = 110
"""Width of output on a wide terminal or in a file, in characters."""
_INDENT = 2
_GAP = 2
_NAMES = 30
"""Widest column of names; a longer name has its own line."""


def number(value: Any, digits: int = 3) -> str:
    """Format a number with this many decimals; a dash for None, NaN or infinity."""
    known = isinstance(value, int | float) and math.isfinite(value)
    return f"{value:.{digits}f}" if known else "–"


def milliseconds(value: Any) -> str:
    """Format a duration in milliseconds, without the unit."""
    return number(value, 2)


def percent(share: Any) -> str:
    """Format a share as a percentage."""
    text = number(100 * share if isinstance(share, int | float) else None, 1)
    return text if text == "–" else f"{text} %"


def named(name: str, unit: str) -> str:
    """Return a quantity with its unit of measure."""
    return f"{name} ({unit})" if unit else name


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells.

    Attributes:
        title: heading.
        text: a sentence or two on what is in it.
        columns: headings.
        rows: rows with a cell for each column.
        words: number of first columns with words, which are left-aligned; numbers are
            right-aligned.
    """

    title: str
    text: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int = 1


@dataclass(frozen=True, slots=True)
class Section:
    """A heading, and pairs of name and text."""

    title: str
    rows: tuple[tuple[str, str], ...]


def once(words: list[str]) -> list[str]:
    """Blank words that repeat those above them."""
    return ["" if i and words[i - 1] == word else word for i, word in enumerate(words)]


def width_of(screen: Console) -> int:
    """Return the width of output: the terminal's, or ``COLUMNS``."""
    stated = screen.is_terminal or "COLUMNS" in os.environ
    return min(screen.width, WIDTH) if stated else WIDTH


def wrapped(text: str, width: int) -> list[str]:
    """Wrap text to lines of at most ``width`` characters, without breaking words."""
    lines = textwrap.wrap(text, max(1, width), break_long_words=False, break_on_hyphens=False)
    return lines or [""]


def lines_of(sections: Iterable[Section], width: int) -> list[str]:
    """Format sections as lines of at most ``width`` characters, without breaking words."""
    made: list[str] = []
    for section in sections:
        made += ([""] if made else []) + wrapped(section.title, width)
        short = [len(name) for name, _ in section.rows if len(name) <= _NAMES]
        column = max(short, default=0) + _INDENT + 2
        for name, text in section.rows:
            longest = max(map(len, text.split()), default=0)
            beside = len(name) <= _NAMES and longest <= width - column
            at = column if beside else 2 * _INDENT + 2
            lines = wrapped(text, max(width - at, longest))
            head = " " * _INDENT + name
            if beside:
                made.append((head.ljust(column) + lines[0]).rstrip())
                lines = lines[1:]
            else:
                made.append(head)
            made += [" " * at + line for line in lines if line]
    return made


def lines_of_table(table: Table, width: int) -> list[str]:
    """The rows of a table, and its columns' names above, in lines of at most ``width`` characters.

    Where the columns do not fit side by side, words are wrapped; where no room is left for that, a
    row is a heading with its other cells below it.
    """
    cells = [table.columns, *table.rows]
    whole = [max(len(row[i]) for row in cells) for i in range(len(table.columns))]
    least = [_longest(row[i] for row in cells) for i in range(len(table.columns))]
    least = [w if i < table.words else max(w, _widest(table, i)) for i, w in enumerate(least)]
    room = width - _INDENT - _GAP * (len(whole) - 1)
    if sum(least) > room:
        return lines_of(_sections(table), width)[2:]
    columns = list(least)
    for i in sorted(range(len(whole)), key=lambda i: whole[i]):
        columns[i] += min(whole[i] - columns[i], room - sum(columns))
    made: list[str] = []
    for row in cells:
        parts = [wrapped(cell, columns[i]) for i, cell in enumerate(row)]
        for at in range(max(map(len, parts))):
            line = [part[at] if at < len(part) else "" for part in parts]
            each = [
                text.ljust(columns[i]) if i < table.words else text.rjust(columns[i])
                for i, text in enumerate(line)
            ]
            made.append((" " * _INDENT + (" " * _GAP).join(each)).rstrip())
    return made


def _longest(texts: Iterable[str]) -> int:
    return max((len(word) for text in texts for word in text.split()), default=0)


def _widest(table: Table, column: int) -> int:
    """Of the cells of a column of numbers: they are not wrapped."""
    return max((len(row[column]) for row in table.rows), default=0)


def _sections(table: Table) -> list[Section]:
    """A section for each row."""
    made, above = [Section("", ())], ""
    for row in table.rows:
        above = row[0] or above
        title = ", ".join(part for part in (above, *row[1 : table.words]) if part)
        named_cells = zip(table.columns[table.words :], row[table.words :], strict=True)
        made.append(Section(title, tuple((name, cell) for name, cell in named_cells if cell)))
    return made


def show(table: Table, screen: Console) -> None:
    """Print a table with its title and text."""
    screen.print(table.title, style="bold")
    if table.text:
        screen.print(f"  {table.text}")
    for line in lines_of_table(table, width_of(screen)):
        screen.print(line)


def show_sections(sections: Iterable[Section], screen: Console) -> None:
    """Print sections."""
    for line in lines_of(sections, width_of(screen)):
        screen.print(line)


def scores_table(
    title: str,
    methods: Mapping[str, Mapping[str, float]],
    intervals: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
) -> Table:
    """Scores of decoders: R2 of each channel, their mean with its interval, and coverage.

    Args:
        methods: by decoder, by metric; see ``scoring.score.Scores``.
        intervals: by decoder; ``r2`` are the bounds of its 95 % interval.
    """
    names = dict.fromkeys(k for values in methods.values() for k in values if k.startswith("r2."))
    bounded = any("r2" in found for found in (intervals or {}).values())
    covered = any("coverage_90" in values for values in methods.values())
    columns = ["decoder", "mean R2"]
    columns += ["95 % interval"] if bounded else []
    columns += names  # as in JSON
    columns += ["90 % covers"] if covered else []
    rows: list[tuple[str, ...]] = []
    for method, values in methods.items():
        found = (intervals or {}).get(method, {}).get("r2")
        cells = [method, number(values.get("r2"))]
        if bounded:
            cells.append("–" if found is None else f"{number(found[0])} to {number(found[1])}")
        cells += [number(values.get(name)) for name in names]
        cells += [percent(values.get("coverage_90"))] if covered else []
        rows.append(tuple(cells))
    return Table(title, "", tuple(columns), tuple(rows))


def classes_table(scores: ClassScores) -> Table:
    """How many bins get a class, and how many of these are right, by the threshold to abstain."""
    rows = [
        (number(least, 2), percent(answered), percent(right))
        for least, answered, right in zip(THRESHOLDS, scores.answered, scores.right, strict=True)
    ]
    text = f"{len(scores.names)} classes in {scores.n} bins of trials; the most frequent one has "
    text += f"{percent(scores.chance)}. Log loss {number(scores.log_loss)} bits; stated and actual "
    text += f"probability differ by {number(scores.calibration_error)} (mean over bins)."
    columns = ("abstain below", "bins that get a class", "of these right")
    return Table("Classes", text, columns, tuple(rows), words=0)


def latency_table(
    stages: Mapping[str, Mapping[str, Any]], bounds: Mapping[str, float] | None = None
) -> Table:
    """Quantiles of latencies in milliseconds.

    Args:
        stages: by stage, ``n`` and quantiles; a stage without values is left out.
        bounds: uncertainty of a stage that crosses from one clock to the other, in milliseconds.
    """
    of = ("p50", "p99", "p99.9", "max")
    known = {stage: values for stage, values in stages.items() if values["n"]}
    rows = [
        (stage, *(milliseconds(values[q]) for q in of), str(int(values["n"])))
        for stage, values in known.items()
    ]
    columns = ("stage", *of, "n")
    if bounds and any(bounds.values()):
        columns += ("±",)
        rows = [
            (*row, number(bounds[stage]) if bounds.get(stage) else "")
            for row, stage in zip(rows, known, strict=True)
        ]
    return Table("Latency (ms)", "", columns, tuple(rows))
