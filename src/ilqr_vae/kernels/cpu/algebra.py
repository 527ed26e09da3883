"""Small dense algebra for the CPU kernels: products by tiles kept in registers, and elimination.

Everything expensive in a Riccati step is a product X' Y of row-major matrices. Products, rows and
symmetric sums are put together from the vector instructions of `tiles.py`; a number's bits do not
depend on where in a matrix it stands. Arrays are C-contiguous and most places in them are given as
positions in their memory.

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
    make_add,
    make_dots,
    make_mirror,
    make_move,
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


_full_wide = make_tile(ROWS, 2 * COLUMNS)
_full = make_tile(ROWS)
_rest_wide = make_tile(4, 2 * COLUMNS)
_rest = make_tile(4)
_full_wide_minus = make_tile(ROWS, 2 * COLUMNS, minus=True)
_full_minus = make_tile(ROWS, minus=True)
_rest_minus = make_tile(4, minus=True)
_across_wide = make_tile(ROWS, 2 * COLUMNS, across=True)
_across = make_tile(ROWS, across=True)
_across_rest = make_tile(4, across=True)
_row, _row_two = make_tile(1, onto=True), make_tile(1, vectors=2, onto=True)
_row_three = make_tile(1, vectors=3, onto=True)
_row_minus, _row_three_minus = make_tile(1, minus=True), make_tile(1, vectors=3, minus=True)
_move_eight, _move_four, _move_one = make_move(8), make_move(4), make_move(1)
_add_eight, _add_four, _add_one = make_add(8), make_add(4), make_add(1)
_four_dots, _one_dot, _short_dot = make_dots(4, 4), make_dots(4, 1), make_dots(1, 1)
_mirror = make_mirror(ROWS, diagonal=False)
_mirror_diagonal = make_mirror(ROWS, diagonal=True)


@inner
def multiply(X, x0, ldx, Y, y0, ldy, C, c0, ldc, length, rows, columns, upper):
    """C = X' Y over ``length`` rows; C gets ``rows`` (to 4) by ``columns`` (to 8) written.

    X, Y and C are row-major with row lengths ldx, ldy, ldc; they start at x0, y0 and c0. X and Y
    must be readable, C writable, up to the rounded size. With ``upper`` only the tiles that touch
    the upper triangle are computed.
    """
    never_inline()
    for i in range(0, rows, ROWS):
        short = rows - i <= 4
        j = i // COLUMNS * COLUMNS if upper else 0
        while j < columns:
            x, y, c = x0 + i, y0 + j, c0 + i * ldc + j
            double = wide(Y) > COLUMNS and columns - j > COLUMNS
            if double and short:
                _rest_wide(X, x, ldx, Y, y, ldy, C, c, ldc, length)
            elif double:
                _full_wide(X, x, ldx, Y, y, ldy, C, c, ldc, length)
            elif short:
                _rest(X, x, ldx, Y, y, ldy, C, c, ldc, length)
            else:
                _full(X, x, ldx, Y, y, ldy, C, c, ldc, length)
            j += 2 * COLUMNS if double else COLUMNS


@inner
def subtract_square(W, w0, ldw, C, c0, ldc, length, size):
    """C -= W' W over ``length`` rows, the tiles that touch the upper triangle; see ``multiply``."""
    never_inline()
    for i in range(0, size, ROWS):
        short = size - i <= 4
        j = i // COLUMNS * COLUMNS
        while j < size:
            x, y, c = w0 + i, w0 + j, c0 + i * ldc + j
            double = wide(C) > COLUMNS and size - j > COLUMNS and not short
            if double:
                _full_wide_minus(W, x, ldw, W, y, ldw, C, c, ldc, length)
            elif short:
                _rest_minus(W, x, ldw, W, y, ldw, C, c, ldc, length)
            else:
                _full_minus(W, x, ldw, W, y, ldw, C, c, ldc, length)
            j += 2 * COLUMNS if double else COLUMNS


