"""The generative model: composition of dynamics, priors and observation groups.

    z_0 ~ N(mu_0, diag sigma_0^2)      u_k ~ p(u)      z_{k+1} = f(z_k, u_k)
    o_k ~ p(o | z_{k+1}), k = 0 .. T-1: bin k observes the state after its input

and the inference cost of a window (Schimel et al. 2022, eqs. 10 and 11), with an initial cost in
place of the prior when a moving horizon supplies its arrival cost:

    J(z_0, u) = initial(z_0) + sum_k [ -log p(u_k) - log p(o_k | z_{k+1}) ]

``linearise`` and ``quadratise`` turn J at a trajectory into one LQR problem for the primitive.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ilqr_vae.errors import ShapeError
from ilqr_vae.lqr import LQRProblem
from ilqr_vae.model.dynamics import Dynamics, Weights
from ilqr_vae.model.likelihoods import Likelihood, Observations, Observed
from ilqr_vae.model.priors import InitialCost, InitialPrior, InputPrior
from ilqr_vae.model.rollout import jacobians, rollout


class Model(nn.Module):
    """A latent dynamical system driven by inputs, with groups of observations.

    Attributes:
        dynamics, prior, initial: the families (see their modules).
        groups: observation group name -> likelihood, e.g. "spikes" and "kinematics".
    """

    def __init__(
        self,
        dynamics: Dynamics,
        prior: InputPrior,
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

    def sample(
        self, batch: int, steps: int, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Draw (z, u, expected observations per group) from the model."""
        with torch.no_grad():
            z0 = self.initial.draw((batch,), generator)
            u = self.prior.draw((batch, steps), generator)
            z = self.rollout(self.dynamics.weights(), z0, u)
            means = {name: self.group(name).mean(z[:, 1:]) for name in self.groups}
        return z, u, means

    def check(self, observed: Observations) -> None:
        """Check that the model can be conditioned on these observations.

        Raises:
            ShapeError: naming the group and what is wrong with it (see ``Likelihood.check``), an
                unknown group, none at all, or groups of different trials or bins.
        """
        if not observed:
            raise ShapeError("observed", expected="at least one group", got="none")
        sizes: dict[str, tuple[int, ...]] = {}
        for name, o in observed.items():
            if name not in self.groups:
                known = ", ".join(self.groups)
                raise ShapeError("observed", expected=f"groups among {known}", got=repr(name))
            self.group(name).check(o, f"observed.{name}")
            sizes[name] = tuple(o.values.shape[:2])
        if len(set(sizes.values())) > 1:
            raise ShapeError(
                "observed", expected="the same trials and bins in each group", got=str(sizes)
            )

    def log_likelihood(
        self, z: Float[Tensor, "B T1 n"], observed: Observations
    ) -> dict[str, Float[Tensor, "B T"]]:
        """log p(o_k | z_{k+1}) per group and bin."""
        return {name: self.group(name).score(z[:, 1:], o) for name, o in observed.items()}

    def cost(
        self,
        z: Float[Tensor, "B T1 n"],
        u: Float[Tensor, "B T m"],
        observed: Observations,
        initial: InitialCost,
    ) -> Float[Tensor, " B"]:
        """Return J up to constants that do not affect the optimum."""
        J = initial.value(z[:, 0]) - self.prior.log_prob(u).sum(-1)
        for name, o in observed.items():
            J = J - self.group(name).unnormalised(z[:, 1:], o).sum(-1)
        return J

    def linearise(
        self, w: Weights, z: Float[Tensor, "B T1 n"], u: Float[Tensor, "B T m"]
    ) -> tuple[Float[Tensor, "B T n n"], Float[Tensor, "B T n m"]]:
        """Jacobians A_k, B_k along the trajectory."""
        return jacobians(self.dynamics, w, z, u)

    def observation_terms(
        self, z: Float[Tensor, "*batch n"], observed: Observations
    ) -> tuple[Float[Tensor, "*batch n"], Float[Tensor, "*batch n n"]]:
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
        """Add costate-weighted second derivatives of f to the Gauss-Newton Hessian of J."""
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

    def exact_hessian(
        self,
        w: Weights,
        problem: LQRProblem,
        z: Tensor,
        u: Tensor,
        costate: Tensor,
        observed: Observations,
    ) -> LQRProblem:
        """Return the exact Hessian of J.

        It includes the curvature of the dynamics, and that of prior and likelihoods which the
        Gauss-Newton model omits to stay positive definite.
        """
        full = self.add_dynamics_curvature(w, problem, z, u, costate)
        R = full.R + self.prior.hessian(u) - self.prior.quadratise(u)[1]
        Q = full.Q.clone()
        for name, o in observed.items():
            family = self.group(name)
            a = family.affine(z[:, 1:])
            missing = (family.curvature(a, o.values) - family.derivatives(a, o.values)[1]) * o.mask
            if bool((missing != 0).any()):
                Q[:, 1:] += torch.einsum("btk,ki,kj->btij", missing, family.C, family.C)
        return LQRProblem(A=full.A, B=full.B, Q=Q, q=full.q, R=R, r=full.r, c=full.c, S=full.S)


def conditioned_on(observed: Observations, names: Iterable[str]) -> dict[str, Observed]:
    """Return the groups to condition on."""
    return {name: observed[name] for name in names if name in observed}
