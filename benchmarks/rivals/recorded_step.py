"""Time single steps in torch, compiled and recorded as a CUDA graph.

``python -m benchmarks.rivals.recorded_step N M UNITS H STREAMS SECONDS`` is a separate process, so
that compilation can be interrupted.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import fields

import torch
from torch import Tensor

from benchmarks.models import estimator_of
from benchmarks.stream import bins_of
from ilqr_vae.kernels import backend
from ilqr_vae.streaming.horizon import MovingHorizon
from ilqr_vae.streaming.state import Estimate, HorizonState

_WARM_UP = 3


def step_of(est: MovingHorizon, compiler: str) -> Callable[..., tuple[Tensor, ...]]:
    """Return the sync-free step on tensors, compiled by torch.compile."""

    def step(*given: Tensor) -> tuple[Tensor, ...]:
        state = HorizonState(*given[:-2])
        after, answer = est.step_reference(state, given[-2], given[-1], sync_free=True)
        return (*after.tensors(), *(getattr(answer, f.name) for f in fields(Estimate)))

    return torch.compile(step, backend=compiler, dynamic=False)


def measure(sizes: list[int], streams: int, seconds: float) -> list[float]:
    """Time steps from counts on the host to the newest latents on the host."""
    est = estimator_of(*sizes, 2, device="cuda", dtype=torch.float32)  # pyright: ignore
    counts = bins_of(est, streams, 16).float().pin_memory()
    state = est.init(streams).tensors()
    inputs = [*(t.clone() for t in state), counts[0].cuda(), torch.ones_like(counts[0]).cuda()]
    step = step_of(est, "inductor")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):
            step(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step(*inputs)
        for kept, after in zip(inputs, outputs[: len(state)], strict=False):
            kept.copy_(after)
    spent: list[float] = []
    warm, end = est.config.horizon + 3, time.perf_counter() + seconds
    while len(spent) < warm + 20 or time.perf_counter() < end:
        began = time.perf_counter()
        inputs[-2].copy_(counts[len(spent) % 16], non_blocking=True)
        graph.replay()
        outputs[len(state)].cpu()
        spent.append(time.perf_counter() - began)
    return spent[warm:]


if __name__ == "__main__":
    n, m, units, horizon, streams = (int(x) for x in sys.argv[1:6])
    with backend.using("reference"), torch.no_grad():
        print(json.dumps(measure([n, m, units, horizon], streams, float(sys.argv[6]))))
