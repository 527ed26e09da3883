"""Vector instructions the CPU kernels are made of, written out: tiles of products, rows, blocks.

LLVM's vectoriser does badly at the sizes met here (a few rows of 20 to 80 numbers: remainders and
alias checks cost more than the arithmetic). Everything here takes flat positions in C-contiguous
arrays, of which only the memory is used, and works at every size: nothing is compiled per (n, m).

A tile's sum runs over its terms in order, each fused where the processor can, so its bits depend
neither on what surrounds it nor on the tile's shape. No fastmath: NaN must be seen.

Only numba code lives here: it must not be wrapped by a type-checking import hook.
"""

# numba infers the types of what it compiles, and gives an intrinsic's first parameter itself.
# pyright: reportMissingParameterType=false, reportCallIssue=false

from __future__ import annotations

from itertools import chain
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils, config
from numba.extending import intrinsic

#: Numbers in a vector; where the processor's are shorter, LLVM splits it.
COLUMNS = 8
_SIZE = types.intp


def _many_registers() -> bool:
    """Whether there are 32 vector registers of 64 bytes, else half of both is counted on."""
    chosen: str | None = getattr(config, "CPU_FEATURES", None)
    if chosen is not None:
        return "+avx512f" in chosen
    return bool(llvm.get_host_cpu_features().get("avx512f", False))


#: Rows of a tile: with one vector of columns enough sums to keep two multiply-add units busy.
ROWS = 8 if _many_registers() else 4
#: Columns of a panel: of a matrix that is only ever multiplied from the left, packed for it.
PANEL = 2 * COLUMNS if _many_registers() else COLUMNS
_LANE = ir.IntType(32)


class Emit:
    """What the intrinsics' code generators share: vectors, and the memory of array arguments."""

    def __init__(self, context: Any, builder: Any, signature: Any, args: Any, lanes: int) -> None:
        self.context, self.builder, self.signature, self.args = context, builder, signature, args
        dtype = signature.args[0].dtype
        self.scalar = context.get_value_type(dtype)
        self.size = dtype.bitwidth // 8
        self.lanes, self.vector = lanes, ir.VectorType(self.scalar, lanes)
        self.name = f"v{lanes}f{dtype.bitwidth}"
        self.undefined = ir.Constant(self.vector, ir.Undefined)
        self.zero = ir.Constant(self.vector, [self.scalar(0.0)] * lanes)

    def at(self, array: int, offset: Any) -> Any:
        """A pointer into the array that is this argument."""
        made = self.context.make_array(self.signature.args[array])
        data = made(self.context, self.builder, self.args[array]).data
        return self.builder.gep(data, [offset])

    def ahead(self, pointer: Any, offset: Any) -> Any:
        return self.builder.gep(pointer, [offset])

    def times(self, count: int, stride: Any) -> Any:
        return self.builder.mul(ir.Constant(stride.type, count), stride)

    def load(self, pointer: Any) -> Any:
        place = self.builder.bitcast(pointer, self.vector.as_pointer())
        return self.builder.load(place, align=self.size)

    def store(self, value: Any, pointer: Any) -> None:
        place = self.builder.bitcast(pointer, value.type.as_pointer())
        self.builder.store(value, place, align=self.size)

    def spread(self, scalar: Any) -> Any:
        """A scalar in every lane."""
        one = self.builder.insert_element(self.undefined, scalar, _LANE(0))
        everywhere = ir.Constant(ir.VectorType(_LANE, self.lanes), [_LANE(0)] * self.lanes)
        return self.builder.shuffle_vector(one, self.undefined, everywhere)

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        called = cgutils.get_or_insert_function(
            self.builder.module,
            ir.FunctionType(self.vector, [self.vector] * 3),
            f"llvm.fmuladd.{self.name}",
        )
        return self.builder.call(called, [a, b, c])

    def pick(self, a: Any, b: Any, lanes: list[int]) -> Any:
        """Lanes of a (0 ...) and b (``lanes`` ...)."""
        mask = ir.Constant(ir.VectorType(_LANE, len(lanes)), [_LANE(i) for i in lanes])
        return self.builder.shuffle_vector(a, b, mask)

    def done(self) -> Any:
        return self.context.get_dummy_value()


