"""The torch side of the CUDA step: one launch processes a bin of each of S streams.

It replaces ``streaming.compiled`` on a GPU, with the same letters and models. States are read from
and written to rows of tensors on the GPU, so that only counts and answers are copied between bins,
once each. It computes in the estimator's dtype; sums, pivots and triangular solves are float64.

The solve of a bin is one launch. A ``stop`` is therefore called beforehand, once per iteration: an
iteration budget is respected, but not the clock.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ilqr_vae.inference import compiled
from ilqr_vae.inference.compiled import Array, Options, Stopped
from ilqr_vae.inference.problem import Status
from ilqr_vae.kernels import backend
from ilqr_vae.kernels.cpu.arguments import Estimates
from ilqr_vae.kernels.cpu.dynamics import FAMILIES
from ilqr_vae.kernels.gpu.nvrtc import Kernel, NoKernelError
from ilqr_vae.kernels.gpu.step import LARGEST_M, Constants, Shape, pack_launch, source
from ilqr_vae.model.dynamics import Weights
from ilqr_vae.model.generative import Model
from ilqr_vae.model.intervals import SpeedScale, stated
from ilqr_vae.model.likelihoods import Counts, Likelihood
from ilqr_vae.model.readout import KinematicReadout
from ilqr_vae.streaming.bounds import PlausibleBounds
from ilqr_vae.streaming.compiled import Rows, States, recurrent_layer
from ilqr_vae.streaming.state import HorizonState

_log = logging.getLogger(__name__)

_DTYPES = (torch.float32, torch.float64)


class _Launches(Protocol):
    """The interface of a compiled kernel; see ``nvrtc.Kernel``."""

    window: int
    multiprocessors: int
    resident: int

    def launch(self, argument: bytes, blocks: int, stream: int) -> None: ...


#: Compiles a kernel for a shape and the names of the model's arrays.
Build = Callable[[Shape, tuple[str, ...]], _Launches]


def build_cuda(shape: Shape, fields: tuple[str, ...]) -> Kernel:
    """Compile the kernel for the current CUDA device. Raises NoKernelError."""
    return Kernel(source(shape, fields), shape.threads)


@cache
def _say(reason: str) -> None:
    _log.warning("no GPU kernel of the streaming step (%s): it runs in torch", reason)


def usable(model: Model, like: Tensor) -> bool:
    """Return whether the kernel is enabled and supports this tensor and model; log once why not."""
    if not like.is_cuda or like.dtype not in _DTYPES or backend.current() == "reference":
        return False
    reason = compiled.unsupported(model, ("spikes",), FAMILIES)
    if reason is None and model.group("spikes").features:
        reason = "features beside counts"
    if reason is None and model.m > LARGEST_M:
        reason = f"{model.m} inputs, more than {LARGEST_M}"
    if reason is not None:
        _say(reason)
    return reason is None


def _rates(family: Likelihood) -> dict[str, Tensor]:
    """Return the rows of a group, and the terms of its rates (``compiled.channels_of``)."""
    arrays = compiled.channel_arrays([family], family.C.shape[1], family.C.dtype)
    names = ("C", "b", "limit", "precision", "gain", "floor", "soft")
    return dict(zip(names, arrays.tensors, strict=True))


class GpuEstimator:
    """A model and readout packed for a kernel; see ``compiled.Estimator``.

    Args:
        model: a model that ``usable`` accepts.
        w, readout, mean_rate, bounds, initial, options, intervals: as for ``compiled.Estimator``,
            on the device.
        build: compiles the kernel.

    Raises:
        NoKernelError: the kernel cannot be compiled, or a block does not fit.
    """

    def __init__(
        self,
        model: Model,
        w: Weights,
        readout: KinematicReadout | None,
        mean_rate: Tensor,
        bounds: PlausibleBounds,
        initial: HorizonState,
        options: Options,
        intervals: SpeedScale | None = None,
        build: Build = build_cuda,
    ) -> None:
        self.options, self.intervals = options, intervals
        self._device, self._dtype = mean_rate.device, mean_rate.dtype
        self._number = torch.empty(0, dtype=mean_rate.dtype).numpy().dtype
        used = KinematicReadout(model.n, 0).to(mean_rate) if readout is None else readout
        prior = compiled.prior_arrays(model)
        arrays = self._arrays(model, w, used, mean_rate, bounds) | {
            "centre": prior.mean, "weight": prior.precision,
        }  # fmt: skip
        self._kept = {k: t.detach().to(mean_rate).contiguous() for k, t in arrays.items()}
        self._initial = tuple(t.contiguous() for t in initial.tensors())
        spikes, shape, N = model.group("spikes"), used.shape, mean_rate.shape[0]
        self.shape = Shape(
            single=self._dtype == torch.float32, n=model.n, m=model.m, units=N,
            horizon=initial.u.shape[1], poisson=N if isinstance(spikes, Counts) else 0,
            family=model.dynamics.kernel or "", student=prior.nu > 0,
            linked=compiled.channel_arrays([spikes], model.n, self._dtype).linked,
            channels=used.W.shape[0], lags=shape.lags, residuals=shape.residuals,
            hidden=shape.hidden, recurrent=shape.recurrent, direct=used.W.shape[1],
            features=shape.features(model.n, N),
        )  # fmt: skip
        tolerance, armijo, backtracks, least, largest = options.numbers
        constants = Constants(
            options.iterations, backtracks, tolerance, armijo, least, largest,
            prior.nu, prior.constant,
        )  # fmt: skip
        self._packed = constants.pack(
            [t.data_ptr() for t in self._initial],
            {k: t.data_ptr() for k, t in self._kept.items()},
        )
        self._kernels = _Kernels(self.shape, tuple(self._kept), self._device, build)
        self._room: _Staging | None = None

    def _arrays(
        self,
        model: Model,
        w: Weights,
        readout: KinematicReadout,
        mean_rate: Tensor,
        bounds: PlausibleBounds,
    ) -> dict[str, Tensor]:
        """Return the arrays of the model by their names in the kernel's source."""
        gated = bool(FAMILIES[model.dynamics.kernel or ""])
        names = ("Wz", "bz", "Wh", "bh", "Wu")
        weights = w if gated else (w[0], *(w[0],) * 3, w[-1])
        spikes, precision = model.group("spikes"), model.initial.cost(1).precision[0]
        own = _rates(readout.expects(spikes))
        layer = recurrent_layer(readout, model.n, mean_rate.shape[0])
        return {
            **dict(zip(names, weights, strict=True)),
            **_rates(spikes),
            **{f"read_{name}": own[name] for name in ("C", "b", "gain")},
            "believed": readout.believed(torch.ones_like(mean_rate)),
            "prior_precision": precision, "prior_covariance": precision.inverse(),
            "mean_rates": mean_rate,
            **dict(zip(("bound_counts", *PlausibleBounds._fields[1:]), bounds, strict=True)),
            "W": readout.W, "offset": readout.b, "Ut": readout.U.mT, "U": readout.U[:, : model.n],
            "c": readout.c, "O": readout.O,
            **dict(zip(("Cr", "A", "a", "P", "p", "G", "g"), layer, strict=True)),
            "variance": readout.variance, "stated_gain": readout.gain, "kappa": readout.kappa,
            "decode_mean": readout.centre, "spread": readout.spread,
        }  # fmt: skip

    def step(
        self, states: States, rows: Rows, counts: Array, mask: Array, stopped: Stopped | None
    ) -> Estimates:
        """One bin of each stream.

        Args:
            states: before the bins and after them; tensors on the device, each field of as many
                rows; what is written is no row that is read.
            rows: (S,) the streams' rows in both.
            counts, mask: (S, N).
            stopped: asked beforehand, see the module's docstring.
        """
        return self.solved(states, rows, counts, mask, self.limits(len(counts), stopped))

    def solved(
        self, states: States, rows: Rows, counts: Array, mask: Array, limits: NDArray[np.int64]
    ) -> Estimates:
        """Step with at most this many iterations of each stream."""
        return self._run(states, rows, counts, mask, limits, predicts=False)

    def predict_only(self, states: States, rows: Rows, counts: Array, mask: Array) -> Estimates:
        """Process one bin without a solve: predictions without covariance."""
        limits = np.zeros(len(counts), np.int64)
        return self._run(states, rows, counts, mask, limits, predicts=True)

    def limits(self, streams: int, stopped: Stopped | None) -> NDArray[np.int64]:
        """Return the largest number of iterations of each stream."""
        limits = np.full(streams, self.options.iterations, np.int64)
        if stopped is None:
            return limits
        running = int(Status.RUNNING)
        status = np.full(streams, running, np.int64)
        for done in range(1, self.options.iterations):
            before = status == running
            ended = stopped(status)
            limits[before & (status != running)] = done
            if ended:
                break
        return limits

    def _run(
        self,
        states: States,
        rows: Rows,
        counts: Array,
        mask: Array,
        limits: NDArray[np.int64],
        *,
        predicts: bool,
    ) -> Estimates:
        S = len(counts)
        if self._room is None or self._room.streams < S:
            self._room = _Staging(self.shape, 1 << max(0, S - 1).bit_length(), self._device)
        room = self._room
        given = room.given(S, (*rows, limits), (counts, mask))
        kernel, blocks, windows = self._kernels.for_streams(S)
        addresses = [torch.as_tensor(t).data_ptr() for state in states for t in state]
        addresses += [*given, *room.answers(S), windows.data_ptr()]
        stream = torch.cuda.current_stream(self._device).cuda_stream if windows.is_cuda else 0
        if S:
            kernel.launch(pack_launch(S, predicts, addresses) + self._packed, blocks, stream)
        return self._estimates(*room.answered(S))

    def _estimates(self, numbers: Array, said: NDArray[np.int32]) -> Estimates:
        """Unpack the records of the streams."""
        s, at, made = self.shape, 0, list[Array]()
        for size in (s.features, s.n**2, s.units, s.channels, s.channels):
            made.append(numbers[:, at : at + size])
            at += size
        window, z_cov, rates, kinematics, std = made
        return Estimates(
            window, z_cov.reshape(-1, s.n, s.n), rates, kinematics,
            stated(self.intervals, kinematics, std), numbers[:, at], numbers[:, at + 1],
            said[:, 0].astype(np.int64), said[:, 1].astype(np.int64), said[:, 2].astype(np.int64),
            said[:, 3] > 0, said[:, 4] > 0,
        )  # fmt: skip


