"""Times of one stage of a bin: a Prometheus histogram and exact tails, at the cost of an append.

What comes is put aside and counted in bulk, when somebody asks or once a second. For the exact
tails a time is kept to microseconds, above two milliseconds to a part in a thousand; how many
numbers that are is bounded.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Iterable

import numpy as np
from hdrh.histogram import HdrHistogram
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

_BITS = 11
_LONGEST_NS = 60_000_000_000


class Stage(Collector):
    """Durations in nanoseconds, up to a minute each.

    Args:
        name: of the metric.
        text: what it is.
        edges: of its buckets, seconds, rising.
    """

    def __init__(self, name: str, text: str, edges: tuple[float, ...]) -> None:
        self._name, self._text, self._edges = name, text, edges
        self._counts = np.zeros(len(edges) + 1, dtype=np.int64)
        self._sum = 0.0
        self._exact: Counter[int] = Counter()
        self._aside: deque[int] = deque()
        self._lock = threading.Lock()
        self.add = self._aside.append
        """Take one duration."""

    def settle(self) -> None:
        """Count what was put aside. From any thread."""
        with self._lock:
            aside: list[int] = []
            while self._aside:
                aside.append(self._aside.popleft())
            if not aside:
                return
            ns = np.array(aside, dtype=np.int64)
            at = np.searchsorted(self._edges, ns / 1e9, side="left")
            self._counts += np.bincount(at, minlength=self._counts.size)
            self._sum += float(ns.sum()) / 1e9
            us = np.maximum(ns // 1000, 1)
            shift = np.maximum(np.frexp(us.astype(np.float64))[1] - _BITS, 0)
            self._exact.update(((us >> shift) << shift).tolist())

    def describe(self) -> Iterable[Metric]:
        """The metric without numbers."""
        return [HistogramMetricFamily(self._name, self._text)]

    def collect(self) -> Iterable[Metric]:
        """The metric as Prometheus takes it."""
        self.settle()
        with self._lock:
            counts, total = np.cumsum(self._counts).tolist(), self._sum
        names = [*map(floatToGoString, self._edges), "+Inf"]
        buckets = list(zip(names, counts, strict=True))
        return [HistogramMetricFamily(self._name, self._text, buckets=buckets, sum_value=total)]

    def exact(self) -> HdrHistogram:
        """All of them, in nanoseconds, to three digits."""
        self.settle()
        histogram = HdrHistogram(1_000, _LONGEST_NS, 3)
        with self._lock:
            for us, times in self._exact.items():
                histogram.record_value(us * 1000, times)
        return histogram
