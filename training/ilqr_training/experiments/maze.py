"""Training speed and memory at the size of the Neural Latents Benchmark's maze recording.

The simulated file has the benchmark's layout (HDF5, ``train_spikes_heldin`` and
``train_spikes_heldout``, trials x bins x units), so that the real file can be used in its place.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from ilqr_training.experiments.driver import (
    Array,
    ExperimentResult,
    FitConfig,
    NetConfig,
    TrialBatches,
    fit,
    observed_of,
    poisson_network,
)
from ilqr_training.experiments.generators import duffing_trials, spiking
from ilqr_training.fit.loop import Report, TrainingRun
from ilqr_vae.errors import RecordingError
from ilqr_vae.files import PositiveInt
from ilqr_vae.kernels.backend import device_of
from ilqr_vae.machine import peak_memory
from ilqr_vae.model.dynamics import DynamicsOptions
from ilqr_vae.progress import Progress

HELD_IN, HELD_OUT = "train_spikes_heldin", "train_spikes_heldout"


class MazeConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Settings of ``maze-size``: 137 units held in and 45 held out, 140 bins of 5 ms.

    Attributes:
        file: an HDF5 file in the benchmark's layout; if empty, one is simulated.
        trials: number of trials of the simulated file.
        device: cpu, cuda or cuda:N.
    """

    file: str = ""
    trials: PositiveInt = 336
    bins: PositiveInt = 140
    held_in: PositiveInt = 137
    held_out: PositiveInt = 45
    net: NetConfig = NetConfig(
        dynamics="mgu2", latents=60, inputs=15, options=DynamicsOptions(forget_bias=-1.0)
    )
    fit: FitConfig = FitConfig(
        steps=3, batch=168, learning_rate=0.01, iterations=3, posterior="kronecker", kl_warmup=0
    )
    device: str = "cpu"


def write_layout(path: Path, config: MazeConfig, seed: int) -> None:
    """Simulate a file in the benchmark's layout."""
    import h5py

    rng = np.random.default_rng(seed)
    moves = duffing_trials(rng, config.trials, config.bins)
    units = config.held_in + config.held_out
    counts = spiking(rng, moves, units, mean_rate=0.03, gain=0.8).counts
    with h5py.File(path, "w") as file:
        file[HELD_IN] = counts[..., : config.held_in]
        file[HELD_OUT] = counts[..., config.held_in :]


def read_layout(path: Path) -> Array:
    """Read counts (trials, bins, units), held-in units first, without units that never fire.

    Raises:
        RecordingError: there is no such file, or it is not HDF5 or lacks the benchmark's arrays.
    """
    import h5py

    try:
        with h5py.File(path, "r") as file:
            parts = [np.asarray(file[key], dtype=np.float64) for key in (HELD_IN, HELD_OUT)]
    except (OSError, KeyError) as error:
        raise RecordingError(
            path.name,
            expected=f"an HDF5 file with {HELD_IN} and {HELD_OUT}",
            got=str(error),
        ) from error
    if any(p.ndim != 3 or p.shape[:2] != parts[0].shape[:2] for p in parts):
        raise RecordingError(
            path.name,
            expected="(trials, bins, units) of the same trials and bins",
            got=str([p.shape for p in parts]),
        )
    counts = np.concatenate(parts, -1)
    return counts[..., counts.sum((0, 1)) > 0]


def peak_bytes(device: torch.device) -> int:
    """Return the peak memory so far: allocated on a GPU, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_memory()


def maze_size(config: MazeConfig, seed: int, progress: Progress) -> ExperimentResult:
    """Run a few gradient steps at the recording's size; return their time and memory."""
    if config.file:
        counts = read_layout(Path(config.file))
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "maze_size.h5"
            write_layout(path, config, seed)
            counts = read_layout(path)
    device = device_of(config.device)
    model = poisson_network(config.net, counts, seed=seed, dtype=config.fit.dtype).to(device)
    before = peak_bytes(device)
    clock: list[float] = [time.monotonic()]

    def after(run: TrainingRun, report: Report) -> None:
        clock.append(time.monotonic())

    trials = TrialBatches(model, observed_of(model, counts), seed)
    f = fit(model, trials, config.fit, seed, progress, after=after)
    each = np.diff(clock)
    later = each[1:] if len(each) > 1 else each  # the first step compiles
    figures = {
        "trials": counts.shape[0],
        "bins": counts.shape[1],
        "units": counts.shape[2],
        "seconds_per_step": float(later.mean()),
        "seconds_first_step": float(each[0]),
        "peak_memory_gb": peak_bytes(device) / 1e9,
        "memory_before_gb": before / 1e9,
        "bound": f.bounds,
        "steps": len(f.bounds),
    }

    def draw(figure: Any) -> None:
        ax = figure.subplots()
        ax.plot(range(1, len(f.bounds) + 1), f.bounds, marker="o")
        ax.set(xlabel="step", ylabel="bound, nats per bin")

    return ExperimentResult(figures, draw)
