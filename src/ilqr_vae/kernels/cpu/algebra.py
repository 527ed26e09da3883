"""Small dense algebra for the CPU kernels: products by tiles kept in registers, and elimination.

Everything expensive in a Riccati step is a product X' Y of row-major matrices. Products, rows and
symmetric sums are put together from the vector instructions of `tiles.py`; a number's bits do not
depend on where in a matrix it stands. Most functions take pointers; see ``tiles.at``.

Only numba code lives here: it must not be wrapped by a type-checking import hook.
"""

# numba infers the types of what it compiles, and gives an intrinsic's first parameter itself.
# pyright: reportMissingParameterType=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numba import config, njit, types
from numba.extending import intrinsic

from ilqr_vae.kernels.cache import KernelCache, cache_folder
from ilqr_vae.kernels.cpu.tiles import (
    COLUMNS,
    ROWS,
    ahead,
    at,
    load,
    make_add,
    make_dots,
    make_mirror,
    make_move,
    make_pad,
    make_tile,
    wide,
)

_folder = cache_folder(Path(__file__).parent)

# Without numba's reference counts: kernels that make no arrays can do without, and each costs an
# atomic operation wherever an array is named. Then only a ``part`` can return a view.
_common: dict[str, Any] = {"nogil": True, "error_model": "numpy", "_nrt": False}


def compiled(function: Callable[..., Any]) -> Any:
    """How entry points are compiled: what Python calls. Kept on disk where that can be."""
    before: str = config.CACHE_DIR  # pyright: ignore[reportAttributeAccessIssue]
    dispatcher: Any = njit(no_cfunc_wrapper=True, **_common)(function)
    if _folder is None:
        return dispatcher
    try:
        # numba looks at it when a cache is made; other code's kernels have their own place
        config.CACHE_DIR = str(_folder)  # pyright: ignore[reportAttributeAccessIssue]
        dispatcher._cache = KernelCache(function)  # as cache=True does
        return dispatcher
    finally:
        config.CACHE_DIR = before  # pyright: ignore[reportAttributeAccessIssue]


#: How everything they call is compiled: without a wrapper of its own, which for functions of many
#: arrays takes longer to compile than the function.
inner = njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, **_common)
#: How a long function is written in parts. LLVM works again on everything a function calls, at each
#: level of calls; parts that are merged before it sees them are worked on once.
part = njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, inline="always", **_common)


