"""The records of the journal, each framed by its length and a checksum.

A segment is a file ``00000001.journal``: ``MAGIC``, then frames of a little-endian uint32 length,
the uint32 CRC-32 of the record, and a MessagePack record. A truncated frame ends the segment. A
frame with a wrong checksum is skipped if a valid one follows it, and so is a damaged ``MAGIC``. A
file without a valid frame is empty.
"""

from __future__ import annotations

import itertools
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from ilqr_service.solving.run import PackedRun, PackedWork
from ilqr_vae.errors import JournalError, spanned
from ilqr_vae.files import FRAME, frame_at, framed
from ilqr_vae.protocol import messages

MAGIC = b"ilqr-journal-1\n\n"
SUFFIX = ".journal"
MAX_RECORD = 1 << 28
_ANY_VERSION = b"ilqr-journal-"
_NAME = re.compile(r"\d{1,18}\.journal")


class Record(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", array_like=True):
    """Base of the tagged records.

    The tags are those of the first version, so that its files stay readable.
    """


class Header(Record, frozen=True, kw_only=True, tag="header"):
    """Begins every segment.

    Attributes:
        boot: identifies the process that wrote it.
        at_ns, clock_ns: time in nanoseconds of the Unix epoch, and of the service's clock.
        next_run: first unused run number.
        lost: number of records that could not be written so far.
        versions: versions of the computing packages.
        settings: settings of the service.
        manifests: manifests of the models by id.
        segment, previous: number of this segment and of the previous one; 0 if not stated.
    """

    boot: str
    at_ns: int
    clock_ns: int
    next_run: int
    lost: int
    versions: dict[str, str]
    settings: dict[str, Any]
    manifests: dict[str, Any]
    segment: int = 0
    previous: int = 0


class RunOpened(Record, frozen=True, kw_only=True, tag="began"):
    """A run began, or (``again``) was open when the segment began.

    Attributes:
        request: the message that opened it.
        next_index, base, serial, missing: if ``again``, its state before the works that follow.
        revision: if ``again``, the highest revision of an answer so far.
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
    revision: int = 0


class Queued(Record, frozen=True, kw_only=True, tag="worked"):
    """A work was queued: a bin, a missing bin, or a change of model; records are in order."""

    work: PackedWork


class Fed(Record, frozen=True, kw_only=True, tag="fed"):
    """A batch of spikes was taken; the bins that it closed or changed are queued before it."""

    run: int
    batch: messages.Spikes


class Happened(Record, frozen=True, kw_only=True, tag="happened"):
    """An event of the experiment was published."""

    run: int
    event: messages.Event


class Answered(Record, frozen=True, kw_only=True, tag="answered"):
    """``frame`` (a ``messages.Result``) answers the work ``serial``; ``settles`` if finally."""

    run: int
    serial: int
    settles: bool
    index: int
    revision: int
    frame: bytes


class Snapshot(Record, frozen=True, kw_only=True, tag="kept"):
    """The state of a run."""

    packed: PackedRun


class RunClosed(Record, frozen=True, kw_only=True, tag="ended"):
    """A run ended, with the reason."""

    run: int
    what: str


class Controlled(Record, frozen=True, kw_only=True, tag="controlled"):
    """A control message was accepted."""

    at_ns: int
    user: str
    frame: bytes


class Deployed(Record, frozen=True, kw_only=True, tag="served"):
    """A model is served from now on."""

    slot: str
    model: str
    manifest: dict[str, Any]


class Checkpoint(Record, frozen=True, kw_only=True, tag="checkpoint"):
    """The records before this one suffice to continue from this segment."""

    runs: int


AnyRecord = (
    Header
    | RunOpened
    | Queued
    | Fed
    | Happened
    | Answered
    | Snapshot
    | RunClosed
    | Controlled
    | Deployed
    | Checkpoint
)

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(AnyRecord)
# first bytes of a record: an array, then its tag
_RECORD = re.compile(
    rb"[\x90-\x9f](\xa6(header|worked|served)|\xa5(began|ended)|\xa8answered|\xa4kept"
    rb"|\xaacontrolled|\xaacheckpoint|\xa3fed|\xa8happened)"
)


def frame(record: Record) -> bytes:
    """Return a record as bytes of the file."""
    return framed(_encoder.encode(record))


def records(path: Path, damage: list[str] | None = None) -> Iterator[AnyRecord]:
    """Yield the valid records of a segment, in order.

    Args:
        damage: receives a line for each unreadable range.

    Raises:
        JournalError: the file could not be read, or is of another version.
    """
    try:
        data = path.read_bytes()
    except (OSError, MemoryError) as error:
        got = f"{path.name} ({error or 'too large'})"
        raise JournalError("journal", expected="a readable file", got=got) from error
    if MAGIC.startswith(data):
        return  # truncated while it was created
    at = len(MAGIC) if data.startswith(MAGIC) else 0
    if not at and data.startswith(_ANY_VERSION):
        raise JournalError("journal", expected="a journal of this version", got=path.name)
    while at < len(data):
        payload = frame_at(data, at, MAX_RECORD)
        if payload is None:
            starts = (match.start() - FRAME.size for match in _RECORD.finditer(data, at + 1))
            good = next(
                (k for k in starts if k > at and frame_at(data, k, MAX_RECORD) is not None), None
            )
            where = f"bytes {at} to {len(data) if good is None else good}"
            if damage is not None:
                what = "cut short" if good is None else "damaged"
                damage.append(f"{path.name}: {where} are {what} and skipped")
            if good is None:
                return
            at = good
            continue
        try:
            yield _decoder.decode(payload)
        except msgspec.MsgspecError as error:
            raise JournalError(
                f"journal {path.name}", expected="records of this version", got=str(error)
            ) from error
        at += FRAME.size + len(payload)


def number(path: Path) -> int:
    """Return the number of a segment by its name."""
    return int(path.name.removesuffix(SUFFIX))


def survey(folder: Path) -> tuple[list[Path], list[str]]:
    """Return a journal's segments, oldest first, and a line for each irregularity of its files.

    Segments are ordered by the number in their header. Other files are ignored: with another name,
    a folder, a link, an unreadable file, a copy of another segment.

    Raises:
        JournalError: no such folder, or one that cannot be read.
    """
    try:
        names = sorted(path for path in folder.iterdir() if path.name.endswith(SUFFIX))
    except (OSError, ValueError) as error:
        raise JournalError("journal", expected="a folder", got=str(folder)) from error
    found: dict[int, Path] = {}
    previous: dict[int, int] = {}
    odd: list[str] = []
    for path in sorted(names, key=lambda path: (len(path.name), path.name)):
        if not _NAME.fullmatch(path.name):
            odd.append(f"{path.name} is not used: its name is not NUMBER{SUFFIX}")
            continue
        try:
            if not stat.S_ISREG(path.lstat().st_mode):
                odd.append(f"{path.name} is not used: it is no regular file")
                continue
            stated, before = _stated(path)
        except OSError as error:
            odd.append(f"{path.name} is not used: {error.strerror}")
            continue
        if stated in found and stated != number(path):
            odd.append(f"{path.name} is not used: it is a copy of {found[stated].name}")
            continue
        if stated in found:  # the copy was listed first
            odd.append(f"{found[stated].name} is not used: it is a copy of {path.name}")
        elif stated != number(path):
            odd.append(f"{path.name} is segment {stated} by its header")
        found[stated], previous[stated] = path, before
    order = sorted(found)
    for before, after in itertools.pairwise(order):
        if previous[after] > before:
            lost = spanned("segment", before + 1, previous[after])
            are = "is" if previous[after] == before + 1 else "are"
            odd.append(f"{lost} {are} missing and skipped")
    empty = [found[k].name for k in order[:-1] if found[k].stat().st_size <= len(MAGIC)]
    odd += [f"{name} is empty and skipped" for name in empty]
    return [found[k] for k in order], odd


def _stated(path: Path) -> tuple[int, int]:
    """Return the numbers of a segment and of the previous one by its header, else by its name.

    Raises OSError.
    """
    with path.open("rb") as file:
        start = file.read(len(MAGIC) + FRAME.size)
        if len(start) == len(MAGIC) + FRAME.size and start.startswith(MAGIC):
            length, _ = FRAME.unpack_from(start, len(MAGIC))
            payload = frame_at(start[len(MAGIC) :] + file.read(min(length, 1 << 24)), 0, MAX_RECORD)
            try:
                record = None if payload is None else _decoder.decode(payload)
            except msgspec.MsgspecError:
                record = None
            if isinstance(record, Header) and record.segment:
                return record.segment, record.previous
    return number(path), number(path) - 1


def segments(folder: Path) -> list[Path]:
    """Return a journal's segments, oldest first. Raises JournalError if there is no such folder."""
    return survey(folder)[0]