class _Kernels:
    """The kernel with windows in global memory, and the one with windows in shared memory.

    The latter, if windows fit, is used as long as each stream has its own multiprocessor.
    """

    def __init__(
        self, shape: Shape, fields: tuple[str, ...], device: torch.device, build: Build
    ) -> None:
        self._fields, self._device, self._build = fields, device, build
        self._shape = shape
        self._wide = build(shape, fields)
        self._near: _Launches | None = None
        self._tried = False
        self._windows = torch.empty(0, dtype=torch.uint8, device=device)

    def for_streams(self, streams: int) -> tuple[_Launches, int, Tensor]:
        """Return the kernel, its blocks, and their windows in global memory."""
        if streams <= self._wide.multiprocessors and (near := self._in_shared()) is not None:
            return near, streams, self._windows
        blocks = min(streams, self._wide.resident)
        if self._windows.numel() < blocks * self._wide.window:
            size = blocks * self._wide.window
            self._windows = torch.empty(size, dtype=torch.uint8, device=self._device)
        return self._wide, blocks, self._windows

    def _in_shared(self) -> _Launches | None:
        if not self._tried:
            self._tried = True
            try:
                self._near = self._build(replace(self._shape, in_shared=True), self._fields)
            except NoKernelError as error:
                _log.debug("windows stay in global memory: %s", error)
        return self._near


