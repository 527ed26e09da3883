"""The Triton rollouts against the plain loop: through the interpreter, and on a GPU where one is.

``test_lqr_gpu`` starts the process that interprets.
"""

from __future__ import annotations

import pytest
import torch

from ilqr_vae.model import rollout as rollouts
from ilqr_vae.model.rollout import adjoint, closed_loop_reference, rollout
from small import make_model
from test_lqr_gpu import on_each_device
from test_rollout import normal, policy

code = pytest.importorskip("ilqr_vae.kernels.gpu.dynamics")
DTYPES = [(torch.float64, 1e-12), (torch.float32, 2e-5)]


@on_each_device
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES, ids=["float64", "float32"])
@pytest.mark.parametrize("family", ["linear", "mgu2"])
@pytest.mark.parametrize(("B", "T", "n", "m"), [(1, 1, 1, 1), (2, 5, 20, 8), (1, 2, 33, 17)])
def test_closed_loop_is_the_reference(
    device: str, family: str, B: int, T: int, n: int, m: int, dtype: torch.dtype, tolerance: float
) -> None:
    model = make_model(family, n=n, m=m).to(device, dtype)
    w = tuple(x.detach() for x in model.dynamics.weights())
    given = [x.to(device) for x in policy(B, T, n, m, dtype)]
    # three trajectories a law
    given[0] = torch.cat([given[0], 0.5 * given[0], -given[0]])
    given[5] = torch.cat([given[5], 0.5 * given[5], 0 * given[5]])
    z, u = rollouts._gpu_closed_loop(
        code, model.dynamics, w, True, given[0], rollouts._Policy(*given[1:])
    )
    z_, u_ = closed_loop_reference(model.dynamics, w, *given)
    assert z.dtype == u.dtype == dtype
    scale = 1 + float(z_.abs().max()) + float(u_.abs().max())
    torch.testing.assert_close(z, z_, rtol=0, atol=tolerance * scale)
    torch.testing.assert_close(u, u_, rtol=0, atol=tolerance * scale)
    z0 = given[0][:B]
    free = rollouts._Policy(z0, given[2], z0, z0, z0)
    z, u = rollouts._gpu_closed_loop(code, model.dynamics, w, False, z0, free)
    z_ = rollout(model.dynamics, w, z0, given[2])
    torch.testing.assert_close(z, z_, rtol=0, atol=tolerance * scale)
    assert torch.equal(u, given[2])


@on_each_device
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES, ids=["float64", "float32"])
@pytest.mark.parametrize(("B", "T", "n"), [(2, 1, 1), (2, 6, 18)])
def test_adjoint_is_the_reference(
    device: str, B: int, T: int, n: int, dtype: torch.dtype, tolerance: float
) -> None:
    A, gz = normal(4, (B, T, n, n), (B, T + 1, n))
    truth = adjoint(0.3 * A, gz)
    found = rollouts._gpu_adjoint(code, *(x.to(device, dtype) for x in (0.3 * A, gz)))
    atol = tolerance * float(truth.abs().max())
    torch.testing.assert_close(found.cpu().double(), truth, rtol=0, atol=atol)
