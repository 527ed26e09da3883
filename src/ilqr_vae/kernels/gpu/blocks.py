"""What the Triton kernels share: small matrices and vectors as blocks, and their inverse.

A matrix is a block padded with zeros to powers of two, 16 or more, which is what a tensor product
needs. Vectors are float64 whatever the problem's dtype; float32 products are exact float32 ones
(no TF32).

Only Triton code lives here: it must not be wrapped by a type-checking import hook.
"""

# Triton infers the types of what it compiles, and its language is no Python a checker knows.
# pyright: basic, reportMissingParameterType=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false, reportReturnType=false

import triton
import triton.language as tl


@triton.jit
def load(pointer, rows, columns, P: tl.constexpr, R: tl.constexpr):
    """A (rows, columns) matrix as a (P, R) block, zeros beyond."""
    i, j = tl.arange(0, P)[:, None], tl.arange(0, R)[None, :]
    return tl.load(pointer + i * columns + j, mask=(i < rows) & (j < columns), other=0.0)


@triton.jit
def store(pointer, value, rows, columns, P: tl.constexpr, R: tl.constexpr):
    i, j = tl.arange(0, P)[:, None], tl.arange(0, R)[None, :]
    inside = (i < rows) & (j < columns)
    tl.store(pointer + i * columns + j, value.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def load_row(pointer, size, P: tl.constexpr):
    i = tl.arange(0, P)
    return tl.load(pointer + i, mask=i < size, other=0.0).to(tl.float64)


@triton.jit
def store_row(pointer, value, size, P: tl.constexpr):
    i = tl.arange(0, P)
    tl.store(pointer + i, value.to(pointer.dtype.element_ty), mask=i < size)


@triton.jit
def product(X, Y, HOW: tl.constexpr = 0):
    """X Y to the dtype's last digits: in float64 if HOW is 1, in three TF32 passes if 2."""
    if HOW == 1:
        return tl.dot(X.to(tl.float64), Y.to(tl.float64), out_dtype=tl.float64).to(X.dtype)
    if HOW == 2:
        return tl.dot(X, Y, input_precision="tf32x3", out_dtype=X.dtype)
    return tl.dot(X, Y, input_precision="ieee", out_dtype=X.dtype)


@triton.jit
def times(X, y):
    """X y for a float64 vector."""
    return tl.sum(X.to(tl.float64) * y[None, :], axis=1)


@triton.jit
def refined(M, M_inv, y):
    """M^-1 y for a float64 vector, by the inverse and one step of iterative refinement."""
    x = times(M_inv, y)
    return x + times(M_inv, y - times(M, x))


@triton.jit
def transposed_times(X, y):
    return tl.sum(X.to(tl.float64) * y[:, None], axis=0)


@triton.jit
def symmetric(X):
    return 0.5 * (X + tl.trans(X))


@triton.jit
def beyond(X, largest):
    """1 at every number that is not finite or larger than ``largest``, else 0."""
    return 1 - (tl.abs(X.to(tl.float64)) <= largest).to(tl.int32)


@triton.jit
def inverse(M, size, floor, P: tl.constexpr):
    """M^-1 of the leading ``size`` rows of a symmetric float64 block, zeros beyond; and 1 if M is
    positive definite, else 0.

    Sweeps one pivot after the other. Pivots are the squares of Cholesky's; each must exceed
    ``floor`` times its diagonal entry, which is scaled to one first.
    """
    index = tl.arange(0, P)
    diagonal = tl.sum(tl.where(index[:, None] == index[None, :], M, 0.0), axis=1)
    scale = tl.where(diagonal > 0.0, 1.0 / tl.sqrt(tl.where(diagonal > 0.0, diagonal, 1.0)), 1.0)
    # the same numbers laid out along rows: M is symmetric, a transpose would be one more exchange
    across = tl.sum(tl.where(index[:, None] == index[None, :], M, 0.0), axis=0)
    across = tl.where(across > 0.0, 1.0 / tl.sqrt(tl.where(across > 0.0, across, 1.0)), 1.0)
    M = M * scale[:, None] * across[None, :]
    good = 1
    for p in range(size):
        at_row, at_column = (index == p)[:, None], (index == p)[None, :]
        row = tl.sum(tl.where(at_row, M, 0.0), axis=0)
        column = tl.sum(tl.where(at_column, M, 0.0), axis=1)
        pivot = tl.sum(tl.where(index == p, row, 0.0))
        good = good & ((pivot > 0.0) & (pivot > floor)).to(tl.int32)
        one_over = 1.0 / pivot
        swept = M - column[:, None] * (row * one_over)[None, :]
        swept = tl.where(at_row, (row * one_over)[None, :], swept)
        swept = tl.where(at_column, (column * one_over)[:, None], swept)
        M = tl.where(at_row & at_column, -one_over, swept)
    return -M * scale[:, None] * across[None, :], good
