"""socu on one LQR problem, run by a Python that has it: ``python socu_lqr.py PROBLEM.npz SECONDS``.

socu factorises positive definite block tridiagonal matrices on a GPU by nested dissection. With Q
and R positive definite the multipliers y_t of z_{t+1} = A_t z_t + B_t u_t solve such a system:

    D_t = A_t Q_t^{-1} A_t' + B_t R_t^{-1} B_t' + Q_{t+1}^{-1},    E_t = -A_{t+1} Q_{t+1}^{-1},
    b_t = Q_{t+1}^{-1} q_{t+1} - A_t Q_t^{-1} q_t - B_t R_t^{-1} r_t,

with D_t on the diagonal and E_t below it. Then z_t = Q_t^{-1} (y_t - A_t' y_{t+1} - q_t). Timed is
the factorisation and the solution alone, which is less than a solver of LQR problems does: the
system is made, and z and u are found from y, outside; there are no gains and no cost-to-go.

Prints one JSON line: seconds of single calls in float32 (until results are ready), and the distance
of dz from the one in the file.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np


def system(A, B, Q, q, R, r):
    """Return the blocks D (T, n, n), E (T - 1, n, n) and b (T, n) of the multipliers' system."""
    Qi, Ri = np.linalg.inv(Q), np.linalg.inv(R)
    AQ = A @ Qi[:-1]
    D = AQ @ A.transpose(0, 2, 1) + B @ Ri @ B.transpose(0, 2, 1) + Qi[1:]
    b = (
        np.einsum("tij,tj->ti", Qi[1:], q[1:])
        - np.einsum("tij,tj->ti", AQ, q[:-1])
        - np.einsum("tij,tj->ti", B @ Ri, r)
    )
    return D, -AQ[1:], b


def states(A, Q, q, y):
    """Return z (T + 1, n) of the multipliers y (T, n)."""
    none = np.zeros((1, y.shape[1]))
    before = np.concatenate([none, y])
    after = np.concatenate([np.einsum("tji,tj->ti", A, y), none])
    return np.linalg.solve(Q, (before - after - q)[..., None])[..., 0]


def measure(given, truth, seconds: float, dtype: str) -> dict[str, object]:
    import warp as wp
    from socu import block_tridiag_solver as socu

    device = "cuda" if wp.is_cuda_available() else "cpu"
    A, _, Q, q, _, _ = given
    D, E, b = system(*given)
    T, n = b.shape
    kind = getattr(wp, dtype)
    below = np.zeros((socu.calculate_off_diag_storage_len(T), n, n))
    below[: T - 1] = E
    first = [wp.from_numpy(x, dtype=kind, device=device) for x in (D, below, b[..., None])]
    used = [wp.clone(x) for x in first]
    launch = socu.create_cholesky_factor_and_solve_launch(*used, device=device, dtype=kind)

    def solve() -> None:
        # it works in place
        for target, source in zip(used, first, strict=True):
            wp.copy(target, source)
        launch()
        wp.synchronize_device(device)

    for _ in range(3):
        solve()
    z = states(A, Q, q, used[2].numpy()[..., 0].astype(np.float64))
    spent, end = [], time.perf_counter() + seconds
    while len(spent) < 5 or time.perf_counter() < end:
        began = time.perf_counter()
        solve()
        spent.append(time.perf_counter() - began)
    error = float(np.abs(z - truth).max() / np.abs(truth).max())
    about = {"implementation": "socu, factor and solve alone", "device": device, "dtype": dtype}
    return about | {"seconds": spent, "error": error}


def main() -> None:
    file, seconds = np.load(sys.argv[1]), float(sys.argv[2])
    given = [file[name][0] for name in ("A", "B", "Q", "q", "R", "r")]
    # compiling it for another dtype takes longer than all its measurements
    print(json.dumps(measure(given, file["dz"][0], seconds, "float32")), flush=True)


if __name__ == "__main__":
    main()
