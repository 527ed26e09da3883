"""The contents of a journal: sessions, their models, and how they were answered."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from ilqr_service.journal.records import (
    Answered,
    Deployed,
    Happened,
    Header,
    Queued,
    RunClosed,
    RunOpened,
    segments,
)
from ilqr_service.journal.verify import stream
from ilqr_vae.errors import JournalError, number_of
from ilqr_vae.protocol import messages
from ilqr_vae.report.table import Section

_NAMED = 12
"""Largest number of event names shown per run."""


class RecordedRun(msgspec.Struct):
    """A session's run, from its opening to its end.

    Attributes:
        session, epoch, run: name of the session, epoch, and serial number in the journal.
        model, user: its last model, and the user that fed it.
        bin_ms, units: bin width and number of units.
        bins, first, last: number of bins taken, and the lowest and highest index answered.
        began, ended: UTC of the first and the last answer; "" if there is none.
        statuses: counts of statuses, from the newest answer to each bin.
        end: why it ended; "" if the journal does not say.
        events: number of events by name.
    """

    session: str
    epoch: int
    run: int
    model: str
    user: str
    bin_ms: float
    units: int
    bins: int = 0
    first: int | None = None
    last: int | None = None
    began: str = ""
    ended: str = ""
    statuses: dict[str, int] = {}
    end: str = ""
    events: dict[str, int] = {}


class JournalContents(msgspec.Struct):
    """A journal. ``damage``: a line for each irregularity of its files."""

    folder: str
    segments: int
    megabytes: float
    lost: int
    versions: dict[str, str]
    models: dict[str, str]
    runs: list[RecordedRun]
    damage: list[str]


def contents_of(folder: Path) -> JournalContents:
    """Read a journal. Raises JournalError if it is none, or of another version."""
    paths, damage = segments(folder), list[str]()
    if not paths:
        expected = "a journal's folder, with files NUMBER.journal"
        raise JournalError("journal", expected=expected, got=str(folder))
    size = sum(path.stat().st_size for path in paths) / 1e6
    made = JournalContents(str(folder), len(paths), size, 0, {}, {}, [], damage)
    runs: dict[int, RecordedRun] = {}
    newest: dict[int, dict[int, tuple[int, str]]] = {}
    taken: dict[int, set[int]] = {}
    events: dict[int, dict[tuple[str, int], str]] = {}
    header: Header | None = None
    for record in stream(folder, damage):
        match record:
            case Header():
                header, made.lost, made.versions = record, record.lost, record.versions
                made.models |= {name: _model(each) for name, each in record.manifests.items()}
            case Deployed():
                made.models[record.model] = _model(record.manifest)
            case RunOpened():
                asked = record.request
                units, width = len(asked.units), asked.bin_width_ns / 1e6
                begun = RecordedRun(
                    asked.session, asked.epoch, record.run, record.model, record.user, width, units
                )
                runs.setdefault(record.run, begun).model = record.model
            case Queued() if record.work.run in runs:
                run = runs[record.work.run]
                # a segment begins with works of the previous one
                if record.work.counts is not None:
                    taken.setdefault(run.run, set()).add(record.work.index)
                run.model = record.work.swap or run.model
            case Answered() if record.run in runs:
                result = messages.decode_published(record.frame)
                if isinstance(result, messages.Result):
                    _answered(runs[record.run], result, newest.setdefault(record.run, {}), header)
            # a segment begins with those of the previous one
            case Happened() if record.run in runs:
                event = record.event
                events.setdefault(record.run, {})[event.source, event.index] = event.name
            case RunClosed() if record.run in runs:
                runs[record.run].end = record.what
            case _:
                pass
    for number, run in runs.items():
        run.bins = len(taken.get(number, ()))
        run.events = dict(Counter(events.get(number, {}).values()).most_common())
        run.statuses = dict(Counter(status for _, status in newest.get(number, {}).values()))
    made.runs = list(runs.values())
    return made


def _answered(
    run: RecordedRun,
    result: messages.Result,
    newest: dict[int, tuple[int, str]],
    header: Header | None,
) -> None:
    if newest.get(result.index, (-1, ""))[0] < result.revision:
        newest[result.index] = result.revision, result.status
    run.first = result.index if run.first is None else min(run.first, result.index)
    run.last = result.index if run.last is None else max(run.last, result.index)
    if header is not None:
        at = (header.at_ns + result.received_ns - header.clock_ns) / 1e9
        run.ended = f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M:%S}"
        run.began = run.began or run.ended


def _model(manifest: dict[str, Any]) -> str:
    features, width = len(manifest.get("features", ())), float(manifest.get("bin_width", 0.0))
    units = len(manifest.get("unit_names", ())) - features
    beside = f" and {number_of(features, 'feature')}" if features else ""
    decodes = ", ".join(manifest.get("kinematic_names", ())) or "latents and rates only"
    return f"{number_of(units, 'unit')}{beside}, {width * 1e3:g} ms bins; decodes {decodes}"


def look(folder: Path) -> tuple[JournalContents, list[Section]]:
    """Return a journal's contents, and their sections for ``inspect``. Raises JournalError."""
    found = contents_of(folder)
    about = {
        "segments": f"{found.segments}, {found.megabytes:.3g} MB",
        "sessions": f"{len({run.session for run in found.runs})} in {len(found.runs)} runs",
        "lost": f"{found.lost} records could not be written",
        "written by": ", ".join(f"{k} {v}" for k, v in found.versions.items()),
    }
    sections = [Section(f"journal {found.folder}", tuple(about.items()))]
    sections.append(Section("Models", tuple(found.models.items())))
    sections.append(Section("Runs", tuple((_name(run), _said(run)) for run in found.runs)))
    sections.append(Section("Damage", tuple(("skipped", line) for line in found.damage)))
    return found, [section for section in sections if section.rows]


def _name(run: RecordedRun) -> str:
    return f"{run.session}, epoch {run.epoch}"


def _said(run: RecordedRun) -> str:
    statuses = ", ".join(f"{n} {status}" for status, n in sorted(run.statuses.items()))
    names = list(run.events.items())
    events = ", ".join(f"{n} {name}" for name, n in names[:_NAMED])
    events += f" and {len(names) - _NAMED} other names" if len(names) > _NAMED else ""
    parts = [
        f"run {run.run}",
        f"model {run.model}",
        f"{number_of(run.units, 'unit')}, {run.bin_ms:g} ms",
        f"{number_of(run.bins, 'bin')} taken"
        + (f", {run.first} to {run.last} answered" if statuses else ""),
        statuses,
        f"events: {events}" if events else "",
        f"{run.began} to {run.ended} UTC" if run.began else "",
        f"fed by {run.user}" if run.user else "",
        run.end or "open or cut off at the end",
    ]
    return "; ".join(part for part in parts if part)
