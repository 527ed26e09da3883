"""Optional settings of the operating system for steady latency, each with a report."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from ilqr_service import logs
from ilqr_service.settings import ServiceSettings
from ilqr_vae.machine import keep_freed_memory

_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}  # the number of the system call
_MCL_CURRENT_AND_FUTURE = 3
_KEPT_BYTES = 64 << 20


_MOST_CPUS = 1 << 16
_COLLECT_S, _OVERDUE_S = 5.0, 60.0
_FULL_EVERY = 12
"""One in this many collections is a full one, over all objects since the start."""


def parse_cpus(text: str) -> set[int]:
    """Parse ``0,2-3`` as {0, 2, 3}. Raises ValueError if it is malformed or out of range."""
    cpus: set[int] = set()
    for part in filter(None, text.split(",")):
        first, dash, last = part.partition("-")
        low, high = int(first), int(last) if dash else int(first)
        if not 0 <= low <= high < _MOST_CPUS:
            raise ValueError(f"expected cores such as 0,2-3, got {part!r}")
        cpus |= set(range(low, high + 1))
    return cpus


class _Metrics(Collector):
    def __init__(self, report: dict[str, str]) -> None:
        self._report = report

    def collect(self) -> Iterable[Metric]:
        shown = GaugeMetricFamily(
            "ilqr_hygiene",
            "1 where what was asked of the system for steady latency is in force",
            labels=["what"],
        )
        for what, came in list(self._report.items()):
            shown.add_metric([what], float(came == "on"))
        return [shown]


class Hygiene:
    """Applies the settings, and records whether each is in force.

    Args:
        settings: see ``ServiceSettings``.
        clock: seconds, monotonic.

    Attributes:
        report: ``on``, or why not, by setting.
        metrics: the same for /metrics: 1 or 0.
    """

    def __init__(
        self, settings: ServiceSettings, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._settings = settings
        self.report: dict[str, str] = {}
        self._clock, self._collected, self._collections = clock, clock(), 0
        self.metrics = _Metrics(self.report)

    def process(self) -> None:
        """Apply the settings of the process: memory and garbage collector."""
        settings = self._settings
        if settings.lock_memory:
            self._try("lock_memory", _lock_memory)
        if settings.gc == "idle":
            gc.disable()
            self.report["gc"] = "on"
        if settings.malloc == "keep":
            self._try("malloc", lambda: keep_freed_memory(_KEPT_BYTES))

    def thread(self) -> None:
        """Apply the settings of the calling thread: cores and scheduling class."""
        settings, name = self._settings, threading.current_thread().name
        if settings.cpus:
            self._try(f"cpus {name}", lambda: _pin(settings.cpus))
        if settings.slice_ms:
            self._try(f"slice {name}", lambda: _short_slice(settings.slice_ms))
        if settings.realtime:
            self._try(f"realtime {name}", lambda: _realtime(settings.realtime))

    def collect(self, *, idle: bool) -> None:
        """Collect garbage if it is due; call often.

        It is due every few seconds while the service is idle, and every minute in any case.

        Long-lived objects are examined every dozen times. Those of the start are not: they were
        frozen.
        """
        waited = self._clock() - self._collected
        if self._settings.gc != "idle" or waited < (_COLLECT_S if idle else _OVERDUE_S):
            return
        self._collections += 1
        gc.collect(1 if self._collections % _FULL_EVERY else 2)
        self._collected = self._clock()

    def _try(self, what: str, do: Callable[[], None]) -> None:
        try:
            do()
            self.report[what] = "on"
        except (OSError, ValueError, AttributeError) as error:
            self.report[what] = f"off: {error}"
        logs.info("hygiene", **{what.replace(" ", "_"): self.report[what]})


def _lock_memory() -> None:
    if not sys.platform.startswith("linux"):
        raise OSError("not on this system")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mlockall(_MCL_CURRENT_AND_FUTURE) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _pin(cpus: str) -> None:
    os.sched_setaffinity(0, parse_cpus(cpus))


def _short_slice(milliseconds: float) -> None:
    """Shorten the time slice of the calling thread by sched_setattr(2), which Python does not wrap.

    Since Linux 6.12 a thread with a short slice waits less for one with a longer slice.
    """
    number = _SCHED_SETATTR.get(platform.machine())
    if not sys.platform.startswith("linux") or number is None:
        raise OSError("not on this system")
    # size, policy (the default one), flags, nice, priority, runtime in ns, deadline, period
    nice = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    attributes = struct.pack("=IIQiIQQQ", 48, 0, 0, nice, 0, round(1e6 * milliseconds), 0, 0)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(number, 0, attributes, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _realtime(priority: int) -> None:
    # not inherited by threads started from here: one that loads a model must not compete with the
    # solver
    policy = os.SCHED_FIFO | os.SCHED_RESET_ON_FORK
    os.sched_setscheduler(0, policy, os.sched_param(priority))
