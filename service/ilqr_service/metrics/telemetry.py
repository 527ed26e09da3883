"""Counters and timings of the service, as Prometheus metrics.

Histogram edges are finer than the defaults, with one exactly at the bin width, so that the share of
bins answered within a bin is exact. No label depends on sessions. Values are collected and counted
on demand or once a second: the lock and label of a counter for each bin would cost more than the
session table itself.

Stages of a bin, the label ``stage`` of ``ilqr_latency_seconds``: ``wire_in`` (source to arrival),
``queue`` (arrival to solve), ``solve``, ``publish`` (end of solve to the socket), ``total``
(arrival to the socket). ``wire_in`` uses the clock offset that the feeder states with the bin; its
uncertainty is a histogram of its own. Bins of feeders that state none are counted and left out.
"""

from __future__ import annotations

import math
import platform
import threading
import time
from collections import Counter as Tally
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from itertools import cycle
from typing import Any, get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Info,
    disable_created_metrics,
)
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from ilqr_service.metrics.histogram import Durations, Histogram
from ilqr_vae.protocol import messages

STAGES = ("wire_in", "queue", "solve", "publish", "total")
_EDGES_MS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 4, 5, 7, 10, 15, 20, 30, 50, 100, 250)
_REASONS = (
    "credits",
    "index",
    "late",
    "message",
    "size",
    "session",
    "key",
    "role",
    "rate",
    "handshake",
    "source_ns",
    "frames",
    "protocol",
    "subscription",
    "connections",
)
_HALF_LIFE = 5_000
_SECOND_NS, _MINUTE_NS = 1_000_000_000, 60_000_000_000
_QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999, "p99.99": 0.9999}

# Events of the session table and the server, by the counter that counts them.
EVENTS = {
    "gap": "gaps in the bin indices",
    "gap_bins": "bins that did not come",
    "reset": "estimates started again after a gap too long to bridge",
    "dropped": "bins dropped because their session ended",
    "opened": "sessions opened",
    "restarted": "sessions restarted under a higher epoch",
    "idle": "sessions ended for being silent",
    "solve_failed": "solves that raised, answered with a prediction",
    "non_converged": "solves that stalled or were not finite",
    "unreachable": "replies to a feeder that is gone or does not read",
    "overdue": "bins answered without having come, by the clock",
    "late_in": "bins that came late and were put in their place",
    "late_lost": "late bins that could not be put in their place",
    "revised": "answers that superseded one",
    "shed": "bins answered without a solve, for overload",
    "resumed": "sessions continued by another feeder where they stood",
    "reconnected": "sessions that followed their feeder to another connection",
    "asked_again": "times a feeder asked for answers that it had not received",
    "clock_steps": "times a feeder's clock was set",
    "slipped": "times a clocked session's timetable slipped behind with its feeder",
    "unit_changes": "units masked or used again",
    "ignored_counts": "counts of units that were beyond the model's limit and were not used",
    "beyond": "answers beyond what training showed",
    "lost": "estimates that were lost and began anew",
    "swapped": "models put in another's place",
    "load_failed": "models that could not be loaded",
    "early_spikes": "spikes before their session's origin, which were not used",
    "lost_spikes": "spikes that came after their bin had left the window, which were not used",
    "uncertain_bins": "bins of which spikes may be in a batch that did not come",
    "noted": "events of the experiment",
    "noted_again": "events that came more than once",
    "unclocked": "bins whose feeder does not say how far its clock is from this one",
    "disconnected": "connections of feeders and clients that ended, or were cut off",
}


def edges(bin_width: float) -> tuple[float, ...]:
    """Return increasing histogram edges in seconds, with one exactly at ``bin_width``."""
    relative = (0.5, 1.0, 2.0, 4.0)
    return tuple(sorted({e / 1e3 for e in _EDGES_MS} | {r * bin_width for r in relative}))


