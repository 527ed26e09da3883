"""The estimator states of all streams in one set of arrays, one row each.

The compiled step, on CPU or GPU, reads and writes rows in place. Otherwise a batch of streams is
gathered from its rows and scattered to new ones with one copy per field. A row is written once and
never modified; it is free when nothing refers to it any more. Recently freed rows are reused first,
so that the memory in use is proportional to the number of streams.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from ilqr_vae.streaming.state import HorizonState

_FIELDS = tuple(f.name for f in fields(HorizonState))

# Address space, not memory: a page is allocated when first written. Beyond it the arrays are copied
# into larger ones, which takes a moment.
_RESERVE_BYTES = 1 << 30


def rows_of(horizon: int) -> int:
    """Return how many rows a run takes while bins are missing: two windows, and the next state."""
    return 2 * horizon + 3


class Row:
    """A row of a ``Pool``, reserved for the lifetime of this object."""

    __slots__ = ("_free", "at")

    def __init__(self, free: list[int], at: int) -> None:
        self._free, self.at = free, at

    def __del__(self) -> None:
        self._free.append(self.at)


class Pool:
    """Rows for states.

    Args:
        like: state of one stream (S = 1), with the shapes, dtypes and device of all.
        rows: number of rows to reserve, within a bound on their bytes.
    """

    def __init__(self, like: HorizonState, rows: int) -> None:
        self._like = [getattr(like, name) for name in _FIELDS]
        size = sum(t.nbytes for t in self._like)
        self._arrays: list[Tensor] = []
        self._views: tuple[Any, ...] = ()
        self._free: list[int] = []
        self._grow(max(64, min(rows, _RESERVE_BYTES // size)))

    def __len__(self) -> int:
        """Return the number of rows in use."""
        return self.capacity - len(self._free)

    @property
    def capacity(self) -> int:
        return self._arrays[0].shape[0]

    def _grow(self, rows: int) -> None:
        before = self._arrays
        first = before[0].shape[0] if before else 0
        self._arrays = [t.new_empty((rows, *t.shape[1:])) for t in self._like]
        for new, old in zip(self._arrays, before, strict=False):
            new[:first] = old
        on_cpu = self._arrays[0].device.type == "cpu"
        self._views = tuple(t.numpy() if on_cpu else t for t in self._arrays)
        self._free[:0] = range(rows - 1, first - 1, -1)

    def takes(self, states: HorizonState) -> bool:
        """Return whether these arrays have the shapes of the rows."""
        pairs = zip(states.tensors(), self._like, strict=True)
        return all(t.shape[1:] == like.shape[1:] for t, like in pairs)

    def views(self) -> tuple[Any, ...]:
        """The arrays: numpy views on the CPU, else tensors; valid until the next ``take`` or
        ``put``.
        """
        return self._views

    def take(self, count: int) -> list[Row]:
        """Reserve free rows, to be written by the caller."""
        if len(self._free) < count:
            self._grow(2 * self.capacity + count)
        return [Row(self._free, self._free.pop()) for _ in range(count)]

    def put(self, states: HorizonState) -> list[Row]:
        """Copy streams into rows."""
        given = states.tensors()
        rows = self.take(given[0].shape[0])
        at = self._index(rows)
        for array, values in zip(self._arrays, given, strict=True):
            # arrays that a step returns unchanged may be a row themselves (see ``get``)
            own = values.untyped_storage().data_ptr() == array.untyped_storage().data_ptr()
            array.index_copy_(0, at, (values.clone() if own else values).to(array.dtype))
        return rows

    def get(self, rows: Sequence[Row]) -> HorizonState:
        """Return the streams of these rows as a batch, valid until the next call.

        A single row is returned without a copy.
        """
        if len(rows) == 1:
            first = rows[0].at
            return HorizonState(*(array[first : first + 1] for array in self._arrays))
        at = self._index(rows)
        return HorizonState(*(array.index_select(0, at) for array in self._arrays))

    def _index(self, rows: Sequence[Row]) -> Tensor:
        return torch.tensor([row.at for row in rows], device=self._arrays[0].device)
