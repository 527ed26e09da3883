"""The append-only log of a recorder, beside its NWB file.

Each record is passed to the operating system before the next message is read, so that it survives
the death of the process; once a second the file is synced, so that it survives that of the machine.
A truncated record at the end is removed when the file is opened again. What cannot be written, on a
full disk for example, is kept in memory and tried again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from ilqr_vae.errors import RecordingError
from ilqr_vae.files import FRAME, MIB, frame_at, framed

MAGIC = b"ilqr-record-1\n\n"
_MAX_RECORD = 64 * MIB
_SYNC_S = 1.0


class RecordedService(msgspec.Struct, frozen=True, tag="service", array_like=True):
    """Identifies the service of the following records.

    Attributes:
        endpoint, session: address of the service, and name of the session.
        at_ns, clock_ns: time in ns of the Unix epoch, and of the service's clock.
        manifests: manifests of its models by id.
        path: NWB file of the following run.
    """

    endpoint: str
    session: str
    at_ns: int
    clock_ns: int
    manifests: dict[str, Any]
    path: str


class Heard(msgspec.Struct, frozen=True, tag="heard", array_like=True):
    """A message, as it was published."""

    frame: bytes


Record = RecordedService | Heard
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Record)


class RecordLog:
    """Appends records to a file, and reads existing ones.

    Args:
        path: file, created if it does not exist.

    Attributes:
        failure: why the newest records are not written yet; "" if they are.

    Raises:
        RecordingError: the file could not be created, or another recorder writes it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise self._wrong(error) from error
        with suppress(ModuleNotFoundError):  # Windows has no such locks
            self._lock()
        self._pending, self.failure = bytearray(), ""
        self._dirty, self._synced = False, time.monotonic()

    def _lock(self) -> None:
        import fcntl

        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._fd)
            expected = "a file that no other recorder writes"
            raise RecordingError(str(self.path), expected=expected, got="one in use") from error
        except OSError:  # a file system without locks
            pass

    def _wrong(self, error: OSError) -> RecordingError:
        expected = "a file that can be written"
        return RecordingError(str(self.path), expected=expected, got=str(error.strerror))

    def read(self) -> Iterator[Record]:
        """Read the records of an earlier recorder; remove an incomplete one at the end.

        Raises:
            RecordingError: the file is not a log, or could not be read.
        """
        try:
            data = self.path.read_bytes()
            if MAGIC.startswith(data):
                os.ftruncate(self._fd, 0)
                os.write(self._fd, MAGIC)
                return
            if not data.startswith(MAGIC):
                expected = "a file that a recorder wrote"
                raise RecordingError(str(self.path), expected=expected, got="another")
            at = len(MAGIC)
            while (payload := frame_at(data, at, _MAX_RECORD)) is not None:
                yield _decoder.decode(payload)
                at += FRAME.size + len(payload)
            os.ftruncate(self._fd, at)
        except OSError as error:
            raise self._wrong(error) from error
        except msgspec.MsgspecError as error:
            expected = "records of this version"
            raise RecordingError(str(self.path), expected=expected, got=str(error)) from error

    def add(self, record: Record) -> None:
        """Append a record."""
        self._pending += framed(_encoder.encode(record))
        self._write()

    def _write(self) -> None:
        try:
            while self._pending:
                del self._pending[: os.write(self._fd, self._pending)]
                self._dirty, self.failure = True, ""
        except OSError as error:
            self.failure = str(error.strerror)

    def sync(self) -> None:
        """Write what is left, and sync the file, at most once a second. Raises RecordingError."""
        self._write()
        now = time.monotonic()
        if self._dirty and now - self._synced >= _SYNC_S:
            self._dirty, self._synced = False, now
            try:
                os.fsync(self._fd)
            except OSError as error:
                raise self._wrong(error) from error

    def begin_again(self) -> None:
        """Remove all records. Raises RecordingError."""
        try:
            self._pending.clear()
            os.ftruncate(self._fd, len(MAGIC))
        except OSError as error:
            raise self._wrong(error) from error

    def close(self, *, remove: bool) -> None:
        """Close the file; ``remove`` it if all its records are in NWB files."""
        os.close(self._fd)
        if remove:
            self.path.unlink(missing_ok=True)
