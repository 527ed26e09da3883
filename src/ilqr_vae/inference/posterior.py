"""Gaussian posteriors q(z_0, u | o) around the optimum (z_0*, u*).

Kronecker (Schimel et al. 2022, section 2.2, eq. 12): cov(u) = Sigma_s (x) Sigma_t, learned, the
same for every trial of one fixed length; the time factor is full or diagonal. Laplace: the inverse
(Gauss-Newton) Hessian of J per trial, for any length, straight from the Riccati recursion:
u_k | z_k has covariance Quu_k^-1 and mean K_k dz_k, so

    dz_0 ~ N(0, V_0^-1),   du_k = K_k dz_k + chol(Quu_k^-1) e_k,   dz_{k+1} = A_k dz_k + B_k du_k

Both return a ``Draw``: samples of the deviation, and the terms of the bound. Both factorise over
time, q(z_0) prod_k q(u_k | earlier), so that trials of a batch may end at different bins.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ilqr_vae.errors import ConfigError, ShapeError
from ilqr_vae.lqr import LQRProblem, LQRSolution, marginal_covariance, solve_lqr
from ilqr_vae.model.dynamics import Weights
from ilqr_vae.model.generative import Model
from ilqr_vae.model.likelihoods import Observations
from ilqr_vae.model.priors import LOG_2PI


@dataclass(frozen=True)
class Draw:
    """Samples of the posterior's deviation from its mean, and its moments.

    With several samples per trial, B stands for samples x trials, sample by sample.

    Attributes:
        dz0, du: the samples.
        z0_var, u_var: marginal variances.
        entropy: entropy of q over (z_0, u), nats.
        z0_entropy, u_entropy: entropies of q(z_0) and of each q(u_k | earlier), which sum to it.
        z0_log_q, u_log_q: log densities of the samples, factor by factor.
    """

    dz0: Float[Tensor, "B n"]
    du: Float[Tensor, "B T m"]
    z0_var: Float[Tensor, "B n"]
    u_var: Float[Tensor, "B T m"]
    entropy: Float[Tensor, " B"]
    z0_entropy: Float[Tensor, " B"]
    u_entropy: Float[Tensor, "B T"]
    z0_log_q: Float[Tensor, " B"]
    u_log_q: Float[Tensor, "B T"]


Sampler: TypeAlias = Callable[[int], Draw]
"""A function from the number of samples per trial to a ``Draw``."""


def log_q(e: Tensor, entropy: Tensor) -> Tensor:
    """Return the log density of a sample made of standard normals e, from the entropy."""
    return 0.5 * (e.shape[-1] - (e * e).sum(-1)) - entropy


class Kronecker(nn.Module):
    """q(u) = N(u*, Sigma_s (x) Sigma_t), q(z_0) = N(z_0*, diag); trials of at most ``steps`` bins.

    Args:
        n, m, steps: sizes; ``steps`` is T of the trials.
        scale: initial standard deviation.
        time: "full", or "diagonal" (independent bins).
        surrogate: whether the covariance of z_0 comes from ceil(n/m) further bins of the same
            Kronecker product before the first one. This is the paper's parametrisation, in which
            surrogate bins determine z_0, which correlates with the later inputs. Requires n to be a
            multiple of m.

    Raises:
        ConfigError: surrogate bins do not fill z_0.
    """

    family = "kronecker"

    def __init__(
        self,
        n: int,
        m: int,
        steps: int,
        *,
        scale: float = 0.3,
        time: Literal["full", "diagonal"] = "full",
        surrogate: bool = False,
    ) -> None:
        super().__init__()
        if surrogate and n % m:
            raise ConfigError(
                "posterior.surrogate", expected=f"latents a multiple of {m} inputs", got=str(n)
            )
        self.n, self.full = n, time == "full"
        self.lead = n // m if surrogate else 0
        steps = steps + self.lead
        self.space = nn.Parameter(torch.zeros(m, m))
        self.time = nn.Parameter(torch.zeros(steps, steps) if self.full else torch.zeros(steps))
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.initial_log_scale = nn.Parameter(torch.full((0 if surrogate else n,), math.log(scale)))

    @staticmethod
    def _factor(raw: Tensor) -> Tensor:
        """Return the lower-triangular factor with a positive diagonal."""
        return raw.tril(-1) + torch.diag(raw.diagonal().exp())

    def draw(
        self, batch: int, generator: torch.Generator | None = None, *, steps: int | None = None
    ) -> Draw:
        """Draw samples for a batch of trials.

        Args:
            steps: number of bins, at most the posterior's own; fewer are its first ones.

        Raises:
            ShapeError: the posterior has fewer bins.
        """
        own = self.time.shape[0] - self.lead
        T, m = own if steps is None else steps, self.space.shape[0]
        if own < T:
            raise ShapeError(
                "steps",
                expected=f"at most the {own} bins this Kronecker posterior was made for "
                "(the Laplace posterior has no such limit)",
                got=str(T),
            )
        k = self.lead + T
        raw = self.time if own == T else self.time[(slice(k),) * self.time.ndim]
        Ls = self._factor(self.space) * self.log_scale.exp()
        Lt = self._factor(raw) if self.full else torch.diag(raw.exp())
        log_t = raw.diagonal() if self.full else raw
        log_s = self.space.diagonal().sum() + m * self.log_scale
        e = self._normal(generator, batch, k, m)
        e0 = self._normal(generator, batch, self.initial_log_scale.shape[0])
        u_var = ((Lt * Lt).sum(-1).unsqueeze(-1) * (Ls * Ls).sum(-1)).expand(batch, k, m)
        du = Lt @ e @ Ls.mT
        half = 0.5 * (1 + LOG_2PI)
        u_entropy = (m * log_t + log_s + m * half).expand(batch, k)
        logdet = m * log_t.sum() + k * log_s
        if self.lead:  # the leading bins, in blocks, form z_0
            dz0, z0_var = du[:, : self.lead].flatten(1), u_var[:, : self.lead].flatten(1)
            z0_entropy = u_entropy[:, : self.lead].sum(-1)
            e0 = e[:, : self.lead].flatten(1)
        else:
            scale = self.initial_log_scale.exp()
            dz0, z0_var = e0 * scale, (scale**2).expand(batch, self.n)
            z0_entropy = (self.initial_log_scale.sum() + self.n * half).expand(batch)
            logdet = logdet + self.initial_log_scale.sum()
        entropy = logdet + 0.5 * (T * m + self.n) * (1 + LOG_2PI)
        u_log_q = log_q(e, u_entropy)
        if self.lead:
            du, u_var, u_entropy, u_log_q = (
                x[:, self.lead :] for x in (du, u_var, u_entropy, u_log_q)
            )
        return Draw(
            dz0=dz0,
            du=du,
            z0_var=z0_var,
            u_var=u_var,
            entropy=entropy.expand(batch),
            z0_entropy=z0_entropy,
            u_entropy=u_entropy,
            z0_log_q=log_q(e0, z0_entropy),
            u_log_q=u_log_q,
        )

    def _normal(self, generator: torch.Generator | None, *size: int) -> Tensor:
        like = self.space
        return torch.randn(*size, generator=generator, dtype=like.dtype, device=like.device)

    def sampler(
        self, batch: int, generator: torch.Generator | None = None, *, steps: int | None = None
    ) -> Sampler:
        """Return a sampler for ``batch`` trials."""
        return lambda samples: self.draw(samples * batch, generator, steps=steps)


@dataclass(frozen=True)
class Laplace:
    """The posterior of each trial at an optimum, as factors of the Riccati recursion.

    Attributes:
        A, B, K: linearisation and feedback along the optimum.
        Lu: lower Cholesky factor of Quu^-1; L0: of V_0 (z_0's precision).
        z_cov: covariance of each state; u_cov: of each input.
    """

    A: Float[Tensor, "B T n n"]
    B: Float[Tensor, "B T n m"]
    K: Float[Tensor, "B T m n"]
    Lu: Float[Tensor, "B T m m"]
    L0: Float[Tensor, "B n n"]
    z_cov: Float[Tensor, "B T1 n n"]
    u_cov: Float[Tensor, "B T m m"]

    def draw(self, generator: torch.Generator | None = None, *, samples: int = 1) -> Draw:
        """Draw samples of every trial; shapes (samples * B, ...), ordered by sample."""
        b, T, m, n = self.K.shape
        like = self.K
        dtype, device = like.dtype, like.device
        e = torch.randn(b, T, m, samples, generator=generator, dtype=dtype, device=device)
        e0 = torch.randn(b, n, samples, generator=generator, dtype=dtype, device=device)
        noise = self.Lu @ e
        # du_k = K_k dz_k + noise_k, so one product per bin advances the state
        closed, pushed = self.A + self.B @ self.K, self.B @ noise
        dz = torch.linalg.solve_triangular(self.L0.mT, e0, upper=True)
        dzs = [dz]
        for k in range(T - 1):
            dz = closed[:, k] @ dz + pushed[:, k]
            dzs.append(dz)
        du = noise + self.K @ torch.stack(dzs, 1)

        def first(x: Tensor) -> Tensor:
            """(B, ..., samples) -> (samples * B, ...)."""
            return x.movedim(-1, 0).reshape(samples * b, *x.shape[1:-1])

        def tile(x: Tensor) -> Tensor:
            return x.expand(samples, *x.shape).reshape(samples * b, *x.shape[1:])

        half = 0.5 * (1 + LOG_2PI)
        u_entropy = tile(self.Lu.diagonal(dim1=-2, dim2=-1).log().sum(-1) + m * half)
        z0_entropy = tile(n * half - self.L0.diagonal(dim1=-2, dim2=-1).log().sum(-1))
        return Draw(
            dz0=first(dzs[0]),
            du=first(du),
            z0_var=tile(self.z_cov[:, 0].diagonal(dim1=-2, dim2=-1)),
            u_var=tile(self.u_cov.diagonal(dim1=-2, dim2=-1)),
            entropy=z0_entropy + u_entropy.sum(-1),
            z0_entropy=z0_entropy,
            u_entropy=u_entropy,
            z0_log_q=log_q(first(e0), z0_entropy),
            u_log_q=log_q(first(e), u_entropy),
        )

    def sampler(self, generator: torch.Generator | None = None) -> Sampler:
        """Return a sampler."""
        return lambda samples: self.draw(generator, samples=samples)


def laplace(problem: LQRProblem, lqr: LQRSolution) -> Laplace:
    """Return the Laplace posterior of each trial.

    Args:
        problem, lqr: the LQR problem at the optimum and its solution (free initial state).
    """
    Sigma = marginal_covariance(problem, lqr)
    return Laplace(
        A=problem.A,
        B=problem.B,
        K=lqr.K,
        Lu=torch.linalg.cholesky_ex(lqr.Quu_inv)[0],
        L0=torch.linalg.cholesky_ex(lqr.V[:, 0])[0],
        z_cov=Sigma,
        u_cov=lqr.K @ Sigma[:, :-1] @ lqr.K.mT + lqr.Quu_inv,
    )


def laplace_at(
    model: Model,
    w: Weights,
    z0: Float[Tensor, "B n"],
    u: Float[Tensor, "B T m"],
    observed: Observations,
) -> Laplace:
    """Return the Laplace posterior at (z_0, u), differentiable if gradients are enabled.

    If the optimum has its implicit gradient, the gradient of the bound then includes the dependence
    of the covariance on the parameters: exact, but through a recursion that autograd unrolls. Under
    ``torch.no_grad`` the compiled recursion runs, and the covariance is constant. This is cheap,
    and the default in training, since at a good q the bound hardly depends on its covariance.
    """
    z = model.rollout(w, z0, u)
    problem = model.lqr_problem(w, z, u, observed, model.initial.cost(z0.shape[0]))
    problem = replace(problem, R=model.prior.stated_precision(u).contiguous())
    return laplace(problem, solve_lqr(problem, free_initial=True))


def laplace_draw(
    problem: LQRProblem, lqr: LQRSolution, generator: torch.Generator | None = None
) -> Draw:
    """Sample the Laplace posterior of each trial once; see ``laplace``."""
    return laplace(problem, lqr).draw(generator)
