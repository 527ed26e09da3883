"""The backward recursion of several LQR problems at once: one problem in each lane of a vector.

At the sizes met here a problem's own matrices fill vectors badly; as many problems as a vector has
lanes fill them whole. The recursion, its letters, and the order of each number's sums are those of
`lqr.py`, so a problem's bits do not depend on whether it was solved alone or in a lane.

All that is computed stands in one flat scratch array S, its number e of each problem at S[e L],
S[e L + 1], ... for L lanes; a place in S counts vectors, not numbers.

Only numba code lives here: it must not be wrapped by a type-checking import hook.
"""

# numba infers the types of what it compiles, and gives an intrinsic's first parameter itself.
# pyright: reportMissingParameterType=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ilqr_vae.kernels.cpu.algebra import inner, never_inline, part
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


def _make_tile(rows: int, columns: int, across: bool, sign: int) -> Any:
    """An intrinsic tile(S, x, ldx, y, ldy, c, ldc, length): C(i, j) = sum_l X(l, i) Y(l, j) for
    i < rows, j < columns, as ``tiles.make_tile``. With ``across`` X(i, l) is taken; with a sign
    the sum is added to C or taken from it."""

    def tile(
        typingctx: Any, S: Any, x: Any, ldx: Any, y: Any, ldy: Any, c: Any, ldc: Any, length: Any
    ) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            e = _Lanes(context, builder, signature, args)
            _, x, ldx, y, ldy, c, ldc, length = args
            one = ir.Constant(x.type, 1)
            row, along = (ldx, one) if across else (one, ldx)

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
                down, over = (builder.mul(loop.index, step) for step in (ldy, along))
                right = [e.load(at(y, down, e.times(j, one))) for j in range(columns)]
                for i, totals in enumerate(sums):
                    left = e.load(at(x, over, e.times(i, row)))
                    left = builder.fneg(left) if sign < 0 else left
                    for total, factor in zip(totals, right, strict=True):
                        builder.store(e.fma(left, factor, builder.load(total)), total)
            for each, totals in zip(places, sums, strict=True):
                for place, total in zip(each, totals, strict=True):
                    e.store(builder.load(total), place)
            return e.done()

        return types.void(S, *[_SIZE] * 7), codegen

    return intrinsic(tile)


def _make_product(*, across: bool = False, sign: int = 0) -> Any:
    """A product of ``rows`` by ``columns`` numbers out of tiles; its other arguments are a tile's.
    With ``upper`` only the blocks of ``ROWS`` that touch the upper triangle are computed."""
    square = _make_tile(_EDGE, _EDGE, across, sign)
    tall, flat = _make_tile(_EDGE, 1, across, sign), _make_tile(1, _EDGE, across, sign)
    single = _make_tile(1, 1, across, sign)

    @inner
    def product(S, x, ldx, y, ldy, c, ldc, length, rows, columns, upper):
        never_inline()
        i = 0
        while i < rows:
            high = rows - i >= _EDGE
            left, out = x + (i * ldx if across else i), c + i * ldc
            j = i // ROWS * ROWS if upper else 0
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


def _half_sum(e: _Lanes, x: Any, y: Any) -> Any:
    return e.builder.fmul(e.constant(0.5), e.builder.fadd(x, y))


def _root(e: _Lanes, x: Any) -> Any:
    kind = ir.FunctionType(e.vector, [e.vector])
    root = cgutils.get_or_insert_function(e.builder.module, kind, f"llvm.sqrt.{e.name}")
    return e.builder.call(root, [x])


_multiply, _multiply_across = _make_product(), _make_product(across=True)
_add_product, _subtract_product = _make_product(sign=1), _make_product(sign=-1)
_sum = _make_map(lambda e, x, y, z: e.builder.fadd(x, y))
_mean = _make_map(lambda e, x, y, z: _half_sum(e, x, y))
_mean_more = _make_map(lambda e, x, y, z: e.builder.fadd(z, _half_sum(e, x, y)))
_mean_onto = _make_map(lambda e, x, y, z: e.fma(e.constant(0.5), e.builder.fadd(x, y), z))
_fused = _make_map(lambda e, x, y, z: e.fma(x, y, z))
_rounded = _make_map(lambda e, x, y, z: e.builder.fadd(z, e.builder.fmul(x, y)))
_times = _make_map(lambda e, x, y, z: e.builder.fmul(x, y))
_minus_times = _make_map(lambda e, x, y, z: e.builder.fmul(e.builder.fneg(x), y))
_minus = _make_map(lambda e, x, y, z: e.builder.fneg(x))
_inverse = _make_map(lambda e, x, y, z: e.builder.fdiv(e.constant(1.0), x))
_inverse_root = _make_map(lambda e, x, y, z: e.builder.fdiv(e.constant(1.0), _root(e, x)))
_copy = _make_map(lambda e, x, y, z: x)
_zero, _one = (_make_map(lambda e, x, y, z, v=v: e.constant(v)) for v in (0.0, 1.0))


