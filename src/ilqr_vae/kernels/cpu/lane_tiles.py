"""Vector instructions on several problems at once: one problem in each lane of a vector.

All numbers stand in one flat scratch array S, number e of each problem at S[e L], S[e L + 1], ...
for L lanes; a place in S counts vectors, not numbers.

Only numba code lives here: it must not be wrapped by a type-checking import hook.
"""

# numba infers the types of what it compiles, and gives an intrinsic's first parameter itself.
# pyright: reportMissingParameterType=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ilqr_vae.kernels.cpu.algebra import inner, never_inline
from ilqr_vae.kernels.cpu.tiles import ROWS, Emit, transposed

_SIZE = types.intp
VECTOR_BYTES = 64
#: Rows and columns of a tile: with their sums and factors it fits the registers.
_EDGE = ROWS // 2


class _Lanes(Emit):
    """Vectors of a lane a problem, at places in S, the first argument."""

    def __init__(self, context: Any, builder: Any, signature: Any, args: Any) -> None:
        lanes = VECTOR_BYTES * 8 // signature.args[0].dtype.bitwidth
        super().__init__(context, builder, signature, args, lanes)
        self._base = self.at(0, ir.Constant(args[1].type, 0))

    def place(self, position: Any) -> Any:
        return self.ahead(self._base, self.times(self.lanes, position))

    def constant(self, value: float) -> Any:
        return ir.Constant(self.vector, [self.scalar(value)] * self.lanes)


@intrinsic
def lanes_of(typingctx: Any, S: Any) -> Any:
    """How many problems a vector of S's numbers holds."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.get_constant(_SIZE, VECTOR_BYTES * 8 // S.dtype.bitwidth)

    return _SIZE(S), codegen


def _make_tile(rows: int, columns: int, sign: int) -> Any:
    """An intrinsic tile(S, x, ldx, y, ldy, c, ldc, length): C(i, j) = sum_l X(l, i) Y(l, j) for
    i < rows, j < columns, as ``tiles.make_tile``. With a sign the sum is added to C or taken
    from it."""

    def tile(
        typingctx: Any, S: Any, x: Any, ldx: Any, y: Any, ldy: Any, c: Any, ldc: Any, length: Any
    ) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            e = _Lanes(context, builder, signature, args)
            _, x, ldx, y, ldy, c, ldc, length = args
            one = ir.Constant(x.type, 1)

            def at(start: Any, *terms: Any) -> Any:
                for term in terms:
                    start = builder.add(start, term)
                return e.place(start)

            places = [
                [at(c, e.times(i, ldc), e.times(j, one)) for j in range(columns)]
                for i in range(rows)
            ]
            sums = [[cgutils.alloca_once(builder, e.vector) for _ in each] for each in places]
            for each, totals in zip(places, sums, strict=True):
                for place, total in zip(each, totals, strict=True):
                    builder.store(e.load(place) if sign else e.zero, total)
            with cgutils.for_range(builder, length) as loop:
                down, over = (builder.mul(loop.index, step) for step in (ldy, ldx))
                right = [e.load(at(y, down, e.times(j, one))) for j in range(columns)]
                for i, totals in enumerate(sums):
                    left = e.load(at(x, over, e.times(i, one)))
                    left = builder.fneg(left) if sign < 0 else left
                    for total, factor in zip(totals, right, strict=True):
                        builder.store(e.fma(left, factor, builder.load(total)), total)
            for each, totals in zip(places, sums, strict=True):
                for place, total in zip(each, totals, strict=True):
                    e.store(builder.load(total), place)
            return e.done()

        return types.void(S, *[_SIZE] * 7), codegen

    return intrinsic(tile)


def _make_product(*, sign: int = 0) -> Any:
    """A product of ``rows`` by ``columns`` numbers out of tiles; its other arguments are a tile's.
    With ``upper`` only the tiles that touch the upper triangle are computed."""
    square = _make_tile(_EDGE, _EDGE, sign)
    tall, flat = _make_tile(_EDGE, 1, sign), _make_tile(1, _EDGE, sign)
    single = _make_tile(1, 1, sign)

    @inner
    def product(S, x, ldx, y, ldy, c, ldc, length, rows, columns, upper):
        never_inline()
        i = 0
        while i < rows:
            high = rows - i >= _EDGE
            left, out = x + i, c + i * ldc
            j = i if upper else 0
            while j < columns:
                broad = columns - j >= _EDGE
                if high and broad:
                    square(S, left, ldx, y + j, ldy, out + j, ldc, length)
                elif high:
                    tall(S, left, ldx, y + j, ldy, out + j, ldc, length)
                elif broad:
                    flat(S, left, ldx, y + j, ldy, out + j, ldc, length)
                else:
                    single(S, left, ldx, y + j, ldy, out + j, ldc, length)
                j += _EDGE if broad else 1
            i += _EDGE if high else 1

    return product


def _make_map(value: Callable[[_Lanes, Any, Any, Any], Any]) -> Any:
    """An intrinsic map(S, o, x, y, z): S[o] = value(S[x], S[y], S[z])."""

    def mapped(typingctx: Any, S: Any, o: Any, x: Any, y: Any, z: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            e = _Lanes(context, builder, signature, args)
            given = [e.load(e.place(place)) for place in args[2:]]
            e.store(value(e, *given), e.place(args[1]))
            return e.done()

        return types.void(S, *[_SIZE] * 4), codegen

    return intrinsic(mapped)


multiply = _make_product()
add_product, subtract_product = _make_product(sign=1), _make_product(sign=-1)
plus = _make_map(lambda e, x, y, z: e.builder.fadd(x, y))
fused = _make_map(lambda e, x, y, z: e.fma(x, y, z))
times = _make_map(lambda e, x, y, z: e.builder.fmul(x, y))
minus_times = _make_map(lambda e, x, y, z: e.builder.fmul(e.builder.fneg(x), y))
minus = _make_map(lambda e, x, y, z: e.builder.fneg(x))
inverse = _make_map(lambda e, x, y, z: e.builder.fdiv(e.constant(1.0), x))
copy = _make_map(lambda e, x, y, z: x)
zero, one = (_make_map(lambda e, x, y, z, v=v: e.constant(v)) for v in (0.0, 1.0))


@intrinsic
def positive(typingctx: Any, S: Any, x: Any, y: Any, tiny: Any) -> Any:
    """A bit for each lane: whether S[x] > 0 and S[x] > tiny S[y]."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = _Lanes(context, builder, signature, args)
        pivot, entry = (e.load(e.place(place)) for place in args[1:3])
        # tiny entry is of double precision, as where one problem is solved
        double = ir.DoubleType()
        wide = ir.VectorType(double, e.lanes)
        if e.size == 4:
            pivot, entry = builder.fpext(pivot, wide), builder.fpext(entry, wide)
        least = ir.Constant(wide, ir.Undefined)
        for lane in range(e.lanes):
            least = builder.insert_element(least, args[3], ir.IntType(32)(lane))
        both = builder.and_(
            builder.fcmp_ordered(">", pivot, ir.Constant(wide, [double(0.0)] * e.lanes)),
            builder.fcmp_ordered(">", pivot, builder.fmul(least, entry)),
        )
        return builder.zext(builder.bitcast(both, ir.IntType(e.lanes)), ir.IntType(64))

    return types.int64(S, _SIZE, _SIZE, types.float64), codegen


