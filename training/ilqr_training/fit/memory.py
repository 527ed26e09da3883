"""An estimate of the memory that a training run needs, checked before it starts."""

from __future__ import annotations

from dataclasses import dataclass, replace

import msgspec

from ilqr_training.config import TrainConfig
from ilqr_training.fit.crops import Prepared
from ilqr_training.fit.validate import LOST_BINS
from ilqr_vae.errors import ConfigError
from ilqr_vae.kernels.backend import device_of
from ilqr_vae.machine import available_memory, peak_memory

GIB = 2**30
HOPELESS = 4
"""Refuse a run that needs more than this multiple of the free memory."""

# Number of tensors of each size that are alive at the peak of a step, from measured peaks
# (tests/test_memory.py compares the estimate with one).
_BLOCKS, _PATHS, _CHANNELS = 12, 60, 14
_STREAMS = 64  # largest number of pieces that a validation streams in parallel
_COPIES = 2.5  # copies of the results of a validation: as computed, stacked, and in order
_LIBRARIES = 280 * 2**20  # of torch and numba themselves, on first use


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """An estimate in bytes.

    Attributes:
        now: already resident in this process (interpreter, libraries, recording).
        data: the training part as tensors, with its warm starts.
        step: one gradient step.
        validation: latents, rates and covariances of the training and validation part, and the
            design the readout is fitted on.
        available: memory that this process can still allocate, see ``machine.available_memory``.
    """

    now: int
    data: int
    step: int
    validation: int
    available: int

    @property
    def peak(self) -> int:
        """Peak memory of this process."""
        return self.now + _LIBRARIES + self.data + max(self.step, self.validation)

    @property
    def more(self) -> int:
        """Memory needed beyond what is already resident."""
        return self.peak - self.now

    @property
    def fits(self) -> bool:
        return self.more <= self.available

    def __str__(self) -> str:
        text = (
            f"memory: about {self.peak / GIB:.1f} GiB at most "
            f"({(self.now + _LIBRARIES) / GIB:.1f} program and recording, "
            f"{self.data / GIB:.2f} training data, {self.step / GIB:.2f} a step, "
            f"{self.validation / GIB:.2f} a validation); {self.available / GIB:.1f} GiB are free"
        )
        if self.fits:
            return text
        return text + ": it may not fit; smaller training.batch, training.chunk or model sizes help"


def estimate(config: TrainConfig, data: Prepared) -> MemoryEstimate:
    """Estimate the memory of a run, within a factor of two of measurements."""
    recording, loop = data.recording, config.training
    n, m, N = config.model.latents, config.model.inputs, recording.n_units
    D = 0 if recording.kinematics is None else recording.kinematics.shape[1]
    train = data.train[1] - data.train[0]
    validation = data.validation[1] - data.validation[0]
    word = 4 if loop.dtype == "float32" else 8
    rows = loop.batch * loop.chunk
    block = (n + m) * (n + m)  # Jacobians, curvature, gains and value matrices of a bin
    posterior = 3 * loop.chunk**2 if loop.posterior == "kronecker" else 4 * rows * block
    step = word * (rows * (_BLOCKS * block + _PATHS * (n + m) + _CHANNELS * (N + D)) + posterior)
    reads = config.readout.within(config.estimator.horizon)
    features = n * (reads.lags + 1) + N * reads.residuals
    bins = train + validation
    bins += len(reads.lost) * sum(min(part, LOST_BINS) for part in (train, validation))
    # float64: window, covariance, rates; float32: recalled counts; then the standardised design and
    # its copies
    recalled = 4 * reads.lags * N if reads.recurrent else 0
    kept = bins * (8 * (n * n + n + N + m + 2 * features + 4 * D) + 2 * recalled)
    fit = 8 * (bins * 3 * features + 3 * features**2)
    streams = 8 * _STREAMS * config.estimator.horizon * (4 * block + 3 * N)
    return MemoryEstimate(
        now=peak_memory(),
        data=word * train * (N + D + n + m + 2),
        step=step,
        validation=int(_COPIES * kept) + fit + streams,
        available=available_memory(),
    )


def refuse_hopeless(config: TrainConfig, data: Prepared) -> None:
    """Refuse a run that is far from fitting in memory.

    The estimate is accurate within a factor of two and swap helps a little, so a tight fit is only
    a warning in the text of the estimate.

    Raises:
        ConfigError: the message names the setting that contributes most.
    """
    whole = _on_host(config, data)
    if whole.more <= HOPELESS * whole.available:
        return
    least: dict[str, int] = {}
    for field in ("model.latents", "model.inputs", "training.batch", "training.chunk"):
        part, name = field.split(".")
        changed = msgspec.structs.replace(getattr(config, part), **{name: 1})
        least[field] = _on_host(msgspec.structs.replace(config, **{part: changed}), data).more
    field = min(least, key=lambda name: least[name])
    part, name = field.split(".")
    raise ConfigError(
        field,
        expected=f"what fits in memory ({whole.available / GIB:.1f} GiB are free)",
        got=f"{getattr(getattr(config, part), name)}, about {whole.more / GIB:.3g} GiB in all",
    )


def _on_host(config: TrainConfig, data: Prepared) -> MemoryEstimate:
    """Return the estimate without a gradient step that runs on another device."""
    made = estimate(config, data)
    return made if device_of(config.training.device).type == "cpu" else replace(made, step=0)
