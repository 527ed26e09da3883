"""What adapting costs: a refit on one core, and the stream's p99 while one runs beside it.

    python -m benchmarks.adapt --json F [--blocks 20] [--seconds 5] [--streams 4]

The refit is of 200 units on five minutes of bins, a quarter of which are units that the model does
not know. Beside it, a service answers streams in real time; `ilqr-vae adapt` runs as `follow`
starts it, in every other block of the same stream, and is stopped in the others. The ratio of the
two p99 has an interval by bootstrap over pairs of blocks.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.models import BIN_S
from benchmarks.rows import Row, machine, row
from benchmarks.service import WARM, model_file, running
from ilqr_clients.follow import started_adapt
from ilqr_clients.load import Generator
from ilqr_clients.load_schedule import Faults, LoadSize
from ilqr_training.adaptation.adapt import adapt
from ilqr_vae.artifact import load_artifact, save_artifact
from ilqr_vae.files import write_whole
from ilqr_vae.model.generative import Model
from ilqr_vae.recordings import Recording

N, M, UNITS, H, BINS = 20, 8, 200, 20, 6000
REPLACED = UNITS // 4
DRAWS = 2000


def modulated(folder: Path) -> Path:
    """Write a model whose units follow its latents well enough to be told apart."""
    path = folder / "m.safetensors"
    made = load_artifact(model_file(path, N, M, UNITS, H))
    with torch.no_grad():
        made.model.group("spikes").C.mul_(4)
    save_artifact(path, made.manifest, made.model, None, made.mean_rate)
    return path


def counts_of(model: Model) -> NDArray[np.uint16]:
    """Draw counts from the model, with a quarter of the units in each other's places."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        w = tuple(t.contiguous() for t in model.dynamics.weights())
        u = torch.randn(1, BINS, M, generator=g).double()
        z = model.rollout(w, torch.zeros(1, N).double(), u)[0, 1:]
        counts = torch.poisson(model.group("spikes").mean(z), generator=g).numpy()
    counts[:, :REPLACED] = np.roll(counts[:, :REPLACED], 1, axis=1)
    return counts.astype(np.uint16)


def refit(folder: Path) -> Row:
    """Time a refit in this process, on one core."""
    artifact = load_artifact(modulated(folder))
    names, counts = artifact.manifest.unit_names, counts_of(artifact.model)
    recording = Recording(name="made up", bin_width=BIN_S, counts=counts, unit_names=names)
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    adapt(artifact, recording, (0, 400))  # compiles
    began, cpu = time.perf_counter(), time.process_time()
    made = adapt(artifact, recording, (0, BINS))
    return row(
        "adapt",
        "refit",
        units=UNITS,
        bins=BINS,
        seconds=round(time.perf_counter() - began, 2),
        cpu_seconds=round(time.process_time() - cpu, 2),
        refused=made.refused,
    )


class Beside:
    """Runs `ilqr-vae adapt` again and again, in every other block.

    Args:
        model, bins: files for `adapt`.
        edges: (blocks + 1,) ends of the blocks, monotonic seconds; it runs in the odd ones.
    """

    def __init__(self, model: Path, bins: Path, edges: NDArray[np.float64]) -> None:
        self._model, self._bins, self._edges = model, bins, edges
        self._thread = threading.Thread(target=self._run)
        self.ended = 0

    def __enter__(self) -> Beside:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()

    def _run(self) -> None:
        fitting: subprocess.Popen[str] | None = None
        for block, end in enumerate(self._edges[1:]):
            if fitting is not None:
                fitting.send_signal(signal.SIGCONT if block % 2 else signal.SIGSTOP)
            while (left := end - time.monotonic()) > 0:
                if block % 2 and (fitting is None or fitting.poll() is not None):
                    self.ended += fitting is not None
                    out = self._bins.with_name("adapted.safetensors")
                    fitting = started_adapt(self._model, self._bins, out)
                time.sleep(min(left, 0.02))
        if fitting is not None:
            fitting.kill()
            fitting.communicate()


def beside(folder: Path, blocks: int, seconds: float, streams: int) -> Row:
    """Stream with and without a refit beside it, in alternating blocks."""
    model, bins = modulated(folder), folder / "bins.npz"
    artifact = load_artifact(model)
    names, counts = np.array(artifact.manifest.unit_names), counts_of(artifact.model)
    mask = np.ones(counts.shape, bool)
    np.savez(bins, counts=counts, mask=mask, names=names, bin_width=BIN_S)
    serve = (
        *("-m", "ilqr_vae.cli", "serve", str(model), "--device", "cpu", "--http", ""),
        *("--ingest", "tcp://127.0.0.1:*", "--results", "tcp://127.0.0.1:*"),
        *("--threads", "1", "--ready-file", "-"),
    )
    size = LoadSize(
        sessions=streams, bins=WARM + round(blocks * seconds / BIN_S), warm_up=WARM, rate=0.4
    )
    with running(serve) as server, Generator(server["ingest"], size, Faults()) as load:
        load.open()
        edges = time.monotonic() + WARM * BIN_S + seconds * np.arange(blocks + 1, dtype=np.float64)
        with Beside(model, bins, edges) as refits:
            outcome = load.run()
    stamps = np.array(outcome.stamps, dtype=np.int64)
    block = np.searchsorted(edges, stamps[:, 0] / 1e9) - 1
    ms = (stamps[:, -1] - stamps[:, 0]) / 1e6
    pairs = [(ms[block == k], ms[block == k + 1]) for k in range(0, blocks - 1, 2)]
    return row(
        "adapt",
        "stream beside a refit",
        units=UNITS,
        streams=streams,
        samples=len(ms),
        refits_ended=refits.ended,
        **ratio(pairs),
    )


def ratio(pairs: list[tuple[NDArray[np.float64], NDArray[np.float64]]]) -> Row:
    """Return p99 of all blocks without and with, and their ratio with a 95 % interval."""

    def p99s(chosen: NDArray[np.int64]) -> NDArray[np.float64]:
        sides = zip(*(pairs[k] for k in chosen), strict=True)
        return np.array([np.percentile(np.concatenate(side), 99) for side in sides])

    without, beside = p99s(np.arange(len(pairs)))
    rng = np.random.default_rng(0)
    drawn = np.array([p99s(d) for d in rng.integers(len(pairs), size=(DRAWS, len(pairs)))])
    low, high = np.percentile(drawn[:, 1] / drawn[:, 0], [2.5, 97.5])
    return {
        "p99_us": round(1e3 * without, 1),
        "beside_p99_us": round(1e3 * beside, 1),
        "ratio": round(beside / without, 3),
        "interval": [round(low, 3), round(high, 3)],
    }


def main() -> None:
    """Measure, print and write the rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adapt", description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where the rows go")
    parser.add_argument("--blocks", type=int, default=20, help="an even number")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of a block")
    parser.add_argument("--streams", type=int, default=4)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as text:
        found = [beside(Path(text), given.blocks, given.seconds, given.streams)]
        found.append(refit(Path(text)))
    for one in found:
        print(json.dumps(one))
    write_whole(given.json, json.dumps({"machine": machine(), "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
