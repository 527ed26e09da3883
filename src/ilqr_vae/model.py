"""The generative model: composition of dynamics, priors and observation groups.

    z_0 ~ N(mu_0, diag sigma_0^2)      u_k ~ p(u)      z_{k+1} = f(z_k, u_k)
    o_k ~ p(o | z_{k+1}),  k = 0 .. T-1: bin k is seen through the state its input leads to

and the recognition cost of a window (Schimel et al. 2022, eq. 7), with an initial cost in place of
the prior where a moving horizon supplies its arrival cost:

    J(z_0, u) = initial(z_0) + sum_k [ -log p(u_k) - log p(o_k | z_{k+1}) ]

``linearise`` and ``quadratise`` turn J at a trajectory into one LQR problem for the primitive.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ilqr_vae.dynamics import Dynamics, Weights
from ilqr_vae.likelihoods import Likelihood, Observations, Observed, Poisson
from ilqr_vae.lqr import LQRProblem
from ilqr_vae.priors import GaussianPrior, InitialCost, InitialPrior
from ilqr_vae.rollout import rollout


class Model(nn.Module):
    """A latent dynamical system driven by inputs, seen through observation groups.

    Attributes:
        dynamics, prior, initial: the families (see their modules).
        groups: observation group name -> likelihood, e.g. "spikes" and "kinematics".
    """

    def __init__(
        self,
        dynamics: Dynamics,
        prior: GaussianPrior,
        initial: InitialPrior,
        groups: Mapping[str, Likelihood],
    ) -> None:
        super().__init__()
        self.dynamics = dynamics
        self.prior = prior
        self.initial = initial
        self.groups = nn.ModuleDict(groups)

    @property
    def n(self) -> int:
        return self.dynamics.n

    @property
    def m(self) -> int:
        return self.dynamics.m

    def group(self, name: str) -> Likelihood:
        member = self.groups[name]
        assert isinstance(member, Likelihood)
        return member

    def rollout(
        self, w: Weights, z0: Float[Tensor, "B n"], u: Float[Tensor, "B T m"]
    ) -> Float[Tensor, "B T1 n"]:
        """z (B, T+1, n)."""
        return rollout(self.dynamics, w, z0, u)

    def sample(self, batch: int, steps: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Draw (z, u, expected observations per group) from the model."""
        with torch.no_grad():
            like = self.initial.mean
            z0 = like + self.initial.log_scale.exp() * torch.randn(batch, self.n).to(like)
            u = self.prior.mean + self.prior.log_scale.exp() * torch.randn(batch, steps, self.m).to(
                like
            )
            z = self.rollout(self.dynamics.weights(), z0, u)
            means = {name: self.group(name).mean(z[:, 1:]) for name in self.groups}
        return z, u, means

    def log_likelihood(
        self, z: Float[Tensor, "B T1 n"], observed: Observations
    ) -> dict[str, Float[Tensor, "B T"]]:
        """log p(o_k | z_{k+1}) per group and bin."""
        return {name: self.group(name).log_prob(z[:, 1:], o) for name, o in observed.items()}

    def cost(
        self,
        z: Float[Tensor, "B T1 n"],
        u: Float[Tensor, "B T m"],
        observed: Observations,
        initial: InitialCost,
    ) -> Float[Tensor, " B"]:
        """J up to constants no optimum depends on."""
        J = initial.value(z[:, 0]) - self.prior.log_prob(u).sum(-1)
        for name, o in observed.items():
            family = self.group(name)
            score = family.unnormalised if isinstance(family, Poisson) else family.log_prob
            J = J - score(z[:, 1:], o).sum(-1)
        return J

    def linearise(
        self, w: Weights, z: Float[Tensor, "B T1 n"], u: Float[Tensor, "B T m"]
    ) -> tuple[Float[Tensor, "B T n n"], Float[Tensor, "B T n m"]]:
        """Jacobians A_k, B_k along the trajectory."""
        return self.dynamics.jacobians(w, z[:, :-1], u)

    def observation_terms(
        self, z: Float[Tensor, "B T n"], observed: Observations
    ) -> tuple[Float[Tensor, "B T n"], Float[Tensor, "B T n n"]]:
        """Gradient and curvature of -sum over groups of log p(o | z), per bin."""
        q = torch.zeros_like(z)
        Q = z.new_zeros(*z.shape, z.shape[-1])
        for name, o in observed.items():
            dq, dQ = self.group(name).quadratise(z, o)
            q, Q = q + dq, Q + dQ
        return q, Q

    def lqr_problem(
        self,
        w: Weights,
        z: Float[Tensor, "B T1 n"],
        u: Float[Tensor, "B T m"],
        observed: Observations,
        initial: InitialCost,
    ) -> LQRProblem:
        """The Gauss-Newton model of J around (z, u) in deviations (dz, du)."""
        A, B = self.linearise(w, z, u)
        q, Q = self.observation_terms(z[:, 1:], observed)
        r, R = self.prior.quadratise(u)
        q = torch.cat([initial.gradient(z[:, 0]).unsqueeze(1), q], 1)
        Q = torch.cat([initial.precision.unsqueeze(1), Q], 1)
        return LQRProblem(A=A, B=B, Q=Q, q=q, R=R.contiguous(), r=r, c=None, S=None)

    def add_dynamics_curvature(
        self, w: Weights, problem: LQRProblem, z: Tensor, u: Tensor, costate: Tensor
    ) -> LQRProblem:
        """The exact Hessian of J: adds costate-weighted second derivatives of f."""
        batch, T, m = u.shape
        n = z.shape[-1]
        zz, uz, uu = self.dynamics.curvature(
            w,
            z[:, :-1].reshape(-1, n),
            u.reshape(-1, m),
            costate[:, 1:].reshape(-1, n),
        )
        Q = problem.Q.clone()
        Q[:, :-1] += zz.reshape(batch, T, n, n)
        return LQRProblem(
            A=problem.A,
            B=problem.B,
            Q=Q,
            q=problem.q,
            R=problem.R + uu.reshape(batch, T, m, m),
            r=problem.r,
            c=problem.c,
            S=uz.reshape(batch, T, m, n),
        )


def conditioned_on(observed: Observations, names: Iterable[str]) -> dict[str, Observed]:
    """The groups the recognition sees."""
    return {name: observed[name] for name in names if name in observed}
