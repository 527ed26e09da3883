"""Plausibility of the index and source time of a bin.

A glitch of a feeder's counter or clock should cost only one bin, and a real jump none. So a bin
that jumps is held back. If the next bin continues from the held bin, both are accepted; if it
continues from the bins before, the held bin is refused. If no other bin comes, the held bin is
refused after ``patience_ns``, unless too few bins came before to contradict it.

An index jumps if it skips more than ``reach`` bins in less than half the duration of these bins. A
source time jumps if it decreases while the index increases, or if it increases by more than a
second and by twice as much as the arrival times or the indices do. A bin whose transit took at
least as long as that of earlier bins does not jump: then the bin before it was delayed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ilqr_service.work import Vector
from ilqr_vae.errors import ProtocolError
from ilqr_vae.protocol import messages

_SLACK_NS = 1_000_000_000
_SHORTEST_PATIENCE_NS = 250_000_000
# The shortest delay may drift by one part in this many of the elapsed time, as two clocks do.
_DRIFT = 1000


@dataclass(frozen=True, slots=True)
class Arrival:
    """A bin, or a batch of spikes, whose contents have passed the checks.

    Attributes:
        message: the message.
        received_ns: arrival, by the service's clock.
        counts, mask: (N,); mask is None if all units were observed. A batch has no counts.
    """

    message: messages.Bin | messages.Spikes
    received_ns: int
    counts: Vector | None = None
    mask: NDArray[np.bool_] | None = None

    @property
    def index(self) -> int:
        return self.message.index

    @property
    def delay_ns(self) -> int:
        """Time from the source to the arrival, on two clocks."""
        return self.received_ns - self.message.source_ns


class Decision(NamedTuple):
    """Bins to accept now, in order of their indices, and a bin to refuse and why.

    ``step_ns``: the feeder's clock was set by this much before these bins.
    """

    accepted: list[Arrival]
    refused: tuple[Arrival, ProtocolError] | None = None
    step_ns: int = 0


class Arrivals:
    """The recent bins of a feeder, with which new ones are compared.

    Args:
        width_ns: the bin width.

    Attributes:
        reach: number of bins that an index may skip.
        held: the bin that is held back, if any.
    """

    def __init__(self, width_ns: int) -> None:
        self.reach = 0
        self.held: Arrival | None = None
        self._width = width_ns
        self._patience = max(4 * width_ns, _SHORTEST_PATIENCE_NS)
        self._newest: Arrival | None = None
        self._shortest_delay_ns = 0
        self._sure = False

    def restart(self) -> None:
        """Forget all bins: another feeder may have another clock."""
        self._newest, self._sure = None, False

    def sort(self, arrival: Arrival, next_index: int) -> Decision:
        """Add a bin; decide about it and about the held one."""
        held, self.held = self.held, None
        if self._jump(arrival, next_index) is not None:
            if held is not None and self._follows(held, arrival):
                accepted = sorted((held, arrival), key=lambda a: a.index)
                step_ns = self._step_ns(accepted[0])
                self._newest, self._sure = None, True  # it may be another clock
                self._accept(accepted[-1])
                return Decision(accepted, step_ns=step_ns)
            self.held = arrival
            return Decision([], self._refused(held, next_index))
        self._sure = self._newest is not None
        self._accept(arrival)
        return Decision([arrival], self._refused(held, next_index))

    def expired(self, now_ns: int) -> bool:
        """Return whether a held bin has waited long enough."""
        return self.held is not None and now_ns - self.held.received_ns >= self._patience

    def settle(self, next_index: int) -> Decision:
        """Decide about the held bin, without another one."""
        held, self.held = self.held, None
        if held is None or self._sure:
            return Decision([], self._refused(held, next_index))
        self._newest = None
        self._accept(held)
        return Decision([held])

    def _accept(self, arrival: Arrival) -> None:
        newest, delay_ns = self._newest, arrival.delay_ns
        if newest is None:
            self._newest, self._shortest_delay_ns = arrival, delay_ns
        elif arrival.index > newest.index:
            passed = max(0, arrival.received_ns - newest.received_ns)
            shortest = self._shortest_delay_ns + passed // _DRIFT
            self._newest, self._shortest_delay_ns = arrival, min(shortest, delay_ns)

    def _refused(
        self, held: Arrival | None, next_index: int
    ) -> tuple[Arrival, ProtocolError] | None:
        if held is None:
            return None
        alone = ProtocolError("index", expected="a bin that others follow", got=str(held.index))
        return held, self._jump(held, next_index) or alone

    def _jump(self, arrival: Arrival, next_index: int) -> ProtocolError | None:
        """Return what is implausible about a bin, if anything."""
        newest, index = self._newest, arrival.index
        passed = 0 if newest is None else arrival.received_ns - newest.received_ns
        skipped = index - next_index
        if skipped > self.reach and 2 * passed < skipped * self._width:
            return ProtocolError(
                "index",
                expected=f"at most {next_index + self.reach}, or a later bin that follows it",
                got=str(index),
            )
        if newest is None or self._in_time(newest, arrival):
            return None
        at_ns, source_ns = newest.message.source_ns, arrival.message.source_ns
        delayed = arrival.delay_ns >= self._shortest_delay_ns - _SLACK_NS
        if index > newest.index and source_ns >= at_ns and delayed:
            return None
        if index > newest.index:
            order = "at least" if source_ns < at_ns else "soon after"
        else:
            order = "at most" if source_ns > at_ns else "soon before"
        return ProtocolError(
            "source_ns",
            expected=f"{order} bin {newest.index}'s {at_ns}",
            got=f"{source_ns} of bin {index}",
        )

    def _step_ns(self, arrival: Arrival) -> int:
        newest = self._newest
        if newest is None or self._in_time(newest, arrival):
            return 0
        gained = arrival.message.source_ns - newest.message.source_ns
        return gained - (arrival.received_ns - newest.received_ns)

    def _follows(self, held: Arrival, arrival: Arrival) -> bool:
        near = 0 < abs(arrival.index - held.index) <= self.reach + 1
        return near and self._in_time(held, arrival)

    def _in_time(self, one: Arrival, other: Arrival) -> bool:
        """Return whether the source times of two bins match their order and distance."""
        gained = other.message.source_ns - one.message.source_ns
        apart = abs(other.index - one.index)
        passed = max(abs(other.received_ns - one.received_ns), apart * self._width)
        if other.index < one.index:
            gained = -gained
        return 0 <= gained <= _SLACK_NS + 2 * passed
