"""Inference with a trained model: posteriors, samples, forecasts, long sequences.

``infer`` finds the optimum (z_0*, u*) of the cost J (``inference.ilqr``) and a Gaussian posterior
q(z_0, u | o) around it (``inference.posterior``), from which samples, rates, bounds and forecasts
are derived. B trials of T bins, N channels, n latents, m inputs, K samples or steps. No gradients
are recorded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ilqr_vae.errors import ShapeError
from ilqr_vae.inference import elbo, ilqr
from ilqr_vae.inference.posterior import Kronecker, Laplace, Sampler, laplace_at
from ilqr_vae.model.dynamics import Weights
from ilqr_vae.model.generative import Model, conditioned_on
from ilqr_vae.model.likelihoods import Observations, Observed
from ilqr_vae.model.priors import InitialCost

SOLVER = ilqr.SolverConfig(iterations=100, tolerance=1e-8)
"""Default settings of the solver."""


@dataclass(frozen=True)
class PosteriorSamples:
    """Draws from the posterior, K per trial.

    Attributes:
        inputs, states: inputs and states of the model.
        rates: E[o | z] per group, expected counts per bin for spikes.
        observations: observations drawn given z, per group, for all channels.
    """

    inputs: Float[Tensor, "K B T m"]
    states: Float[Tensor, "K B T1 n"]
    rates: Mapping[str, Float[Tensor, "K B T N"]]
    observations: Mapping[str, Float[Tensor, "K B T N"]]


@dataclass(frozen=True)
class Inferred:
    """The posterior of a batch of trials.

    Attributes:
        model, w: the generative model and its effective weights.
        state: result of the solve: ``z`` (B, T+1, n), ``u`` (B, T, m), ``status``.
        sampler: draws deviations from the optimum.
        laplace: per-trial posterior with its covariances; None with a Kronecker posterior.
    """

    model: Model
    w: Weights
    state: ilqr.State
    sampler: Sampler
    laplace: Laplace | None

    @property
    def z(self) -> Float[Tensor, "B T1 n"]:
        return self.state.z

    @property
    def u(self) -> Float[Tensor, "B T m"]:
        return self.state.u

    def rates(self) -> dict[str, Float[Tensor, "B T N"]]:
        """Return E[o | z] of every group at the mean trajectory."""
        return {name: self.model.group(name).mean(self.z[:, 1:]) for name in self.model.groups}

    @torch.no_grad()
    def posterior_rates(self, group: str) -> Float[Tensor, "B T N"]:
        """Return E[o] of a group under the Laplace posterior of each state, by quadrature.

        Raises:
            ShapeError: the posterior is not a Laplace posterior.
        """
        if self.laplace is None:
            raise ShapeError("posterior", expected="a Laplace posterior", got="a Kronecker one")
        family, Sigma = self.model.group(group), self.laplace.z_cov[:, 1:]
        a = family.affine(self.z[:, 1:])
        std = torch.einsum("ki,btij,kj->btk", family.C, Sigma, family.C).clamp(min=0).sqrt()
        nodes, weights = np.polynomial.hermite_e.hermegauss(7)
        total = torch.zeros_like(a)
        for x, weight in zip(nodes.tolist(), (weights / weights.sum()).tolist(), strict=True):
            total += weight * family.expected(a + x * std)
        return total

    @torch.no_grad()
    def sample(self, samples: int, generator: torch.Generator | None = None) -> PosteriorSamples:
        """Draw ``samples`` samples per trial.

        The generator draws observations; states come from the one given to ``infer``.
        """
        B, T, m = self.u.shape
        draw = self.sampler(samples)
        u = self.u.repeat(samples, 1, 1) + draw.du
        z = self.model.rollout(self.w, self.z[:, 0].repeat(samples, 1) + draw.dz0, u)
        z = z.view(samples, B, T + 1, -1)
        groups = {name: self.model.group(name) for name in self.model.groups}
        return PosteriorSamples(
            inputs=u.view(samples, B, T, m),
            states=z,
            rates={name: family.mean(z[:, :, 1:]) for name, family in groups.items()},
            observations={
                name: family.sample(z[:, :, 1:], generator) for name, family in groups.items()
            },
        )

    def mean_rates(self, samples: int) -> dict[str, Float[Tensor, "B T N"]]:
        """Return the posterior mean of E[o | z] over this many samples."""
        return {name: rate.mean(0) for name, rate in self.sample(samples).rates.items()}

    @torch.no_grad()
    def bound(
        self, observed: Observations, *, samples: int = 1, live: Tensor | None = None
    ) -> Float[Tensor, " B"]:
        """Return the bound on log p of ``observed`` in nats per trial, averaged over samples."""
        total = torch.zeros_like(self.state.cost)
        for _ in range(samples):
            parts = elbo.bound(
                self.model, self.w, self.z[:, 0], self.u, self.sampler(1), observed, live=live
            )
            total = total + parts.value()
        return total / samples

    def importance_weighted(
        self,
        observed: Observations,
        *,
        samples: int = 1000,
        at_once: int = 10,
        live: Tensor | None = None,
    ) -> Float[Tensor, " B"]:
        """Return the importance-weighted bound on log p of ``observed`` in nats per trial."""
        return elbo.importance_weighted(
            self.model,
            self.w,
            self.z[:, 0],
            self.u,
            self.sampler,
            observed,
            samples=samples,
            at_once=at_once,
            live=live,
        )


@torch.no_grad()
def infer(
    model: Model,
    observed: Observations,
    *,
    condition: Iterable[str] | None = None,
    posterior: Kronecker | None = None,
    solver: ilqr.SolverConfig = SOLVER,
    start: tuple[Float[Tensor, "B n"], Float[Tensor, "B T m"]] | None = None,
    generator: torch.Generator | None = None,
    check: bool = True,
) -> Inferred:
    """Infer inputs and initial states of a batch of trials of any length.

    Args:
        observed: values and masks per group.
        condition: groups to condition on; default: all.
        posterior: learned Kronecker covariance; default: per-trial Laplace.
        solver: iterations and tolerance.
        start: initial states and inputs to start from; default: mean of the prior.
        generator: random generator of later samples.
        check: whether to check the observations (``Model.check``). Set it to False for short data
            in which a unit may be silent, which the check refuses.

    Raises:
        ShapeError: observations the model cannot be conditioned on (``Model.check``), or trials
            longer than a Kronecker posterior.
    """
    if check:
        model.check(observed)
    seen = conditioned_on(observed, model.groups if condition is None else condition)
    if not seen:
        raise ShapeError("condition", expected="at least one group of the data", got="none")
    first = next(iter(seen.values())).values
    B, T = first.shape[:2]
    w = tuple(t.contiguous() for t in model.dynamics.weights())
    initial = model.initial.cost(B)
    if start is None:
        start = initial.mean.clone(), first.new_zeros(B, T, model.m) + model.prior.mean
    problem = ilqr.Problem(model, w, seen, initial)
    state, _ = ilqr.solve(problem, start[0], start[1], solver)
    if posterior is not None:
        return Inferred(model, w, state, posterior.sampler(B, generator, steps=T), None)
    at = laplace_at(model, w, state.z[:, 0], state.u, seen)
    return Inferred(model, w, state, at.sampler(generator), at)


def _window(observed: Observations, a: int, b: int) -> dict[str, Observed]:
    return {k: Observed(o.values[:, a:b], o.mask[:, a:b]) for k, o in observed.items()}


@torch.no_grad()
def infer_long(
    model: Model,
    observed: Observations,
    *,
    chunk: int,
    condition: Iterable[str] | None = None,
    solver: ilqr.SolverConfig = SOLVER,
    generator: torch.Generator | None = None,
    check: bool = True,
) -> Inferred:
    """Infer sequences much longer than the training chunks, each as one problem.

    A cold start far from the data can lead to a poor optimum. So chunks are solved first, each from
    the end of the previous one, and the whole sequence is then solved from these inputs. The result
    is the optimum of the whole sequence: chunks only provide the start.

    Args:
        chunk: bins per chunk, about as many as in training.
        check: as for ``infer``.

    Raises:
        ShapeError: as for ``infer``, or the chunk is below one bin.
    """
    if chunk < 1:
        raise ShapeError("chunk", expected="at least 1 bin", got=str(chunk))
    if check:
        model.check(observed)
    seen = conditioned_on(observed, model.groups if condition is None else condition)
    first = next(iter(observed.values())).values
    B, T = first.shape[:2]
    w = tuple(t.contiguous() for t in model.dynamics.weights())
    initial = model.initial.cost(B)
    inputs: list[Tensor] = []
    z_first: Tensor | None = None
    # at the start of a chunk, trust the end of the previous one to a tenth of the prior's deviation
    tight = 100.0 * initial.precision
    for a in range(0, T, chunk):
        b = min(T, a + chunk)
        problem = ilqr.Problem(model, w, _window(seen, a, b), initial)
        u = first.new_zeros(B, b - a, model.m) + model.prior.mean
        state, _ = ilqr.solve(problem, initial.mean.clone(), u, solver)
        z_first = state.z[:, 0] if z_first is None else z_first
        inputs.append(state.u)
        initial = InitialCost(state.z[:, -1], tight)
    assert z_first is not None
    return infer(
        model,
        observed,
        condition=condition,
        solver=solver,
        start=(z_first, torch.cat(inputs, 1)),
        generator=generator,
        check=False,
    )


@torch.no_grad()
def extrapolate(
    model: Model, z: Float[Tensor, "*batch n"], steps: int
) -> Float[Tensor, "*batch K n"]:
    """Return the states 1 to ``steps`` bins after z, with zero inputs.

    Raises:
        ShapeError: the state has another size, or there are no steps.
    """
    if z.shape[-1] != model.n or steps < 1:
        raise ShapeError(
            "z",
            expected=f"(..., {model.n}) and at least one step",
            got=f"{tuple(z.shape)} and {steps}",
        )
    flat = z.reshape(-1, model.n)
    u = z.new_zeros(flat.shape[0], steps, model.m)
    w = tuple(t.contiguous() for t in model.dynamics.weights())
    out = model.rollout(w, flat.contiguous(), u)[:, 1:]
    return out.reshape(*z.shape[:-1], steps, model.n)


@torch.no_grad()
def forecasts(
    model: Model, z: Float[Tensor, "B T1 n"], steps: int, group: str
) -> Float[Tensor, "B T K N"]:
    """Forecast E[o] of a group 1 to ``steps`` bins after each bin, with zero inputs.

    Args:
        z: states, e.g. the posterior mean. ``z[:, t + 1]`` is the state at bin t, and the result at
            [:, t, k - 1] is for bin t + k.

    Raises:
        ShapeError: as ``extrapolate``.
    """
    return model.group(group).mean(extrapolate(model, z[:, 1:], steps))
