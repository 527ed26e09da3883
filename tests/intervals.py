"""Whether the stated covariance of the latents is that of their errors, for simulated models.

``python tests/intervals.py`` prints the tables that docs/decoding.md states. The models are MGU2
with Poisson counts and parameters in general position, and the estimator has the true ones. With
e the error of the filtered latents z in R^n and Sigma their stated covariance:

    s = e' Sigma^-1 e / n      has mean 1, and n s is chi-squared with n degrees, if e ~ N(0, Sigma)

Half of the streams, independent of the others, fit two corrections by maximum likelihood:
e ~ N(0, c Sigma), and e ~ t_nu(0, c Sigma). The other half measures them.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import optimize, stats

from ilqr_vae.model.generative import Model
from ilqr_vae.streaming.horizon import HorizonConfig, MovingHorizon
from small import make_model

N, M, UNITS, HORIZON = 4, 2, 20, 20
STREAMS, BINS, SKIPPED = 64, 120, 40
GAP = 3000
Array = NDArray[np.float64]


class Errors(NamedTuple):
    """Of streams and bins: s (S, T), each latent's error over its deviation (S, T, n), and the
    same along the direction of least variance (S, T)."""

    scaled: Array
    single: Array
    narrowest: Array


def _estimator(model: Model, iterations: int) -> MovingHorizon:
    rate = torch.full((UNITS,), 0.5, dtype=torch.float64)
    return MovingHorizon(model, None, rate, HorizonConfig(horizon=HORIZON, iterations=iterations))


def _errors(error: Array, covariance: Array) -> Errors:
    scaled = np.einsum("...i,...i", error, np.linalg.solve(covariance, error[..., None])[..., 0])
    variance, axes = np.linalg.eigh(covariance)
    deviation = np.sqrt(np.diagonal(covariance, axis1=-2, axis2=-1))
    along = np.einsum("...i,...i", error, axes[..., 0])
    return Errors(scaled / N, error / deviation, along / np.sqrt(variance[..., 0]))


def filtered(model: Model, iterations: int, seed: int) -> Errors:
    """Errors of filtered latents; the first bins of each stream are skipped."""
    torch.manual_seed(seed)
    z, _, means = model.sample(STREAMS, BINS)
    counts = torch.poisson(means["spikes"])
    estimator = _estimator(model, iterations)
    state, mask = estimator.init(STREAMS), torch.ones_like(counts[:, 0])
    found: list[tuple[Array, Array]] = []
    for t in range(BINS):
        state, answer = estimator.step(state, counts[:, t], mask)
        if t >= SKIPPED:
            found.append(((z[:, t + 1] - answer.z).numpy(), answer.z_cov.numpy()))
    error, covariance = (np.stack(x, 1) for x in zip(*found, strict=True))
    return _errors(error, covariance)


def _t_fit(scaled: Array) -> tuple[float, float]:
    """nu and c of the t distribution, by maximum likelihood."""

    def cost(p: Array) -> float:
        nu, c = np.exp(p)
        return -float(stats.f.logpdf(scaled / c, N, nu).mean() - np.log(c))

    found = optimize.minimize(cost, np.log([10.0, 1.0]), method="Nelder-Mead")
    nu, c = np.exp(found.x)
    return float(nu), float(c)


def row(name: str, errors: Errors) -> str:
    """A row of the first table: the stated covariance and both corrections."""
    half = STREAMS // 2
    fitted, held = errors.scaled[:half].ravel(), errors.scaled[half:].ravel()
    single, narrowest = np.abs(errors.single[half:]), np.abs(errors.narrowest[half:])
    c = float(fitted.mean())
    nu, c_t = _t_fit(fitted)
    joint, one = stats.chi2.ppf(0.9, N) / N, stats.norm.ppf(0.95)
    one_t = stats.t.ppf(0.95, nu) * np.sqrt(c_t)
    covers = [
        *(100 * (single < x).mean() for x in (one, one * np.sqrt(c), one_t)),
        *(100 * (narrowest < x).mean() for x in (one, one * np.sqrt(c), one_t)),
        *(100 * (held < x).mean() for x in (joint, c * joint, c_t * stats.f.ppf(0.9, N, nu))),
    ]
    groups = [" / ".join(f"{x:.0f}" for x in covers[k : k + 3]) for k in (0, 3, 6)]
    return f"| {name} | {held.mean():.2f} | {c:.2f} | {nu:.1f} | {' | '.join(groups)} |"


class Gap(NamedTuple):
    """Deviations over the true stationary one, averaged over latents: as stated, as predicted
    with moments of f over a Gaussian instead of its Jacobian, and corrected by ``scale``."""

    stated: float
    moments: float
    scaled: float


def in_a_gap(model: Model, iterations: int, scale: float, seed: int) -> Gap:
    """What is stated after thousands of bins without data."""
    torch.manual_seed(seed)
    z, _, _ = model.sample(256, 400)
    true = z[:, 200:].reshape(-1, N).std(0).numpy()
    estimator = _estimator(model, iterations)
    state = estimator.init()
    missing = torch.zeros(1, UNITS, dtype=torch.float64)
    for _ in range(GAP):
        state, answer = estimator.step(state, missing, missing)
    stated = answer.z_std[0].numpy()
    deviation = model.prior.log_scale.detach().exp().numpy()
    mean, P = np.zeros(N), np.eye(N)
    w = model.dynamics.weights()
    size = N + M
    nodes = np.sqrt(size) * np.concatenate([np.eye(size), -np.eye(size)])
    for _ in range(GAP):
        at = mean + nodes[:, :N] @ np.linalg.cholesky(P).T
        u = nodes[:, N:] * deviation
        with torch.no_grad():
            after = model.dynamics.step(w, torch.from_numpy(at), torch.from_numpy(u)).numpy()
        mean, P = after.mean(0), np.cov(after.T, bias=True) + 1e-9 * np.eye(N)
    moments = np.sqrt(np.diag(P))
    return Gap(*(float(np.mean(x / true)) for x in (stated, moments, stated * np.sqrt(scale))))


def main(seeds: int) -> None:
    print("| model, iterations | mean s | c | nu | single | narrowest | joint |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    scales: dict[int, float] = {}
    for seed in range(seeds):
        model = make_model("mgu2", n=N, m=M, units=UNITS, seed=seed)
        for iterations in (2, 8, 40):
            found = filtered(model, iterations, seed)
            scales.setdefault(seed, float(found.scaled.mean()))
            print(row(f"{seed}, {iterations}", found), flush=True)
    print("\n| model | stated, 2 iterations | 40 iterations | moments | scaled by c |")
    print("| --- | --- | --- | --- | --- |")
    for seed in range(seeds):
        model = make_model("mgu2", n=N, m=M, units=UNITS, seed=seed)
        few, many = (in_a_gap(model, k, scales[seed], seed) for k in (2, 40))
        print(
            f"| {seed} | {few.stated:.2f} | {many.stated:.2f} | {few.moments:.2f} "
            f"| {few.scaled:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=6)
    main(parser.parse_args().seeds)