@inner
def multiply_across(X, x0, ldx, Y, y0, ldy, C, c0, ldc, length, rows, columns):
    """``multiply`` with X as it stands, C = X Y; ``rows`` are read and written to the next 4."""
    never_inline()
    for i in range(0, rows, ROWS):
        short = rows - i <= 4
        j = 0
        while j < columns:
            x, y, c = x0 + i * ldx, y0 + j, c0 + i * ldc + j
            double = wide(Y) > COLUMNS and columns - j > COLUMNS and not short
            if double:
                _across_wide(X, x, ldx, Y, y, ldy, C, c, ldc, length)
            elif short:
                _across_rest(X, x, ldx, Y, y, ldy, C, c, ldc, length)
            else:
                _across(X, x, ldx, Y, y, ldy, C, c, ldc, length)
            j += 2 * COLUMNS if double else COLUMNS


@inner
def add_symmetric(Z, z0, Q, q0, ldq, P, p0, ld, size):
    """Z = (Q + Q') / 2 + P, exactly symmetric, of which P's upper triangle is read; Z may be Q.

    The three start at z0, q0 and p0; all are used up to ``ld``, ``size`` rounded up to 8, which is
    the row length of Z and P.
    """
    never_inline()
    for i in range(0, size, ROWS):
        at, there = i * ld + i, i * ldq + i
        _mirror_diagonal(Z, z0 + at, z0 + at, ld, Q, q0 + there, q0 + there, ldq, P, p0 + at, ld)
        for j in range(i + ROWS, size, ROWS):
            up, low = i * ld + j, j * ld + i
            q_up, q_low = q0 + i * ldq + j, q0 + j * ldq + i
            _mirror(Z, z0 + up, z0 + low, ld, Q, q_up, q_low, ldq, P, p0 + up, ld)


@inner
def add_row_product(out, o, x, x0, M, m0, ldm, length, columns):
    """out[o : o + columns] += x' M over ``length`` rows of M; ``columns`` is rounded up to 8."""
    never_inline()
    j = 0
    while j < columns:
        left = columns - j
        if left > 2 * COLUMNS:
            _row_three(x, x0, 1, M, m0 + j, ldm, out, o + j, 0, length)
            j += 3 * COLUMNS
        elif left > COLUMNS:
            _row_two(x, x0, 1, M, m0 + j, ldm, out, o + j, 0, length)
            j += 2 * COLUMNS
        else:
            _row(x, x0, 1, M, m0 + j, ldm, out, o + j, 0, length)
            j += COLUMNS


@inner
def subtract_row_product(out, o, x, x0, M, m0, ldm, length, columns):
    """out[o : o + columns] -= x' M; see ``add_row_product``."""
    never_inline()
    j = 0
    while j < columns:
        if columns - j > 2 * COLUMNS:
            _row_three_minus(x, x0, 1, M, m0 + j, ldm, out, o + j, 0, length)
            j += 3 * COLUMNS
        else:
            _row_minus(x, x0, 1, M, m0 + j, ldm, out, o + j, 0, length)
            j += COLUMNS


@inner
def move_row(target, t, source, s, count, factor):
    """target[t : t + count] = factor * source[s : s + count]."""
    j = 0
    while j + 8 <= count:
        _move_eight(target, t + j, factor, source, s + j)
        j += 8
    if j + 4 <= count:
        _move_four(target, t + j, factor, source, s + j)
        j += 4
    while j < count:
        _move_one(target, t + j, factor, source, s + j)
        j += 1


@inner
def add_row(target, t, factor, source, s, count):
    """target[t : t + count] += factor * source[s : s + count]."""
    j = 0
    while j + 8 <= count:
        _add_eight(target, t + j, factor, source, s + j)
        j += 8
    if j + 4 <= count:
        _add_four(target, t + j, factor, source, s + j)
        j += 4
    while j < count:
        _add_one(target, t + j, factor, source, s + j)
        j += 1


@inner
def move_rows(target, t0, ldt, source, s0, lds, rows, columns):
    """A block of ``source`` written to one of ``target``, other memory; row lengths lds and ldt."""
    never_inline()
    scale_rows(target, t0, ldt, source, s0, lds, rows, columns, target.dtype.type(1.0))


@inner
def scale_rows(target, t0, ldt, source, s0, lds, rows, columns, factor):
    """``move_rows``, times a factor. The last vector of a row may write some numbers twice."""
    for i in range(rows):
        t, s = t0 + i * ldt, s0 + i * lds
        if columns < 8:
            move_row(target, t, source, s, columns, factor)
            continue
        for j in range(0, columns - 7, 8):
            _move_eight(target, t + j, factor, source, s + j)
        last = columns - 8
        _move_eight(target, t + last, factor, source, s + last)


