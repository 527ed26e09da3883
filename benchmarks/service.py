"""End to end on loopback: open-loop load, timed from the intended send, against a bare echo."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import zmq

from benchmarks.models import BIN_S, model_of
from benchmarks.rows import Row, quantiles, row
from ilqr_clients.load import Generator
from ilqr_clients.plan import Faults, Load
from ilqr_vae import wire
from ilqr_vae.artifact import GroupSpec, Manifest, ModelSpec, save_artifact
from ilqr_vae.horizon import HorizonConfig
from ilqr_vae.recordings import MatSpec, RecordingSpec

N, M, UNITS, H = 20, 5, 196, 20


def _model_file(path: Path) -> Path:
    shapes = ModelSpec(
        dynamics="mgu2",
        latents=N,
        inputs=M,
        groups={"spikes": GroupSpec(family="poisson", channels=UNITS)},
    )
    manifest = Manifest(
        bin_width=BIN_S,
        unit_names=tuple(f"unit{i}" for i in range(UNITS)),
        data=RecordingSpec(bin_width=BIN_S, mat=MatSpec(spikes="spikes")),
        horizon=HorizonConfig(horizon=H, iterations=2),
        model=shapes,
    )
    rate = torch.full((UNITS,), 0.4, dtype=torch.float64)
    save_artifact(path, manifest, model_of(N, M, UNITS), None, rate)
    return path


def _echo(count: int, interval: float) -> list[float]:
    """Seconds from intended send to arrival of bins that are sent back as results as they are.

    The messages have the sizes of a bin and of its answer; the paths are the service's: DEALER to
    ROUTER, XPUB to SUB.
    """
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    router, pub = context.socket(zmq.ROUTER), context.socket(zmq.XPUB)
    ports = [s.bind_to_random_port("tcp://127.0.0.1") for s in (router, pub)]
    dealer, sub = context.socket(zmq.DEALER), context.socket(zmq.SUB)
    dealer.connect(f"tcp://127.0.0.1:{ports[0]}")
    sub.connect(f"tcp://127.0.0.1:{ports[1]}")
    sub.setsockopt(zmq.SUBSCRIBE, b"")
    counts = wire.pack(np.zeros(UNITS, np.int64), "<u2")
    numbers = {"latent": N, "latent_std": N, "rates": UNITS, "kinematics": 2, "kinematics_std": 2}
    arrays = {name: wire.pack(np.zeros(size), "<f8") for name, size in numbers.items()}
    stamps = ("source_ns", "received_ns", "solve_start_ns", "solve_end_ns", "published_ns")
    result = wire.Result(
        session="echo", epoch=0, index=0, revision=0, model="0" * 12, status="ok",
        solver="iteration_limit", iterations=2, bits=0.0, spikes=0,
        **dict.fromkeys(stamps, 0), **arrays,
    )  # fmt: skip
    answer = wire.encode(result)

    def serve() -> None:
        pub.recv()  # the subscription
        for _ in range(count):
            router.recv_multipart()
            pub.send_multipart([b"echo", answer])

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    spent: list[float] = []
    began = time.perf_counter() + 0.2
    for index in range(count):
        intended = began + index * interval
        while time.perf_counter() < intended:
            pass
        bin_ = wire.Bin(session="echo", index=index, source_ns=0, counts=counts)
        dealer.send(wire.encode(bin_))
        wire.decode_published(sub.recv_multipart()[-1])
        spent.append(time.perf_counter() - intended)
    thread.join()
    context.destroy(linger=0)
    return spent


def run(quick: bool) -> list[Row]:
    """Rows for the echo, and for the service with one and many sessions."""
    common = {"n": N, "m": M, "units": UNITS, "H": H, "iterations": 2, "device": "cpu"}
    rows: list[Row] = []
    bins = 200 if quick else 2000
    echo = _echo(bins, 0.01)
    rows.append(row("service", "bare ZeroMQ echo", streams=1, **common) | quantiles(echo))
    with tempfile.TemporaryDirectory() as folder:
        path = _model_file(Path(folder) / "model.safetensors")
        # a process of its own, as in use: not under the load generator's lock
        with _served(path) as endpoint:
            for sessions in (1, 8) if quick else (1, 8, 32, 100):
                # in real time, but for the few sessions that would take long
                load = Load(
                    sessions=sessions,
                    bins=max(100, bins // sessions),
                    speed=max(1.0, 5.0 / sessions**0.5),
                )
                rows.append(_loaded(endpoint, load, echo, common))
    return rows


@contextmanager
def _served(model: Path) -> Iterator[str]:
    """The address of ``ilqr-vae serve`` for feeders."""
    command = [
        *(sys.executable, "-m", "ilqr_vae.cli", "serve", str(model), "--device", "cpu"),
        *("--ingest", "tcp://127.0.0.1:*", "--results", "tcp://127.0.0.1:*", "--http", ""),
        *("--ready-file", "-"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise RuntimeError("the service did not get ready")
        yield json.loads(line)["ingest"]
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def _loaded(endpoint: str, load: Load, echo: list[float], common: Row) -> Row:
    generator = Generator(endpoint, load, Faults(), keep=True)
    try:
        generator.open()
        outcome = generator.run()
    finally:
        generator.close()
    results = [r for session in outcome.results.values() for r in session.values() if r.source_ns]
    solves = np.asarray([r.solve_end_ns - r.solve_start_ns for r in results]) / 1e3
    found = quantiles([x / 1e3 for x in outcome.latency_ms])
    # per answer, from the intended send to publishing, without its own solve
    beside = np.asarray(
        [(r.published_ns - r.source_ns - r.solve_end_ns + r.solve_start_ns) / 1e3 for r in results]
    )
    solve_p99 = float(np.quantile(solves, 0.99))
    measured = {
        "solve_median_us": round(float(np.median(solves)), 1),
        "solve_p99_us": round(solve_p99, 1),
        "beside_solve_median_us": round(float(np.median(beside)), 1),
        "beside_solve_p99_us": round(float(np.quantile(beside, 0.99)), 1),
        "p99_over_solve_and_echo_us": round(
            found["p99_us"] - solve_p99 - float(np.quantile(echo, 0.99)) * 1e6, 1
        ),
        "unanswered": outcome.unanswered,
        "statuses": dict(outcome.first_statuses),
    }
    about = {"streams": load.sessions, "speed": round(load.speed, 2)} | common
    return row("service", "ilqr-vae serve", **about) | found | measured
