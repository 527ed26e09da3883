"""What ``ilqr-vae inspect`` shows, as lines for a terminal of any width."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass

from ilqr_vae.recordings.contents import Contents, Series

_INDENT = 2
_NAMES = 26
"""Widest column of names; a longer name has a line to itself."""


@dataclass(frozen=True, slots=True)
class Section:
    """A heading, and names with what there is to say of each."""

    title: str
    rows: tuple[tuple[str, str], ...]


def lines_of(sections: Iterable[Section], width: int) -> list[str]:
    """Sections as lines of at most ``width`` characters; no word is broken, long ones overhang."""
    made: list[str] = []
    for section in sections:
        made += ([""] if made else []) + [section.title]
        short = [len(name) for name, _ in section.rows if len(name) <= _NAMES]
        column = max(short, default=0) + _INDENT + 2
        for name, text in section.rows:
            room = width - column
            longest = max(map(len, text.split()), default=0)
            beside = len(name) <= _NAMES and longest <= room
            at = column if beside else 2 * _INDENT + 2
            wrapped = textwrap.wrap(
                text, max(width - at, longest), break_long_words=False, break_on_hyphens=False
            ) or [""]
            head = " " * _INDENT + name
            if beside:
                made.append((head.ljust(column) + wrapped[0]).rstrip())
                wrapped = wrapped[1:]
            else:
                made.append(head)
            made += [" " * at + line for line in wrapped if line]
    return made


def recording_sections(found: Contents) -> list[Section]:
    """A recording's contents, and what would be read of them."""
    made = [Section(f"recording {found.name}", ())]
    units: list[tuple[str, str]] = []
    if found.n_units:
        low, middle, high = found.rates or (None, None, None)
        rates = "" if low is None else f"; {low:.3g}, {middle:.3g}, {high:.3g} Hz"
        said = f"{found.n_units}{rates}" + (" (slowest, median, fastest)" if rates else "")
        units.append(("units", said))
    for column in dict.fromkeys(group.column for group in found.groups):
        each = [g for g in found.groups if g.column == column]
        said = "; ".join(f"{g.value or '(empty)'}: {g.units} at {g.rate:.3g} Hz" for g in each)
        units.append((column, said))
    if found.unit_columns:
        units.append(("selected by", f"data.units: {', '.join(found.unit_columns)}"))
    if units:
        made.append(Section("Units", tuple(units)))
    if found.series:
        title = (
            "Series, as they would be chosen"
            if any(s.decodable for s in found.series)
            else "What is in it"
        )
        made.append(Section(title, tuple((s.name, _said(s)) for s in found.series)))
    if found.n_trials or found.trial_columns:
        span = (
            ""
            if found.trials_begin is None
            else (f", {found.trials_begin:g} to {found.trials_end:g} s")
        )
        rows = [("trials", f"{found.n_trials}{span}")] if found.n_trials else []
        rows += [(c.name, c.holds) for c in found.trial_columns]
        made.append(Section("Trials", tuple(rows)))
    if found.refused:
        made.append(Section("With these settings it cannot be read", (("error", found.refused),)))
    else:
        made.append(Section("With these settings it reads as", tuple(found.reads.items())))
    said = [(f"warning {w.name}", w.text) for w in found.warnings]
    said += [("note", note) for note in found.notes]
    return made + ([Section("What a reader should know", tuple(said))] if said else [])


def _said(series: Series) -> str:
    parts = [series.kind, " x ".join(map(str, series.shape)), series.unit]
    if series.rate is not None:
        parts.append(f"{series.rate:.6g} Hz")
    if series.begin is not None:
        parts.append(f"{series.begin:g} to {series.end:g} s")
    if series.decodable:
        parts.append(f"could be decoded ({series.decodable})")
    return ", ".join(part for part in parts if part)
