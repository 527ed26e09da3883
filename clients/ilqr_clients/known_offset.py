"""The offset of the service's clock from this client's, updated while bins are sent."""

from __future__ import annotations

from ilqr_vae.protocol import messages
from ilqr_vae.protocol.clock import Clock, ClockOffset, offset_of

_PROBE_NS = 10_000_000_000


class KnownClock:
    """An offset that is measured every ten seconds, since clocks of two machines drift apart.

    Args:
        timer: this client's clock.
        offset: measured beforehand; None if the offset is not known and not to be measured.

    Attributes:
        offset: best current estimate.
        also_ns: uncertainty of this client's own times, if they come from another clock.
    """

    def __init__(self, timer: Clock, offset: ClockOffset | None) -> None:
        self.timer = timer
        self.offset = offset
        self.also_ns = 0
        self._probed_ns = timer.now_ns()

    def stated(self, now_ns: int) -> messages.Offset | None:
        """Return the offset to state with a bin sent at ``now_ns``."""
        clock = self.offset
        return (
            None
            if clock is None
            else messages.Offset(clock.offset_ns, clock.uncertainty_at(now_ns) + self.also_ns)
        )

    def probe(self, now_ns: int) -> messages.Probe | None:
        """Return a probe to send if the newest measurement is old."""
        clock = self.offset
        if clock is None or clock.same or now_ns - self._probed_ns < _PROBE_NS:
            return None
        self._probed_ns = now_ns
        return messages.Probe(client_ns=now_ns)

    def take(self, probed: messages.Probed) -> None:
        """Add the answer to a probe; keep it if it is better by now."""
        now = self.timer.now_ns()
        newer = offset_of([(probed.client_ns, probed.service_ns, now)])
        if self.offset is None or newer.uncertainty_ns < self.offset.uncertainty_at(now):
            self.offset = newer
