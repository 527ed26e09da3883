"""Clocked sessions: due times of the next bins, and what happens when the feeder pauses."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ilqr_service.sessions.effects import Effects
    from ilqr_service.sessions.session import Limits, ServedSession

_ARRIVALS = 64
_FEWEST = 8
_MAX_DRIFT = 0.1
_LATE_IN_A_ROW = 3


class FeederClock:
    """Expected arrival times of a feeder's bins: phase and rate, estimated from arrivals.

    A delayed bin arrives later than expected, and none arrives earlier. The expected times are
    therefore a line below the newest timely arrivals: its slope joins the earliest ones of their
    two halves (at most 10 % from the bin width), and it touches the earliest.

    A feeder that pauses, or is slower than that, falls behind the line. If three consecutive bins
    arrive after they were due, and not in a burst, the line slips: it restarts at the last. It also
    restarts at a bin that is known to follow a pause, and at one that comes early by half a width:
    then the line was late, as it is after a delay that looked like a pause.

    Args:
        width_ns: the bin width.
        grace_ns: time from the expected arrival of a bin until it is due.
    """

    def __init__(self, width_ns: int, grace_ns: int) -> None:
        self._width, self._grace = width_ns, grace_ns
        self.restart()

    def restart(self) -> None:
        """Forget the arrivals so far."""
        self._arrivals: deque[tuple[int, int]] = deque(maxlen=_ARRIVALS)
        self._behind: list[int] = []
        self._slope = 0.0
        self._origin = self._offset = 0

    def due_ns(self, index: int) -> int | None:
        """Return when a bin is to be answered as missing; None before the first arrival."""
        if not self._arrivals:
            return None
        drift = round(self._slope * (index - self._origin))
        return self._offset + drift + index * self._width + self._grace

    def arrived(self, index: int, now_ns: int, *, paused: bool = False) -> int:
        """Add an arrival. Return by how many nanoseconds the line slipped, 0 if it did not.

        ``paused``: no bin has come since this one was due.
        """
        due, offset = self.due_ns(index), now_ns - index * self._width
        slipped = 0
        if due is not None and now_ns > due:
            self._behind.append(offset)
            first, last = self._behind[-_LATE_IN_A_ROW:][0], offset
            few = len(self._behind) < _LATE_IN_A_ROW or 2 * (first - last) >= self._width
            if few and not paused:
                return 0
            slipped = now_ns - (due - self._grace)
            self._arrivals.clear()
        elif due is not None and now_ns < due - self._grace - self._width // 2:
            self._arrivals.clear()
        self._behind.clear()
        self._arrivals.append((index, offset))
        self._fit()
        return slipped

    def _fit(self) -> None:
        arrivals = list(self._arrivals)
        if len(arrivals) >= _FEWEST:
            half = len(arrivals) // 2
            first, last = (min(part, key=_offset) for part in (arrivals[:half], arrivals[half:]))
            if last[0] > first[0]:
                limit = _MAX_DRIFT * self._width
                slope = (last[1] - first[1]) / (last[0] - first[0])
                self._slope = min(limit, max(-limit, slope))
        self._origin = arrivals[-1][0]
        self._offset = min(o - round(self._slope * (i - self._origin)) for i, o in arrivals)


def _offset(arrival: tuple[int, int]) -> int:
    return arrival[1]


def arrived(
    session: ServedSession, index: int, now_ns: int, effects: Effects, again: range = range(0)
) -> None:
    """Update the timetable of a clocked session by a bin.

    ``again``: bins that were answered as missing, and will be answered again.
    """
    if not session.request.clocked:
        return
    slipped_ns = session.clock.arrived(index, now_ns, paused=bool(again))
    if slipped_ns or again:
        session.silent = 0
        effects.events["slipped"] += 1
        late = f" {slipped_ns / 1e6:.0f} ms late," if slipped_ns else ""
        how = "as those before it"
        if again:
            how = f"after a pause; bins {again[0]} to {again[-1]} are answered again"
        effects.published.append(session.notice(f"slipped: bin {index} came{late} {how}"))


def pause(session: ServedSession, index: int) -> range:
    """Return the newest bins of a clocked session that are all missing, if ``index`` is of them.

    Then no bin has come since ``index`` was due: its feeder has paused.
    """
    first = session.next_index
    if session.request.clocked and session.base <= index < first:
        while first > session.base and first - 1 in session.missing:
            first -= 1
    return range(first, session.next_index) if first <= index else range(0)


def rewind(session: ServedSession, index: int) -> range:
    """Go back to before a pause, if ``index`` has left the window; return the bins to repeat."""
    again = range(0) if session.in_window(index) else pause(session, index)
    if again:
        session.missing.difference_update(again)
        session.next_index, session.rewinds = again.start, True
    return again


class TimeTable:
    """When the next bins of clocked sessions are to be answered as missing.

    Args:
        runs: sessions by run, which the session table updates.
        limits: see ``ServedSession.due_ns``.
    """

    def __init__(self, runs: Mapping[int, ServedSession], limits: Limits) -> None:
        self._runs, self._limits = runs, limits
        self._due: list[tuple[int, int]] = []  # a heap of (time, run); most entries are stale

    def note(self, session: ServedSession) -> None:
        """Update a session whose next due time may have changed."""
        if (due := session.due_ns(self._limits)) is not None:
            heapq.heappush(self._due, (due, session.run))

    def next(self) -> int | None:
        """Return the earliest due time in nanoseconds, None if no bin is due."""
        while self._due:
            due, run = self._due[0]
            session = self._runs.get(run)
            if session is not None and session.due_ns(self._limits) == due:
                return due
            heapq.heappop(self._due)  # its bin has arrived since, or the session has ended
        return None
