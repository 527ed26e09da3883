"""What a load sends, and when: everything is fixed beforehand.

Faults are drawn from a seed: bins left out, sent twice, sent out of order, sent with jitter, and a
stall after which everything held back is sent at once.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """What goes wrong on the way.

    Attributes:
        drop, duplicate: share of bins.
        reorder: bins may be sent up to so many places late.
        jitter: bin widths that a send may be late by, uniformly.
        stall: seconds, half-way, in which nothing is sent; then all of it at once.
        seed: of everything drawn.
    """

    drop: float = 0.0
    duplicate: float = 0.0
    reorder: int = 0
    jitter: float = 0.0
    stall: float = 0.0
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How much.

    Attributes:
        sessions: at once.
        bins: of each session.
        speed: multiple of real time.
        deadline: seconds from arrival to answer; 0 is the bin width.
        clocked, anytime: of the sessions; see ``wire.Open``.
        rate: mean spikes per unit and bin.
        patience: seconds to wait for the last answers.
    """

    sessions: int = 1
    bins: int = 200
    speed: float = 1.0
    deadline: float = 0.0
    clocked: bool = False
    anytime: bool = False
    rate: float = 1.0
    patience: float = 5.0


def source_offset(load: Load, session: int, index: int, bin_width: float) -> int:
    """When a bin is complete, whatever happens on the way; nanoseconds from the start."""
    width = bin_width / load.speed * 1e9
    return int(width * session / load.sessions + width * (index + 1))


def schedule(load: Load, faults: Faults, bin_width: float) -> list[tuple[int, int, int]]:
    """All sends as (nanoseconds from the start, session, index), in order of time."""
    rng = np.random.default_rng(faults.seed)
    width = bin_width / load.speed * 1e9
    sends: list[tuple[int, int, int]] = []
    for session in range(load.sessions):
        offset = width * session / load.sessions  # sessions are not in step
        for index in range(load.bins):
            draws = rng.random(4)
            at = offset + width * (index + 1)
            if faults.reorder and draws[2] < 0.3:
                at += width * (rng.integers(1, faults.reorder + 1) + 0.5)
            at += width * faults.jitter * draws[3]
            if draws[0] < faults.drop and index < load.bins - 1:
                continue
            sends.append((int(at), session, index))
            if draws[1] < faults.duplicate:
                sends.append((int(at + width * rng.random()), session, index))
    if faults.stall:
        begin = width * load.bins / 2
        end = begin + faults.stall * 1e9
        sends = [(int(end) if begin <= at < end else at, s, i) for at, s, i in sends]
    heapq.heapify(sends)
    return [heapq.heappop(sends) for _ in range(len(sends))]


def counts_of(load: Load, faults: Faults, session: int, n_units: int) -> NDArray[np.int64]:
    """The bins (T, N) that a session is fed."""
    rng = np.random.default_rng([faults.seed, session])
    return rng.poisson(load.rate, (load.bins, n_units))
