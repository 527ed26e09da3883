"""Letters for dimensions, and the tensor aliases built from them.

The same letter means the same thing in every module, docstring and signature:

========  ==========================================================================
``B``     problems, trials or streams solved together
``T``     time steps; a trajectory has T inputs and T + 1 states
``n``     latent state
``m``     input
``N``     units (neurons)
``D``     kinematic channels
``S``     streams of a moving-horizon estimator (its batch)
``H``     bins in the window of a moving-horizon estimator
========  ==========================================================================

The aliases are jaxtyping's. They cost nothing at run time; a test run under jaxtyping's import hook
checks them. Functions compiled by numba are never annotated with them.
"""

from __future__ import annotations

from typing import TypeAlias

from jaxtyping import Bool, Float
from torch import Tensor

#: One number per problem.
PerProblem: TypeAlias = Float[Tensor, " B"]
#: One truth value per problem.
FlagPerProblem: TypeAlias = Bool[Tensor, " B"]
#: One state per problem.
State: TypeAlias = Float[Tensor, "B n"]
#: A state, or a gradient with respect to it, at each of the T + 1 times.
States: TypeAlias = Float[Tensor, "B T+1 n"]
#: A state-sized vector for each of the T transitions.
Transitions: TypeAlias = Float[Tensor, "B T n"]
#: An input, or a gradient with respect to it, at each of the T steps.
Inputs: TypeAlias = Float[Tensor, "B T m"]
#: A symmetric n x n matrix (curvature, covariance) of one state per problem.
StateMatrix: TypeAlias = Float[Tensor, "B n n"]
#: A symmetric n x n matrix (curvature, covariance) at each of the T + 1 times.
StateMatrices: TypeAlias = Float[Tensor, "B T+1 n n"]
#: d z_{k+1} / d z_k.
StateJacobians: TypeAlias = Float[Tensor, "B T n n"]
#: d z_{k+1} / d u_k.
InputJacobians: TypeAlias = Float[Tensor, "B T n m"]
#: A symmetric m x m matrix (curvature, inverse curvature) at each of the T steps.
InputMatrices: TypeAlias = Float[Tensor, "B T m m"]
#: An m x n matrix at each of the T steps: feedback gains, or the cost's input-state cross term.
InputByState: TypeAlias = Float[Tensor, "B T m n"]