def make_tile(
    rows: int,
    columns: int = COLUMNS,
    *,
    vectors: int = 1,
    across: bool = False,
    onto: bool = False,
    minus: bool = False,
) -> Any:
    """An intrinsic that computes ``rows`` x (``vectors`` x ``columns``) numbers of a product.

    tile(X, x0, ldx, Y, y0, ldy, C, c0, ldc, length):
    C[c0 + i ldc + j] = sum_l X(l, i) Y[y0 + l ldy + j] for these i and j, where X(l, i) is
    X[x0 + l ldx + i], or with ``across`` X[x0 + i ldx + l] (X as it stands, not transposed). With
    ``onto`` the sum is added to what stands in C, with ``minus`` taken from it.
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
        signature = types.void(X, _SIZE, _SIZE, Y, _SIZE, _SIZE, C, _SIZE, _SIZE, _SIZE)

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            e = Emit(context, builder, signature, args, columns)
            _, x0, ldx, _, y0, ldy, _, c0, ldc, length = args
            x, y, c = e.at(0, x0), e.at(3, y0), e.at(6, c0)
            starts = [ir.Constant(x0.type, v * columns) for v in range(vectors)]
            places = [
                [e.ahead(row, start) for start in starts]
                for row in (e.ahead(c, e.times(i, ldc)) for i in range(rows))
            ]
            sums = [[cgutils.alloca_once(builder, e.vector) for _ in starts] for _ in range(rows)]
            for total, place in zip(chain(*sums), chain(*places), strict=True):
                builder.store(e.load(place) if onto or minus else e.zero, total)
            x_rows = [e.ahead(x, e.times(i, ldx)) for i in range(rows if across else 0)]
            with cgutils.for_range(builder, length) as loop:
                x_row = e.ahead(x, builder.mul(loop.index, ldx))
                y_row = e.ahead(y, builder.mul(loop.index, ldy))
                y_vectors = [e.load(e.ahead(y_row, start)) for start in starts]
                for i in range(rows):
                    place = (
                        e.ahead(x_rows[i], loop.index)
                        if across
                        else e.ahead(x_row, ir.Constant(x0.type, i))
                    )
                    factor = e.spread(builder.load(place))
                    factor = builder.fneg(factor) if minus else factor
                    for total, vector in zip(sums[i], y_vectors, strict=True):
                        builder.store(e.fma(factor, vector, builder.load(total)), total)
            for total, place in zip(chain(*sums), chain(*places), strict=True):
                e.store(builder.load(total), place)
            return e.done()

        return signature, codegen

    return intrinsic(tile)


def make_move(width: int) -> Any:
    """An intrinsic move(target, t, factor, source, s): target[t : t + width] = factor *
    source[s : s + width]."""

    def move(typingctx: Any, target: Any, t: Any, factor: Any, source: Any, s: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            e = Emit(context, builder, signature, args, width)
            e.store(builder.fmul(e.spread(args[2]), e.load(e.at(3, args[4]))), e.at(0, args[1]))
            return e.done()

        return types.void(target, _SIZE, target.dtype, source, _SIZE), codegen

    return intrinsic(move)


def make_add(width: int) -> Any:
    """An intrinsic add(target, t, factor, source, s): target[t : t + width] += factor *
    source[s : s + width], fused."""

    def add(typingctx: Any, target: Any, t: Any, factor: Any, source: Any, s: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            e = Emit(context, builder, signature, args, width)
            place = e.at(0, args[1])
            e.store(e.fma(e.spread(args[2]), e.load(e.at(3, args[4])), e.load(place)), place)
            return e.done()

        return types.void(target, _SIZE, target.dtype, source, _SIZE), codegen

    return intrinsic(add)


def transposed(e: Emit, rows: list[Any]) -> list[Any]:
    """A square of vectors, transposed."""
    size = e.lanes
    half = 1
    while half < size:
        low = [L if not L & half else size + L - half for L in range(size)]
        high = [L + half if not L & half else size + L for L in range(size)]
        after = list(rows)
        for i in range(size):
            if not i & half:
                after[i] = e.pick(rows[i], rows[i + half], low)
                after[i + half] = e.pick(rows[i], rows[i + half], high)
        rows = after
        half *= 2
    return rows


def make_mirror(size: int, *, diagonal: bool) -> Any:
    """An intrinsic that adds a matrix to half of a symmetric sum, block by block.

    mirror(Z, upper, lower, ldz, Q, q_upper, q_lower, ldq, P, p0, ldp): for the size x size blocks
    of Z and Q at (i, j) and (j, i), and of P at (i, j),
    Z(i, j) = P(i, j) + (Q(i, j) + Q(j, i)') / 2 and Z(j, i) = Z(i, j)'. With ``diagonal`` i is j
    and P is replaced by the mean of itself and its transpose. Z may be Q.
    """

    def mirror(
        typingctx: Any,
        Z: Any,
        upper: Any,
        lower: Any,
        ldz: Any,
        Q: Any,
        q_upper: Any,
        q_lower: Any,
        ldq: Any,
        P: Any,
        p0: Any,
        ldp: Any,
    ) -> Any:
        signature = types.void(Z, _SIZE, _SIZE, _SIZE, Q, _SIZE, _SIZE, _SIZE, P, _SIZE, _SIZE)

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            e = Emit(context, builder, signature, args, size)
            _, upper, lower, ldz, _, q_upper, q_lower, ldq, _, p0, ldp = args
            half = ir.Constant(e.vector, [e.scalar(0.5)] * size)

            def rows(array: int, start: Any, ld: Any) -> list[Any]:
                base = e.at(array, start)
                return [e.load(e.ahead(base, e.times(i, ld))) for i in range(size)]

            def write(values: list[Any], start: Any) -> None:
                base = e.at(0, start)
                for i, value in enumerate(values):
                    e.store(value, e.ahead(base, e.times(i, ldz)))

            here, added = rows(4, q_upper, ldq), rows(8, p0, ldp)
            if diagonal:
                both = [builder.fadd(a, b) for a, b in zip(here, added, strict=True)]
                turned = transposed(e, both)
                pairs = zip(both, turned, strict=True)
                write([builder.fmul(half, builder.fadd(a, b)) for a, b in pairs], upper)
                return e.done()
            turned = transposed(e, rows(4, q_lower, ldq))
            total = [
                e.fma(half, builder.fadd(a, b), c)
                for a, b, c in zip(here, turned, added, strict=True)
            ]
            write(total, upper)
            write(transposed(e, total), lower)
            return e.done()

        return signature, codegen

    return intrinsic(mirror)


def make_dots(width: int, rows: int) -> Any:
    """An intrinsic dots(out, o, M, m0, ldm, x, x0, length): for ``rows`` (one or ``width``) of M,
    out[o + i] += sum_j M[m0 + i ldm + j] x[x0 + j] over the first ``length`` // width * width j."""

    def dots(
        typingctx: Any, out: Any, o: Any, M: Any, m0: Any, ldm: Any, x: Any, x0: Any, length: Any
    ) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            e = Emit(context, builder, signature, args, width)
            _, o, _, m0, ldm, _, x0, length = args
            sums = [cgutils.alloca_once(builder, e.vector) for _ in range(rows)]
            for total in sums:
                builder.store(e.zero, total)
            m, x = e.at(2, m0), e.at(5, x0)
            starts = [e.ahead(m, e.times(i, ldm)) for i in range(rows)]
            unit = ir.Constant(length.type, width)
            with cgutils.for_range(builder, builder.udiv(length, unit)) as loop:
                j = builder.mul(loop.index, unit)
                factor = e.load(e.ahead(x, j))
                for row, total in zip(starts, sums, strict=True):
                    value = e.load(e.ahead(row, j))
                    builder.store(e.fma(value, factor, builder.load(total)), total)
            totals = [builder.load(total) for total in sums]
            turned = transposed(e, totals + [e.zero] * (width - rows))
            while len(turned) > 1:
                pairs = zip(turned[::2], turned[1::2], strict=True)
                turned = [builder.fadd(a, b) for a, b in pairs]
            place = e.at(0, o)
            if rows == width:
                e.store(builder.fadd(e.load(place), turned[0]), place)
            else:
                found = builder.extract_element(turned[0], _LANE(0))
                builder.store(builder.fadd(builder.load(place), found), place)
            return e.done()

        return types.void(out, _SIZE, M, _SIZE, _SIZE, x, _SIZE, _SIZE), codegen

    return intrinsic(dots)


@intrinsic
def wide(typingctx: Any, X: Any) -> Any:
    """Columns of a tile that fills the registers with X's numbers."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        doubled = _many_registers() or X.dtype.bitwidth == 32
        return context.get_constant(_SIZE, (2 if doubled else 1) * COLUMNS)

    return _SIZE(X), codegen
