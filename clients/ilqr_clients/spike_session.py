"""A stream of spikes, and the answers to the bins that the service makes of them."""

from __future__ import annotations

import time
from collections import deque
from typing import SupportsIndex

from numpy.typing import ArrayLike

from ilqr_clients.exact import sized, whole
from ilqr_clients.outstanding import REMEMBERED
from ilqr_clients.session import Session
from ilqr_vae.protocol import messages


class SpikeSession(Session):
    """A session that is fed with spikes, created by ``ServiceClient.open_spikes``.

    After a broken connection or a restart of the service, bins that it does not have are sent again
    as their original batches of spikes.
    """

    _sent: deque[tuple[int, bytes]]
    _again: set[int]
    _next_batch: int
    _next_bin: int

    @property
    def origin_ns(self) -> int:
        """Start of bin 0, by the feeder's clock."""
        assert self.request.origin_ns is not None
        return self.request.origin_ns

    def end_ns(self, index: int) -> int:
        """Return the end of a bin, by the feeder's clock."""
        return self.origin_ns + (index + 1) * self.request.bin_width_ns

    def _open(self) -> None:
        self._sent, self._again = deque(maxlen=REMEMBERED), set()
        self._next_batch = self._next_bin = 0
        super()._open()
        self._next_batch = self.opened.next_batch or 0
        self._next_bin = self.opened.next_index

    def send_spikes(
        self,
        times_ns: ArrayLike,
        units: ArrayLike,
        *,
        until_ns: SupportsIndex | None = None,
        source_ns: SupportsIndex | None = None,
        batch: SupportsIndex | None = None,
    ) -> int:
        """Send the spikes since the last call, possibly none, without blocking.

        Args:
            times_ns: (S,) integer nanoseconds of this client's clock, in any order.
            units: (S,) position of each spike's unit in the session's units.
            until_ns: no further spike before this time will be sent: bins that end by then are
                closed. Default: ``source_ns`` minus the grace.
            source_ns: current time of the clock of the spikes; default: this client's clock. It
                must not decrease, and no spike may be later.
            batch: number of a batch that was skipped and is now available; ``source_ns`` is then
                between those of its neighbours.

        Returns:
            The first bin that is not closed.

        Raises:
            ShapeError: there is not one time for each unit, or a value is not an integer, or a unit
                is negative.
            SessionEndedError, ServiceUnreachableError, AnswerTimeoutError: as ``send``.
        """
        times = sized("times_ns", times_ns, "<i8", "whole nanoseconds")
        which = sized("units", units, "<u4", "whole numbers, at least 0", len(times))
        self._take(0.0)
        self._report(sending=True)
        now = self.timer.now_ns()
        source = now if source_ns is None else whole("source_ns", source_ns, -(2**63))
        message = messages.Spikes(
            session=self.request.session,
            epoch=self.request.epoch,
            index=self._next_batch if batch is None else whole("batch", batch),
            source_ns=source,
            times_ns=messages.pack(times, "<i8"),
            units=messages.pack(which, "<u4"),
            until_ns=None if until_ns is None else whole("until_ns", until_ns, -(2**63)),
            clock=self.clock.stated(now),
            token=self.request.token,
        )
        if (probe := self.clock.probe(now)) is not None:
            self.send_raw(messages.encode(probe))
        frame = messages.encode(message)
        self.send_raw(frame)
        self._sent.append((message.index, frame))
        self._next_batch = max(self._next_batch, message.index + 1)
        width = self.request.bin_width_ns
        grace = self.request.grace_ns or width // 2
        until = source - grace if message.until_ns is None else message.until_ns
        closed = range(self._next_bin, max(self._next_bin, (until - self.origin_ns) // width))
        for index in closed[-REMEMBERED:]:
            self._outstanding.sent(index, b"", time.monotonic())
        self.credits -= len(closed)
        self._next_bin = closed.stop
        return closed.stop

    def skip_batch(self) -> int:
        """Mark spikes since the last batch as lost: bins up to the next batch are missing.

        Returns:
            The number of the skipped batch.
        """
        self._next_batch += 1
        return self._next_batch - 1

    def _resend(self, opened: messages.Opened, frames: list[bytes]) -> None:
        for index, frame in self._sent:
            if index >= (opened.next_batch or 0):
                self.send_raw(frame)

    def _reply(self, reply: messages.Downstream | None) -> None:
        if isinstance(reply, messages.Refused) and reply.index >= 0:
            if reply.field == "index":
                return  # it was sent twice
            if reply.field == "credits":
                self._again.add(reply.index)
                return
        super()._reply(reply)
        if isinstance(reply, messages.Credit) and self._again:
            for index, frame in self._sent:
                if index in self._again:
                    self.send_raw(frame)
            self._again.clear()
