"""A moving-horizon step recorded once as a CUDA graph and replayed: one launch per bin.

A graph has fixed shapes, so batches are padded to the next of a few sizes, and one graph is
recorded per size when first needed. What is recorded is ``MovingHorizon.step_reference`` without
looking at any number (``sync_free``); the pads are streams of missing bins, and no stream changes
another.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_log = logging.getLogger(__name__)

#: Batches are padded to one of these, or to a multiple of the last.
SIZES = (1, 4, 16, 64, 256, 1024)
_WARM_UP = 3

Tensors = tuple[Tensor, ...]
Step = Callable[[Tensors], Tensors]
Replay = Callable[[], Tensors]
Record = Callable[[Step, Tensors], Replay]


def padded_size(streams: int) -> int:
    """The size of the graph that a batch of this many streams is run by."""
    for size in SIZES:
        if streams <= size:
            return size
    return -(-streams // SIZES[-1]) * SIZES[-1]


def record_cuda(step: Step, inputs: Tensors) -> Replay:
    """Record ``step`` on tensors whose memory stays; calling the answer runs it on what they hold.

    Runs it a few times first, on a stream of its own, so that everything lazy has happened.
    """
    side = torch.cuda.Stream(inputs[0].device)
    side.wait_stream(torch.cuda.current_stream(inputs[0].device))
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):
            step(inputs)
    torch.cuda.current_stream(inputs[0].device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step(inputs)

    def replay() -> Tensors:
        graph.replay()
        return outputs

    return replay


@dataclass(frozen=True)
class _Recorded:
    inputs: Tensors
    replay: Replay


class Graphs:
    """Recorded steps by batch size.

    Args:
        step: from tensors to tensors, the batch first in each, of any batch size.
        blank: inputs that pads get: one stream, batch of one.
        record: how to record.
    """

    def __init__(self, step: Step, blank: Tensors, record: Record = record_cuda) -> None:
        self._step, self._blank, self._record = step, blank, record
        self._recorded: dict[int, _Recorded] = {}
        self._refused = False

    def _graph(self, size: int) -> _Recorded:
        if size not in self._recorded:
            inputs = tuple(x.repeat(size, *[1] * (x.ndim - 1)) for x in self._blank)
            self._recorded[size] = _Recorded(inputs, self._record(self._step, inputs))
        return self._recorded[size]

    def __call__(self, inputs: Sequence[Tensor]) -> Tensors:
        """The step's outputs, in memory of their own."""
        streams = inputs[0].shape[0]
        if self._refused:
            return self._step(tuple(inputs))
        try:
            graph = self._graph(padded_size(streams))
        except RuntimeError as error:
            _log.warning("no CUDA graph of the step (%s): launched operation by operation", error)
            self._refused = True
            return self._step(tuple(inputs))
        for mine, theirs, blank in zip(graph.inputs, inputs, self._blank, strict=True):
            mine[:streams].copy_(theirs)
            mine[streams:].copy_(blank)
        return tuple(x[:streams].clone() for x in graph.replay())
