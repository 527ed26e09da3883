"""One run of a session, what the service grants it, and what a step of the table asks for."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from ilqr_service.work import Work
from ilqr_vae import wire


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the service grants.

    Attributes:
        credits: bins a feeder may have unanswered.
        gap_limit: longest gap answered bin by bin.
        max_sessions: open at once.
        deadline_ns: for a session that asks for 0.
        idle_ns: a session silent for longer ends.
    """

    credits: int = 64
    gap_limit: int = 100
    max_sessions: int = 256
    deadline_ns: int
    idle_ns: int = 600_000_000_000


@dataclass(slots=True)
class Effects:
    """What a caller has to do now, in this order.

    Attributes:
        forget: runs whose queue and estimator state are to be dropped.
        work: bins to solve.
        published: results and notices for subscribers.
        replies: messages by feeder.
        events: what to count; ``refused:REASON`` for refusals.
    """

    forget: list[int] = field(default_factory=list[int])
    work: list[Work] = field(default_factory=list[Work])
    published: list[wire.Result | wire.Notice] = field(
        default_factory=list["wire.Result | wire.Notice"]
    )
    replies: list[tuple[bytes, wire.Message]] = field(
        default_factory=list[tuple[bytes, wire.Message]]
    )
    events: Counter[str] = field(default_factory=Counter[str])


class Recent:
    """The newest durations, for quantiles. Holds ``size`` int64 values."""

    def __init__(self, size: int = 1024) -> None:
        self._values = np.zeros(size, dtype=np.int64)
        self._count = 0

    def add(self, value: int) -> None:
        self._values[self._count % len(self._values)] = value
        self._count += 1

    def quantiles(self, *qs: float) -> tuple[int, ...]:
        """For each q the smallest held value that at least a share q of them does not exceed; 0
        where nothing was added yet."""
        held = np.sort(self._values[: min(self._count, len(self._values))])
        if held.size == 0:
            return (0,) * len(qs)
        return tuple(int(held[max(0, math.ceil(q * held.size) - 1)]) for q in qs)


@dataclass(slots=True)
class Session:
    """One run of a session."""

    run: int
    name: str
    epoch: int
    owner: bytes
    deadline_ns: int
    anytime: bool
    seen_ns: int
    next_index: int = 0
    newest: int = -1
    started: bool = False
    closing: bool = False
    waiting: int = 0
    unanswered: int = 0
    owed: int = 0
    bins: int = 0
    bits: float = 0.0
    spikes: int = 0
    statuses: Counter[str] = field(default_factory=Counter[str])
    solves: Recent = field(default_factory=Recent)

    def info(self, now_ns: int) -> wire.SessionInfo:
        p50, p99 = self.solves.quantiles(0.5, 0.99)
        return wire.SessionInfo(
            session=self.name,
            epoch=self.epoch,
            bins=self.bins,
            next_index=self.next_index,
            deadline_ns=self.deadline_ns,
            statuses=dict(self.statuses),
            solve_p50_ns=p50,
            solve_p99_ns=p99,
            bits_per_spike=self.bits / self.spikes if self.spikes else 0.0,
            idle_ns=max(0, now_ns - self.seen_ns),
        )

    def notice(self, what: str) -> wire.Notice:
        return wire.Notice(session=self.name, epoch=self.epoch, what=what)

    def credit(self) -> wire.Credit:
        """The credits owed, which this call settles."""
        owed, self.owed = self.owed, 0
        return wire.Credit(session=self.name, epoch=self.epoch, index=self.newest, credits=owed)
