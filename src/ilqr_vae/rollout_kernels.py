"""Compiled rollouts of the built-in dynamics families (numba; kept free of annotations).

``*_closed_loop``: z_0 = z0; u_k = ub_k + alpha_b k_k + K_k (z_k - zb_k); z_{k+1} = f(z_k, u_k), for
each problem of a batch. The open-loop rollout is the same with zero gains. One problem's loop is
``*_one``; it is called serially for a batch of one, else in parallel over the batch.
"""

import math

import numpy as np
from numba import njit, prange

_FLAGS = {"cache": True, "nogil": True, "error_model": "numpy"}


@njit(**_FLAGS)
def _policy(zb, ub, K, k, alpha, z, u, n, m):
    for i in range(m):
        u[i] = ub[i] + alpha * k[i]
    for i in range(m):
        acc = u[i]
        for j in range(n):
            acc += K[i, j] * (z[j] - zb[j])
        u[i] = acc


@njit(**_FLAGS)
def _mgu2_one(Uf, bf, Uh, bh, W, z0, zb, ub, K, k, alpha, z, u):
    T, m = ub.shape
    n = z0.shape[0]
    f = np.empty(n, z0.dtype)
    g = np.empty(n, z0.dtype)
    for i in range(n):
        z[0, i] = z0[i]
    for t in range(T):
        _policy(zb[t], ub[t], K[t], k[t], alpha, z[t], u[t], n, m)
        for i in range(n):
            acc = bf[i]
            for j in range(n):
                acc += Uf[i, j] * z[t, j]
            f[i] = 1.0 / (1.0 + math.exp(-acc))
            g[i] = f[i] * z[t, i]
        for i in range(n):
            acc = bh[i]
            for j in range(n):
                acc += Uh[i, j] * g[j]
            for j in range(m):
                acc += W[i, j] * u[t, j]
            z[t + 1, i] = z[t, i] + f[i] * (math.tanh(acc) - z[t, i])


@njit(**_FLAGS)
def mgu2_serial(w, z0, zb, ub, K, k, alpha, z, u):
    Uf, bf, Uh, bh, W = w
    for b in range(z0.shape[0]):
        _mgu2_one(Uf, bf, Uh, bh, W, z0[b], zb[b], ub[b], K[b], k[b], alpha[b], z[b], u[b])


@njit(parallel=True, **_FLAGS)
def mgu2_parallel(w, z0, zb, ub, K, k, alpha, z, u):
    Uf, bf, Uh, bh, W = w
    for b in prange(z0.shape[0]):
        _mgu2_one(Uf, bf, Uh, bh, W, z0[b], zb[b], ub[b], K[b], k[b], alpha[b], z[b], u[b])


@njit(**_FLAGS)
def _linear_one(A, B, z0, zb, ub, K, k, alpha, z, u):
    T, m = ub.shape
    n = z0.shape[0]
    for i in range(n):
        z[0, i] = z0[i]
    for t in range(T):
        _policy(zb[t], ub[t], K[t], k[t], alpha, z[t], u[t], n, m)
        for i in range(n):
            acc = A[i, 0] * z[t, 0]
            for j in range(1, n):
                acc += A[i, j] * z[t, j]
            for j in range(m):
                acc += B[i, j] * u[t, j]
            z[t + 1, i] = acc


@njit(**_FLAGS)
def linear_serial(w, z0, zb, ub, K, k, alpha, z, u):
    A, B = w
    for b in range(z0.shape[0]):
        _linear_one(A, B, z0[b], zb[b], ub[b], K[b], k[b], alpha[b], z[b], u[b])


@njit(parallel=True, **_FLAGS)
def linear_parallel(w, z0, zb, ub, K, k, alpha, z, u):
    A, B = w
    for b in prange(z0.shape[0]):
        _linear_one(A, B, z0[b], zb[b], ub[b], K[b], k[b], alpha[b], z[b], u[b])


@njit(**_FLAGS)
def _adjoint_one(A, gz, lam):
    T = A.shape[0]
    n = A.shape[1]
    for i in range(n):
        lam[T, i] = gz[T, i]
    for t in range(T - 1, -1, -1):
        for i in range(n):
            lam[t, i] = gz[t, i]
        for j in range(n):
            s = lam[t + 1, j]
            for i in range(n):
                lam[t, i] += A[t, j, i] * s


@njit(parallel=True, **_FLAGS)
def adjoint(A, gz, lam):
    """lam_T = gz_T; lam_k = gz_k + A_k' lam_{k+1}."""
    for b in prange(A.shape[0]):
        _adjoint_one(A[b], gz[b], lam[b])


KERNELS = {
    "mgu2": (mgu2_serial, mgu2_parallel),
    "linear": (linear_serial, linear_parallel),
}
