"""The bits of streamed decodes of fixed models: a change of the code must not change them.

Machine code differs from processor to processor, so the digests hold for one kind of processor; on
others the test is skipped. Where other bits are meant, the digests are made anew (``python -m
pytest tests/test_bits.py`` shows them) and ``ilqr_vae.kernels.ARITHMETIC`` is raised.
"""

from __future__ import annotations

import hashlib

import llvmlite.binding as llvm
import numpy as np
import pytest
import torch

from ilqr_vae.model.readout import KinematicReadout, ReadoutShape
from ilqr_vae.streaming.horizon import HorizonConfig, MovingHorizon
from kernel_rig import model_of

N, UNITS, BINS, STREAMS = 5, 9, 60, 3
ANSWER = ("z", "z_cov", "window", "rates", "kinematics", "kinematics_std", "bits", "spikes")
DIGESTS = {
    "znver5": {
        ("linear", "torch.float64"): "14e623e855e41a47",
        ("linear", "torch.float32"): "6a94834de37553b5",
        ("mgu2", "torch.float64"): "04d7058361eb55cb",
        ("mgu2", "torch.float32"): "3da77238d332caa9",
    }
}


def estimator(dynamics: str, dtype: torch.dtype) -> MovingHorizon:
    rng = np.random.default_rng(7)

    def numbers(x: torch.Tensor, scale: float, offset: float = 0.0) -> torch.Tensor:
        return torch.from_numpy(offset + scale * rng.standard_normal(x.shape)).to(dtype)

    model = model_of(dynamics, N, 2, UNITS).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(numbers(p, 0.3))
    shape = ReadoutShape(lags=2, residuals=2, hidden=4, recurrent=3)
    readout = KinematicReadout(N, 2, shape, units=UNITS).to(dtype)
    for name, b in readout.named_buffers():
        positive = name in {"variance", "gain", "kappa", "spread"}
        made = numbers(b, 0.3)
        b.copy_(made.abs() + 0.5 if positive else made)
    config = HorizonConfig(horizon=6, iterations=2)
    rate = torch.from_numpy(rng.uniform(0.3, 1.5, UNITS)).to(dtype)
    return MovingHorizon(model, readout, rate, config)


def digest(dynamics: str, dtype: torch.dtype) -> str:
    est, rng = estimator(dynamics, dtype), np.random.default_rng(11)
    sha, state = hashlib.sha256(), est.init(STREAMS)
    for t in range(BINS):
        counts = torch.from_numpy(rng.poisson(0.8, (STREAMS, UNITS)).astype(np.float64)).to(dtype)
        mask = torch.from_numpy((rng.random((STREAMS, UNITS)) < 0.9).astype(np.float64)).to(dtype)
        mask[t % 5 == 4] = 0.0  # no bin came
        take = est.predict_only if t % 11 == 7 else est.step
        state, answer = take(state, counts, mask)
        for tensor in (*state.tensors(), *(getattr(answer, name) for name in ANSWER)):
            sha.update(tensor.contiguous().numpy().tobytes())
        sha.update(bytes(answer.iterations.tolist() + answer.status.tolist()))
    return sha.hexdigest()[:16]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("dynamics", ["linear", "mgu2"])
def test_the_bits_of_streamed_decodes_stay(dynamics: str, dtype: torch.dtype) -> None:
    known = DIGESTS.get(llvm.get_host_cpu_name())
    if known is None:
        pytest.skip(f"no digests for {llvm.get_host_cpu_name()}")
    assert digest(dynamics, dtype) == known[dynamics, str(dtype)]