class _Staging:
    """Staging memory for bins and answers of up to ``streams`` streams.

    A buffer on the host, page-locked for a GPU, and one on the device.
    """

    def __init__(self, shape: Shape, streams: int, device: torch.device) -> None:
        self.streams, self._shape = streams, shape
        self._number = np.dtype(np.float32 if shape.single else np.float64)
        given = streams * (3 * 8 + 2 * shape.units * self._number.itemsize)
        answered = streams * (shape.record * self._number.itemsize + 5 * 4)
        pinned = device.type == "cuda"
        sizes, kind = (given, answered), torch.uint8
        self._host = [torch.zeros(x, dtype=kind, pin_memory=pinned) for x in sizes]
        self._there = [torch.empty(x, dtype=kind, device=device) for x in sizes]

    def given(
        self, streams: int, integers: tuple[Array, ...], numbers: tuple[Array, ...]
    ) -> list[int]:
        """Copy the inputs of a step to the device; return their addresses."""
        host, there = self._host[0], self._there[0]
        memory, at, addresses = host.numpy(), 0, list[int]()
        for values, dtype in [(x, np.dtype(np.int64)) for x in integers] + [
            (x, self._number) for x in numbers
        ]:
            size = values.size * dtype.itemsize
            memory[at : at + size].view(dtype)[:] = values.reshape(-1)
            addresses.append(there.data_ptr() + at)
            at += size
        there[:at].copy_(host[:at], non_blocking=True)
        return addresses

    def answers(self, streams: int) -> tuple[int, int]:
        """Return the device addresses of the numbers and integers of the answers."""
        start = self._there[1].data_ptr()
        return start, start + streams * self._shape.record * self._number.itemsize

    def answered(self, streams: int) -> tuple[Array, NDArray[np.int32]]:
        """Wait for the answers; return copies of numbers (S, record) and integers (S, 5)."""
        middle = streams * self._shape.record * self._number.itemsize
        end = middle + streams * 5 * 4
        host, there = self._host[1], self._there[1]
        host[:end].copy_(there[:end], non_blocking=True)
        if there.is_cuda:
            torch.cuda.current_stream(there.device).synchronize()
        made = host[:end].numpy().copy()
        numbers, said = made[:middle].view(self._number), made[middle:].view(np.int32)
        return numbers.reshape(streams, -1), said.reshape(streams, 5)


def estimator(*given: Any) -> GpuEstimator | None:
    """Return a ``GpuEstimator``; log why and return None if that is not possible."""
    try:
        return GpuEstimator(*given, build=build_cuda)
    except NoKernelError as error:
        _say(str(error))
        return None


def step_together(
    members: Sequence[GpuEstimator],
    states: Sequence[States],
    rows: Sequence[Rows],
    bins: tuple[Array, Array],
    stopped: Stopped | None,
) -> list[Estimates]:
    """Process one bin of each stream by each member; as ``compiled.step_together``."""
    limits = members[0].limits(len(bins[0]), stopped)
    parts = zip(members, states, rows, strict=True)
    return [member.solved(state, row, *bins, limits) for member, state, row in parts]


def predict_together(
    members: Sequence[GpuEstimator],
    states: Sequence[States],
    rows: Sequence[Rows],
    bins: tuple[Array, Array],
) -> list[Estimates]:
    """Process one bin of each stream by each member without a solve."""
    parts = zip(members, states, rows, strict=True)
    return [member.predict_only(state, row, *bins) for member, state, row in parts]