@intrinsic
def never_inline(typingctx: Any) -> Any:
    """Keeps the function that calls it whole: called, not copied, by what LLVM makes of others."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.void(), codegen


_row, _row_two = make_tile(1, onto=True), make_tile(1, vectors=2, onto=True)
_row_three = make_tile(1, vectors=3, onto=True)
_row_minus, _row_three_minus = make_tile(1, minus=True), make_tile(1, vectors=3, minus=True)
_move_eight, _move_four, _move_one = make_move(8), make_move(4), make_move(1)
_add_eight, _add_four, _add_one = make_add(8), make_add(4), make_add(1)
_pad_eight, _four_dots = make_pad(COLUMNS), make_dots(4)
_mirror = make_mirror(ROWS, diagonal=False)
_mirror_diagonal = make_mirror(ROWS, diagonal=True)


def _make_product(**kind: bool) -> Any:
    full, full_wide = make_tile(ROWS, **kind), make_tile(ROWS, 2 * COLUMNS, **kind)
    rest, rest_wide = make_tile(4, **kind), make_tile(4, 2 * COLUMNS, **kind)

    @inner
    def product(X, ldx, Y, ldy, C, ldc, length, rows, columns, upper):
        never_inline()
        for i in range(0, rows, ROWS):
            short = rows - i <= 4
            x = ahead(X, i)
            j = i // COLUMNS * COLUMNS if upper else 0
            while j < columns:
                y, c = ahead(Y, j), ahead(C, i * ldc + j)
                double = wide(Y) > COLUMNS and columns - j > COLUMNS
                if double and short:
                    rest_wide(x, ldx, y, ldy, c, ldc, length)
                elif double:
                    full_wide(x, ldx, y, ldy, c, ldc, length)
                elif short:
                    rest(x, ldx, y, ldy, c, ldc, length)
                else:
                    full(x, ldx, y, ldy, c, ldc, length)
                j += 2 * COLUMNS if double else COLUMNS

    return product


#: multiply(X, ldx, Y, ldy, C, ldc, length, rows, columns, upper): C = X' Y over ``length`` rows; C
#: gets ``rows`` (to 4) by ``columns`` (to 8) written. X, Y and C are row-major with row lengths
#: ldx, ldy, ldc. X and Y must be readable, C writable, up to the rounded size. With ``upper`` only
#: the tiles that touch the upper triangle are computed.
multiply = _make_product()
#: C += X' Y and C -= X' Y; see ``multiply``.
multiply_add, multiply_subtract = _make_product(onto=True), _make_product(minus=True)


@inner
def add_symmetric(Z, ldz, P, ldp, Q, ldq, size):
    """Z = P + Q, all symmetric, P and Q given by their upper triangles; Z may be P.

    All are used up to ``size`` rounded up to 8.
    """
    never_inline()
    for i in range(0, size, ROWS):
        up, p, q = i * ldz + i, i * ldp + i, i * ldq + i
        _mirror_diagonal(Z, ldz, up, up, P, ldp, p, Q, ldq, q)
        for j in range(i + ROWS, size, ROWS):
            up, low, p, q = i * ldz + j, j * ldz + i, i * ldp + j, i * ldq + j
            _mirror(Z, ldz, up, low, P, ldp, p, Q, ldq, q)


@inner
def add_row_product(out, x, M, ldm, length, columns):
    """out[:columns] += x' M over ``length`` rows of M; ``columns`` is rounded up to 8."""
    never_inline()
    j = 0
    while j < columns:
        left, y, o = columns - j, ahead(M, j), ahead(out, j)
        if left > 2 * COLUMNS:
            _row_three(x, 1, y, ldm, o, 0, length)
            j += 3 * COLUMNS
        elif left > COLUMNS:
            _row_two(x, 1, y, ldm, o, 0, length)
            j += 2 * COLUMNS
        else:
            _row(x, 1, y, ldm, o, 0, length)
            j += COLUMNS


@inner
def subtract_row_product(out, x, M, ldm, length, columns):
    """out[:columns] -= x' M; see ``add_row_product``."""
    never_inline()
    j = 0
    while j < columns:
        y, o = ahead(M, j), ahead(out, j)
        if columns - j > 2 * COLUMNS:
            _row_three_minus(x, 1, y, ldm, o, 0, length)
            j += 3 * COLUMNS
        else:
            _row_minus(x, 1, y, ldm, o, 0, length)
            j += COLUMNS


@inner
def move_row(target, source, count, factor):
    """target[:count] = factor * source[:count]."""
    j = 0
    while j + 8 <= count:
        _move_eight(ahead(target, j), factor, ahead(source, j))
        j += 8
    if j + 4 <= count:
        _move_four(ahead(target, j), factor, ahead(source, j))
        j += 4
    while j < count:
        _move_one(ahead(target, j), factor, ahead(source, j))
        j += 1


@inner
def add_row(target, factor, source, count):
    """target[:count] += factor * source[:count]."""
    j = 0
    while j + 8 <= count:
        _add_eight(ahead(target, j), factor, ahead(source, j))
        j += 8
    if j + 4 <= count:
        _add_four(ahead(target, j), factor, ahead(source, j))
        j += 4
    while j < count:
        _add_one(ahead(target, j), factor, ahead(source, j))
        j += 1


@inner
def move_rows(target, ldt, source, lds, rows, columns, factor):
    """``move_row`` for rows ldt and lds apart."""
    never_inline()
    for i in range(rows):
        move_row(ahead(target, i * ldt), ahead(source, i * lds), columns, factor)


@inner
def pad_row(target, source, count):
    """``count`` numbers copied, then zeros to the next 8.

    Written by whole vectors: a vector that is read soon after its parts were written waits.
    """
    for j in range(0, count, COLUMNS):
        _pad_eight(ahead(target, j), ahead(source, j), min(COLUMNS, count - j))


@inner
def pad_rows(target, ldt, source, lds, rows, columns):
    """``pad_row`` for rows ldt and lds apart."""
    never_inline()
    for i in range(rows):
        pad_row(ahead(target, i * ldt), ahead(source, i * lds), columns)


