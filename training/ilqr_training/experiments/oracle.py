"""How well inputs of a linear system could be known at best: inference with the true parameters."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from ilqr_training.experiments.generators import LinearData
from ilqr_vae.lqr import LQRProblem, solve_lqr

Array = NDArray[np.float64]


def smoothed_inputs(data: LinearData, *, noise: float, start: float, variance: Array) -> Array:
    """Posterior mean of the inputs under the true system and Gaussian inputs.

    Args:
        noise: standard deviation of the observations.
        start: standard deviation of the initial state.
        variance: (K, T), of every input of a bin; zero where there is none.

    Returns:
        (K, T, m).
    """

    def each(matrix: Array) -> torch.Tensor:
        return torch.as_tensor(matrix).expand(K, T, *matrix.shape)

    K, T, m = data.inputs.shape
    n = data.A.shape[0]
    Q = torch.zeros(K, T + 1, n, n, dtype=torch.float64)
    Q[:, 0] = torch.eye(n) / start**2
    Q[:, 1:] = torch.as_tensor(data.C.T @ data.C) / noise**2
    q = torch.zeros(K, T + 1, n, dtype=torch.float64)
    q[:, 1:] = torch.as_tensor(-data.values @ data.C) / noise**2
    # where there is no input, one so dear that it is none to ten digits
    precision = torch.as_tensor(1.0 / np.maximum(variance, 1e-10))
    problem = LQRProblem(
        A=each(data.A).contiguous(),
        B=each(data.B).contiguous(),
        Q=Q,
        q=q,
        R=torch.eye(m, dtype=torch.float64) * precision[..., None, None],
        r=torch.zeros(K, T, m, dtype=torch.float64),
        c=None,
        S=None,
    )
    return solve_lqr(problem, free_initial=True).du.numpy()


def oracle_scores(data: LinearData, *, noise: float, start: float) -> dict[str, float]:
    """R2 of the inputs, true parameters known, no map fitted.

    ``white``: under Gaussian inputs of their average variance (the best linear estimate of sparse
    events). ``events``: knowing besides which bins have an event, which no estimate from the
    observations can beat on average.
    """
    u = data.inputs
    total = ((u - u.mean((0, 1))) ** 2).sum()
    if total == 0:
        return {"white": float("nan"), "events": float("nan")}
    event = (u != 0).any(-1)
    power = (u[event] ** 2).mean()
    white = np.full(event.shape, (u**2).mean())
    found = {
        name: smoothed_inputs(data, noise=noise, start=start, variance=variance)
        for name, variance in (("white", white), ("events", event * power))
    }
    return {name: float(1 - ((u - x) ** 2).sum() / total) for name, x in found.items()}
