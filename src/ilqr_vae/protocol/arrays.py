"""Arrays in messages: raw little-endian bytes, a dtype from an allow-list, and a shape."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from ilqr_vae.errors import ProtocolError

DType = Literal["u1", "<u2", "<u4", "<i8", "<f4", "<f8"]
DTYPES: tuple[str, ...] = ("u1", "<u2", "<u4", "<i8", "<f4", "<f8")
_NUMPY = {name: np.dtype(name) for name in DTYPES}


class Array(msgspec.Struct, frozen=True, gc=False):
    """An array as dtype, shape and raw little-endian bytes in C order."""

    dtype: DType
    shape: Annotated[tuple[int, ...], msgspec.Meta(max_length=3)]
    data: bytes


def pack(values: NDArray[Any], dtype: DType) -> Array:
    """Pack an array for a message, converted to ``dtype``."""
    array = np.ascontiguousarray(values, dtype=np.dtype(dtype))
    return Array(dtype, array.shape, array.tobytes())


def unpack(array: Array, field: str) -> NDArray[Any]:
    """Return the read-only array. Raises ProtocolError naming ``field`` if it does not match."""
    dtype, shape = _NUMPY[array.dtype], array.shape
    if shape and min(shape) < 0:
        raise ProtocolError(f"{field}.shape", expected="sizes >= 0", got=str(shape))
    size = math.prod(shape)
    if len(array.data) != size * dtype.itemsize:
        raise ProtocolError(
            f"{field}.data",
            expected=f"{size * dtype.itemsize} bytes for {array.dtype} {shape}",
            got=f"{len(array.data)} bytes",
        )
    return np.frombuffer(array.data, dtype=dtype).reshape(shape)
