"""What launching a Triton kernel needs: whether there is Triton, what fits, how many warps.

``TRITON_INTERPRET=1``, set before Triton is imported, runs the same kernels on the CPU.
"""

from __future__ import annotations

import importlib
import logging
from functools import cache
from types import ModuleType

import torch

_log = logging.getLogger(__name__)

#: Dynamics with kernels, by ``Dynamics.kernel``.
FAMILIES = ("linear", "mgu2")
#: The largest problem whose blocks a program can hold: n by dtype, and m.
LARGEST_N = {torch.float32: 128, torch.float64: 64}
LARGEST_M = 32
#: A tensor product takes no smaller block.
_SMALLEST = 16


@cache
def kernels(module: str, what: str) -> ModuleType | None:
    """A module of Triton functions, or None (said once in the log) where there is no Triton.

    Args:
        module: its name.
        what: what is done in torch instead, for the log.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        _log.warning("Triton cannot be imported (%s): %s in torch", error, what)
        return None


@cache
def _say_too_large(n: int, m: int, dtype: torch.dtype, what: str) -> None:
    limits = f"to {LARGEST_N.get(dtype, 0)} and {LARGEST_M}"
    _log.warning(
        "no GPU kernel for n = %d, m = %d, %s (%s): %s in torch", n, m, dtype, limits, what
    )


def fits(n: int, m: int, dtype: torch.dtype, what: str) -> bool:
    """Whether a program can hold a problem of this size; says once in the log where not."""
    if n <= LARGEST_N.get(dtype, 0) and m <= LARGEST_M:
        return True
    _say_too_large(n, m, dtype, what)
    return False


def block(size: int) -> int:
    """Rows of the block that holds ``size`` of them."""
    return max(_SMALLEST, 1 << (size - 1).bit_length())


def products(n: int, dtype: torch.dtype) -> int:
    """How matrices of n rows are multiplied (``blocks.product``).

    On an H200, three TF32 passes take a third of the time of float32 arithmetic at n = 60, and half
    more at n = 20.
    """
    return 2 if dtype == torch.float32 and n > 32 else 0


def options(n: int, few: int = 32) -> dict[str, int]:
    """How a program for matrices of n rows is compiled: four warps for up to ``few`` rows."""
    return {"num_warps": 4 if n <= few else 8}
