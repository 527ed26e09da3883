"""Arrays that begin where a cache line does: vectors read from them never straddle two lines."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
