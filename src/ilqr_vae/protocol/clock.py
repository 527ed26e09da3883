"""Monotonic clocks: of this machine, identified by name, and of others, measured by probes.

Two processes read the same clock if its ``name`` is the same: on one boot of one machine (and in
one time namespace). Otherwise a probe, answered with the other clock's time, bounds the offset of
the clocks, since the answer was made between its sending and its return.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

DRIFT = 2e-4
"""Largest relative drift of two clocks: quartz is within 100 parts per million each."""


class Clock(Protocol):
    """A monotonic clock. ``name`` is equal only for the same clock; "" if not known."""

    @property
    def name(self) -> str: ...

    def now_ns(self) -> int:
        """Return the time in nanoseconds, which never decreases."""
        ...


class MonotonicClock:
    """The clock of this machine."""

    @property
    def name(self) -> str:
        return this_clock()

    def now_ns(self) -> int:
        return time.monotonic_ns()


@cache
def this_clock() -> str:
    """Return the name of this machine's monotonic clock; "" if the boot id is not available."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = os.readlink("/proc/self/ns/time") if Path("/proc/self/ns/time").exists() else ""
    except OSError:
        return ""
    return hashlib.sha256(f"{boot} {space}".encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockOffset:
    """The service's clock minus this client's.

    Attributes:
        offset_ns: add it to a client time for the service's time.
        uncertainty_ns: bound on its error.
        at_ns: client time of the measurement.
        probes: number of answered probes.
        same: whether both read the same clock, so that the offset is zero.
    """

    offset_ns: int
    uncertainty_ns: int
    at_ns: int = 0
    probes: int = 1
    same: bool = False

    def uncertainty_at(self, now_ns: int) -> int:
        """Return the uncertainty in nanoseconds at ``now_ns`` of the client's clock, with drift."""
        return 0 if self.same else self.uncertainty_ns + round(DRIFT * abs(now_ns - self.at_ns))


def offset_of(probes: Sequence[tuple[int, int, int]], *, same: bool = False) -> ClockOffset:
    """Return the offset consistent with all probes (sent, answered, returned; ns).

    Args:
        same: the clocks have the same name; trusted unless a probe contradicts it (two machines
            started from one image may share it).
    """
    spans = [(there - after, there - before) for before, there, after in probes]
    low, high = max(a for a, _ in spans), min(b for _, b in spans)
    if low > high:  # a clock was slewed meanwhile: use only the narrowest
        low, high = min(spans, key=lambda s: s[1] - s[0])
    at = probes[-1][2]
    if same and low <= 0 <= high:
        return ClockOffset(offset_ns=0, uncertainty_ns=0, at_ns=at, probes=len(probes), same=True)
    return ClockOffset(
        offset_ns=(low + high) // 2,
        uncertainty_ns=(high - low + 1) // 2 + 1,
        at_ns=at,
        probes=len(probes),
    )


@dataclass(frozen=True, slots=True)
class ClockTrack:
    """The offset during a run: linear between a measurement before it and one after it."""

    first: ClockOffset
    last: ClockOffset

    @property
    def same(self) -> bool:
        return self.first.same and self.last.same

    @property
    def probes(self) -> int:
        return self.first.probes + (0 if self.last is self.first else self.last.probes)

    @property
    def uncertainty_ns(self) -> int:
        """Uncertainty of an interpolated offset."""
        return max(self.first.uncertainty_ns, self.last.uncertainty_ns)

    @property
    def drift(self) -> float:
        """Drift of the service's clock in seconds per second."""
        passed = self.last.at_ns - self.first.at_ns
        return (self.last.offset_ns - self.first.offset_ns) / passed if passed > 0 else 0.0

    def offset_ns(self, at_ns: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the offset at client times in nanoseconds, of any shape."""
        gained = np.rint(self.drift * (at_ns - self.first.at_ns)).astype(np.int64)
        return self.first.offset_ns + gained

    def to_json(self) -> dict[str, Any]:
        """Return values for ``json.dumps``, in milliseconds."""
        return {
            "same": self.same,
            "offset_ms": self.first.offset_ns / 1e6,
            "uncertainty_ms": self.uncertainty_ns / 1e6,
            "drift_ppm": self.drift * 1e6,
            "probes": self.probes,
        }

    def __str__(self) -> str:
        if self.same:
            return "same clock as the service"
        drift = "" if self.last is self.first else f", drift {self.drift * 1e6:+.1f} ppm"
        return (
            f"service {self.first.offset_ns / 1e6:+.3f} ms ± {self.uncertainty_ns / 1e6:.3f} ms "
            f"({self.probes} probes{drift})"
        )
