"""Threads of the compiled kernels: one pool, one number, one way to share a batch out.

Kernels are called as ``kernel(first, last, *arguments, scratch)`` on ranges of a batch; they hold
no GIL and keep one problem's numbers apart from its neighbours', so the bits of an answer depend
neither on the number of threads nor on the rest of the batch. The threads are plain Python ones:
they sleep when idle (spinning pools slow each other and their callers on busy cores), may be used
by several callers at once, and survive a fork.

Their number is what ``use`` said, else torch's (``torch.get_num_threads``). torch's own threads
help little at these sizes: where the kernels have the cores, give torch one thread.
"""

from __future__ import annotations

import itertools
import math
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray

#: Multiply-adds below which waking another thread costs more than it saves (about 0.1 ms).
WORTH_A_THREAD = 2_000_000

_ALIGNMENT = 64


class _Pool:
    """The helper threads, made when first needed, forgotten in a forked child."""

    def __init__(self) -> None:
        self.count: int | None = None
        self._helpers: ThreadPoolExecutor | None = None
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        self._helpers = None

    def helpers(self) -> ThreadPoolExecutor:
        if self._helpers is None:
            self._helpers = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="kernels")
        return self._helpers


_pool = _Pool()
_local = threading.local()


def use(count: int | None) -> None:
    """How many threads the kernels share a batch among; None means as many as torch has."""
    _pool.count = None if count is None else max(1, count)


def count() -> int:
    """How many threads the kernels share a batch among."""
    return torch.get_num_threads() if _pool.count is None else _pool.count


def scratch(dtype: DTypeLike, size: int) -> NDArray[Any]:
    """This thread's buffer of at least ``size`` numbers, aligned; its contents have no meaning.

    It grows to the largest ever asked for and stays.
    """
    kept: dict[np.dtype[Any], NDArray[Any]] | None = getattr(_local, "kept", None)
    if kept is None:
        kept = _local.kept = {}
    key = np.dtype(dtype)
    buffer = kept.get(key)
    if buffer is None or buffer.size < size:
        raw: NDArray[Any] = np.zeros(size + _ALIGNMENT, key)
        start = -raw.ctypes.data % _ALIGNMENT // key.itemsize
        buffer = raw[start : start + size]
        kept[key] = buffer
    return buffer


def worth(batch: int, work: int) -> int:
    """How many threads to share a batch out to.

    Args:
        batch: problems.
        work: multiply-adds per problem, roughly: decides whether threads are woken.
    """
    return min(count(), batch, 1 + batch * work // WORTH_A_THREAD)


def together(calls: Sequence[Callable[[], None]]) -> None:
    """Side by side: the first call in this thread, each other one in a helper."""
    if len(calls) == 1:
        calls[0]()
        return
    helpers = _pool.helpers()
    pending = [helpers.submit(call) for call in calls[1:]]
    calls[0]()
    for one in pending:
        one.result()


def share_out(
    kernel: Callable[..., None],
    batch: int,
    work: int,
    arguments: tuple[object, ...],
    *,
    dtype: DTypeLike,
    scratch_size: int,
    group: int = 1,
) -> None:
    """Run ``kernel(first, last, *arguments, scratch)`` over a batch.

    Args:
        batch, work: see ``worth``.
        arguments: the kernel's, between the range and the scratch buffer.
        dtype, scratch_size: of the buffer each thread brings.
        group: how many problems the kernel does best together.
    """
    threads = worth(batch, work)
    if threads <= 1:
        kernel(0, batch, *arguments, scratch(dtype, scratch_size))
        return
    # small runs, taken when free: problems differ in how long they take
    groups = -(-batch // group)
    runs = min(groups, 4 * threads)
    edges = [min(batch, groups * run // runs * group) for run in range(runs + 1)]
    queue = iter(itertools.pairwise(edges))

    def work_through() -> None:
        buffer = scratch(dtype, scratch_size)
        for first, last in queue:
            kernel(first, last, *arguments, buffer)

    together([work_through] * threads)


# Arrays that begin where a cache line does: vectors read from them never straddle two lines.

_LINE = 64  # bytes


def arrays(dtype: np.dtype[Any], *shapes: tuple[int, ...]) -> list[NDArray[Any]]:
    """Arrays of these shapes in one piece of memory, each from a cache line's start; not set."""
    total, places = _layout(dtype.itemsize, shapes)
    room = np.empty(total, dtype)
    start = -room.__array_interface__["data"][0] % _LINE // dtype.itemsize
    return [room[start + at : start + end].reshape(shape) for at, end, shape in places]


@lru_cache(256)
def _layout(
    itemsize: int, shapes: tuple[tuple[int, ...], ...]
) -> tuple[int, list[tuple[int, int, tuple[int, ...]]]]:
    """Numbers in all, and where each array begins and ends."""
    unit, at = _LINE // itemsize, 0
    places: list[tuple[int, int, tuple[int, ...]]] = []
    for shape in shapes:
        end = at + math.prod(shape)
        places.append((at, end, shape))
        at = -(-end // unit) * unit
    return at + unit, places
