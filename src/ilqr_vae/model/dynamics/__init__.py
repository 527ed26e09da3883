"""Dynamics families: z_{k+1} = f(z_k, u_k).

Notation: z in R^n latent state, u in R^m input, A = df/dz, B = df/du. A family is two things:

- a module that owns raw parameters and turns them into effective weights ``w = family.weights()``
  (differentiable; computed once per solve or per gradient step), and
- pure functions of those weights: ``step(w, z, u)`` and ``jacobians(w, z, u)``, batched over any
  leading axes, with analytic Jacobians (tested against autodiff).

A new family is a subclass with these three methods and ``from_options``, listed in ``FAMILIES``. A
compiled rollout for it is one entry in ``ilqr_vae.model.rollout``; without it the torch loop runs.
"""

from ilqr_vae.model.dynamics.base import Dynamics, DynamicsOptions, Weights
from ilqr_vae.model.dynamics.feedforward import RNN, ResidualMLP
from ilqr_vae.model.dynamics.gated import MGU, MGU2
from ilqr_vae.model.dynamics.linear import Linear

FAMILIES: dict[str, type[Dynamics]] = {
    cls.family: cls for cls in (Linear, MGU2, MGU, RNN, ResidualMLP)
}
"""Every family by the name configs and model files use."""

__all__ = [
    "FAMILIES",
    "MGU",
    "MGU2",
    "RNN",
    "Dynamics",
    "DynamicsOptions",
    "Linear",
    "ResidualMLP",
    "Weights",
]
