"""Vector instructions the CPU kernels are made of, written out: tiles of products, rows, blocks.

LLVM's vectoriser does badly at the sizes met here (a few rows of 20 to 80 numbers: remainders and
alias checks cost more than the arithmetic). Everything here takes pointers into the memory of
C-contiguous arrays and works at every size: nothing is compiled per (n, m). A pointer is one
argument where numba passes an array as seven or more, and here a call has three of them.

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

    def load_first(self, pointer: Any, count: Any) -> Any:
        """The first ``count`` numbers from there, then zeros; no others are read."""
        number = ir.VectorType(count.type, self.lanes)
        one = self.builder.insert_element(ir.Constant(number, ir.Undefined), count, _LANE(0))
        everywhere = ir.Constant(ir.VectorType(_LANE, self.lanes), [_LANE(0)] * self.lanes)
        counts = self.builder.shuffle_vector(one, one, everywhere)
        inside = self.builder.icmp_signed("<", ir.Constant(number, list(range(self.lanes))), counts)
        place = self.builder.bitcast(pointer, self.vector.as_pointer())
        kinds = [place.type, _LANE, inside.type, self.vector]
        called = cgutils.get_or_insert_function(
            self.builder.module,
            ir.FunctionType(self.vector, kinds),
            f"llvm.masked.load.{self.name}.p0{self.name}",
        )
        return self.builder.call(called, [place, _LANE(self.size), inside, self.zero])

    def pick(self, a: Any, b: Any, lanes: list[int]) -> Any:
        """Lanes of a (0 ...) and b (``lanes`` ...)."""
        mask = ir.Constant(ir.VectorType(_LANE, len(lanes)), [_LANE(i) for i in lanes])
        return self.builder.shuffle_vector(a, b, mask)

    def done(self) -> Any:
        return self.context.get_dummy_value()


@intrinsic
def at(typingctx: Any, array: Any, offset: Any) -> Any:
    """A pointer to an array's number ``offset``, counted through its memory."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return Emit(context, builder, signature, args, COLUMNS).at(0, args[1])

    return types.CPointer(array.dtype)(array, _SIZE), codegen


