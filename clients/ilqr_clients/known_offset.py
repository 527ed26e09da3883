"""How far the service's clock is from this client's, kept up while bins are sent."""

from __future__ import annotations

from ilqr_vae.protocol import messages
from ilqr_vae.protocol.clock import Clock, ClockOffset, offset_of

_PROBE_NS = 10_000_000_000


class KnownClock:
    """An offset that is probed again every ten seconds: clocks of two machines part.

    Args:
        timer: this client's clock.
        offset: measured beforehand, or None: not known, and not asked for.

    Attributes:
        offset: the best of those measured, at this moment.
        also_ns: how far off this client's times are themselves, where they are of another clock.
    """

    def __init__(self, timer: Clock, offset: ClockOffset | None) -> None:
        self.timer = timer
        self.offset = offset
        self.also_ns = 0
        self._probed_ns = timer.now_ns()

    def stated(self, now_ns: int) -> messages.Offset | None:
        """What is said of it with a bin sent at ``now_ns``."""
        clock = self.offset
        return (
            None
            if clock is None
            else messages.Offset(clock.offset_ns, clock.uncertainty_at(now_ns) + self.also_ns)
        )

    def probe(self, now_ns: int) -> messages.Probe | None:
        """To be sent, where the newest has become old."""
        clock = self.offset
        if clock is None or clock.same or now_ns - self._probed_ns < _PROBE_NS:
            return None
        self._probed_ns = now_ns
        return messages.Probe(client_ns=now_ns)

    def take(self, probed: messages.Probed) -> None:
        """A probe's answer; kept where it is the better one by now."""
        now = self.timer.now_ns()
        newer = offset_of([(probed.client_ns, probed.service_ns, now)])
        if self.offset is None or newer.uncertainty_ns < self.offset.uncertainty_at(now):
            self.offset = newer
