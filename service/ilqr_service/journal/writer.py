"""The append-only writer of the journal; records reach the operating system before they count.

The I/O thread writes. A bin is written before it is solved, an answer before it is published.
Written records survive the death of the process and, after an fsync, that of the machine (policy:
``always`` before anything continues, ``interval`` once a second, ``never``). A separate thread does
whatever may take long: fsync, close, and the removal of old segments.

Each segment begins with all that is needed to continue from it alone: each open run, its newest
snapshot, the works since and their answers. A new segment is created at each start, when one is
full, and after a fault: nothing is appended to a file that may be truncated.

Faults do not stop answers, e.g. a full disk, a missing folder, or a segment removed or truncated by
others. Records that cannot be written are dropped and counted, the alarm is raised (``ok``), and a
new segment is tried once a second. A missing folder is created again if its parent exists.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec

from ilqr_service import logs
from ilqr_service.journal.live import Live, advance, follow
from ilqr_service.journal.records import (
    MAGIC,
    SUFFIX,
    Checkpoint,
    Header,
    Record,
    frame,
    number,
    survey,
)
from ilqr_vae.errors import JournalError, ServiceError

_RETRY_S = 1.0
_SYNC_S = 1.0
_INSPECT_S = 0.1
_RETIRED = 2
"""Largest number of segments waiting for an fsync; beyond it the newest segment grows."""
_ALARM_S, _LOSS_ALARM_S = 2.0, 3.0
"""Shortest duration of the alarm, so that brief faults are seen: for records that could not be
written, and for written records that are gone.
"""


class Copy(Protocol):
    """A copy of a journal on another node. Used by the thread of the writer."""

    def renewed(self) -> bool:
        """Return whether a copy restarts, from a new segment."""
        ...

    def write(self, segment: int, offset: int, data: bytes) -> None:
        """Copy bytes that were written to a segment."""
        ...

    @property
    def position(self) -> int:
        """Position of the last write."""
        ...

    def copied(self) -> int:
        """Position up to which results may be published: the copy has it, or there is none."""
        ...


class Writer:
    """Writes a journal into a folder, which it locks. Only one thread may use it.

    Args:
        folder: folder of the journal, created if it does not exist.
        header: returns the header of a segment; called with the number of lost records.
        sync: ``always``, ``interval`` or ``never``.
        segment_bytes: size of a segment beyond its repeated records.
        keep: number of segments to keep; 0 for all.
        clock: monotonic, seconds.
        copy: receives all that is written.

    Attributes:
        failed: whether writing fails.
        lost: number of records that could not be written.
        written: bytes written to all segments.

    Raises:
        ServiceError: the folder cannot be created or written to, or another process uses it.
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
        copy: Copy | None = None,
    ) -> None:
        self._copy = copy
        self.failed = False
        self.lost = 0
        self.written = 0
        self._folder, self._header, self._sync = folder, header, sync
        self._segment_bytes, self._keep, self._clock = segment_bytes, keep, clock
        self._runs: dict[int, Live] = {}
        self._pending: list[bytes] = []
        self._fd = self._folder_fd = self._lock_fd = -1
        self._path = folder
        self._number = self._size = self._repeated = self._records = 0
        self._retry = self._inspected = 0.0
        self._alarm = float("-inf")
        # For the writer's thread, the only one that syncs and closes segments.
        self._retired: deque[int] = deque()
        self._dirty = self._begun = False
        self._sync_error: OSError | None = None
        self._work, self._closing = threading.Event(), threading.Event()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._claim()
        except (OSError, ValueError) as error:
            raise ServiceError(
                "journal",
                expected="a folder that can be written and that no other service uses",
                got=f"{folder} ({getattr(error, 'strerror', None) or error})",
            ) from error
        self._thread = threading.Thread(target=self._tidying, name="journal", daemon=True)

    @property
    def ok(self) -> bool:
        """Whether records are written, and were in the last seconds."""
        return not self.failed and self._clock() >= self._alarm

    def start(self, runs: dict[int, Live]) -> None:
        """Create a segment, with open runs. Raises ServiceError if it cannot be written."""
        self._runs = dict(runs)
        self._number = max((number(path) for path in survey(self._folder)[0]), default=0)
        self._begin()
        if self.failed:
            raise ServiceError(
                "journal", expected="a folder that can be written", got=str(self._folder)
            )
        self._thread.start()

    @property
    def position(self) -> int:
        """Position of the last write, for ``copied``."""
        return 0 if self._copy is None else self._copy.position

    def copied(self) -> int:
        """Position up to which results may be published."""
        return 0 if self._copy is None else self._copy.copied()

    def write(self, record: Record) -> None:
        """Add a record; it is on disk after the next ``flush``."""
        framed = frame(record)
        self._pending.append(framed)
        follow(self._runs, record, framed)

    def flush(self) -> None:
        """Write added records. Never raises: records that cannot be written count as lost."""
        now = self._clock()
        if self._fd >= 0 and now >= self._inspected + _INSPECT_S:
            self._inspected = now
            self._inspect()
        if self.failed:
            self.lost += len(self._pending)
            self._pending.clear()
            if now >= self._retry:
                self._begin()
            return
        if self._copy is not None and self._copy.renewed():
            self._begin()
        if not self._pending:
            return
        added, data = len(self._pending), b"".join(self._pending)
        self._pending.clear()
        if not self._append(data):
            self.lost += added
            return
        self._records += added
        full = self._size - self._repeated > self._segment_bytes
        if full and len(self._retired) < _RETIRED:
            self._inspect()  # a last check: it is not inspected again
            self._begin()

    def close(self) -> None:
        """Write and sync the rest; unlock the folder."""
        self.flush()
        self._closing.set()
        self._work.set()
        if self._thread.is_alive():
            self._thread.join()
        self._retire()
        self._tidy()
        for fd in (self._lock_fd, self._folder_fd):
            if fd >= 0:
                os.close(fd)
        self._lock_fd = self._folder_fd = -1

    # ---- the folder ----------------------------------------------------------------------------

    def _claim(self) -> None:
        """Lock the folder at the path. Raises OSError if there is none, or it is in use.

        The folder itself is locked as well as its file ``lock``, which could be removed; if a file
        system cannot lock folders, only the file is locked.
        """
        if self._folder_fd >= 0 and _same(self._folder, self._folder_fd):
            return
        try:
            import fcntl
        except ModuleNotFoundError as error:
            raise OSError("a journal needs locks of folders, which Windows has not") from error
        self._folder.mkdir(exist_ok=True)
        folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        lock = -1
        try:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise
            lock = os.open("lock", os.O_RDWR | os.O_CREAT, 0o600, dir_fd=folder)
            os.lockf(lock, os.F_TLOCK, 0)
        except OSError:
            os.close(folder)
            if lock >= 0:
                os.close(lock)
            raise
        for fd in (self._lock_fd, self._folder_fd):
            if fd >= 0:
                os.close(fd)
        self._folder_fd, self._lock_fd = folder, lock

    def _inspect(self) -> None:
        """Detect a segment that was removed, moved or truncated by others, and a failed fsync."""
        error, self._sync_error = self._sync_error, None
        try:
            mine = os.fstat(self._fd)
            if error is not None:
                self._fail(str(error))
            elif mine.st_nlink == 0 or mine.st_size < self._size:
                self.lost += self._records
                self._fail(f"{self._path.name} was removed or cut short", _LOSS_ALARM_S)
                if os.pread(self._fd, len(MAGIC), 0) != MAGIC:
                    os.ftruncate(self._fd, 0)  # it would begin in the middle of a record
            elif not _same(self._path, self._fd):
                self._fail(f"{self._path} is no longer what is written", _LOSS_ALARM_S)
            else:
                return
        except OSError as fault:
            self._fail(str(fault))
        self._retire()
        self._retry = self._clock()

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
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, good)
            self._fail(str(error))
            self._retire()
            return False
        self.written += len(data)
        self._dirty = True
        if self._copy is not None:
            self._copy.write(self._number, good, data)
        return True

    def _fail(self, why: str, alarm_s: float = _ALARM_S) -> None:
        now = self._clock()
        if not self.failed:
            logs.warning("the journal cannot be written", error=why)
            self._alarm = now + alarm_s
        self.failed = True
        self._retry = now + _RETRY_S

    def _retire(self) -> None:
        """Hand the open segment over to the writer's thread."""
        if self._fd >= 0:
            self._retired.append(self._fd)
            self._fd = -1
            self._work.set()

    def _begin(self) -> None:
        """Create a segment with everything needed to continue from it."""
        self._retire()
        was_failed, previous = self.failed, self._number
        try:
            self._claim()
            self._create()
        except OSError as error:
            self._fail(str(error))
            return
        self._size = self._records = 0
        place = {"segment": self._number, "previous": previous}
        header = msgspec.structs.replace(self._header(self.lost), **place)
        parts = [MAGIC, frame(header)]
        for live in self._runs.values():
            parts.append(frame(advance(live.opened, [])))
            parts += [live.snapshot] if live.snapshot else []
            parts += [framed for framed, _ in live.works.values()]
            parts += live.answers.values()
            parts += [framed for _, framed in live.fed]
            parts += live.happened
        parts.append(frame(Checkpoint(runs=len(self._runs))))
        if not self._append(b"".join(parts)):
            with contextlib.suppress(OSError):
                self._path.unlink()
            self._number = previous
            return
        self.failed = False
        self._repeated = self._size
        self._begun = True
        if was_failed:
            logs.info("the journal can be written again", lost=self.lost)

    def _create(self) -> None:
        """Create the file with the next free number. Raises OSError."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND
        while True:
            self._path = self._folder / f"{self._number + 1:08d}{SUFFIX}"
            try:
                self._fd = os.open(self._path, flags, 0o600)
            except FileExistsError:
                self._number += 1
                continue
            self._number += 1
            return

    # ---- the writer's own thread ---------------------------------------------------------------

    def _tidying(self) -> None:
        while not self._closing.is_set():
            self._work.wait(_SYNC_S)
            self._work.clear()
            self._tidy()

    def _tidy(self) -> None:
        """Sync the segment and the folder, close retired segments, remove old ones."""
        begun = False
        try:
            if self._dirty:
                self._dirty = False  # clear it first: later writes are synced next time
                if self._sync == "interval" and (fd := self._fd) >= 0:
                    os.fsync(fd)
            while self._retired:
                fd = self._retired.popleft()
                try:
                    if self._sync != "never":
                        os.fsync(fd)
                finally:
                    os.close(fd)
            if self._begun:
                self._begun, begun = False, True
                if self._sync != "never" and self._folder_fd >= 0:
                    os.fsync(self._folder_fd)
        except OSError as error:
            self._sync_error = error
            return
        if begun and self._keep:
            with contextlib.suppress(OSError, JournalError):
                for old in survey(self._folder)[0][: -self._keep]:
                    if number(old) < self._number:  # a copy under another number stays
                        old.unlink()


def _same(path: Path, fd: int) -> bool:
    """Return whether the file at ``path`` is the open one."""
    try:
        return os.path.samestat(path.stat(), os.fstat(fd))
    except OSError:
        return False
