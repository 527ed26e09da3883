"""Vector arithmetic the fused kernels are made of: panels, products with them, exponentials.

A matrix that is multiplied from the right is kept as panels of columns, (P, rows, PANEL), padded
with zeros: each panel is read front to back once, whatever the matrix's size. Row buffers that are
written a panel at a time have their length rounded up to ``whole`` panels.

Only numba code lives here: it must not be wrapped by a type-checking import hook.
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

from ilqr_vae.kernels.cpu import threads
from ilqr_vae.kernels.cpu.algebra import compiled, inner, never_inline, round_up
from ilqr_vae.kernels.cpu.tiles import COLUMNS, PANEL, ROWS, Emit, ahead, at, make_tile

_rows = make_tile(ROWS, PANEL, across=True)
_four_rows = make_tile(4, PANEL, across=True)
_one_row = make_tile(1, PANEL, across=True)

# exp(x) = 2^k exp(r), |r| <= log(2)/2: bits of the mantissa, smallest and largest x whose 2^k is a
# normal number, the degree of the Taylor polynomial, and log(2) in two parts
_EXP = {
    64: (52, -708.0, 709.0, 13, 6.93147180369123816490e-01, 1.90821492927058770002e-10),
    32: (23, -87.0, 88.0, 7, 0.693359375, -2.12194440e-4),
}


def _emit_exp(e: Emit, given: Any) -> Any:
    """exp of a vector, to about one unit in the last place; of NaN it is NaN.

    Arguments are clamped to where the result is a normal number.
    """
    builder, bits = e.builder, 8 * e.size
    mantissa, low, high, degree, log2_high, log2_low = _EXP[bits]
    integers = ir.VectorType(ir.IntType(bits), e.lanes)

    def all_of(value: float) -> Any:
        return ir.Constant(e.vector, [e.scalar(float(value))] * e.lanes)

    x = builder.select(builder.fcmp_ordered(">", given, all_of(high)), all_of(high), given)
    x = builder.select(builder.fcmp_ordered("<", x, all_of(low)), all_of(low), x)
    # adding 1.5 * 2^mantissa rounds to an integer, which then stands in the lowest bits
    magic = all_of(1.5 * 2.0**mantissa)
    shifted = builder.fadd(builder.fmul(x, all_of(1.0 / math.log(2.0))), magic)
    k = builder.fsub(shifted, magic)
    r = e.fma(k, all_of(-log2_high), x)
    r = e.fma(k, all_of(-log2_low), r)
    total = all_of(1.0 / math.factorial(degree))
    for power in range(degree - 1, -1, -1):
        total = e.fma(total, r, all_of(1.0 / math.factorial(power)))
    exponent = builder.shl(
        builder.bitcast(shifted, integers),
        ir.Constant(integers, [ir.IntType(bits)(mantissa)] * e.lanes),
    )
    total = builder.bitcast(builder.add(builder.bitcast(total, integers), exponent), e.vector)
    return builder.select(builder.fcmp_unordered("uno", given, given), given, total)


@intrinsic
def next_of(typingctx: Any, queue: Any) -> Any:
    """queue[0], which is one more for whoever asks next, in whatever thread."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.atomic_rmw("add", place, ir.IntType(64)(1), "monotonic")

    return types.int64(queue), codegen


