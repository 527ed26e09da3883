"""End to end on loopback: open-loop load, timed from the intended send, against a bare echo.

The service has warmed up before it says that it is ready; each stream is then fed ``WARM`` bins
that are not measured, so that its window is full and moves. The service, the echo and the load
generator (``feeder``) are processes of their own, and share the machine's cores.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.feeder import Fed, Plan
from benchmarks.models import BIN_S, estimator_of, model_of
from benchmarks.rows import ROOT, Row, quantiles, row
from ilqr_vae.artifact import GroupSpec, Manifest, ModelSpec, save_artifact
from ilqr_vae.recordings import MatSpec, RecordingSpec
from ilqr_vae.streaming.horizon import HorizonConfig

N, M, UNITS, H = 20, 5, 196, 20
RATE = 0.4
WARM = H + 5
NAMES = tuple(f"unit{i}" for i in range(UNITS))


def _model_file(path: Path) -> Path:
    shapes = ModelSpec(
        dynamics="mgu2",
        latents=N,
        inputs=M,
        groups={"spikes": GroupSpec(family="poisson", channels=UNITS)},
    )
    manifest = Manifest(
        bin_width=BIN_S,
        unit_names=NAMES,
        data=RecordingSpec(bin_width=BIN_S, mat=MatSpec(spikes="spikes")),
        horizon=HorizonConfig(horizon=H, iterations=2),
        model=shapes,
    )
    rate = torch.full((UNITS,), RATE, dtype=torch.float64)
    save_artifact(path, manifest, model_of(N, M, UNITS), None, rate)
    return path


def _compile_predict_only() -> None:
    estimator = estimator_of(N, M, UNITS, H, 2)
    bins = torch.ones(1, UNITS, dtype=torch.float64)
    estimator.predict_only(estimator.init(1), bins, bins)


def run(quick: bool) -> list[Row]:
    """Rows for the echo, and for the service, with one and many streams."""
    rows: list[Row] = []
    echo = ("-m", "benchmarks.echo", str(N), str(UNITS))
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        model = _model_file(folder / "model.safetensors")
        service = (
            *("-m", "ilqr_vae.cli", "serve", str(model), "--device", "cpu", "--http", ""),
            *("--ingest", "tcp://127.0.0.1:*", "--results", "tcp://127.0.0.1:*"),
            *("--ready-file", "-"),
        )
        # where nothing is compiled yet, the other core can do a part of it for the service
        helping = threading.Thread(target=_compile_predict_only)
        helping.start()
        with _running(service) as served, _running(echo) as echoed:
            helping.join()
            for streams in (1, 100) if quick else (1, 8, 32, 64, 100):
                # in real time, but for the few streams that would take long
                speed = max(1.0, 5.0 / streams**0.5)
                seconds = 1.5 if quick else 20.0
                bare = None
                if streams == 1 or not quick:
                    bare = _fed(folder, echoed, streams, speed, seconds / 3)
                    rows.append(_row("bare ZeroMQ echo", bare, streams, speed))
                fed = _fed(folder, served, streams, speed, seconds)
                rows.append(_row("ilqr-vae serve", fed, streams, speed) | _service(fed, bare))
    return rows


@contextmanager
def _running(command: tuple[str, ...]) -> Generator[Row]:
    """A server, and what it says when it is ready: its addresses and process."""
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"{command[1]} did not get ready")
        yield json.loads(line) | {"pid": process.pid}
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def _fed(folder: Path, server: Row, streams: int, speed: float, seconds: float) -> Fed:
    """Feed a server for so long."""
    bins = max(1, round(seconds * speed / BIN_S))
    plan = Plan(
        ingest=server["ingest"],
        results=server["results"],
        streams=streams,
        bins=WARM + bins,
        warm=WARM,
        interval_ns=round(BIN_S / speed * 1e9),
        bin_width_ns=round(BIN_S * 1e9),
        units=NAMES,
        rate=RATE,
        pid=server["pid"],
    )
    asked, came = folder / "plan.json", folder / "fed.json"
    asked.write_bytes(msgspec.json.encode(plan))
    subprocess.run(
        [sys.executable, "-m", "benchmarks.feeder", str(asked), str(came)], check=True, cwd=ROOT
    )
    return msgspec.json.decode(came.read_bytes(), type=Fed)


def _us(begin: list[int], end: list[int]) -> NDArray[np.float64]:
    return (np.asarray(end) - np.asarray(begin)) / 1e3


def _p99(us: NDArray[np.float64]) -> float:
    return round(float(np.quantile(us, 0.99)), 1)


def _row(implementation: str, fed: Fed, streams: int, speed: float) -> Row:
    about = {"n": N, "m": M, "units": UNITS, "H": H, "iterations": 2, "device": "cpu"}
    about |= {"streams": streams, "speed": round(speed, 2)}
    times = quantiles((_us(fed.intended, fed.arrived) / 1e6).tolist())
    cpu = {} if fed.cpu_us is None else {"cpu_us": round(fed.cpu_us, 1)}
    return row("service", implementation, **about) | times | cpu | {
        "unanswered": fed.unanswered,
        "feeder_cpu_us": round(fed.own_cpu_us, 1),
        "feeder_late_p99_us": _p99(_us(fed.intended, fed.sent)),
    }  # fmt: skip


def _service(fed: Fed, echo: Fed | None) -> Row:
    """What only an answer of the service tells; solves of one step have the same times. What is
    over solve and echo is given where the echo was measured."""
    solve = _us(fed.solve_start, fed.solve_end)
    beside = _us(fed.intended, fed.published) - solve
    over = {}
    if echo is not None:
        whole, bare = (_p99(_us(one.intended, one.arrived)) for one in (fed, echo))
        over = {"p99_over_solve_and_echo_us": round(whole - _p99(solve) - bare, 1)}
    answers = Counter(fed.statuses)
    return {
        "late": answers["late"],
        "predicted": answers["extrapolated"] + answers["missing"],
        "shed": answers["shed"],
        "refused": sum(fed.refused.values()),
        "bins_a_step": round(len(solve) / max(1, len(set(fed.solve_start))), 2),
        "solve_median_us": round(float(np.median(solve)), 1),
        "solve_p99_us": _p99(solve),
        "queue_p99_us": _p99(_us(fed.received, fed.solve_start)),
        "publish_p99_us": _p99(_us(fed.solve_end, fed.published)),
        "beside_solve_median_us": round(float(np.median(beside)), 1),
        "beside_solve_p99_us": _p99(beside),
    } | over
