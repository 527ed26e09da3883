"""Small dense algebra for the CPU kernels: products by tiles kept in registers, and elimination.

Everything expensive in a Riccati step is a product X' Y of row-major matrices. LLVM's vectoriser
does badly on such products at the sizes met here (a few rows of 20 to 80 numbers: remainders and
alias checks cost more than the arithmetic), so a 4 x 8 tile is written out as vector instructions.
It works at every size, which is why nothing here is compiled per (n, m).

A tile's sum runs over the rows of X and Y in order, each term fused where the processor can, so its
bits do not depend on what surrounds it. No fastmath: NaN must be seen.

Only numba code lives here: it must not be wrapped by a type-checking import hook. numba's cache
notices a change of the file a compiled function stands in, not of the files it calls into: touch
`kernels.py` after editing this one.
"""

# numba infers the types of what it compiles, and gives an intrinsic's first parameter itself.
# pyright: reportMissingParameterType=false, reportCallIssue=false

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

ROWS = 4
COLUMNS = 8

#: How entry points are compiled: what Python calls.
compiled = njit(cache=True, nogil=True, error_model="numpy", no_cfunc_wrapper=True)
#: How everything they call is compiled: without a wrapper of its own, which for functions of many
#: arrays takes longer to compile than the function.
inner = njit(nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
#: How a long function is written in parts. LLVM works again on everything a function calls, at each
#: level of calls; parts that are merged before it sees them are worked on once.
part = njit(
    nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True, inline="always"
)


@intrinsic
def never_inline(typingctx: Any) -> Any:
    """Keeps the function that calls it whole: called, not copied, by what LLVM makes of others."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.void(), codegen


def make_tile(rows: int, *, across: bool) -> Any:
    """An intrinsic that computes ``rows`` x 8 numbers of a product; all arrays flat.

    tile(X, x0, ldx, Y, y0, ldy, C, c0, ldc, length):
    C[c0 + i ldc + j] = sum_l X(l, i) Y[y0 + l ldy + j] for i < rows, j < 8, where X(l, i) is
    X[x0 + l ldx + i], or with ``across`` X[x0 + i ldx + l] (X as it stands, not transposed).
    """

    def tile(
        typingctx: Any,
        X: Any,
        x0: Any,
        ldx: Any,
        Y: Any,
        y0: Any,
        ldy: Any,
        C: Any,
        c0: Any,
        ldc: Any,
        length: Any,
    ) -> Any:
        index = types.intp
        signature = types.void(X, index, index, Y, index, index, C, index, index, index)

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            def data(position: int) -> Any:
                array = context.make_array(signature.args[position])(
                    context, builder, args[position]
                )
                return array.data

            scalar = context.get_value_type(X.dtype)
            vector = ir.VectorType(scalar, COLUMNS)
            size = X.dtype.bitwidth // 8
            fused = cgutils.get_or_insert_function(
                builder.module,
                ir.FunctionType(vector, [vector] * 3),
                f"llvm.fmuladd.v{COLUMNS}f{X.dtype.bitwidth}",
            )
            lane = ir.IntType(32)
            undefined = ir.Constant(vector, ir.Undefined)
            everywhere = ir.Constant(ir.VectorType(lane, COLUMNS), [lane(0)] * COLUMNS)

            sums = [cgutils.alloca_once(builder, vector) for _ in range(rows)]
            for total in sums:
                builder.store(ir.Constant(vector, [scalar(0.0)] * COLUMNS), total)
            x_base = builder.gep(data(0), [args[1]])
            y_base = builder.gep(data(3), [args[4]])
            x_rows = [
                builder.gep(x_base, [builder.mul(ir.Constant(args[2].type, i), args[2])])
                for i in range(rows if across else 0)
            ]
            with cgutils.for_range(builder, args[9]) as loop:
                x_row = builder.gep(x_base, [builder.mul(loop.index, args[2])])
                y_row = builder.gep(y_base, [builder.mul(loop.index, args[5])])
                y = builder.load(builder.bitcast(y_row, vector.as_pointer()), align=size)
                for i, total in enumerate(sums):
                    if across:
                        place = builder.gep(x_rows[i], [loop.index])
                    else:
                        place = builder.gep(x_row, [ir.Constant(args[1].type, i)])
                    x = builder.insert_element(undefined, builder.load(place), lane(0))
                    x = builder.shuffle_vector(x, undefined, everywhere)
                    builder.store(builder.call(fused, [x, y, builder.load(total)]), total)
            c_base = builder.gep(data(6), [args[7]])
            for i, total in enumerate(sums):
                c_row = builder.gep(c_base, [builder.mul(ir.Constant(args[8].type, i), args[8])])
                builder.store(
                    builder.load(total), builder.bitcast(c_row, vector.as_pointer()), align=size
                )
            return context.get_dummy_value()

        return signature, codegen

    return intrinsic(tile)


_tile = make_tile(ROWS, across=False)


@inner
def multiply(X, x0, ldx, Y, y0, ldy, C, ldc, length, rows, columns, upper):
    """C = X' Y over ``length`` rows; C gets ``rows`` (to 4) by ``columns`` (to 8) written.

    X, Y and C are flat and row-major with row lengths ldx, ldy, ldc; X and Y start at x0 and y0 and
    must be readable, C writable, up to the rounded size. With ``upper`` only the tiles that touch
    the upper triangle are computed.
    """
    never_inline()
    for i in range(0, rows, ROWS):
        first = (i // COLUMNS) * COLUMNS if upper else 0
        for j in range(first, columns, COLUMNS):
            _tile(X, x0 + i, ldx, Y, y0 + j, ldy, C, i * ldc + j, ldc, length)


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
    size * eps * its diagonal entry. Only the upper triangle is read. ``diagonal`` is scratch.
    """
    never_inline()
    tiny = size * np.finfo(E.dtype).eps
    one = E.dtype.type(1.0)
    for p in range(size):
        diagonal[p] = E[p, p]
    for p in range(size):
        pivot_row = E[p]
        pivot = pivot_row[p]
        if not (pivot > 0.0 and pivot > tiny * diagonal[p]):
            return False
        scale = one / np.sqrt(pivot)
        for j in range(p, width):
            pivot_row[j] *= scale
        for i in range(p + 1, size):
            factor = pivot_row[i]
            row = E[i]
            for j in range(i, width):
                row[j] -= factor * pivot_row[j]
    return True


@inner
def back_substitute(E, size, first, width):
    """Columns ``first`` to ``width`` of E multiplied by U^{-1}."""
    never_inline()
    one = E.dtype.type(1.0)
    for p in range(size - 1, -1, -1):
        row = E[p]
        for i in range(p + 1, size):
            factor = row[i]
            other = E[i]
            for j in range(first, width):
                row[j] -= factor * other[j]
        scale = one / row[p]
        for j in range(first, width):
            row[j] *= scale


@inner
def add_product(out, matrix, vector):
    """out += matrix @ vector, four rows at a time."""
    never_inline()
    rows, columns = matrix.shape
    i = 0
    while i + 3 < rows:
        s0, s1, s2, s3 = out[i], out[i + 1], out[i + 2], out[i + 3]
        for j in range(columns):
            x = vector[j]
            s0 += matrix[i, j] * x
            s1 += matrix[i + 1, j] * x
            s2 += matrix[i + 2, j] * x
            s3 += matrix[i + 3, j] * x
        out[i], out[i + 1], out[i + 2], out[i + 3] = s0, s1, s2, s3
        i += 4
    while i < rows:
        s = out[i]
        for j in range(columns):
            s += matrix[i, j] * vector[j]
        out[i] = s
        i += 1


@inner
def all_finite(array):
    never_inline()
    largest = np.finfo(array.dtype).max
    finite = True
    for i in range(array.size):
        finite &= abs(array[i]) <= largest
    return finite