def _make_square(*, out: bool) -> Any:
    """An intrinsic square(S, o, matrix, start, which, stride): as many numbers of each problem as
    there are lanes, from matrix[which[lane] stride + start] to S[o], or the way back."""

    def square(
        typingctx: Any, S: Any, o: Any, matrix: Any, start: Any, which: Any, stride: Any
    ) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            e = _Lanes(context, builder, signature, args)
            _, o, _, start, _, stride = args
            problems = [builder.load(e.at(4, ir.Constant(o.type, i))) for i in range(e.lanes)]
            rows = [e.ahead(e.at(2, start), builder.mul(b, stride)) for b in problems]
            vectors = [
                e.place(builder.add(o, ir.Constant(o.type, lane))) for lane in range(e.lanes)
            ]
            sources, targets = (vectors, rows) if out else (rows, vectors)
            for value, target in zip(
                transposed(e, [e.load(source) for source in sources]), targets, strict=True
            ):
                e.store(value, target)
            return e.done()

        return types.void(S, _SIZE, matrix, _SIZE, which, _SIZE), codegen

    return intrinsic(square)


def _make_move(*, out: bool) -> Any:
    """move(S, o, matrix, start, which, stride, count): ``count`` numbers of each problem, in a row
    from matrix[which[lane] stride + start], into S[o], or the way back."""
    square = _make_square(out=out)

    @inner
    def move(S, o, matrix, start, which, stride, count):
        never_inline()
        lanes = lanes_of(S)
        if count >= lanes:
            for i in range(0, count - lanes + 1, lanes):
                square(S, o + i, matrix, start + i, which, stride)
            if count % lanes:
                last = count - lanes
                square(S, o + last, matrix, start + last, which, stride)
            return
        for lane in range(lanes):
            at = which[lane] * stride + start
            for i in range(count):
                if out:
                    matrix[at + i] = S[(o + i) * lanes + lane]
                else:
                    S[(o + i) * lanes + lane] = matrix[at + i]

    return move


gather, scatter = _make_move(out=False), _make_move(out=True)


@inner
def spaced(count):
    """A row length for ``count`` vectors by which rows fall on all sets of the nearest cache."""
    return count + 4 if count % 8 == 0 else count


def _make_rows(move):
    """A matrix of each problem moved by ``move``, its rows ``ld`` vectors apart in S."""

    @inner
    def move_rows(S, o, ld, matrix, start, which, stride, rows, columns):
        never_inline()
        if ld == columns:
            move(S, o, matrix, start, which, stride, rows * columns)
            return
        for i in range(rows):
            move(S, o + i * ld, matrix, start + i * columns, which, stride, columns)

    return move_rows


gather_rows, scatter_rows = _make_rows(gather), _make_rows(scatter)
