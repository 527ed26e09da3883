"""The open runs in a journal, with all that is needed to resume each."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from msgspec.structs import replace

from ilqr_service.journal.records import (
    Answered,
    Fed,
    Happened,
    Queued,
    Record,
    RunClosed,
    RunOpened,
    Snapshot,
)

TAIL = 128
"""Number of newest answers of a run that a checkpoint repeats."""


@dataclass(slots=True)
class Live:
    """An open run in the journal.

    Attributes:
        opened: its opening record, updated to the newest snapshot.
        snapshot: newest snapshot, framed.
        works: framed works since the snapshot, by serial, with their index and whether a bin came.
        answers: newest answer to each of the newest bins, framed, by index.
        fed: batches of spikes of the newest bins, framed.
        happened: newest events, framed.
    """

    opened: RunOpened
    snapshot: bytes = b""
    works: dict[int, tuple[bytes, Queued]] = field(default_factory=dict[int, tuple[bytes, Queued]])
    answers: dict[int, bytes] = field(default_factory=dict[int, bytes])
    fed: deque[tuple[int, bytes]] = field(default_factory=deque[tuple[int, bytes]])
    happened: deque[bytes] = field(default_factory=lambda: deque[bytes](maxlen=TAIL))

    def note(self, record: Record, framed: bytes) -> None:
        """Apply a record of this run."""
        if isinstance(record, Queued):
            self.works[record.work.serial] = (framed, record)
        elif isinstance(record, Answered):
            self.answers.pop(record.index, None)  # keep the newest last
            self.answers[record.index] = framed
            if record.revision > self.opened.revision:
                self.opened = replace(self.opened, revision=record.revision)
            if len(self.answers) > TAIL:
                del self.answers[min(self.answers)]
        elif isinstance(record, Fed):
            newest = max(record.batch.source_ns, self.fed[-1][0] if self.fed else 0)
            self.fed.append((record.batch.source_ns, framed))
            while self.fed[0][0] < newest - TAIL * self.opened.request.bin_width_ns:
                self.fed.popleft()
        elif isinstance(record, Happened):
            self.happened.append(framed)
        elif isinstance(record, Snapshot):
            self.snapshot = framed
            done = [s for s in self.works if s <= record.packed.serial]
            at = advance(self.opened, [self.works.pop(s)[1] for s in done])
            self.opened = replace(at, model=record.packed.model)


def run_of(record: Record) -> int | None:
    """Return the run of a record; None if it belongs to no run."""
    match record:
        case RunOpened() | Fed() | Happened() | Answered() | RunClosed():
            return record.run
        case Queued():
            return record.work.run
        case Snapshot():
            return record.packed.run
        case _:
            return None


def follow(runs: dict[int, Live], record: Record, framed: bytes) -> None:
    """Update the open runs by one record."""
    run = run_of(record)
    if isinstance(record, RunOpened):
        runs[record.run] = Live(record)
    elif isinstance(record, RunClosed):
        runs.pop(record.run, None)
    elif run is not None and run in runs:
        runs[run].note(record, framed)


def advance(opened: RunOpened, works: list[Queued]) -> RunOpened:
    """Advance a run by these works, in order."""
    next_index, base, serial = opened.next_index, opened.base, opened.serial
    model = opened.model
    missing = set(opened.missing)
    for record in works:
        work = record.work
        serial = work.serial + 1
        model = work.swap or work.model or model  # the record of a swap may be lost
        if work.swap:
            continue
        if work.restart:
            base = work.index
        if work.rewind:
            next_index = work.index
            missing = {i for i in missing if i < next_index}
        next_index = max(next_index, work.index + 1)
        if work.counts is None:
            missing.add(work.index)
        else:
            missing.discard(work.index)
    kept = tuple(sorted(i for i in missing if i >= next_index - 1024))
    return replace(
        opened,
        again=True,
        model=model,
        next_index=next_index,
        base=base,
        serial=serial,
        missing=kept,
    )
