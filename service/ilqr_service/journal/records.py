"""What the journal holds: typed records, each framed by its length and a checksum.

A segment is a file: ``MAGIC``, then frames of a little-endian uint32 length, the uint32 CRC-32 of
what follows, and a MessagePack record. A frame that is cut short or does not match its checksum
ends the segment: what lies before it is good.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from ilqr_service.solving.run import PackedRun, PackedWork
from ilqr_vae.errors import JournalError
from ilqr_vae.protocol import messages

MAGIC = b"ilqr-journal-1\n\n"
SUFFIX = ".journal"
MAX_RECORD = 1 << 28
_HEAD = struct.Struct("<II")


class Record(
    msgspec.Struct, frozen=True, kw_only=True, tag=str.lower, tag_field="type", array_like=True
):
    """Base: a tagged record."""


class Header(Record, frozen=True, kw_only=True):
    """Begins every segment.

    Attributes:
        boot: names the process that wrote it.
        at_ns, clock_ns: nanoseconds of the Unix epoch, and of the service's clock then.
        next_run: the first run number not yet used.
        lost: records lost so far because they could not be written.
        versions: of what computes.
        settings: of the service.
        manifests: of the models, by id.
    """

    boot: str
    at_ns: int
    clock_ns: int
    next_run: int
    lost: int
    versions: dict[str, str]
    settings: dict[str, Any]
    manifests: dict[str, Any]


class Began(Record, frozen=True, kw_only=True):
    """A run began, or (``again``) was alive when the segment began.

    Attributes:
        request: what it was opened with.
        bins: answered so far, where ``again``.
        next_index, base, serial, missing, revisions: where it stands, where ``again``, before the
            works that follow.
    """

    run: int
    slot: str
    model: str
    user: str
    request: messages.Open
    again: bool = False
    next_index: int = 0
    base: int = 0
    serial: int = 0
    missing: tuple[int, ...] = ()


class Worked(Record, frozen=True, kw_only=True):
    """A bin was accepted, found missing, or a model is to be swapped, in this order."""

    work: PackedWork


class Answered(Record, frozen=True, kw_only=True):
    """``frame`` (a ``messages.Result``) answers for the work ``serial``; ``settles`` its last."""

    run: int
    serial: int
    settles: bool
    index: int
    revision: int
    frame: bytes


class Kept(Record, frozen=True, kw_only=True):
    """A snapshot of a run."""

    packed: PackedRun


class Ended(Record, frozen=True, kw_only=True):
    run: int
    what: str


class Controlled(Record, frozen=True, kw_only=True):
    """A control message was accepted."""

    at_ns: int
    user: str
    frame: bytes


class Served(Record, frozen=True, kw_only=True):
    """A model is served from here on."""

    slot: str
    model: str
    manifest: dict[str, Any]


class Checkpoint(Record, frozen=True, kw_only=True):
    """What is needed to go on from this segment alone lies before this record."""

    runs: int


AnyRecord = Header | Began | Worked | Answered | Kept | Ended | Controlled | Served | Checkpoint

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(AnyRecord)


def frame(record: Record) -> bytes:
    """A record as it is written."""
    payload = _encoder.encode(record)
    return _HEAD.pack(len(payload), zlib.crc32(payload)) + payload


def records(path: Path) -> Iterator[AnyRecord]:
    """The good records of a segment, in order.

    Raises:
        JournalError: the file cannot be read, or is no segment of this version.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise JournalError("journal", expected="a readable file", got=str(error)) from error
    if data[: len(MAGIC)] != MAGIC:
        if MAGIC.startswith(data):
            return  # torn while it was being made
        raise JournalError("journal", expected="a journal of this version", got=path.name)
    at = len(MAGIC)
    while at + _HEAD.size <= len(data):
        length, check = _HEAD.unpack_from(data, at)
        end = at + _HEAD.size + length
        if length > MAX_RECORD or end > len(data):
            return
        payload = data[at + _HEAD.size : end]
        if zlib.crc32(payload) != check:
            return
        try:
            yield _decoder.decode(payload)
        except msgspec.MsgspecError as error:
            raise JournalError(
                f"journal {path.name}", expected="records of this version", got=str(error)
            ) from error
        at = end


def segments(folder: Path) -> list[Path]:
    """A journal's segments, oldest first. Raises JournalError: no such folder."""
    if not folder.is_dir():
        raise JournalError("journal", expected="a folder", got=str(folder))
    return sorted(folder.glob(f"*{SUFFIX}"))


def number(path: Path) -> int:
    """A segment's number."""
    return int(path.name.removesuffix(SUFFIX))
