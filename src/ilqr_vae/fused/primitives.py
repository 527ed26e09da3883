"""Vector arithmetic the fused kernels are made of: panels, products with them, exponentials.

A matrix that is multiplied from the right is kept as panels of eight columns, (P, rows, 8), padded
with zeros: each panel is read front to back once, whatever the matrix's size. Row buffers that are
written eight at a time have their length rounded up to eight.

Only numba code lives here: it must not be wrapped by a type-checking import hook. numba's cache
notices a change of the file a compiled function stands in, not of the files it calls into: touch
the fused kernels and ``rollout_kernels.py`` after editing this file or ``lqr/algebra.py``.
"""

# numba infers the types of what it compiles, and gives an intrinsic's first parameter itself.
# pyright: reportMissingParameterType=false, reportCallIssue=false

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ilqr_vae.lqr.algebra import compiled, inner, never_inline, round_up
from ilqr_vae.lqr.tiles import COLUMNS, ROWS, make_tile

_rows = make_tile(ROWS, across=True)
_four_rows = make_tile(4, across=True)
_one_row = make_tile(1, across=True)

# exp(x) = 2^k exp(r), |r| <= log(2)/2: bits of the mantissa, smallest and largest x whose 2^k is a
# normal number, the degree of the Taylor polynomial, and log(2) in two parts
_EXP = {
    64: (52, -708.0, 709.0, 13, 6.93147180369123816490e-01, 1.90821492927058770002e-10),
    32: (23, -87.0, 88.0, 7, 0.693359375, -2.12194440e-4),
}


@intrinsic
def _exp_eight(typingctx: Any, X: Any, x0: Any) -> Any:
    """X[x0 : x0 + 8] = exp of itself, to about one unit in the last place; flat.

    Arguments are clamped to where the result is a normal number. NaN stays NaN.
    """
    signature = types.void(X, types.intp)
    bits = X.dtype.bitwidth
    mantissa, low, high, degree, log2_high, log2_low = _EXP[bits]

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, args[0])
        scalar = context.get_value_type(X.dtype)
        vector = ir.VectorType(scalar, COLUMNS)
        integers = ir.VectorType(ir.IntType(bits), COLUMNS)
        fused = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(vector, [vector] * 3),
            f"llvm.fmuladd.v{COLUMNS}f{bits}",
        )

        def all_of(value: float) -> Any:
            return ir.Constant(vector, [scalar(float(value))] * COLUMNS)

        def fma(a: Any, b: Any, c: Any) -> Any:
            return builder.call(fused, [a, b, c])

        place = builder.bitcast(builder.gep(array.data, [args[1]]), vector.as_pointer())
        given = builder.load(place, align=bits // 8)
        x = builder.select(builder.fcmp_ordered(">", given, all_of(high)), all_of(high), given)
        x = builder.select(builder.fcmp_ordered("<", x, all_of(low)), all_of(low), x)
        # adding 1.5 * 2^mantissa rounds to an integer, which then stands in the lowest bits
        magic = all_of(1.5 * 2.0**mantissa)
        shifted = builder.fadd(builder.fmul(x, all_of(1.0 / math.log(2.0))), magic)
        k = builder.fsub(shifted, magic)
        r = fma(k, all_of(-log2_high), x)
        r = fma(k, all_of(-log2_low), r)
        total = all_of(1.0 / math.factorial(degree))
        for power in range(degree - 1, -1, -1):
            total = fma(total, r, all_of(1.0 / math.factorial(power)))
        exponent = builder.shl(
            builder.bitcast(shifted, integers),
            ir.Constant(integers, [ir.IntType(bits)(mantissa)] * COLUMNS),
        )
        total = builder.bitcast(builder.add(builder.bitcast(total, integers), exponent), vector)
        total = builder.select(builder.fcmp_unordered("uno", given, given), given, total)
        builder.store(total, place, align=bits // 8)
        return context.get_dummy_value()

    return signature, codegen


@inner
def exp_inplace(x, start, count):
    """exp of x[start : start + count] in place; x is flat, writable to the next multiple of 8."""
    for i in range(0, count, COLUMNS):
        _exp_eight(x, start + i)


@compiled
def pack(matrix, panels):
    """A (rows, columns) matrix as panels (P, rows, 8), zeros beyond its columns."""
    rows, columns = matrix.shape
    panels[:] = 0.0
    for i in range(rows):
        for j in range(columns):
            panels[j // COLUMNS, i, j % COLUMNS] = matrix[i, j]


@compiled
def pack_transposed(matrix, panels):
    """The transpose of a (columns, rows) matrix as panels (P, rows, 8)."""
    columns, rows = matrix.shape
    panels[:] = 0.0
    for j in range(columns):
        for i in range(rows):
            panels[j // COLUMNS, i, j % COLUMNS] = matrix[j, i]


@compiled
def pack_products(C, panels):
    """Panels (P, N, 8) of the products C[:, i] * C[:, j], j >= i, row by row of the triangle."""
    N, n = C.shape
    panels[:] = 0.0
    column = 0
    for i in range(n):
        for j in range(i, n):
            panel, lane = column // COLUMNS, column % COLUMNS
            for k in range(N):
                panels[panel, k, lane] = C[k, i] * C[k, j]
            column += 1


@inner
def times_panels(X, x0, ldx, rows, panels, C, c0, ldc):
    """C = X P for a row-major X with ``rows`` rows; C gets all of the panels' columns written.

    X and C are flat, with row lengths ldx and ldc, and start at x0 and c0.
    """
    never_inline()
    count, length, _ = panels.shape
    most, fours = rows // ROWS * ROWS, rows // 4 * 4
    for p in range(count):
        y0 = p * length * COLUMNS
        column = c0 + p * COLUMNS
        for i in range(0, most, ROWS):
            _rows(X, x0 + i * ldx, ldx, panels, y0, COLUMNS, C, column + i * ldc, ldc, length)
        for i in range(most, fours, 4):
            _four_rows(X, x0 + i * ldx, ldx, panels, y0, COLUMNS, C, column + i * ldc, ldc, length)
        for i in range(fours, rows):
            _one_row(X, x0 + i * ldx, ldx, panels, y0, COLUMNS, C, column + i * ldc, ldc, length)


@inner
def eight(size):
    """``size`` rounded up to whole vectors."""
    return round_up(size, COLUMNS)


@inner
def finite(x):
    """Whether one number is."""
    return abs(x) <= np.finfo(x).max