class _First(Collector):
    """Calls a function before the other metrics of the registry are collected."""

    def __init__(self, do: Callable[[], None]) -> None:
        self._do = do

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        self._do()
        return []


class Telemetry:
    """Counters, gauges and histograms of one service, in a registry of its own.

    Args:
        bin_width: seconds.
        clock: nanoseconds.

    Attributes:
        registry: registry for the HTTP endpoint.
    """

    def __init__(self, bin_width: float, *, clock: Callable[[], int] = time.monotonic_ns) -> None:
        disable_created_metrics()  # no extra series of start times beside each counter
        self.registry = CollectorRegistry(auto_describe=True)
        r = self.registry
        r.register(_First(self._settle_events))
        versions = {name: version(name) for name in ("ilqr-vae", "torch", "numba")}
        Info("ilqr_build", "what the service runs", registry=r).info(
            {name.replace("-", "_"): number for name, number in versions.items()}
            | {"python": platform.python_version()}
        )
        self._stages = {stage: Durations(edges(bin_width)) for stage in STAGES}
        r.register(Histogram("ilqr_latency_seconds", "time of a bin, by stage", self._stages))
        bins = Counter("ilqr_bins", "bins answered, by status", ["status"], registry=r)
        self._bins = {status: bins.labels(status) for status in get_args(messages.Status)}
        self._refused = Counter(
            "ilqr_refused", "messages refused, by the field that was wrong", ["reason"], registry=r
        )
        for reason in _REASONS:  # create it now, so that the first refusal is an increase
            self._refused.labels(reason)
        self._events = {
            name: Counter(f"ilqr_{name}", text, registry=r) for name, text in EVENTS.items()
        }
        self._sessions = Gauge("ilqr_sessions", "open sessions", registry=r)
        self._queued = Gauge("ilqr_queued_bins", "bins queued or being solved", registry=r)
        self._ready = Gauge("ilqr_ready", "1 when bins are answered", registry=r)
        Gauge("ilqr_bin_width_seconds", "the model's bin width", registry=r).set(bin_width)
        self._bits = Gauge(
            "ilqr_bits_per_spike", "one step ahead, over the newest spikes", registry=r
        )
        self._index = Gauge(
            "ilqr_calibration_index",
            "bits per spike over the last minute, over those when the models were validated",
            registry=r,
        )
        self._index.set(math.nan)
        self._clock = clock
        self._sums = (0.0, 0.0)
        self._minute: deque[tuple[int, tuple[float, float]]] = deque([(clock(), self._sums)])
        self._masked = Gauge("ilqr_masked_units", "units masked, over all sessions", registry=r)
        self._journal_ok = Gauge("ilqr_journal_ok", "0 while the journal fails", registry=r)
        self._journal = {
            name: Counter(f"ilqr_journal_{name}", text, registry=r)
            for name, text in (("lost", "records not written"), ("bytes", "bytes written"))
        }
        self._lost_records = Gauge(
            "ilqr_journal_lost_records", "as ilqr_journal_lost_total, its earlier name", registry=r
        )
        self._journal_told = dict.fromkeys(self._journal, 0)
        self._journal_ok.set(1)
        self._recent = (0.0, 0.0)
        self._uncertainty = Durations((0.0, *edges(bin_width)))
        r.register(
            Histogram(
                "ilqr_wire_in_uncertainty_seconds",
                "how far wire_in may be off, from the offset between the clocks; 0 on one clock",
                {"": self._uncertainty},
            )
        )
        self._turns = cycle([*self._stages.values(), self._uncertainty])
        self._iterations = Counter("ilqr_iterations", "iLQR iterations done", registry=r)
        self._done = self._counted = 0
        self._tally: Tally[str] = Tally()
        self._aside: deque[Mapping[str, int]] = deque()
        self._lock = threading.Lock()

    def count(
        self,
        events: Mapping[str, int],
        bits: float = 0.0,
        spikes: int = 0,
        expected: float = 0.0,
        met: float = 0.0,
    ) -> None:
        """Add events: ``status:S``, ``refused:REASON`` or a name in ``EVENTS``.

        Also add the bits gained over mean rates and the spikes; and, for models that state their
        expected score, bits expected and met.
        """
        if expected:
            self._sums = self._sums[0] + expected, self._sums[1] + met
        if spikes:
            keep = 0.5 ** (spikes / _HALF_LIFE)
            self._recent = (keep * self._recent[0] + bits, keep * self._recent[1] + spikes)
        if events:
            self._aside.append(events)

    def _settle_events(self) -> None:
        """Count the pending events. Thread-safe."""
        with self._lock:
            events: Tally[str] = Tally()
            while self._aside:
                events.update(self._aside.popleft())
            for event, n in events.items():
                self._tally[event] += n
                kind, _, label = event.partition(":")
                if kind == "status":
                    self._bins[label].inc(n)
                elif kind == "refused":
                    self._refused.labels(label).inc(n)
                else:
                    self._events[kind].inc(n)
            done = self._done  # read it once: the I/O thread adds to it meanwhile
            self._iterations.inc(done - self._counted)
            self._counted = done
            bits, spikes = self._recent
        if spikes:
            self._bits.set(bits / spikes)

    def observe(self, result: messages.Result) -> None:
        """Record the times of a published answer; a missing bin has a solve time only."""
        self._time("solve", result.solve_end_ns - result.solve_start_ns)
        self._done += result.iterations
        if result.status == "missing":
            return
        if (clock := result.clock) is None:
            self.count({"unclocked": 1})
        else:
            wire_in = result.received_ns - result.source_ns - clock.offset_ns
            within = -clock.uncertainty_ns <= wire_in < 0  # uncertainty of the clock offset
            self._time("wire_in", 0 if within else wire_in)
            self._uncertainty.add(min(clock.uncertainty_ns, _MINUTE_NS))
        self._time("queue", result.solve_start_ns - result.received_ns)
        self._time("publish", result.published_ns - result.solve_end_ns)
        self._time("total", result.published_ns - result.received_ns)

    def _time(self, stage: str, ns: int) -> None:
        if 0 <= ns < _MINUTE_NS:
            self._stages[stage].add(ns)

    def settle(self) -> None:
        """Count pending events, and the times of one stage per call; call ten times a second.

        One stage at a time, so that no call takes long.
        """
        next(self._turns).settle()
        self._settle_events()
        now, minute = self._clock(), self._minute
        if now - minute[-1][0] < _SECOND_NS:
            return
        minute.append((now, self._sums))
        while len(minute) > 2 and now - minute[1][0] >= _MINUTE_NS:
            minute.popleft()
        expected, met = (a - b for a, b in zip(minute[-1][1], minute[0][1], strict=True))
        self._index.set(met / expected if expected > 0 else math.nan)

    def gauge(self, *, sessions: int, queued: int) -> None:
        self._sessions.set(sessions)
        self._queued.set(queued)

    def masked(self, units: int) -> None:
        self._masked.set(units)

    def journal(self, ok: bool, lost: int, written: int) -> None:
        self._journal_ok.set(ok)
        self._lost_records.set(lost)
        for name, total in (("lost", lost), ("bytes", written)):
            self._journal[name].inc(max(0, total - self._journal_told[name]))
            self._journal_told[name] = total

    def ready(self, ready: bool) -> None:
        self._ready.set(ready)

    def counts(self) -> dict[str, int]:
        """Return all counts by event."""
        self._settle_events()
        return dict(self._tally)

    def summary(self) -> dict[str, Any]:
        """Return counts, and upper bounds of quantiles per stage in ms, for JSON."""
        stages = {stage: times.summary(_QUANTILES) for stage, times in self._stages.items()}
        latency = {stage: figures for stage, figures in stages.items() if figures}
        return {"counts": self.counts(), "latency_ms": latency}
