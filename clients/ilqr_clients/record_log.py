"""What a recorder has heard, in an append-only file beside its NWB file.

Each record is with the operating system before the next message is taken, so that it survives the
end of the process; once a second the file is synced, so that it survives that of the machine. A
record that was cut short ends the file and is removed when it is opened again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from ilqr_vae.errors import RecordingError
from ilqr_vae.files import FRAME, MIB, frame_at, framed

MAGIC = b"ilqr-record-1\n\n"
_MAX_RECORD = 64 * MIB
_SYNC_S = 1.0


class RecordedService(msgspec.Struct, frozen=True, tag="service", array_like=True):
    """The service that follows.

    Attributes:
        endpoint, session: what was recorded, and where.
        at_ns, clock_ns: ns of the Unix epoch, and of the service's clock then.
        manifests: of its models, by id.
        path: the NWB file of the run that follows.
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
    """Appends records to a file, and reads those that it has.

    Args:
        path: it is made if it does not exist.

    Raises:
        RecordingError: it cannot be written, or is another file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise self._wrong(error) from error
        self._dirty, self._synced = False, time.monotonic()

    def _wrong(self, error: OSError) -> RecordingError:
        expected = "a file that can be written"
        return RecordingError(str(self.path), expected=expected, got=str(error.strerror))

    def read(self) -> Iterator[Record]:
        """The records of an earlier recorder; what it did not write to the end is removed.

        Raises:
            RecordingError: another file, or it cannot be read.
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
        """Append a record. Raises RecordingError: it cannot be written."""
        view = memoryview(framed(_encoder.encode(record)))
        try:
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError as error:
            raise self._wrong(error) from error
        self._dirty = True

    def sync(self) -> None:
        """Bring to the disk what was added, at most once a second. Raises RecordingError."""
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
            os.ftruncate(self._fd, len(MAGIC))
        except OSError as error:
            raise self._wrong(error) from error

    def close(self, *, remove: bool) -> None:
        """Close the file; ``remove`` it if all that it has is in NWB files."""
        os.close(self._fd)
        if remove:
            self.path.unlink(missing_ok=True)