@intrinsic
def _positive(typingctx: Any, S: Any, x: Any, y: Any, tiny: Any) -> Any:
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
    """An intrinsic square(S, o, matrix, start, stride): as many numbers of each problem as there
    are lanes, from matrix[lane stride + start] to S[o], or the way back."""

    def square(typingctx: Any, S: Any, o: Any, matrix: Any, start: Any, stride: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            e = _Lanes(context, builder, signature, args)
            _, o, _, start, stride = args
            rows = [e.ahead(e.at(2, start), e.times(lane, stride)) for lane in range(e.lanes)]
            vectors = [
                e.place(builder.add(o, ir.Constant(o.type, lane))) for lane in range(e.lanes)
            ]
            sources, targets = (vectors, rows) if out else (rows, vectors)
            for value, target in zip(
                transposed(e, [e.load(source) for source in sources]), targets, strict=True
            ):
                e.store(value, target)
            return e.done()

        return types.void(S, _SIZE, matrix, _SIZE, _SIZE), codegen

    return intrinsic(square)


def _make_move(*, out: bool) -> Any:
    """move(S, o, matrix, start, stride, count): ``count`` numbers of each problem, in a row from
    matrix[lane stride + start], into S[o], or the way back."""
    square = _make_square(out=out)

    @inner
    def move(S, o, matrix, start, stride, count):
        never_inline()
        lanes = lanes_of(S)
        if count >= lanes:
            for i in range(0, count - lanes + 1, lanes):
                square(S, o + i, matrix, start + i, stride)
            if count % lanes:
                last = count - lanes
                square(S, o + last, matrix, start + last, stride)
            return
        for lane in range(lanes):
            for i in range(count):
                if out:
                    matrix[lane * stride + start + i] = S[(o + i) * lanes + lane]
                else:
                    S[(o + i) * lanes + lane] = matrix[lane * stride + start + i]

    return move


_gather, _scatter = _make_move(out=False), _make_move(out=True)


def scratch_size(n, m):
    """Numbers of scratch that ``backward`` needs."""
    both = n + m
    return 16 * (4 * n * n + n * m + m * m + both * both + 4 * m * both + 3 * n + 5 * m + 8)


@inner
def _add_symmetric(S, V, Q, D, n):
    """V = (Q + Q') / 2 + D, as ``algebra.add_symmetric``."""
    never_inline()
    for i in range(n):
        block = i // ROWS * ROWS
        for j in range(block, min(block + ROWS, n)):
            _sum(S, D + i * n + j, Q + i * n + j, D + i * n + j, 0)
    for i in range(n):
        block = i // ROWS * ROWS
        for j in range(i, n):
            up, low = i * n + j, j * n + i
            if j < block + ROWS:
                _mean(S, V + up, D + up, D + low, 0)
            else:
                _mean_onto(S, V + up, Q + up, Q + low, D + up)
            _copy(S, V + low, V + up, 0, 0)


@inner
def _eliminate(S, E, m, diagonal, spare):
    """``algebra.eliminate`` of (m, 2 m) lanes, of which only L is scaled. Returns a bit for each
    lane that was positive definite."""
    never_inline()
    tiny = m * np.finfo(S.dtype).eps
    ld, good = 2 * m, (1 << lanes_of(S)) - 1
    for p in range(m):
        _copy(S, diagonal + p, E + p * ld + p, 0, 0)
    for p in range(m):
        row = E + p * ld
        good &= _positive(S, row + p, diagonal + p, tiny)
        _inverse(S, spare, row + p, 0, 0)
        for i in range(p + 1, m):
            at, factor = E + i * ld, spare + 1
            _minus_times(S, factor, row + i, spare, 0)
            for j in range(i, m):
                _fused(S, at + j, factor, row + j, at + j)
            for j in range(m, m + p + 1):
                _fused(S, at + j, factor, row + j, at + j)
    for p in range(m):
        row = E + p * ld
        _inverse_root(S, spare, row + p, 0, 0)
        for j in range(m, m + p + 1):
            _times(S, row + j, row + j, spare, 0)
    return good


@part
def _rest(array, first):
    """Everything that an array holds for the problems from ``first``."""
    found = array[first:]
    return found.reshape(found.size)


@inner
def backward(first, problem, damping, law, cost, S):
    """Fill K, k, V, v and Quu_inv of the L problems from ``first``; no offsets, no cross
    curvature. Returns a bit for each lane: whether every Quu was positive definite.

    Args:
        problem, damping, law, cost: of the whole batch; see ``lqr.solve``.
        S: ``scratch_size(n, m)`` numbers.
    """
    never_inline()
    A, B, Q, q, R, r, _c, _S = problem
    K, k, Quu_inv = law
    V, v = cost
    _, T, n, m = B.shape
    A, B, Q, q = _rest(A, first), _rest(B, first), _rest(Q, first), _rest(q, first)
    R, r, K, k = _rest(R, first), _rest(r, first), _rest(K, first), _rest(k, first)
    Quu_inv, V, v = _rest(Quu_inv, first), _rest(V, first), _rest(v, first)
    lanes, ld, nn, mm, nm = lanes_of(S), m + n, n * n, m * m, n * m
    a, b = 0, nn
    given, value = b + nm, b + nm + nn
    cost_u = value + nn  # R
    G = cost_u + mm  # [V B | V A]
    H = G + n * ld  # B' G = [Quu | Qux]
    D = H + m * ld  # A' V A - W' W, its upper triangle
    E = D + nn  # [Quu | I], later [U | L]
    W, gain, inverse = E + 2 * mm, E + 2 * mm + nm, E + 2 * mm + 2 * nm
    gx = inverse + mm
    slope, gu, w = gx + n, gx + 2 * n, gx + 2 * n + m
    kk, diagonal = w + m, w + 2 * m
    shift, spare = diagonal + m, diagonal + m + 1
    good = (1 << lanes) - 1
    for lane in range(lanes):
        S[shift * lanes + lane] = damping[first + lane]

    _gather(S, given, Q, T * nn, (T + 1) * nn, nn)
    _gather(S, slope, q, T * n, (T + 1) * n, n)
    for i in range(n):
        for j in range(n):
            _mean(S, value + i * n + j, given + i * n + j, given + j * n + i, 0)
    _scatter(S, value, V, T * nn, (T + 1) * nn, nn)
    _scatter(S, slope, v, T * n, (T + 1) * n, n)

    for t in range(T - 1, -1, -1):
        _gather(S, a, A, t * nn, T * nn, nn)
        _gather(S, b, B, t * nm, T * nm, nm)
        _gather(S, given, Q, t * nn, (T + 1) * nn, nn)
        _gather(S, cost_u, R, t * mm, T * mm, mm)
        _gather(S, gx, q, t * n, (T + 1) * n, n)
        _gather(S, gu, r, t * m, T * m, m)
        _add_product(S, slope, 1, b, m, gu, m, n, 1, m, False)
        _add_product(S, slope, 1, a, n, gx, n, n, 1, n, False)
        _multiply(S, value, n, b, m, G, ld, n, n, m, False)
        _multiply(S, value, n, a, n, G + m, ld, n, n, n, False)
        _multiply(S, b, m, G, ld, H, ld, n, m, ld, False)
        _multiply(S, a, n, G + m, ld, D, n, n, n, n, True)

        for i in range(m):
            for j in range(i, m):
                up, low = cost_u + i * m + j, cost_u + j * m + i
                _mean_more(S, E + i * 2 * m + j, up, low, H + i * ld + j)
            for j in range(m):
                _zero(S, E + i * 2 * m + m + j, 0, 0, 0)
            _sum(S, E + i * 2 * m + i, E + i * 2 * m + i, shift, 0)
            _one(S, E + i * 2 * m + m + i, 0, 0, 0)
        good &= _eliminate(S, E, m, diagonal, spare)

        L = E + m
        _multiply_across(S, L, 2 * m, H + m, ld, W, n, m, m, n, False)
        _subtract_product(S, W, n, W, n, D, n, m, n, n, True)
        _add_symmetric(S, value, given, D, n)
        _multiply(S, L, 2 * m, W, n, gain, n, m, m, n, False)
        _multiply(S, L, 2 * m, L, 2 * m, inverse, m, m, m, m, False)
        for i in range(m):
            _zero(S, w + i, 0, 0, 0)
            for j in range(i + 1):
                _rounded(S, w + i, L + i * 2 * m + j, gu + j, w + i)
        _subtract_product(S, w, 1, W, n, gx, n, m, 1, n, False)
        for i in range(m):
            _zero(S, kk + i, 0, 0, 0)
            for j in range(i, m):
                _rounded(S, kk + i, L + j * 2 * m + i, w + j, kk + i)
                _copy(S, inverse + j * m + i, inverse + i * m + j, 0, 0)
            _minus(S, kk + i, kk + i, 0, 0)
        for i in range(nm):
            _minus(S, gain + i, gain + i, 0, 0)
        _scatter(S, value, V, t * nn, (T + 1) * nn, nn)
        _scatter(S, gx, v, t * n, (T + 1) * n, n)
        _scatter(S, gain, K, t * nm, T * nm, nm)
        _scatter(S, kk, k, t * m, T * m, m)
        _scatter(S, inverse, Quu_inv, t * mm, T * mm, mm)
        gx, slope = slope, gx
    return good
