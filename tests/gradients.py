"""How far the Gauss-Newton gradient is from the exact one, over many small models.

``python tests/gradients.py`` prints the table that docs/method.md states: per dynamics family and
input prior, the distribution of |g_GN - g| / |g| over seeds and kinds of observations, and of the
cosine between them. n = 3, m = 2, T = 5; the models' parameters are in general position.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from ilqr_vae.inference import elbo, ilqr, implicit
from ilqr_vae.inference.posterior import Kronecker
from ilqr_vae.inference.problem import Status
from ilqr_vae.model.dynamics import FAMILIES
from ilqr_vae.model.generative import Model
from ilqr_vae.model.likelihoods import Observed
from ilqr_vae.model.priors import StudentPrior
from small import TIGHT, as_problem, draw_data, make_model, perturb, rest

B, T = 2, 5
KINDS = ("gaussian", "poisson", "joint")
SEEDS = 12


@dataclass
class Setting:
    """A model, data with masks, a posterior, the recognition's groups and a first optimum."""

    model: Model
    observed: dict[str, Observed]
    posterior: Kronecker
    names: tuple[str, ...]
    start: tuple[Tensor, Tensor] | None = None

    def parameters(self) -> dict[str, Tensor]:
        named = {**dict(self.model.named_parameters())}
        named |= {f"posterior.{k}": v for k, v in self.posterior.named_parameters()}
        return {k: v for k, v in named.items() if v.requires_grad}

    def solved(self) -> tuple[ilqr.Problem, ilqr.State]:
        problem = as_problem(self.model, self.observed, self.names)
        state, _ = ilqr.solve(problem, *(self.start or rest(problem)), TIGHT)
        assert not (state.status == Status.NOT_FINITE).any()
        return problem, state

    def loss(
        self, *, exact: bool = True, at: tuple[ilqr.Problem, ilqr.State] | None = None
    ) -> Tensor:
        """The bound summed over trials; the sample's noise is always the same."""
        problem, state = at or self.solved()
        z0, u = implicit.attach_gradient(problem, state, exact=exact)
        draw = self.posterior.draw(B, torch.Generator().manual_seed(7))
        parts = elbo.bound(self.model, problem.w, z0, u, draw, self.observed)
        return parts.value(kl_weight=0.9, group_weights={"kinematics": 1.3}).sum()

    def gradient(self, *, exact: bool) -> dict[str, Tensor]:
        named = self.parameters()
        grads = torch.autograd.grad(self.loss(exact=exact), list(named.values()))
        return dict(zip(named, grads, strict=True))


def setting(
    dynamics: str, kinds: str, *, n: int = 3, m: int = 2, seed: int = 3, student: bool = False
) -> Setting:
    """A setting in general position; ``kinds`` are the observations, one of ``KINDS``."""
    model = make_model(
        dynamics,
        n=n,
        m=m,
        units=3,
        spikes="gaussian" if kinds == "gaussian" else "poisson",
        kinematics=2 if kinds == "joint" else 0,
        seed=seed,
    )
    if student:
        scale = model.prior.log_scale.detach()
        model.prior = StudentPrior(m, nu=5.0).double()
        with torch.no_grad():
            model.prior.log_scale.copy_(scale)
    posterior = Kronecker(n, m, T).double()
    perturb(posterior, 0.2, torch.Generator().manual_seed(1))
    observed = draw_data(model, B, T, seed=2, missing=0.25)
    made = Setting(model, observed, posterior, ("spikes",))
    _, state = made.solved()
    made.start = state.z[:, 0], state.u  # every perturbed solve starts at the unperturbed optimum
    return made


def error(s: Setting) -> tuple[float, float]:
    """|g_GN - g| / |g| over all parameters, and the cosine between the two."""
    pair = (s.gradient(exact=True), s.gradient(exact=False))
    exact, rough = (torch.cat([g.flatten() for g in x.values()]) for x in pair)
    cosine = torch.nn.functional.cosine_similarity(exact, rough, dim=0)
    return float((rough - exact).norm() / exact.norm()), float(cosine)


def main(seeds: int) -> None:
    print("| dynamics | inputs | median | 90 % | worst | least cosine |")
    print("| --- | --- | --- | --- | --- | --- |")
    for family in FAMILIES:
        for student in (False, True):
            found = torch.tensor(
                [
                    error(setting(family, kinds, seed=seed, student=student))
                    for seed in range(seeds)
                    for kinds in KINDS
                ]
            )
            most = found[:, 0]
            quantiles = [most.quantile(0.5), most.quantile(0.9), most.max(), found[:, 1].min()]
            numbers = " | ".join(f"{float(x):.2g}" for x in quantiles[:3])
            prior = "Student" if student else "Gaussian"
            print(f"| {family} | {prior} | {numbers} | {float(quantiles[3]):.3f} |", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else SEEDS)