@intrinsic
def _exp_eight(typingctx: Any, X: Any, x0: Any) -> Any:
    """X[x0 : x0 + 8] = exp of itself."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emit(context, builder, signature, args, COLUMNS)
        place = e.at(0, args[1])
        e.store(_emit_exp(e, e.load(place)), place)
        return e.done()

    return types.void(X, types.intp), codegen


def _make_poisson(lanes: int) -> Any:
    """An intrinsic that scores ``count`` // ``lanes`` vectors of Poisson channels.

    poisson(d, d0, w, w0, values, v0, mask, m0, count): of log rates a in d, from d0,
    d = (exp(a) - y) s and w = exp(a) s; answers the sum of (exp(a) - y a) s, in float64, for
    values y from v0 and mask s from m0.
    """

    def poisson(
        typingctx: Any,
        d: Any,
        d0: Any,
        w: Any,
        w0: Any,
        values: Any,
        v0: Any,
        mask: Any,
        m0: Any,
        count: Any,
    ) -> Any:
        index = types.intp
        signature = types.float64(d, index, w, index, values, index, mask, index, index)

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            e = Emit(context, builder, signature, args, lanes)
            d, w, y, s = e.at(0, args[1]), e.at(2, args[3]), e.at(4, args[5]), e.at(6, args[7])
            double = ir.VectorType(ir.DoubleType(), lanes)
            total = cgutils.alloca_once(builder, double)
            builder.store(ir.Constant(double, [ir.DoubleType()(0.0)] * lanes), total)
            unit = ir.Constant(args[8].type, lanes)
            with cgutils.for_range(builder, builder.udiv(args[8], unit)) as loop:
                at = builder.mul(loop.index, unit)
                a, count, seen = (e.load(e.ahead(x, at)) for x in (d, y, s))
                rate = _emit_exp(e, a)
                cost = builder.fmul(builder.fsub(rate, builder.fmul(count, a)), seen)
                if e.size == 4:
                    cost = builder.fpext(cost, double)
                builder.store(builder.fadd(builder.load(total), cost), total)
                e.store(builder.fmul(builder.fsub(rate, count), seen), e.ahead(d, at))
                e.store(builder.fmul(rate, seen), e.ahead(w, at))
            sums = builder.load(total)
            parts = [builder.extract_element(sums, ir.IntType(32)(i)) for i in range(lanes)]
            while len(parts) > 1:
                pairs = zip(parts[::2], parts[1::2], strict=True)
                parts = [builder.fadd(a, b) for a, b in pairs]
            return parts[0]

        return signature, codegen

    return intrinsic(poisson)


_poisson_eight, _poisson_one = _make_poisson(COLUMNS), _make_poisson(1)


@inner
def score_poisson(d, w, row, values, v0, mask, count):
    """Turn log rates, the first ``count`` of a row of d, into slopes d and curvatures w of the
    cost; answers the row's cost. Values and mask of the row start at v0."""
    at = row * d.shape[1]
    total = _poisson_eight(d, at, w, at, values, v0, mask, v0, count)
    whole = count // COLUMNS * COLUMNS
    at, v0 = at + whole, v0 + whole
    return total + _poisson_one(d, at, w, at, values, v0, mask, v0, count - whole)


@inner
def exp_inplace(x, start, count):
    """exp of x[start : start + count] in place; x is flat, writable to the next multiple of 8."""
    for i in range(0, count, COLUMNS):
        _exp_eight(x, start + i)


def new_panels(rows, columns, dtype):
    """Room for the panels of a (rows, columns) matrix."""
    return threads.arrays(dtype, (-(-columns // PANEL), rows, PANEL))[0]


@compiled
def pack(matrix, panels):
    """A (rows, columns) matrix as panels (P, rows, PANEL), zeros beyond its columns."""
    rows, columns = matrix.shape
    panels[:] = 0.0
    for i in range(rows):
        for j in range(columns):
            panels[j // PANEL, i, j % PANEL] = matrix[i, j]


@compiled
def pack_transposed(matrix, panels):
    """The transpose of a (columns, rows) matrix as panels (P, rows, PANEL)."""
    columns, rows = matrix.shape
    panels[:] = 0.0
    for j in range(columns):
        for i in range(rows):
            panels[j // PANEL, i, j % PANEL] = matrix[j, i]


@compiled
def pack_products(C, panels):
    """Panels of the products C[:, i] * C[:, j], (N, pairs j >= i row by row of the triangle)."""
    N, n = C.shape
    panels[:] = 0.0
    column = 0
    for i in range(n):
        for j in range(i, n):
            panel, lane = column // PANEL, column % PANEL
            for k in range(N):
                panels[panel, k, lane] = C[k, i] * C[k, j]
            column += 1


@inner
def times_panels(X, ldx, rows, panels, C, ldc):
    """C = X P for a row-major X with ``rows`` rows; C gets all of the panels' columns written.

    X and C are pointers, with row lengths ldx and ldc.
    """
    never_inline()
    count, length, _ = panels.shape
    most, fours = rows // ROWS * ROWS, rows // 4 * 4
    for p in range(count):
        y, c = at(panels, p * length * PANEL), ahead(C, p * PANEL)
        for i in range(0, most, ROWS):
            _rows(ahead(X, i * ldx), ldx, y, PANEL, ahead(c, i * ldc), ldc, length)
        for i in range(most, fours, 4):
            _four_rows(ahead(X, i * ldx), ldx, y, PANEL, ahead(c, i * ldc), ldc, length)
        for i in range(fours, rows):
            _one_row(ahead(X, i * ldx), ldx, y, PANEL, ahead(c, i * ldc), ldc, length)


@inner
def whole(size):
    """``size`` rounded up to whole panels."""
    return round_up(size, PANEL)


@inner
def finite(x):
    """Whether one number is."""
    return abs(x) <= np.finfo(x).max
