"""A table of words, for terminal and page alike."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from rich.table import Table as Shown

WIDTH = 110
"""Of tables where the output is no terminal, or a narrow one; in characters."""


def number(value: Any, digits: int = 3) -> str:
    """A number with so many decimals; a dash for none, NaN or infinity."""
    known = isinstance(value, int | float) and math.isfinite(value)
    return f"{value:.{digits}f}" if known else "–"


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells.

    Attributes:
        title: heading.
        text: a sentence or two on what is in it.
        columns: headings.
        rows: as many cells each as there are columns.
        words: how many of the columns, the first ones, hold words; they stand left, numbers right.
    """

    title: str
    text: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int = 1


def once(words: list[str]) -> list[str]:
    """Words that are the same as those above them left out."""
    return ["" if i and words[i - 1] == word else word for i, word in enumerate(words)]


def shown(table: Table) -> Shown:
    """A table as the terminal draws it."""
    made = Shown(box=None, pad_edge=True)
    for i, column in enumerate(table.columns):
        made.add_column(column, justify="left" if i < table.words else "right")
    for row in table.rows:
        made.add_row(*row)
    return made
