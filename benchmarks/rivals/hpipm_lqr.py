"""HPIPM and PIQP, run by a Python that has them: ``python hpipm_lqr.py PROBLEM.npz``.

Prints one JSON line with the name and the error of each, then answers each line ``N`` on standard
input with the seconds of N single calls of each, so that it can be timed in turns with another
process.

HPIPM (with BLASFEO, double precision) solves the unconstrained problem with a free initial state by
its square-root Riccati recursion (``ric_alg`` 1) and by the classical one (0). It is timed alone,
with matrices in its own layout, and with packing and unpacking. A batch is solved sequentially.
PIQP solves the first problem as a sparse QP by its multistage factorisation.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from pathlib import Path

import acados
import numpy as np

SPEED_ABS = 0


class Hpipm:
    """A problem in HPIPM's layout. Arrays are (T, ...); ``b`` is zero, as in all timed problems."""

    def __init__(self, library, A, B, Q, q, R, r, square_root):
        self.calls, self.kept = library, []
        T, n, m = B.shape
        self.sizes = T, n, m
        self.given = [(b"A", A), (b"B", B), (b"Q", Q), (b"q", q), (b"R", R), (b"r", r)]
        # its matrices are column-major
        self.columns = [
            (name, [np.ascontiguousarray(x.T) for x in values]) for name, values in self.given
        ]
        dim = self._make("d_ocp_qp_dim", [], T)
        for stage in range(T + 1):
            library.d_ocp_qp_dim_set(b"nx", stage, n, dim)
            library.d_ocp_qp_dim_set(b"nu", stage, m if stage < T else 0, dim)
        self.qp = self._make("d_ocp_qp", [dim])
        library.d_ocp_qp_set_all_zero(self.qp)
        self.solution = self._make("d_ocp_qp_sol", [dim])
        self.arguments = self._make("d_ocp_qp_ipm_arg", [dim])
        library.d_ocp_qp_ipm_arg_set_default(SPEED_ABS, self.arguments)
        chosen = ctypes.c_int(square_root)
        library.d_ocp_qp_ipm_arg_set_ric_alg(ctypes.byref(chosen), self.arguments)
        self.work = self._make("d_ocp_qp_ipm_ws", [dim, self.arguments])
        self.z, self.u = np.empty((T + 1, n)), np.empty((T, m))
        self.sets = [
            (getattr(library, "d_ocp_qp_set_" + name.decode()), stage, _pointer(x))
            for name, values in self.columns
            for stage, x in enumerate(values)
        ]
        get = library.d_ocp_qp_sol_get_x, library.d_ocp_qp_sol_get_u
        self.gets = [(get[0], stage, _pointer(x)) for stage, x in enumerate(self.z)]
        self.gets += [(get[1], stage, _pointer(x)) for stage, x in enumerate(self.u)]
        self.pack()

    def _make(self, name, given, *sizes):
        library = self.calls
        size = getattr(library, name + "_memsize")(*(sizes or given))
        memory = ctypes.create_string_buffer(size)
        struct = ctypes.create_string_buffer(getattr(library, name + "_strsize")())
        place, raw = _address(struct), _address(memory)
        create = getattr(library, name + "_create")
        create(*sizes, *given, place, raw)
        self.kept += [memory, struct]
        return place

    def pack(self):
        for call, stage, pointer in self.sets:
            call(stage, pointer, self.qp)

    def solve(self):
        self.calls.d_ocp_qp_fact_solve_kkt_unconstr(
            self.qp, self.solution, self.arguments, self.work
        )

    def unpack(self):
        for call, stage, pointer in self.gets:
            call(stage, self.solution, pointer)
        return self.z


def _address(buffer):
    return ctypes.c_void_p(ctypes.addressof(buffer))


def _pointer(array):
    return ctypes.c_void_p(array.ctypes.data)


def load():
    """Load the library of the wheel and declare its functions."""
    folder = Path(acados.__file__).parent / "install" / "lib"
    ctypes.CDLL(str(folder / "libblasfeo.so"))  # not global: PIQP has its own BLASFEO
    library = ctypes.CDLL(str(folder / "libhpipm.so"))
    for name in ("d_ocp_qp_dim", "d_ocp_qp", "d_ocp_qp_sol", "d_ocp_qp_ipm_arg", "d_ocp_qp_ipm_ws"):
        for size in ("_strsize", "_memsize"):
            getattr(library, name + size).restype = ctypes.c_size_t
    return library


def multistage(A, B, Q, q, R, r):
    """Return PIQP's solver of a problem over (z_0, u_0, z_1, ..., z_T), and the state indices."""
    import piqp
    from scipy import sparse

    T, n, m = B.shape
    size, step = T * (n + m) + n, n + m
    blocks = [x for t in range(T) for x in (Q[t], R[t])] + [Q[T]]
    linear = np.concatenate([x for t in range(T) for x in (q[t], r[t])] + [q[T]])
    rows = sparse.lil_matrix((T * n, size))
    for t in range(T):
        at, to = slice(t * n, (t + 1) * n), t * step
        rows[at, to : to + n], rows[at, to + n : to + step] = A[t], B[t]
        rows[at, to + step : to + step + n] = -np.eye(n)
    solver = piqp.SparseSolver()
    solver.settings.kkt_solver = piqp.KKTSolver.sparse_multistage
    solver.settings.eps_abs = solver.settings.eps_rel = 1e-9
    solver.settings.compute_timings = False
    solver.setup(sparse.block_diag(blocks, "csc"), linear, rows.tocsc(), np.zeros(T * n))
    states = (np.arange(T + 1)[:, None] * step + np.arange(n)).ravel()
    return solver, states


def main() -> None:
    file = np.load(sys.argv[1])
    given = [np.ascontiguousarray(file[name]) for name in ("A", "B", "Q", "q", "R", "r")]
    truth, library = file["dz"], load()
    calls, errors = {}, {}
    for square_root, name in ((1, "HPIPM square-root"), (0, "HPIPM classical")):
        batch = [Hpipm(library, *[x[b] for x in given], square_root) for b in range(len(truth))]

        def alone(batch=batch):
            for one in batch:
                one.solve()

        def packed(batch=batch):
            for one in batch:
                one.pack()
                one.solve()
                one.unpack()

        alone()
        found = np.stack([one.unpack() for one in batch])
        calls[name + ", solve alone"], calls[name + ", with packing"] = alone, packed
        error = float(np.abs(found - truth).max() / np.abs(truth).max())
        errors |= dict.fromkeys((name + ", solve alone", name + ", with packing"), error)
    if len(truth) == 1:
        solver, states = multistage(*[x[0] for x in given])
        solver.solve()
        found = solver.result.x[states].reshape(truth[0].shape)
        calls["PIQP multistage"] = solver.solve
        errors["PIQP multistage"] = float(np.abs(found - truth[0]).max() / np.abs(truth).max())
    print(json.dumps(errors), flush=True)
    for line in sys.stdin:
        spent = {}
        for name, call in calls.items():
            call()
            spent[name] = []
            for _ in range(int(line)):
                began = time.perf_counter()
                call()
                spent[name].append(time.perf_counter() - began)
        print(json.dumps(spent), flush=True)


if __name__ == "__main__":
    main()
