"""The journal: everything accepted and everything answered, append-only, on disk before it counts.

The I/O thread writes. A bin is written before it is solved, an answer before it is published; what
was written survives the death of the process, and, after an fsync, that of the machine (policy:
``always`` before anything goes on, ``interval`` once a second from a thread of its own, ``never``).

Every segment begins with what is needed to go on from it alone: each open run, its newest snapshot,
the works since and their answers. A new segment is begun at every start, when one is full, and
after a fault: nothing is ever appended to a file that may be torn.

A disk that is full, or any other fault of writing, stops no answer: records are dropped and
counted, the alarm is raised (``failed``), and once a second a new segment is tried.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from ilqr_service import logs
from ilqr_service.journal.records import (
    MAGIC,
    SUFFIX,
    Answered,
    Began,
    Checkpoint,
    Ended,
    Header,
    Kept,
    Record,
    Worked,
    frame,
    number,
    segments,
)
from ilqr_vae.errors import ServiceError

_RETRY_S = 1.0
_SYNC_S = 1.0
TAIL = 128
"""Newest answers of a run that a checkpoint repeats."""


@dataclass(slots=True)
class Live:
    """An open run as the journal knows it.

    Attributes:
        began: what it began with, brought up to the newest snapshot.
        kept: the newest snapshot, framed.
        works: framed works since, by serial, with their index and whether a bin came.
        answers: the newest answer of each of the newest bins, framed, by index.
    """

    began: Began
    kept: bytes = b""
    works: dict[int, tuple[bytes, Worked]] = field(default_factory=dict[int, tuple[bytes, Worked]])
    answers: dict[int, bytes] = field(default_factory=dict[int, bytes])

    def note(self, record: Record, framed: bytes) -> None:
        """Follow one record of this run."""
        if isinstance(record, Worked):
            self.works[record.work.serial] = (framed, record)
        elif isinstance(record, Answered):
            self.answers.pop(record.index, None)  # so that the newest are last
            self.answers[record.index] = framed
            if len(self.answers) > TAIL:
                del self.answers[min(self.answers)]
        elif isinstance(record, Kept):
            self.kept = framed
            done = [s for s in self.works if s <= record.packed.serial]
            self.began = advance(self.began, [self.works.pop(s)[1] for s in done])


def advance(began: Began, works: list[Worked]) -> Began:
    """Where a run stands after these works, in order."""
    next_index, base, serial = began.next_index, began.base, began.serial
    missing = set(began.missing)
    for record in works:
        work = record.work
        serial = work.serial + 1
        if work.swap:
            continue
        if work.fresh:
            base = work.index
        next_index = max(next_index, work.index + 1)
        if work.counts is None:
            missing.add(work.index)
        else:
            missing.discard(work.index)
    kept = tuple(sorted(i for i in missing if i >= next_index - 1024))
    model = next((w.work.swap for w in reversed(works) if w.work.swap), began.model)
    return msgspec.structs.replace(
        began,
        again=True,
        model=model,
        next_index=next_index,
        base=base,
        serial=serial,
        missing=kept,
    )


class Journal:
    """Writes a journal into a folder. One thread uses it.

    Args:
        folder: made where it is not there.
        header: makes a segment's header; asked for the number of lost records.
        sync: ``always``, ``interval`` or ``never``.
        segment_bytes: what is written to a segment, beyond what it repeats, until the next.
        keep: segments kept; 0 is all.
        clock: seconds, monotonic.

    Attributes:
        failed: nothing can be written.
        lost: records that were not.
        written: bytes, over all segments.

    Raises:
        ServiceError: the folder cannot be made or written to, or another process uses it.
    """

    def __init__(
        self,
        folder: Path,
        header: Callable[[int], Header],
        *,
        sync: str = "interval",
        segment_bytes: int = 256 << 20,
        keep: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.failed = False
        self.lost = 0
        self.written = 0
        self._folder, self._header, self._sync = folder, header, sync
        self._segment_bytes, self._keep, self._clock = segment_bytes, keep, clock
        self._live: dict[int, Live] = {}
        self._pending: list[bytes] = []
        self._fd = -1
        self._size = self._repeated = 0
        self._retry = 0.0
        self._dirty = threading.Event()
        self._closing = threading.Event()
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._guard = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
            os.lockf(self._guard, os.F_TLOCK, 0)
        except OSError as error:
            raise ServiceError(
                "journal",
                expected="a folder that can be written and that no other service uses",
                got=f"{folder} ({error.strerror})",
            ) from error
        self._thread = threading.Thread(target=self._syncing, name="journal", daemon=True)

    def start(self, live: dict[int, Live]) -> None:
        """Begin a segment, with runs that go on. Raises ServiceError: it cannot be written."""
        self._live = dict(live)
        self._begin()
        if self.failed:
            raise ServiceError(
                "journal", expected="a folder that can be written", got=str(self._folder)
            )
        self._thread.start()

    def write(self, record: Record) -> None:
        """Add a record; it is on disk after the next ``flush``."""
        framed = frame(record)
        self._pending.append(framed)
        match record:
            case Began():
                self._live[record.run] = Live(record)
            case Ended():
                self._live.pop(record.run, None)
            case Worked():
                self._note(record.work.run, record, framed)
            case Answered():
                self._note(record.run, record, framed)
            case Kept():
                self._note(record.packed.run, record, framed)
            case _:
                pass

    def _note(self, run: int, record: Record, framed: bytes) -> None:
        live = self._live.get(run)
        if live is not None:
            live.note(record, framed)

    def flush(self) -> None:
        """Write what was added. Never raises: what cannot be written is counted as lost."""
        if self.failed:
            self.lost += len(self._pending)
            self._pending.clear()
            if self._clock() >= self._retry:
                self._begin()
            return
        if not self._pending:
            return
        lost, data = len(self._pending), b"".join(self._pending)
        self._pending.clear()
        if not self._append(data):
            self.lost += lost
            return
        if self._size - self._repeated > self._segment_bytes:
            self._begin()

    def close(self) -> None:
        """Write and sync what is left."""
        self.flush()
        self._closing.set()
        self._dirty.set()
        if self._thread.is_alive():
            self._thread.join()
        self._release()
        os.close(self._guard)

    # ---- segments ------------------------------------------------------------------------------

    def _append(self, data: bytes) -> bool:
        good = self._size
        try:
            view = memoryview(data)
            while view:
                done = os.write(self._fd, view)
                view = view[done:]
                self._size += done
            if self._sync == "always":
                os.fdatasync(self._fd)
        except OSError as error:
            self._fail(error, good)
            return False
        self.written += len(data)
        self._dirty.set()
        return True

    def _fail(self, error: OSError, good: int) -> None:
        if not self.failed:
            logs.warning("the journal cannot be written", error=str(error))
        self.failed = True
        self._retry = self._clock() + _RETRY_S
        with contextlib.suppress(OSError):
            os.ftruncate(self._fd, good)
        self._release()

    def _release(self) -> None:
        with self._lock:
            if self._fd >= 0:
                if self._sync != "never":
                    with contextlib.suppress(OSError):
                        os.fsync(self._fd)
                os.close(self._fd)
            self._fd = -1

    def _begin(self) -> None:
        """A new segment with everything needed to go on from it."""
        self._release()
        was_failed, self.failed = self.failed, False
        before = segments(self._folder)
        path = self._folder / f"{(number(before[-1]) if before else 0) + 1:08d}{SUFFIX}"
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        except OSError as error:
            self._fail(error, 0)
            return
        self._size = 0
        parts = [MAGIC, frame(self._header(self.lost))]
        for live in self._live.values():
            parts.append(frame(advance(live.began, [])))
            parts += [live.kept] if live.kept else []
            parts += [framed for framed, _ in live.works.values()]
            parts += live.answers.values()
        parts.append(frame(Checkpoint(runs=len(self._live))))
        if not self._append(b"".join(parts)):
            with contextlib.suppress(OSError):
                path.unlink()
            return
        self._repeated = self._size
        if was_failed:
            logs.info("the journal can be written again", lost=self.lost)
        if self._keep:
            for old in segments(self._folder)[: -self._keep]:
                with contextlib.suppress(OSError):
                    old.unlink()

    def _syncing(self) -> None:
        while not self._closing.wait(_SYNC_S):
            self._dirty.wait()
            self._dirty.clear()
            with self._lock:
                if self._sync == "interval" and self._fd >= 0:
                    with contextlib.suppress(OSError):
                        os.fsync(self._fd)
