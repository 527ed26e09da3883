"""The output of ``ilqr-vae inspect`` for a recording."""

from __future__ import annotations

from ilqr_vae.recordings.contents import Contents, Series
from ilqr_vae.report.table import Section


def recording_sections(found: Contents) -> list[Section]:
    """Return the contents of a recording, and what would be read from it, as sections."""
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
        units.append(("select by", f"data.units: {', '.join(found.unit_columns)}"))
    if units:
        made.append(Section("Units", tuple(units)))
    if found.series:
        title = (
            "Series, in order of preference"
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
