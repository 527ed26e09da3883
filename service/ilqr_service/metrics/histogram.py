"""Times of the stages of a bin as a Prometheus histogram, and quantiles of the newest ones.

A duration only costs an append; durations are counted in bulk, on demand or once a second.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class Durations:
    """Durations in nanoseconds.

    Args:
        edges: increasing edges of the buckets, in seconds.
    """

    def __init__(self, edges: tuple[float, ...]) -> None:
        self._edges = edges
        self._counts = np.zeros(len(edges) + 1, dtype=np.int64)
        self._sum = self._longest = 0.0
        self._aside: deque[int] = deque()
        self._lock = threading.Lock()
        self.add = self._aside.append
        """Add a duration."""

    def settle(self) -> None:
        """Count the pending durations. Thread-safe."""
        with self._lock:
            aside: list[int] = []
            while self._aside:
                aside.append(self._aside.popleft())
            if not aside:
                return
            seconds = np.array(aside, dtype=np.int64) / 1e9
            at = np.searchsorted(self._edges, seconds, side="left")
            self._counts += np.bincount(at, minlength=self._counts.size)
            self._sum += float(seconds.sum())
            self._longest = max(self._longest, float(seconds.max()))

    def buckets(self) -> tuple[list[tuple[str, float]], float]:
        """Return cumulative counts by edge, as Prometheus expects, and the sum in seconds."""
        self.settle()
        with self._lock:
            counts, total = np.cumsum(self._counts).tolist(), self._sum
        names = [*map(floatToGoString, self._edges), "+Inf"]
        return list(zip(names, counts, strict=True)), total

    def summary(self, quantiles: Mapping[str, float]) -> dict[str, float]:
        """Return the count, the maximum in ms, and an upper bound of each quantile.

        The bound is the edge of its bucket. Empty if there were none.
        """
        self.settle()
        with self._lock:
            below, longest = np.cumsum(self._counts), self._longest
        n = int(below[-1])
        if not n:
            return {}
        edges = [*self._edges, longest]
        found: dict[str, float] = {"n": n}
        for name, q in quantiles.items():
            edge = edges[int(np.searchsorted(below, q * n))]
            found[name] = round(min(edge, longest) * 1e3, 4)
        return found | {"max": round(longest * 1e3, 4)}


class Histogram(Collector):
    """A Prometheus histogram of durations.

    Args:
        name: name of the metric.
        text: its description.
        durations: durations by the value of the label ``stage``; only "" for a metric without
            labels.
    """

    def __init__(self, name: str, text: str, durations: Mapping[str, Durations]) -> None:
        self._name, self._text, self._durations = name, text, durations

    def describe(self) -> Iterable[Metric]:
        """Yield the metric without samples."""
        return [HistogramMetricFamily(self._name, self._text)]

    def collect(self) -> Iterable[Metric]:
        """Yield the metric with its samples."""
        labels = [] if "" in self._durations else ["stage"]
        family = HistogramMetricFamily(self._name, self._text, labels=labels)
        for stage, durations in self._durations.items():
            buckets, total = durations.buckets()
            family.add_metric([stage] if labels else [], buckets, total)
        return [family]


class Recent:
    """The newest ``size`` durations (int64), for quantiles."""

    def __init__(self, size: int = 1024) -> None:
        self._values = np.zeros(size, dtype=np.int64)
        self._count = 0
        self._sorted: tuple[int, NDArray[np.int64]] = (0, self._values[:0])  # of which count

    def add(self, value: int) -> None:
        self._values[self._count % len(self._values)] = value
        self._count += 1

    def quantiles(self, *qs: float) -> tuple[int, ...]:
        """Return for each q the smallest value that a share q does not exceed; 0 if empty."""
        if self._sorted[0] != self._count:
            newest = self._values[: min(self._count, len(self._values))]
            self._sorted = (self._count, np.sort(newest))
        held = self._sorted[1]
        if held.size == 0:
            return (0,) * len(qs)
        return tuple(int(held[max(0, math.ceil(q * held.size) - 1)]) for q in qs)
