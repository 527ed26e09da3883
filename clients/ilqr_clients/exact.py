"""Conversion of arguments for the wire, without changing any value."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any, SupportsFloat, SupportsIndex, TypeVar, cast

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from ilqr_vae.errors import ShapeError
from ilqr_vae.protocol import messages

_LARGEST = 1e9
_T = TypeVar("_T")


def _vector(field: str, values: ArrayLike, size: int, expected: str) -> NDArray[Any]:
    """Return ``values`` as an array (size,), none of them masked or complex."""
    try:
        given = np.asarray(values)
    except ValueError as error:  # lists of different lengths
        raise ShapeError(field, expected=f"({size},)", got=str(error)) from error
    if given.shape != (size,):
        raise ShapeError(field, expected=f"({size},)", got=str(given.shape))
    if np.ma.is_masked(values) or given.dtype.kind == "c":  # a part of them would be lost
        raise ShapeError(field, expected=f"{expected}, not masked", got=repr(values))
    return given


def exactly(
    field: str, values: ArrayLike, n_units: int, dtype: DTypeLike, expected: str
) -> NDArray[Any]:
    """Return ``values`` as ``dtype``, which must not change any."""
    given = _vector(field, values, n_units, expected)
    try:
        with np.errstate(invalid="ignore"):
            converted = given.astype(dtype)
    except (TypeError, ValueError, OverflowError) as error:
        raise ShapeError(field, expected=expected, got=repr(given)) from error
    if not np.array_equal(converted, given):
        raise ShapeError(field, expected=expected, got=repr(given))
    return converted


def whole(field: str, value: SupportsIndex, least: int = 0) -> int:
    """Return an integer of any kind, including numpy's, as int. Raises ShapeError."""
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if not least <= number < 2**63:
        expected = f"a whole number, at least {least}"
        raise ShapeError(field, expected=expected, got=_shown(value))
    return number


def finite(field: str, value: SupportsFloat, least: float = -_LARGEST) -> float:
    """Return a number from ``least`` to 1e9, such as seconds, as float. Raises ShapeError."""
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not least <= number <= _LARGEST:
        between = "" if least < 0 else f"at least {least:g}, "
        raise ShapeError(
            field, expected=f"a number, {between}at most {_LARGEST:g}", got=_shown(value)
        )
    return number


def instance(field: str, value: object, kind: type[_T], expected: str) -> _T:
    """Return ``value`` if it is of this kind. Raises ShapeError."""
    if not isinstance(value, kind):
        raise ShapeError(field, expected=expected, got=_shown(value))
    return value


def text(field: str, value: str) -> str:
    """Return text of any kind, including numpy's, as str. Raises ShapeError."""
    return str(instance(field, value, str, "text"))


def switch(field: str, value: object) -> bool:
    """Return True or False, including numpy's, as bool. Raises ShapeError."""
    if not isinstance(value, bool | np.bool_):
        raise ShapeError(field, expected="True or False", got=_shown(value))
    return bool(value)


def names(field: str, values: Sequence[str]) -> tuple[str, ...]:
    """Return a sequence of names, or an array of them, as a tuple. Raises ShapeError."""
    given = cast(object, values)
    if not isinstance(given, Sequence | np.ndarray) or isinstance(given, str | bytes):
        raise ShapeError(field, expected="a list of names", got=_shown(given))
    return tuple(text(f"{field}[{k}]", name) for k, name in enumerate(values))


def mapping(field: str, value: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a map as a dict, which is empty for None. Raises ShapeError."""
    return {} if value is None else dict(instance(field, value, Mapping, "a map"))


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def packed_counts(counts: ArrayLike, n_units: int) -> messages.Array:
    """Pack the counts (N,) of a bin for sending. Raises ShapeError."""
    expected = f"whole numbers in [0, {messages.MAX_COUNT}]"
    return messages.pack(exactly("counts", counts, n_units, "<u2", expected), "<u2")


def packed_mask(mask: ArrayLike | None, n_channels: int) -> messages.Array | None:
    """A mask as it is sent. Raises ShapeError."""
    if mask is None:
        return None
    return messages.pack(exactly("mask", mask, n_channels, np.bool_, "True or False"), "u1")


def packed_features(values: ArrayLike, n_features: int) -> messages.Array:
    """Features (F,) of a bin as they are sent, NaN where there is none. Raises ShapeError."""
    expected = "finite numbers, or NaN where not observed"
    given = _vector("features", values, n_features, expected)
    if given.dtype.kind not in "biuf" or np.isinf(given).any():
        raise ShapeError("features", expected=expected, got=repr(given))
    return messages.pack(given, "<f8")


def sized(
    field: str, values: ArrayLike, dtype: DTypeLike, expected: str, size: int | None = None
) -> NDArray[Any]:
    """Return ``values`` as a 1-D array of ``dtype``, checked for ``size`` if given."""
    shape = np.shape(values)
    given = np.zeros(0) if shape == (0,) else values
    if len(shape) != 1 or (size is not None and shape != (size,)):
        wanted = "(S,)" if size is None else f"({size},)"
        raise ShapeError(field, expected=wanted, got=str(shape))
    return exactly(field, given, shape[0], dtype, expected)
