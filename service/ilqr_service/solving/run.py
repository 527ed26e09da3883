"""The state of a run in the engine, and its snapshot.

A run holds the estimator's state and, for each bin of the window, the bin and the state before it.
So a late bin can be inserted and the window solved again from there, with bit-identical results to
an arrival in order.

While bins are missing, the run also keeps its state before the first of them. So a feeder that
pauses, and then sends its next bin, continues from there, however long the pause was.

A snapshot holds the state before the window and the bins of the window; solving them again restores
the rest. None is taken while bins are missing.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, fields
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from ilqr_service.solving.pool import Pool, Row
from ilqr_service.work import EngineAnswer, Insert, Solve, SwapModel, Work
from ilqr_vae.protocol import messages
from ilqr_vae.streaming.fixed_lag import Later
from ilqr_vae.streaming.state import HorizonState
from ilqr_vae.streaming.unit_watch import UnitWatch


class Entry(msgspec.Struct, frozen=True, gc=False):
    """A bin of the window and the states before it.

    Attributes:
        work: the work as solved: blind if its solve failed, with ``budget`` if it was cut short.
        before: state of the estimator before it.
        watch: state of the unit watch before it; None if units are not watched.
        answer, later: its first answer, and fixed-lag estimates of earlier bins; None without lag.
    """

    work: Solve
    before: Row
    watch: UnitWatch | None
    answer: EngineAnswer | None = None
    later: Later | None = None


@dataclass(slots=True)
class Run:
    """A run: the newest state and up to ``size`` entries, oldest first.

    ``paused``: the first of the newest bins if these are missing, and the run before it.
    """

    size: int
    state: Row
    watch: UnitWatch | None
    serial: int = -1
    entries: deque[Entry] = field(default_factory=deque[Entry])
    paused: tuple[int, Run] | None = None

    def add(self, entry: Entry, state: Row, watch: UnitWatch | None) -> None:
        if not entry.work.missing:
            self.paused = None
        elif self.paused is None:
            before = Run(self.size, self.state, self.watch, self.serial, self.entries.copy())
            self.paused = entry.work.index, before
        self.entries.append(entry)
        if len(self.entries) > self.size:
            self.entries.popleft()
        self.state, self.watch = state, watch

    def before(self, index: int) -> Run | None:
        """Return the run before a bin that is the next one, or the first of the newest missing."""
        if self.paused is not None and self.paused[0] == index:
            return self.paused[1]
        follows = self.entries and self.entries[-1].work.index + 1 == index
        return self if follows else None

    def place(self, index: int) -> int | None:
        """Return the position of the bin ``index``; None if it is not in the window."""
        for k in range(len(self.entries) - 1, -1, -1):
            if self.entries[k].work.index == index:
                return k
        return None


class PackedWork(msgspec.Struct, frozen=True, array_like=True):
    """A ``Work`` in a snapshot: counts as <u4, with features as <f8; mask as u1.

    ``lost``: its record was lost, and a restart replaced it by a missing bin.
    """

    run: int
    serial: int
    index: int
    counts: messages.Array | None
    mask: messages.Array | None
    restart: bool
    late: bool
    anytime: bool
    watch: bool
    source_ns: int
    received_ns: int
    due_ns: int
    budget: int
    swap: str
    model: str
    clock: messages.Offset | None = None
    lost: bool = False
    lag: int = 0
    rewind: bool = False


def pack_work(work: Work) -> PackedWork:
    bin_ = work if isinstance(work, Solve | Insert) else None
    solve = work if isinstance(work, Solve) else None
    counts, mask = (bin_.counts, bin_.mask) if bin_ else (None, None)
    return PackedWork(
        run=work.run,
        serial=work.serial,
        index=work.index,
        counts=None if counts is None else messages.pack(counts, _kept_as(counts)),
        mask=None if mask is None else messages.pack(mask, "u1"),
        restart=solve is not None and solve.restart,
        late=isinstance(work, Insert),
        anytime=solve is not None and solve.anytime,
        watch=work.watch,
        source_ns=bin_.source_ns if bin_ else 0,
        received_ns=work.received_ns,
        due_ns=work.due_ns,
        budget=solve.budget if solve else 0,
        swap=work.to if isinstance(work, SwapModel) else "",
        model=work.model,
        clock=bin_.clock if bin_ else None,
        lag=work.lag,
        rewind=solve is not None and solve.rewind,
    )


def _kept_as(counts: NDArray[np.float64]) -> messages.DType:
    """The dtype that changes no value; features need not be whole."""
    whole = (counts == np.floor(counts)) & (counts >= 0) & (counts < 2**32)
    return "<u4" if bool(whole.all()) else "<f8"


def unpack_work(packed: PackedWork, slot: str = "") -> Work:
    """Unpack a work. Raises ProtocolError if array bytes do not match."""
    queued: dict[str, Any] = {
        name: getattr(packed, name)
        for name in ("run", "index", "serial", "received_ns", "due_ns", "model", "watch", "lag")
    }
    queued["slot"] = slot
    if packed.swap:
        return SwapModel(**queued, to=packed.swap)
    counts, mask = packed.counts, packed.mask
    arrived: dict[str, Any] = {
        "counts": None if counts is None else messages.unpack(counts, "counts").astype(np.float64),
        "mask": None if mask is None else messages.unpack(mask, "mask").astype(bool),
        "source_ns": packed.source_ns,
        "clock": packed.clock,
    }
    if packed.late:
        return Insert(**queued, **arrived)
    how = {name: getattr(packed, name) for name in ("restart", "rewind", "anytime", "budget")}
    return Solve(**queued, **arrived, **how)


class PackedRun(msgspec.Struct, frozen=True, array_like=True):
    """A run in a snapshot.

    Attributes:
        run, model: number of the run, and id of its model.
        serial: serial of the newest work.
        state: arrays of the estimator's state before the first of ``works``; empty if nothing was
            solved yet.
        watch: arrays of the unit watch there; empty if units are not watched.
        works: bins of the window.
    """

    run: int
    model: str
    serial: int
    state: tuple[tuple[str, tuple[int, ...], bytes], ...]
    watch: tuple[tuple[str, tuple[int, ...], bytes], ...]
    works: tuple[PackedWork, ...]


def _raw(array: np.ndarray) -> tuple[str, tuple[int, ...], bytes]:
    array = np.ascontiguousarray(array)
    return array.dtype.str, array.shape, array.tobytes()


def _array(raw: tuple[str, tuple[int, ...], bytes]) -> np.ndarray:
    dtype, shape, data = raw
    return np.frombuffer(data, dtype=np.dtype(dtype)).reshape(shape).copy()


def pack_run(run: int, model: str, held: Run, pool: Pool) -> PackedRun:
    first = held.entries[0] if held.entries else None
    state = pool.get([held.state if first is None else first.before])
    watch = held.watch if first is None else first.watch
    return PackedRun(
        run=run,
        model=model,
        serial=held.serial,
        state=tuple(_raw(getattr(state, f.name).cpu().numpy()) for f in fields(HorizonState)),
        watch=()
        if watch is None
        else tuple(_raw(getattr(watch, f.name)) for f in fields(UnitWatch)),
        works=tuple(pack_work(e.work) for e in held.entries),
    )


def unpack_state(packed: PackedRun, device: torch.device) -> tuple[HorizonState, UnitWatch | None]:
    """Return the state before the first bin of the snapshot."""
    state = HorizonState(*(torch.from_numpy(_array(raw)).to(device) for raw in packed.state))
    watch = UnitWatch(*(_array(raw) for raw in packed.watch)) if packed.watch else None
    return state, watch


@dataclass(frozen=True, slots=True)
class Resumed:
    """A run for the solver to resume.

    Attributes:
        packed: snapshot to start from, or None.
        works: later works, in order.
        answered: serial of the last work whose answers are all in the journal.
    """

    packed: PackedRun | None
    works: list[Work]
    answered: int
