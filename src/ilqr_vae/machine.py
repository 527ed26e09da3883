"""Resources that this process may use: memory and cores within its container, and its limits."""

from __future__ import annotations

import ctypes
import math
import os
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

try:
    import resource
except ModuleNotFoundError:  # Windows
    resource = None

_ROOT = Path("/")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_KEPT_BYTES = 32 << 20  # the largest value that every malloc accepts

try:
    _core: Callable[[], int] | None = ctypes.PyDLL(None).sched_getcpu  # keeps the interpreter lock
except (AttributeError, OSError, TypeError):  # not on this system
    _core = None


def file_limits() -> tuple[float, float]:
    """Return the soft and hard limit of open files; infinite if there is none."""
    if resource is None:
        return math.inf, math.inf
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    return math.inf if now == unlimited else now, math.inf if most == unlimited else most


def raise_file_limit() -> None:
    """Raise the limit of open files to the hard limit."""
    if resource is not None:
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def address_space() -> float:
    """Return the limit of address space in bytes; infinite if there is none."""
    if resource is None:
        return math.inf
    space, _ = resource.getrlimit(resource.RLIMIT_AS)
    return math.inf if space == resource.RLIM_INFINITY else space


def peak_memory() -> int:
    """Return the peak resident size of this process in bytes."""
    if resource is None:
        memory = psutil.Process().memory_info()
        return int(getattr(memory, "peak_wset", memory.rss))  # on Windows
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def keep_freed_memory(most: int) -> None:
    """Keep up to ``most`` bytes of freed memory in the process, so that the next step need not
    fault it in again.

    Raises:
        OSError, AttributeError: not on this system.
    """
    if not sys.platform.startswith("linux"):
        raise OSError("not on this system")
    libc = ctypes.CDLL(None)
    for what, size in ((_M_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES), (_M_TRIM_THRESHOLD, most)):
        if not libc.mallopt(what, size):
            raise OSError("not accepted by malloc")


def available_memory(root: Path = _ROOT) -> int:
    """Return the number of bytes that this process can still allocate.

    This is the minimum of the machine's available memory and of the memory left in each enclosing
    control group (version 1 or 2). Page cache counts as available, since it is reclaimed first.

    Args:
        root: the folder that holds ``proc`` and ``sys``.
    """
    left = [psutil.virtual_memory().available]
    for group in _control_groups("memory", root):
        for limit, usage, cache in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            if (bound := _number(group / limit)) is not None:
                used = _number(group / usage) or 0
                left.append(bound - used + _field(group / "memory.stat", cache))
    return max(0, min(left))


def cores(root: Path = _ROOT) -> int:
    """Return the number of usable cores, from affinity and CPU quotas of control groups."""
    affine = hasattr(os, "sched_getaffinity")
    least = len(os.sched_getaffinity(0)) if affine else os.cpu_count() or 1
    for group in _control_groups("cpu", root):
        quota, _, period = _text(group / "cpu.max").partition(" ")
        if not period:
            quota, period = _text(group / "cpu.cfs_quota_us"), _text(group / "cpu.cfs_period_us")
        if quota.isdecimal() and period.isdecimal() and int(period):  # "max" and -1: no limit
            least = min(least, math.ceil(int(quota) / int(period)))
    return max(1, least)


def core() -> int:
    """Return the core on which the calling thread runs; -1 if the system does not say."""
    return -1 if _core is None else _core()


@contextmanager
def own_core(others: list[threading.Thread]) -> Generator[None]:
    """Keep other threads of this process off the core of the calling thread meanwhile.

    Linux may put a thread that is woken on the core of the one that woke it, if no core is idle at
    that moment, and leave both there for a second while another core has time to spare. Does
    nothing where the calling thread may use no other core.
    """
    allowed = os.sched_getaffinity(0) if others else set[int]()
    elsewhere = allowed - {core()}
    kept = [thread for thread in others if elsewhere and thread.is_alive()]
    _confine(kept, elsewhere)
    try:
        yield
    finally:
        _confine(kept, allowed)


def _confine(threads: list[threading.Thread], cores: set[int]) -> None:
    for thread in threads:
        with suppress(OSError):  # the allowed cores were changed meanwhile
            os.sched_setaffinity(thread.native_id or 0, cores)


def _control_groups(controller: str, root: Path) -> Iterator[Path]:
    """Yield the folders of the control groups of this process, each with its parents.

    Inside a container the stated path may not exist, but its parents up to the mount point do.
    """
    mounted = root / "sys" / "fs" / "cgroup"
    for line in _text(root / "proc" / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2, alone or beside version 1
            tops = [mounted, mounted / "unified"]
        elif controller in controllers.split(","):
            tops = [mounted / controllers, mounted / controller]
        else:
            continue
        for top in dict.fromkeys(tops):
            own = top / path.lstrip("/")
            yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(top))


def _text(path: Path) -> str:
    """Return the content of a file; empty if it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.isdecimal() else None


def _field(path: Path, name: str) -> int:
    fields = dict(line.split() for line in _text(path).splitlines())
    return int(fields.get(name, 0))
