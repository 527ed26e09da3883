"""Models, and a stream of made-up bins, for the tests of compiled code."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from ilqr_vae.artifact import GroupSpec, ModelSpec, build
from ilqr_vae.model.readout import KinematicReadout, ReadoutShape
from ilqr_vae.streaming.horizon import HorizonConfig, MovingHorizon


def model_of(dynamics: str, n: int, m: int, N: int, *, kinematics: int = 0) -> Any:
    groups = {"spikes": GroupSpec(family="poisson", channels=N, log_rate_max=1.5)}
    if kinematics:
        groups = {"kinematics": GroupSpec(family="gaussian", channels=kinematics)} | groups
    with torch.random.fork_rng():
        torch.manual_seed(n)
        return build(ModelSpec(dynamics=dynamics, latents=n, inputs=m, groups=groups))


def assert_same(ours: Any, theirs: Any, tolerance: float) -> None:
    for field in fields(ours):
        a, b = getattr(ours, field.name), getattr(theirs, field.name)
        if not isinstance(b, Tensor):
            assert a is None
            continue
        assert (a.shape, a.dtype) == (b.shape, b.dtype), field.name
        if not b.numel():
            continue
        if not b.is_floating_point():
            assert torch.equal(a, b), field.name
            continue
        scale = 1.0 + float(b.abs().max())
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * scale, msg=field.name)


def assert_identical(ours: Any, theirs: Any, rows: slice = slice(None)) -> None:
    for field in fields(ours):
        assert torch.equal(getattr(ours, field.name), getattr(theirs, field.name)[rows]), field.name


class Stream:
    """A moving-horizon estimator and made-up bins for it."""

    def __init__(self, dynamics: str = "mgu2", *, n: int = 6, m: int = 3, N: int = 12) -> None:
        shape = ReadoutShape(lags=2, residuals=3, hidden=4, recurrent=5)
        readout = KinematicReadout(n, 2, shape, units=N).double()
        g = torch.Generator().manual_seed(5)
        for b in readout.buffers():
            b.copy_(torch.rand(b.shape, generator=g) + 0.1)
        self.estimator = MovingHorizon(
            model_of(dynamics, n, m, N).double(),
            readout,
            torch.full((N,), 0.5, dtype=torch.float64),
            HorizonConfig(horizon=4, iterations=2),
        )
        self.N, self.g = N, torch.Generator().manual_seed(3)

    def bin(self, streams: int) -> tuple[Tensor, Tensor]:
        counts = torch.poisson(torch.full((streams, self.N), 0.7), generator=self.g).double()
        mask = (torch.rand(streams, self.N, generator=self.g) < 0.8).double()
        mask[torch.rand(streams, generator=self.g) < 0.2] = 0.0
        return counts, mask
