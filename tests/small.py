"""Small float64 models, data drawn from them, and the linear-Gaussian oracles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ilqr_vae.inference import ilqr
from ilqr_vae.model.dynamics import FAMILIES, DynamicsOptions, Weights
from ilqr_vae.model.generative import Model, conditioned_on
from ilqr_vae.model.likelihoods import Counts, Gaussian, Likelihood, Observations, Observed, Poisson
from ilqr_vae.model.priors import GaussianPrior, InitialPrior

# Newton: the last step, of 1e-8 or so, squares the error once more
TIGHT = ilqr.SolverConfig(iterations=100, tolerance=1e-15, exact=True)


def perturb(module: torch.nn.Module, scale: float, generator: torch.Generator) -> None:
    """Move every parameter off its special starting value."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator, dtype=p.dtype))


def make_model(
    dynamics: str = "mgu2",
    *,
    n: int = 4,
    m: int = 2,
    units: int = 5,
    spikes: str = "poisson",
    kinematics: int = 0,
    seed: int = 0,
) -> Model:
    """A model with parameters in general position."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        groups: dict[str, Likelihood] = {
            "spikes": Poisson(n, units) if spikes == "poisson" else Gaussian(n, units, scale=0.7)
        }
        if kinematics:
            groups["kinematics"] = Gaussian(n, kinematics, scale=0.5)
        model = Model(
            FAMILIES[dynamics].from_options(n, m, DynamicsOptions()),
            GaussianPrior(m, scale=0.8),
            InitialPrior(n, scale=0.6),
            groups,
        ).double()
    for part in (model.dynamics, model.initial, *model.groups.values()):
        perturb(part, 0.2, generator)
    with torch.no_grad():
        model.prior.log_scale.add_(0.1 * torch.randn(m, generator=generator, dtype=torch.float64))
    return model


def draw_data(
    model: Model, batch: int, steps: int, *, seed: int = 0, missing: float = 0.0
) -> dict[str, Observed]:
    """Observations of every group; a share of the entries, and one whole bin, masked."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        _, _, means = model.sample(batch, steps)
    observed: dict[str, Observed] = {}
    for name, mean in means.items():
        if isinstance(model.group(name), Counts):
            values = torch.poisson(mean, generator=generator)
        else:
            values = mean + 0.5 * torch.randn(mean.shape, generator=generator, dtype=mean.dtype)
        mask = (torch.rand(mean.shape, generator=generator) >= missing).to(mean)
        if missing and steps > 2:
            mask[:, 1] = 0.0
        observed[name] = Observed(values, mask)
    return observed


def as_problem(
    model: Model, observed: Observations, names: Sequence[str] = ("spikes",)
) -> ilqr.Problem:
    """The recognition problem under the model's own prior."""
    batch = next(iter(observed.values())).values.shape[0]
    return ilqr.Problem(
        model,
        model.dynamics.weights(),
        conditioned_on(observed, names),
        model.initial.cost(batch),
    )


def rest(problem: ilqr.Problem) -> tuple[Tensor, Tensor]:
    """Where a cold solve starts: the prior's mean state, inputs of zero."""
    B, T, _ = problem.observed["spikes"].values.shape
    z0 = problem.initial.mean.detach()
    return z0, z0.new_zeros(B, T, problem.model.m)


def loop_rollout(model: Model, w: Weights, z0: Tensor, u: Tensor) -> Tensor:
    """The rollout that autograd can see."""
    zs = [z0]
    for t in range(u.shape[1]):
        zs.append(model.dynamics.step(w, zs[-1], u[:, t]))
    return torch.stack(zs, 1)


@dataclass(frozen=True)
class Smoothed:
    """What exact inference in a linear-Gaussian model knows of one sequence.

    Attributes:
        filtered, filtered_cov: of z_1 .. z_T given the bins so far.
        smoothed, smoothed_cov: of z_0 .. z_T given all bins.
        log_likelihood: of each bin given those before it.
    """

    filtered: Tensor
    filtered_cov: Tensor
    smoothed: Tensor
    smoothed_cov: Tensor
    log_likelihood: Tensor


def kalman(model: Model, values: Tensor, mask: Tensor) -> Smoothed:
    """Kalman filter and Rauch-Tung-Striebel smoother of one sequence, values and mask (T, N)."""
    A, B = (x.detach() for x in model.dynamics.weights())
    spikes = model.group("spikes")
    assert isinstance(spikes, Gaussian)
    C, b = spikes.C.detach(), spikes.b.detach()
    noise = torch.exp(2 * spikes.log_scale.detach())
    W = B @ torch.diag(torch.exp(2 * model.prior.log_scale.detach())) @ B.mT
    mean = model.initial.mean.detach()
    cov = torch.diag(torch.exp(2 * model.initial.log_scale.detach()))
    means, covs, predicted, predicted_cov, scores = [mean], [cov], [], [], []
    for y, seen in zip(values, mask.bool(), strict=True):
        mean, cov = A @ mean, A @ cov @ A.mT + W
        predicted.append(mean)
        predicted_cov.append(cov)
        Cs, e = C[seen], y[seen] - C[seen] @ mean - b[seen]
        S = Cs @ cov @ Cs.mT + torch.diag(noise[seen])
        gain = torch.linalg.solve(S, Cs @ cov).mT
        scores.append(
            -0.5 * (e @ torch.linalg.solve(S, e) + torch.logdet(2 * torch.pi * S))
            if bool(seen.any())
            else e.sum()
        )
        mean, cov = mean + gain @ e, cov - gain @ Cs @ cov
        means.append(mean)
        covs.append(cov)
    smoothed, smoothed_cov = [means[-1]], [covs[-1]]
    for k in range(len(values) - 1, -1, -1):
        G = torch.linalg.solve(predicted_cov[k], A @ covs[k]).mT
        smoothed.append(means[k] + G @ (smoothed[-1] - predicted[k]))
        smoothed_cov.append(covs[k] + G @ (smoothed_cov[-1] - predicted_cov[k]) @ G.mT)
    return Smoothed(
        filtered=torch.stack(means[1:]),
        filtered_cov=torch.stack(covs[1:]),
        smoothed=torch.stack(smoothed[::-1]),
        smoothed_cov=torch.stack(smoothed_cov[::-1]),
        log_likelihood=torch.stack(scores),
    )
