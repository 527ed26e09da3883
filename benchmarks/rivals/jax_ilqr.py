"""diffilqrax's iLQR on a batch of chunks: ``python jax_ilqr.py CHUNKS.npz SECONDS``.

The same model (MGU2, Poisson with an exponential link), jitted over the batch. Its initial state is
fixed while ours is free, and it runs as many iterations as ours took on average.
"""

from __future__ import annotations

import json
import sys
import time

import jax
import numpy as np
from jax import numpy as jnp


def main() -> None:
    from diffilqrax.ilqr import ilqr_solver
    from diffilqrax.typs import ModelDims, System, iLQRParams

    file, seconds = np.load(sys.argv[1]), float(sys.argv[2])
    Uf, bf, Uh, bh, W = (jnp.asarray(file[f"w{i}"]) for i in range(5))
    C, b, precision = (jnp.asarray(file[k]) for k in ("C", "b", "precision"))
    counts, z0, u = (jnp.asarray(file[k]) for k in ("counts", "z0", "u"))
    T, m = u.shape[1:]
    n = z0.shape[1]

    def dynamics(t, z, u, theta):
        f = jax.nn.sigmoid(Uf @ z + bf)
        h = jnp.tanh(Uh @ (f * z) + W @ u + bh)
        return z + f * (h - z)

    def seen(z, y):
        a = C @ z + b
        return jnp.sum(jnp.exp(a) - y * a)

    def cost(t, z, u, theta):
        before = seen(z, theta[jnp.maximum(t - 1, 0)])
        return jnp.where(t > 0, before, 0.0) + 0.5 * jnp.sum(precision * u * u)

    def final(z, theta):
        return seen(z, theta[-1])

    system = System(cost, final, dynamics, ModelDims(n=n, m=m, horizon=T, dt=1.0))

    def one(z0, u, y):
        (z, u, _), total, _ = ilqr_solver(
            system, iLQRParams(z0, y), u, max_iter=int(file["iterations"]), kkt_tol=1e-4
        )
        return z, u, total

    solve = jax.jit(jax.vmap(one))
    began = time.perf_counter()
    jax.block_until_ready(solve(z0, u, counts))
    compiled = time.perf_counter() - began
    spent, end = [], time.perf_counter() + seconds
    while len(spent) < 3 or time.perf_counter() < end:
        began = time.perf_counter()
        jax.block_until_ready(solve(z0, u, counts))
        spent.append(time.perf_counter() - began)
    answer = {
        "implementation": "diffilqrax",
        "dtype": str(u.dtype),
        "iterations": int(file["iterations"]),
        "compile_s": round(compiled, 2),
        "seconds": spent,
    }
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