@inner
def round_up(size, unit):
    return (size + unit - 1) // unit * unit


@inner
def carve(scratch, start, rows, columns):
    """A (rows, columns) view of a flat buffer, and where the next one can start."""
    end = start + rows * columns
    return scratch[start:end].reshape(rows, columns), end


@inner
def eliminate(E, size, width, diagonal):
    """Cholesky U'U of the first ``size`` columns of E, its other columns multiplied by U^{-T}.

    Returns whether the matrix was positive definite to working precision: each squared pivot above
    size * eps * its diagonal entry. Only the upper triangle is read; nothing below it has a meaning
    afterwards. ``diagonal`` is scratch.
    """
    never_inline()
    tiny = size * np.finfo(E.dtype).eps
    one = E.dtype.type(1.0)
    ld = E.shape[1]
    for p in range(size):
        diagonal[p] = E[p, p]
    # the rows are scaled at the end, so that no pivot waits for the root of the one before it
    for p in range(size):
        pivot = E[p, p]
        if not (pivot > 0.0 and pivot > tiny * diagonal[p]):
            return False
        inverse = one / pivot
        for i in range(p + 1, size):
            start = i // COLUMNS * COLUMNS
            factor = -E[p, i] * inverse
            add_row(E, i * ld + start, factor, E, p * ld + start, width - start)
    for p in range(size):
        start = p // COLUMNS * COLUMNS
        scale = one / np.sqrt(E[p, p])
        move_row(E, p * ld + start, E, p * ld + start, width - start, scale)
    return True


@inner
def back_substitute(E, size, first, width):
    """Columns ``first`` to ``width`` of E multiplied by U^{-1}."""
    never_inline()
    one = E.dtype.type(1.0)
    ld, count = E.shape[1], width - first
    for p in range(size - 1, -1, -1):
        for i in range(p + 1, size):
            add_row(E, p * ld + first, -E[p, i], E, i * ld + first, count)
        move_row(E, p * ld + first, E, p * ld + first, count, one / E[p, p])


@inner
def inverse_of_symmetric(M, out, size, scratch):
    """out[:size, :size] = M^{-1}; False where M is not positive definite.

    ``out`` is square, its size rounded up to 8, and zero outside; ``scratch`` holds three times its
    numbers and ``size`` more.
    """
    never_inline()
    wide_size = out.shape[1]
    zero, half, one = out.dtype.type(0.0), out.dtype.type(0.5), out.dtype.type(1.0)
    width = 2 * wide_size
    E, end = carve(scratch, 0, round_up(size, COLUMNS), width)
    D, end = carve(scratch, end, wide_size, wide_size)
    scratch[:end] = zero
    for i in range(size):
        for j in range(i, size):
            E[i, j] = half * (M[i, j] + M[j, i])
        E[i, wide_size + i] = one
    if not eliminate(E, size, width, scratch[end:]):
        return False
    multiply(E, wide_size, width, E, wide_size, width, D, 0, wide_size, size, size, size, True)
    out[:] = zero
    add_symmetric(out, 0, out, 0, wide_size, D, 0, wide_size, size)
    return True


@inner
def add_product(out, o, M, m0, ldm, x, x0, rows, columns):
    """out[o :] += M x, for ``rows`` by ``columns`` numbers of M from m0, row length ldm, and
    ``columns`` of x from x0."""
    never_inline()
    whole = columns // 4 * 4
    for i in range(0, rows - 3, 4):
        _four_dots(out, o + i, M, m0 + i * ldm, ldm, x, x0, columns)
    for i in range(rows // 4 * 4, rows):
        _one_dot(out, o + i, M, m0 + i * ldm, ldm, x, x0, columns)
    if whole < columns:
        for i in range(rows):
            start = m0 + i * ldm + whole
            _short_dot(out, o + i, M, start, ldm, x, x0 + whole, columns - whole)


@inner
def all_finite(array):
    never_inline()
    largest = np.finfo(array.dtype).max
    finite = True
    for i in range(array.size):
        finite &= abs(array[i]) <= largest
    return finite