@intrinsic
def ahead(typingctx: Any, pointer: Any, offset: Any) -> Any:
    """The pointer ``offset`` numbers further."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.gep(args[0], [args[1]])

    return pointer(pointer, _SIZE), codegen


@intrinsic
def load(typingctx: Any, pointer: Any) -> Any:
    """The number there."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(args[0])

    return pointer.dtype(pointer), codegen


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

    tile(X, ldx, Y, ldy, C, ldc, length): C[i ldc + j] = sum_l X(l, i) Y[l ldy + j] for these i and
    j, where X(l, i) is X[l ldx + i], or with ``across`` X[i ldx + l] (X as it stands, not
    transposed). With ``onto`` the sum is added to what stands in C, with ``minus`` taken from it.
    """

    def tile(
        typingctx: Any, X: Any, ldx: Any, Y: Any, ldy: Any, C: Any, ldc: Any, length: Any
    ) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            e = Emit(context, builder, signature, args, columns)
            x, ldx, y, ldy, c, ldc, length = args
            starts = [ir.Constant(ldx.type, v * columns) for v in range(vectors)]
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
                        else e.ahead(x_row, ir.Constant(ldx.type, i))
                    )
                    factor = e.spread(builder.load(place))
                    factor = builder.fneg(factor) if minus else factor
                    for total, vector in zip(sums[i], y_vectors, strict=True):
                        builder.store(e.fma(factor, vector, builder.load(total)), total)
            for total, place in zip(chain(*sums), chain(*places), strict=True):
                e.store(builder.load(total), place)
            return e.done()

        return types.void(X, _SIZE, Y, _SIZE, C, _SIZE, _SIZE), codegen

    return intrinsic(tile)


def make_move(width: int) -> Any:
    """An intrinsic move(target, factor, source): ``width`` numbers of factor * source."""

    def move(typingctx: Any, target: Any, factor: Any, source: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            e = Emit(context, builder, signature, args, width)
            target, factor, source = args
            e.store(builder.fmul(e.spread(factor), e.load(source)), target)
            return e.done()

        return types.void(target, target.dtype, source), codegen

    return intrinsic(move)


def make_add(width: int) -> Any:
    """An intrinsic add(target, factor, source): ``width`` numbers target += factor * source,
    fused."""

    def add(typingctx: Any, target: Any, factor: Any, source: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            e = Emit(context, builder, signature, args, width)
            target, factor, source = args
            e.store(e.fma(e.spread(factor), e.load(source), e.load(target)), target)
            return e.done()

        return types.void(target, target.dtype, source), codegen

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
    """An intrinsic mirror(Z, ldz, upper, lower, P, ldp, p, Q, ldq, q): the sum of the size x size
    blocks of P at p and of Q at q is written to Z at ``upper``, its transpose at ``lower``. With
    ``diagonal`` only their own upper triangles are read, and the mirror image is written. Z may be
    P."""

    def mirror(
        typingctx: Any,
        Z: Any,
        ldz: Any,
        upper: Any,
        lower: Any,
        P: Any,
        ldp: Any,
        p: Any,
        Q: Any,
        ldq: Any,
        q: Any,
    ) -> Any:
        signature = types.void(Z, _SIZE, _SIZE, _SIZE, P, _SIZE, _SIZE, Q, _SIZE, _SIZE)

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            e = Emit(context, builder, signature, args, size)
            Z, ldz, upper, lower, P, ldp, p, Q, ldq, q = args

            def rows(base: Any, start: Any, ld: Any) -> list[Any]:
                first = e.ahead(base, start)
                return [e.ahead(first, e.times(i, ld)) for i in range(size)]

            def write(values: list[Any], start: Any) -> None:
                for value, row in zip(values, rows(Z, start, ldz), strict=True):
                    e.store(value, row)

            pairs = zip(rows(P, p, ldp), rows(Q, q, ldq), strict=True)
            total = [builder.fadd(e.load(a), e.load(b)) for a, b in pairs]
            turned = transposed(e, total)
            if diagonal:
                lanes = [[j + (size if j < i else 0) for j in range(size)] for i in range(size)]
                parts = zip(total, turned, lanes, strict=True)
                write([e.pick(row, column, chosen) for row, column, chosen in parts], upper)
            else:
                write(total, upper)
                write(turned, lower)
            return e.done()

        return signature, codegen

    return intrinsic(mirror)


def make_pad(width: int) -> Any:
    """An intrinsic pad(target, source, count): ``count`` numbers, then zeros up to ``width``."""

    def pad(typingctx: Any, target: Any, source: Any, count: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            e = Emit(context, builder, signature, args, width)
            target, source, count = args
            e.store(e.load_first(source, count), target)
            return e.done()

        return types.void(target, source, _SIZE), codegen

    return intrinsic(pad)


def make_dots(width: int) -> Any:
    """An intrinsic dots(out, M, ldm, x, rows, length): for ``width`` rows of M, of which the ones
    after the first ``rows`` count as the last, out[i] += sum_j M[i ldm + j] x[j] over ``length`` j.
    To the next multiple of ``width`` out is written and x read; what stands there in x must be
    finite."""

    def dots(typingctx: Any, out: Any, M: Any, ldm: Any, x: Any, rows: Any, length: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            e = Emit(context, builder, signature, args, width)
            out, m, ldm, x, rows, length = args
            sums = [cgutils.alloca_once(builder, e.vector) for _ in range(width)]
            for total in sums:
                builder.store(e.zero, total)
            last = builder.sub(rows, ir.Constant(rows.type, 1))
            starts: list[Any] = []
            for i in range(width):
                here = ir.Constant(rows.type, i)
                row = builder.select(builder.icmp_signed("<", here, last), here, last)
                starts.append(e.ahead(m, builder.mul(row, ldm)))
            unit = ir.Constant(length.type, width)

            def add(j: Any, count: Any = None) -> None:
                factor = e.load(e.ahead(x, j))
                for row, total in zip(starts, sums, strict=True):
                    place = e.ahead(row, j)
                    value = e.load(place) if count is None else e.load_first(place, count)
                    builder.store(e.fma(value, factor, builder.load(total)), total)

            with cgutils.for_range(builder, builder.udiv(length, unit)) as loop:
                add(builder.mul(loop.index, unit))
            rest = builder.urem(length, unit)
            with builder.if_then(builder.icmp_signed(">", rest, ir.Constant(rest.type, 0))):
                add(builder.sub(length, rest), rest)
            turned = transposed(e, [builder.load(total) for total in sums])
            while len(turned) > 1:
                pairs = zip(turned[::2], turned[1::2], strict=True)
                turned = [builder.fadd(a, b) for a, b in pairs]
            e.store(builder.fadd(e.load(out), turned[0]), out)
            return e.done()

        return types.void(out, M, _SIZE, x, _SIZE, _SIZE), codegen

    return intrinsic(dots)


@intrinsic
def wide(typingctx: Any, X: Any) -> Any:
    """Columns of a tile that fills the registers with X's numbers."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        doubled = _many_registers() or X.dtype.bitwidth == 32
        return context.get_constant(_SIZE, (2 if doubled else 1) * COLUMNS)

    return _SIZE(X), codegen