@inner
def round_up(size, unit):
    return (size + unit - 1) // unit * unit


@inner
def carve(scratch, start, rows, columns):
    """A (rows, columns) view of a flat buffer, and where the next one can start."""
    end = start + rows * columns
    return scratch[start:end].reshape(rows, columns), end


@inner
def eliminate(E, S, size, width, diagonal):
    """The symmetric matrix in the first ``size`` columns of E factorised as U' D^{-1} U.

    U is upper triangular and D its diagonal. E gets [U | (U' D^{-1})^{-1} X] from [matrix | X], S
    the same rows divided by their pivots. Returns whether the matrix was positive definite to
    working precision: each pivot above size * eps * its diagonal entry. Only the upper triangle is
    read; nothing below it has a meaning afterwards. S has E's shape; ``diagonal`` is scratch.
    """
    never_inline()
    tiny = size * np.finfo(E.dtype).eps
    one = E.dtype.type(1.0)
    ld = E.shape[1]
    for p in range(size):
        diagonal[p] = E[p, p]
    for p in range(size):
        pivot = E[p, p]
        if not (pivot > 0.0 and pivot > tiny * diagonal[p]):
            return False
        inverse = one / pivot
        for i in range(p + 1, size):
            start = i // COLUMNS * COLUMNS
            factor = -E[p, i] * inverse
            add_row(at(E, i * ld + start), factor, at(E, p * ld + start), width - start)
        start = p // COLUMNS * COLUMNS
        move_row(at(S, p * ld + start), at(E, p * ld + start), width - start, inverse)
    return True


@inner
def back_substitute(S, ld, size, first, width):
    """Columns ``first`` to ``width`` of S, of ``eliminate``, become matrix^{-1} X. The columns are
    rounded up to 8."""
    never_inline()
    for p in range(size - 2, -1, -1):
        row, below = ahead(S, p * ld), ahead(S, (p + 1) * ld + first)
        left, count = size - 1 - p, width - first
        subtract_row_product(ahead(row, first), ahead(row, p + 1), below, ld, left, count)


@inner
def inverse_of_symmetric(M, out, size, scratch):
    """out[:size, :size] = M^{-1}; False where M is not positive definite.

    ``out`` is square, its size rounded up to 8, and zero outside; ``scratch`` holds five times its
    numbers and ``size`` more.
    """
    never_inline()
    wide_size = out.shape[1]
    zero, half, one = out.dtype.type(0.0), out.dtype.type(0.5), out.dtype.type(1.0)
    width = 2 * wide_size
    E, end = carve(scratch, 0, wide_size, width)
    S, end = carve(scratch, end, wide_size, width)
    nothing, end = carve(scratch, end, 1, wide_size)
    scratch[:end] = zero
    for i in range(size):
        for j in range(i, size):
            E[i, j] = half * (M[i, j] + M[j, i])
        E[i, wide_size + i] = one
    if not eliminate(E, S, size, width, scratch[end:]):
        return False
    out[:] = zero
    X, Y, C = at(E, wide_size), at(S, wide_size), at(out, 0)
    multiply(X, width, Y, width, C, wide_size, size, size, size, True)
    add_symmetric(C, wide_size, C, wide_size, at(nothing, 0), 0, size)
    return True


@inner
def add_product(out, M, ldm, x, rows, columns):
    """out += M x, for ``rows`` by ``columns`` numbers of M, row length ldm. To the next 4 ``out``
    is written and x read; there x must be finite."""
    never_inline()
    for i in range(0, rows, 4):
        _four_dots(ahead(out, i), ahead(M, i * ldm), ldm, x, min(4, rows - i), columns)


@inner
def add_transposed_product(out, M, x, rows, columns):
    """out += M' x for a whole matrix; of ``out`` whole vectors are written, and no number is read
    beyond the matrix."""
    never_inline()
    safe = min(rows, max(0, (rows * columns - round_up(columns, COLUMNS)) // columns + 1))
    add_row_product(out, x, M, columns, safe, columns)
    for i in range(safe, rows):
        add_row(out, load(ahead(x, i)), ahead(M, i * columns), columns)


@inner
def all_finite(array):
    never_inline()
    largest = np.finfo(array.dtype).max
    finite = True
    for i in range(array.size):
        finite &= abs(array[i]) <= largest
    return finite
