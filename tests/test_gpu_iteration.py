"""The Triton iteration against torch: through the interpreter, and on a GPU where one is.

``test_lqr_gpu`` starts the process that interprets.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ilqr_vae.artifact import GroupSpec, ModelSpec, build
from ilqr_vae.inference import ilqr, line_search
from ilqr_vae.inference.on_gpu import Iteration, packed
from ilqr_vae.kernels import backend
from ilqr_vae.lqr import solve_lqr
from ilqr_vae.model.generative import Model
from ilqr_vae.model.likelihoods import Observed
from ilqr_vae.model.priors import InitialCost
from test_lqr_gpu import on_each_device
from test_rollout import normal

code = pytest.importorskip("ilqr_vae.kernels.gpu.iteration")
CASES = pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-11), (torch.float32, 1e-4)],
    ids=["float64", "float32"],
)
FAMILIES = pytest.mark.parametrize("family", ["linear", "mgu2"])


@dataclass
class Case:
    """A problem of two trajectories, one of them with units and bins missing."""

    model: Model
    w: tuple[Tensor, ...]
    problem: ilqr.Problem
    z0: Tensor
    u: Tensor

    @property
    def kernels(self) -> Iteration:
        return packed(code, self.model, self.w, "spikes")

    @property
    def about(self) -> tuple[Any, InitialCost]:
        return self.problem.observed, self.problem.initial


def case(family: str, device: str, dtype: torch.dtype, *, units: int = 70, T: int = 18) -> Case:
    n, m = 5, 3
    groups = {"spikes": GroupSpec(family="poisson", channels=units, log_rate_max=1.0)}
    torch.manual_seed(3)
    model = build(ModelSpec(dynamics=family, latents=n, inputs=m, groups=groups))
    model = model.to(device, dtype).requires_grad_(False)
    z0, u, mean, root = normal(5, (2, n), (2, T, m), (2, n), (2, n, n))
    mask = torch.ones(2, T, units, dtype=torch.float64)
    mask[1, :, ::3], mask[1, 2] = 0.0, 0.0
    counts = torch.poisson(torch.full_like(mask, 1.5))
    # a channel that drives its rate to where it goes linear
    counts[:, :, 1] = 9.0
    precision = root @ root.mT + torch.eye(n, dtype=torch.float64)

    def to(x: Tensor) -> Tensor:
        return x.to(device, dtype)

    observed = {"spikes": Observed(to(counts), to(mask))}
    w = tuple(t.detach() for t in model.dynamics.weights())
    problem = ilqr.Problem(model, w, observed, InitialCost(to(mean), to(precision)))
    return Case(model, w, problem, to(z0), 0.5 * to(u))


def close(found: Tensor, truth: Tensor, tolerance: float) -> None:
    assert found.dtype == truth.dtype
    assert found.shape == truth.shape
    atol = tolerance * max(1.0, float(truth.abs().max()))
    torch.testing.assert_close(found, truth, rtol=0, atol=atol)


@on_each_device
@CASES
@FAMILIES
def test_the_start_and_its_cost(
    device: str, family: str, dtype: torch.dtype, tolerance: float
) -> None:
    c = case(family, device, dtype)
    z, cost = c.kernels.begin(c.z0, c.u, *c.about)
    with backend.using("reference"):
        truth = c.model.rollout(c.w, c.z0, c.u)
        close(z, truth, tolerance)
        close(cost, c.problem.cost(truth, c.u), tolerance)


@on_each_device
@CASES
@FAMILIES
def test_the_quadratic_model(
    device: str, family: str, dtype: torch.dtype, tolerance: float
) -> None:
    c = case(family, device, dtype, T=3)
    with backend.using("reference"):
        z = c.model.rollout(c.w, c.z0, c.u)
        truth = c.model.lqr_problem(c.w, z, c.u, *c.about)
    found = c.kernels.quadratise(z, c.u, *c.about)
    for name, tensor in truth.tensors().items():
        close(found.tensors()[name], tensor, tolerance)


@on_each_device
@CASES
@FAMILIES
def test_the_line_search(device: str, family: str, dtype: torch.dtype, tolerance: float) -> None:
    c = case(family, device, dtype)
    config = ilqr.SolverConfig(iterations=1)
    with backend.using("reference"):
        state = ilqr.init(c.problem, c.z0, c.u)
        quadratic = c.model.lqr_problem(c.w, state.z, state.u, *c.about)
        lqr = solve_lqr(quadratic, free_initial=True)
        # a step that is far too long, so that it is halved a few times; and one not looked for
        long = replace(lqr, k=6 * lqr.k, dz0=6 * lqr.dz0)
        for law, seeking in ((lqr, [True, True]), (long, [True, True]), (long, [False, True])):
            sought = torch.tensor(seeking, device=device)
            truth = line_search.Search(c.problem, state, law, sought, config).backtrack()
            found = c.kernels.search(
                state.z, state.u, state.cost, law, sought, *c.about,
                armijo=config.armijo, tries=config.backtracks + 1,
            )  # fmt: skip
            assert found[3].tolist() == truth[3].tolist()
            for mine, theirs in zip(found, truth, strict=True):
                close(mine, theirs, tolerance)
        assert truth[3][0] == 0
        assert 0 < truth[3][1] < 1
