"""Where a new session goes, by free room and by what streams were measured to cost. Pure: no
sockets, no clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_FULL = 0.9
"""Share of a server's cores that sessions may take: a queue grows without bound towards one."""

_PLENTY = 0.25
"""Share of a server's cores that is plenty of room."""


@dataclass(frozen=True, slots=True)
class ServerLoad:
    """What a server does.

    Attributes:
        cores: that it may use.
        busy: cores that it was measured to use.
        sessions: open.
        placed: of these, how many the measurement has not seen.
    """

    cores: float
    busy: float
    sessions: int
    placed: int = 0


def cost(loads: Sequence[ServerLoad]) -> float:
    """Cores that a session takes on average; 0 where none was measured."""
    seen = sum(load.sessions - load.placed for load in loads)
    return sum(load.busy for load in loads) / seen if seen else 0.0


def room(load: ServerLoad, each: float) -> float:
    """Cores that are free on a server where each session takes ``each``."""
    return _FULL * load.cores - load.busy - each * load.placed


def place(loads: Sequence[ServerLoad]) -> int | None:
    """Which server takes one more session; None where all are full.

    Of the servers with plenty of room the one with the fewest sessions a core: what few sessions
    cost is not known well. Where none has plenty, the one with the most room.
    """
    each = cost(loads)
    free = [room(load, each) for load in loads]
    if plenty := [k for k, load in enumerate(loads) if free[k] >= max(each, _PLENTY * load.cores)]:
        return min(plenty, key=lambda k: (loads[k].sessions / loads[k].cores, -free[k]))
    able = [k for k in range(len(loads)) if free[k] >= max(each, 0.0)]
    return max(able, key=lambda k: free[k], default=None)
