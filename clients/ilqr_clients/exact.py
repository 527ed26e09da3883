"""What callers give, as the wire takes it, without a value being changed."""

from __future__ import annotations

import operator
from typing import Any, SupportsIndex

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from ilqr_vae.errors import ShapeError


def exactly(
    field: str, values: ArrayLike, n_units: int, dtype: DTypeLike, expected: str
) -> NDArray[Any]:
    """``values`` as ``dtype``, which must not change any."""
    try:
        given = np.asarray(values)
    except ValueError as error:  # lists of several lengths
        raise ShapeError(field, expected=f"({n_units},)", got=str(error)) from error
    if given.shape != (n_units,):
        raise ShapeError(field, expected=f"({n_units},)", got=str(given.shape))
    try:
        with np.errstate(invalid="ignore"):
            converted = given.astype(dtype)
    except (TypeError, ValueError, OverflowError) as error:
        raise ShapeError(field, expected=expected, got=repr(given)) from error
    if not np.array_equal(converted, given):
        raise ShapeError(field, expected=expected, got=repr(given))
    return converted


def whole(field: str, value: SupportsIndex) -> int:
    """An integer of any kind, numpy's among them, at least 0."""
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if number < 0:
        raise ShapeError(field, expected="a whole number, at least 0", got=repr(value))
    return number


def sized(
    field: str, values: ArrayLike, dtype: DTypeLike, expected: str, size: int | None = None
) -> NDArray[Any]:
    """One row of ``values``, ``size`` of them where that is given, as ``dtype``."""
    shape = np.shape(values)
    given = np.zeros(0) if shape == (0,) else values
    if len(shape) != 1 or (size is not None and shape != (size,)):
        wanted = "(S,)" if size is None else f"({size},)"
        raise ShapeError(field, expected=wanted, got=str(shape))
    return exactly(field, given, shape[0], dtype, expected)
