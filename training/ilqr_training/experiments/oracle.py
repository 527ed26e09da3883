"""The best possible estimate of a linear system's inputs: inference with the true parameters."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from ilqr_training.experiments.generators import LinearData
from ilqr_vae.lqr import LQRProblem, solve_lqr

Array = NDArray[np.float64]


def smoothed_inputs(data: LinearData, *, noise: float, start: float, variance: Array) -> Array:
    """Return the posterior mean (K, T, m) of Gaussian inputs under the true system.

    Args:
        noise: standard deviation of the noise of the observations.
        start: standard deviation of the initial state.
        variance: (K, T) prior variance of the inputs of each bin; zero for no input.
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
    # where there is no input, a precision so high that the input is zero to ten digits
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
    """Return R2 of the inputs inferred with the true parameters, without a fitted map.

    ``white``: with Gaussian inputs of the average variance (the best linear estimate). ``events``:
    knowing also which bins have an event; no estimate from the observations is better on average.
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
