"""A service as a process of its own, to be signalled and restarted; and bins offline."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from feeder import WAIT_S
from ilqr_service.server import Service
from ilqr_vae.artifact import load_artifact

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}


@dataclass
class Served:
    """A running service.

    Attributes:
        process: to be signalled.
        ready: what it said when ready.
    """

    process: subprocess.Popen[bytes]
    ready: dict[str, Any]

    @property
    def ingest(self) -> str:
        return str(self.ready["ingest"])

    @property
    def results(self) -> str:
        return str(self.ready["results"])

    @property
    def http(self) -> str:
        return str(self.ready["http"])

    def kill(self) -> None:
        """SIGKILL, and wait."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM, and wait; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@contextmanager
def served(
    model: Path, log: Path, *options: str, port: str = "*", under: tuple[str, ...] = ()
) -> Iterator[Served]:
    """``ilqr-vae serve`` on free ports; killed at the end where it still runs.

    Args:
        under: a command that becomes the service, such as ``prlimit``.
    """
    command = [
        *under,
        *(sys.executable, "-m", "ilqr_vae.cli", "serve", str(model), "--device", "cpu"),
        *("--ingest", f"tcp://127.0.0.1:{port}", "--results", "tcp://127.0.0.1:*"),
        *("--http", "127.0.0.1:0", "--log", "json", "--ready-file", "-", *options),
    ]
    with log.open("ab") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=ENVIRONMENT)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line, log.read_text()
        yield Served(process, json.loads(line))
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def free_port() -> str:
    """A port that nothing listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def metrics(service: Served | Service) -> dict[str, float]:
    """What /metrics shows, by name with labels."""
    with urllib.request.urlopen(f"http://{service.http}/metrics", timeout=WAIT_S) as page:
        lines = page.read().decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def offline(
    path: Path, counts: NDArray[Any], observed: NDArray[np.bool_]
) -> list[NDArray[np.float64]]:
    """Bins in order straight through the estimator: everything computed of each, in one vector
    laid out as ``feeder.numbers``."""
    torch.set_num_threads(1)
    estimator = load_artifact(path, device="cpu").estimator()
    state, out = estimator.init(batch=1), []
    for row, mask in zip(counts, observed, strict=True):
        state, e = estimator.step(
            state, torch.tensor(row, dtype=torch.float64)[None], torch.tensor(mask).double()[None]
        )
        vectors = [t[0].numpy() for t in (e.z, e.z_std, e.rates, e.kinematics, e.kinematics_std)]
        scalars = [float(e.bits[0]), float(e.spikes[0]), float(e.iterations[0])]
        out.append(np.concatenate([*vectors, scalars]))
    return out
