"""Placement of new sessions and number of servers, by free room and by the cost of streams.

Pure: no sockets, no clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_FULL = 0.9
"""Share of a server's cores for sessions: queues grow without bound as it approaches one."""

_PLENTY = 0.25
"""Share of free cores above which a server has plenty of room, and below which a fleet grows."""


@dataclass(frozen=True, slots=True)
class ServerLoad:
    """The load of a server.

    Attributes:
        cores: cores that it may use.
        busy: measured use, in cores.
        sessions: number of open sessions.
        placed: number of sessions opened since the measurement.
    """

    cores: float
    busy: float
    sessions: int
    placed: int = 0


BURST_S = 5.0
"""Seconds without room after which sessions are refused; the start of a session takes less."""


@dataclass(slots=True)
class Busy:
    """Since when no server has had room, by a monotonic clock in seconds; None while one has."""

    since: float | None = None

    def lasts(self, loads: Sequence[ServerLoad], now: float) -> bool:
        """Take the loads of all servers. Return whether there has been no room for long."""
        if place(loads) is not None:
            self.since = None
        elif self.since is None:
            self.since = now
        return self.since is not None and now - self.since >= BURST_S


def cost(loads: Sequence[ServerLoad]) -> float:
    """Return the mean cores per session; 0 if none was measured."""
    seen = sum(load.sessions - load.placed for load in loads)
    return sum(load.busy for load in loads) / seen if seen else 0.0


def room(load: ServerLoad, each: float) -> float:
    """Return the free cores of a server if each session takes ``each``."""
    return _FULL * load.cores - load.busy - each * load.placed


def place(loads: Sequence[ServerLoad]) -> int | None:
    """Return the server for one more session; None if all are full.

    Among servers with plenty of room, it is the one with the fewest sessions per core, since the
    cost of few sessions is not well known. If none has plenty, it is the one with the most room.
    """
    each = cost(loads)
    free = [room(load, each) for load in loads]
    if plenty := [k for k, load in enumerate(loads) if free[k] >= max(each, _PLENTY * load.cores)]:
        return min(plenty, key=lambda k: (loads[k].sessions / loads[k].cores, -free[k]))
    able = [k for k in range(len(loads)) if free[k] >= max(each, 0.0)]
    return max(able, key=lambda k: free[k], default=None)


def change(loads: Sequence[ServerLoad], fewest: int, most: int) -> int:
    """How many servers more there should be, between ``fewest`` and ``most`` in all; -1 where one
    could go."""
    if not loads:
        return 0
    each, cores = cost(loads), sum(load.cores for load in loads)
    free = sum(room(load, each) for load in loads) / cores
    if len(loads) < fewest or (len(loads) < most and (free < _PLENTY or place(loads) is None)):
        return 1
    return -1 if len(loads) > fewest and free > 2 * _PLENTY else 0
