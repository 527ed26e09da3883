"""The schedule of a load, which is drawn from a seed before the first send.

Faults: bins that are dropped, duplicated, reordered or delayed by jitter, and a stall after which
all bins held back are sent at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """Faults of the network between feeder and service.

    Attributes:
        drop, duplicate: share of bins that are not sent, or sent twice.
        reorder: a bin may be sent up to this many places late.
        jitter: largest delay of a send in bin widths; delays are uniform.
        stall: seconds without a send, half-way; then all bins held back are sent at once.
        seed: seed of all random draws, including counts and phases of the sessions.
    """

    drop: float = 0.0
    duplicate: float = 0.0
    reorder: int = 0
    jitter: float = 0.0
    stall: float = 0.0
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSize:
    """Size of a load.

    Attributes:
        sessions: number of concurrent sessions.
        bins: bins per session.
        warm_up: number of first bins per session whose latency is not recorded.
        speed: multiple of real time.
        deadline: seconds from arrival to answer; 0 is the bin width.
        clocked, anytime: options of the sessions; see ``messages.Open``.
        rate: mean spikes per unit and bin.
        patience: seconds to wait for the last answers.
    """

    sessions: int = 1
    bins: int = 200
    warm_up: int = 0
    speed: float = 1.0
    deadline: float = 0.0
    clocked: bool = False
    anytime: bool = False
    rate: float = 1.0
    patience: float = 5.0


class Send(NamedTuple):
    """One message: nanoseconds from the start, session number, index of the bin."""

    at_ns: int
    session: int
    bin: int


def completed(load: LoadSize, faults: Faults, bin_width: float) -> NDArray[np.float64]:
    """Return when each bin is complete, (sessions, bins), in nanoseconds from the start.

    Each session has its own phase within a bin; that of the first is zero.
    """
    phases = np.random.default_rng([faults.seed, 0, 1]).random(load.sessions)
    phases[0] = 0.0
    return bin_width / load.speed * 1e9 * (phases[:, None] + np.arange(1, load.bins + 1))


def schedule(load: LoadSize, faults: Faults, bin_width: float) -> list[Send]:
    """Return all sends in order of time."""
    rng = np.random.default_rng(faults.seed)
    width = bin_width / load.speed * 1e9
    sends: list[Send] = []
    for session, times in enumerate(completed(load, faults, bin_width)):
        for index, at in enumerate(times):
            draws = rng.random(4)
            if faults.reorder and draws[2] < 0.3:
                at += width * (rng.integers(1, faults.reorder + 1) + 0.5)
            at += width * faults.jitter * draws[3]
            if draws[0] < faults.drop and index < load.bins - 1:
                continue
            sends.append(Send(int(at), session, index))
            if draws[1] < faults.duplicate:
                sends.append(Send(int(at + width * rng.random()), session, index))
    if faults.stall:
        begin = width * load.bins / 2
        end = begin + faults.stall * 1e9
        sends = [s._replace(at_ns=int(end)) if begin <= s.at_ns < end else s for s in sends]
    return sorted(sends)


def counts_of(load: LoadSize, faults: Faults, session: int, n_units: int) -> NDArray[np.int64]:
    """Draw the counts (T, N) of a session."""
    rng = np.random.default_rng([faults.seed, session])
    return rng.poisson(load.rate, (load.bins, n_units))
