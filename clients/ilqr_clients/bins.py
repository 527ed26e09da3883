"""A bin's numbers, one a unit, checked and as they go over the wire."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from ilqr_vae.errors import ShapeError
from ilqr_vae.protocol import messages


def counts_of(values: ArrayLike, n_units: int) -> messages.Array:
    """Spikes of each unit. Raises ShapeError: not N whole numbers in [0, 65535]."""
    whole = _exactly("counts", values, n_units, "<u2", "whole numbers in [0, 65535]")
    return messages.pack(whole, "<u2")


def mask_of(values: ArrayLike, n_units: int) -> messages.Array:
    """Which units were observed. Raises ShapeError: not N times True or False."""
    return messages.pack(_exactly("mask", values, n_units, np.bool_, "True or False"), "u1")


def _exactly(
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
