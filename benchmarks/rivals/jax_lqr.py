"""JAX implementations, run by a Python that has them: ``python jax_lqr.py PROBLEM.npz SECONDS``.

Prints one JSON line per implementation and dtype: microseconds of single calls (until results are
ready), and the distance of its optimum from the one in the file. The initial state is fixed at the
solution, which is less work than the recursion it is compared with, since diffilqrax has no free
one.
"""

from __future__ import annotations

import json
import sys
import time

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

jax.config.update("jax_enable_x64", True)


def scan_solve(A, B, Q, q, R, r):
    """A plain scan: backward Riccati, free initial state, forward, costates."""

    def back(carry, x):
        V, v = carry
        A, B, Q, q, R, r = x
        VA, VB = V @ A, V @ B
        quu, qux, qu = R + B.T @ VB, B.T @ VA, r + B.T @ v
        factor = jax.scipy.linalg.cho_factor(quu)
        K, k = -jax.scipy.linalg.cho_solve(factor, qux), -jax.scipy.linalg.cho_solve(factor, qu)
        inverse = jax.scipy.linalg.cho_solve(factor, jnp.eye(quu.shape[0], dtype=quu.dtype))
        P = Q + A.T @ VA + qux.T @ K
        P = 0.5 * (P + P.T)
        p = q + A.T @ v + qux.T @ k
        return (P, p), (K, k, inverse, P, p)

    inputs = (A, B, Q[:-1], q[:-1], R, r)
    (V, v), (K, k, inverse, Vs, vs) = lax.scan(back, (Q[-1], q[-1]), inputs, reverse=True)
    start = -jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(V), v)

    def forward(z, x):
        A, B, K, k = x
        u = k + K @ z
        after = A @ z + B @ u
        return after, (after, u)

    _, (z, u) = lax.scan(forward, start, (A, B, K, k))
    z = jnp.concatenate([start[None], z])
    costate = jnp.einsum("tij,tj->ti", Vs, z[:-1]) + vs
    return z, u, costate, K, k, inverse


def diffilqrax_solve(start):
    """The solver of diffilqrax from a given initial state."""
    from diffilqrax.lqr import solve_lqr
    from diffilqrax.typs import LQR, LQRParams

    def solve(A, B, Q, q, R, r):
        T, n, m = B.shape
        kind = A.dtype
        problem = LQR(
            A, B, jnp.zeros((T, n), kind), Q[:-1], q[:-1], R, r, jnp.zeros((T, n, m), kind),
            Q[-1], q[-1],
        )  # fmt: skip
        return solve_lqr(LQRParams(start.astype(kind), problem))

    return solve


def measure(name: str, solve, given, seconds: float, truth, batch: int) -> None:
    for dtype in ("float64", "float32"):
        arrays = [jnp.asarray(x, dtype) for x in given]
        one = jax.jit(solve if batch == 1 else jax.vmap(solve))
        if batch == 1:
            arrays = [x[0] for x in arrays]
        began = time.perf_counter()
        out = jax.block_until_ready(one(*arrays))
        compiled = time.perf_counter() - began
        for _ in range(5):
            jax.block_until_ready(one(*arrays))
        spent, end = [], time.perf_counter() + seconds
        while len(spent) < 5 or time.perf_counter() < end:
            began = time.perf_counter()
            jax.block_until_ready(one(*arrays))
            spent.append(time.perf_counter() - began)
        z = np.asarray(out[0], np.float64)
        z = z[None] if batch == 1 else z
        error = float(np.abs(z - truth).max() / np.abs(truth).max())
        print(
            json.dumps(
                {
                    "implementation": name,
                    "dtype": dtype,
                    "seconds": spent,
                    "compile_s": round(compiled, 3),
                    "error": error,
                }
            ),
            flush=True,
        )


def main() -> None:
    file, seconds = np.load(sys.argv[1]), float(sys.argv[2])
    given = [file[name] for name in ("A", "B", "Q", "q", "R", "r")]
    batch, truth = given[0].shape[0], file["dz"]
    measure("jax-scan", scan_solve, given, seconds, truth, batch)
    starts = jnp.asarray(truth[:, 0])
    if batch == 1:
        measure("diffilqrax", diffilqrax_solve(starts[0]), given, seconds, truth, batch)
    else:

        def each(A, B, Q, q, R, r, start):
            return diffilqrax_solve(start)(A, B, Q, q, R, r)

        measure("diffilqrax", each, [*given, starts], seconds, truth, batch)


if __name__ == "__main__":
    main()
