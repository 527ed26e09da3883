"""End to end on loopback: open-loop load, timed from the intended send, beside a bare echo.

The service warms up before it reports ready. The first ``WARM`` bins of each stream are not timed,
so that its window is full. The service, the echo and the load generator (``ilqr-vae load``) are
separate processes that share the cores.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from benchmarks.models import BIN_S, estimator_of, model_of
from benchmarks.rows import ROOT, Row, row
from ilqr_vae.artifact import GroupSpec, Manifest, ModelSpec, save_artifact
from ilqr_vae.recordings import MatSpec, RecordingSpec
from ilqr_vae.streaming.horizon import HorizonConfig

N, M, UNITS, H = 20, 5, 196, 20
RATE = 0.4
WARM = H + 5


def model_file(path: Path, n: int = N, m: int = M, units: int = UNITS, horizon: int = H) -> Path:
    """Write an untrained model file of this size."""
    shapes = ModelSpec(
        dynamics="mgu2",
        latents=n,
        inputs=m,
        groups={"spikes": GroupSpec(family="poisson", channels=units)},
    )
    manifest = Manifest(
        bin_width=BIN_S,
        unit_names=tuple(f"unit{i}" for i in range(units)),
        data=RecordingSpec(bin_width=BIN_S, mat=MatSpec(spikes="spikes")),
        horizon=HorizonConfig(horizon=horizon, iterations=2),
        model=shapes,
    )
    rate = torch.full((units,), RATE, dtype=torch.float64)
    save_artifact(path, manifest, model_of(n, m, units), None, rate)
    return path


def _compile_predict_only() -> None:
    estimator = estimator_of(N, M, UNITS, H, 2)
    bins = torch.ones(1, UNITS, dtype=torch.float64)
    estimator.predict_only(estimator.init(1), bins, bins)


def run(quick: bool) -> list[Row]:
    """Return rows for the echo and the service, with one and many streams."""
    rows: list[Row] = []
    echo = ("-m", "benchmarks.echo", str(N), str(UNITS), str(BIN_S))
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        model = model_file(folder / "model.safetensors")
        service = (
            *("-m", "ilqr_vae.cli", "serve", str(model), "--device", "cpu", "--http", ""),
            *("--ingest", "tcp://127.0.0.1:*", "--results", "tcp://127.0.0.1:*"),
            *("--ready-file", "-"),
        )
        # if nothing is compiled yet, compile in parallel with the service
        helping = threading.Thread(target=_compile_predict_only)
        helping.start()
        with running(service) as served, running(echo) as echoed:
            helping.join()
            for streams in (1, 100) if quick else (1, 8, 32, 64, 100, 200):
                # in real time, except for few streams, which would take long
                speed = max(1.0, 5.0 / streams**0.5)
                seconds = 1.5 if quick else 20.0
                bare = None
                if streams == 1 or not quick:
                    bare = fed_by(folder, echoed, streams, speed, seconds / 3)
                    rows.append(_row("bare ZeroMQ echo", bare, streams, speed))
                fed = fed_by(folder, served, streams, speed, seconds)
                rows.append(_row("ilqr-vae serve", fed, streams, speed) | _service(fed, bare))
    return rows


@contextmanager
def running(command: tuple[str, ...]) -> Generator[Row]:
    """Run a server; yield its addresses and process id once it is ready."""
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


def fed_by(
    folder: Path, server: Row, streams: int, speed: float, seconds: float, warm: int = WARM
) -> Row:
    """Load a server; return the report of ``ilqr-vae load`` and the server's CPU time per bin."""
    process, report = psutil.Process(server["pid"]), folder / "load.json"
    before = process.cpu_times()
    options = {
        "to": server["ingest"],
        "sessions": streams,
        "duration": seconds,
        "speed": speed,
        "warm-up": warm,
        "rate": RATE,
        "json": report,
    }
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "ilqr_vae.cli", "load", *words]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    after, fed = process.cpu_times(), json.loads(report.read_text())
    spent = after.user + after.system - before.user - before.system
    return fed | {"cpu_us": round(spent / fed["sent"] * 1e6, 1)}


def _us(times: Row, quantile: str) -> float:
    return round(1e3 * times[quantile], 1)


def _row(implementation: str, fed: Row, streams: int, speed: float) -> Row:
    about = {"n": N, "m": M, "units": UNITS, "H": H, "iterations": 2, "device": "cpu"}
    about |= {"streams": streams, "speed": round(speed, 2)}
    latency = fed["latency_ms"]
    return row("service", implementation, **about) | {
        "samples": int(latency["n"]),
        "median_us": _us(latency, "p50"),
        "p99_us": _us(latency, "p99"),
        "p999_us": _us(latency, "p99.9"),
        "max_us": _us(latency, "max"),
        "cpu_us": fed["cpu_us"],
        "unanswered": fed["unanswered"],
        "feeder_cpu_us": fed["generator_cpu_us"],
        "feeder_late_p99_us": _us(fed["sent_late_ms"], "p99"),
    }


def _service(fed: Row, echo: Row | None) -> Row:
    """Return figures that only the service's answers contain.

    ``p99_over_solve_and_echo_us``, if the echo was measured, is the p99 of the latency minus those
    of the solve and of the echo.
    """
    solve, answers = fed["solve_ms"], fed["first_statuses"]
    over = {}
    if echo is not None:
        whole, bare = (one["latency_ms"]["p99"] for one in (fed, echo))
        over = {"p99_over_solve_and_echo_us": round(1e3 * (whole - solve["p99"] - bare), 1)}
    return {
        "late": answers.get("late", 0),
        "predicted": sum(answers.get(name, 0) for name in ("extrapolated", "missing")),
        "shed": fed["shed"],
        "refused": sum(fed["refused"].values()),
        "bins_a_step": fed["bins_per_step"],
        "solve_median_us": _us(solve, "p50"),
        "solve_p99_us": _us(solve, "p99"),
        "queue_p99_us": _us(fed["queue_ms"], "p99"),
        "publish_p99_us": _us(fed["publish_ms"], "p99"),
        "beside_solve_median_us": _us(fed["beside_solve_ms"], "p50"),
        "beside_solve_p99_us": _us(fed["beside_solve_ms"], "p99"),
    } | over
