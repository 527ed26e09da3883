"""The capacity of a fleet, for docs/capacity.md.

    python -m benchmarks.capacity streams --json F    streams a core, bytes, memory, waiting times
    python -m benchmarks.capacity fleet --json F      what the redirect and the replica cost
    python -m benchmarks.capacity carry FILE          from one core to 10^3, 10^5, 10^6 streams

A server with a journal runs on its own core, and the load generator on the others. Waiting times
are compared with a simulated queue of one server with gated batches: it takes all waiting bins,
works for D per bin, and then answers them together. D is the processor time of a bin with 12
streams. Each stream sends a bin per bin width, with its own phase.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import zmq

from benchmarks import rows
from benchmarks.models import BIN_S
from benchmarks.rows import Row, quantiles, row
from benchmarks.service import RATE, fed_by, model_file, running
from ilqr_clients import ServiceClient, Session
from ilqr_vae.cluster import connected
from ilqr_vae.protocol import messages

SIZES = {
    "small": {"n": 10, "m": 3, "units": 50, "horizon": 10},
    "middle": {"n": 20, "m": 5, "units": 196, "horizon": 20},
    "large": {"n": 32, "m": 8, "units": 192, "horizon": 64},
}
LOADS = (0.3, 0.6, 0.85)
ROOM = 0.9
"""Share of a core that the fleet gives to sessions."""
SECONDS, OPENED, FEW = 12.0, 100, 12


def simulated(streams: int, work_s: float, seconds: float = 60.0, seed: int = 0) -> np.ndarray:
    """Simulate the queue: seconds from the arrival of each bin to its answer."""
    rng = np.random.default_rng(seed)
    phases = rng.uniform(0, BIN_S, streams)
    times = np.sort((phases[:, None] + BIN_S * np.arange(int(seconds / BIN_S))).ravel())
    spent, first, now = np.empty_like(times), 0, 0.0
    while first < times.size:
        now = max(now, times[first])
        last = int(np.searchsorted(times, now, side="right"))
        now += work_s * (last - first)
        spent[first:last] = now - times[first:last]
        first = last
    return spent


def _streams() -> list[Row]:
    found: list[Row] = []
    core, *others = sorted(psutil.Process().cpu_affinity() or [0])
    psutil.Process().cpu_affinity(others or [core])
    for name, size in SIZES.items():
        with tempfile.TemporaryDirectory() as text:
            folder = Path(text)
            model = model_file(folder / "model.safetensors", **size)
            serve = (
                *("-m", "ilqr_vae.cli", "serve", str(model), "--device", "cpu", "--http", ""),
                *("--ingest", "tcp://127.0.0.1:*", "--results", "tcp://127.0.0.1:*"),
                *("--threads", "1", "--journal", str(folder / "journal"), "--ready-file", "-"),
            )
            with running(serve) as server:
                process = psutil.Process(server["pid"])
                process.cpu_affinity([core])
                for thread in process.threads():
                    psutil.Process(thread.id).cpu_affinity([core])
                about = size | {"iterations": 2}
                found.append(_memory(name, server, process, about))
                warm = size["horizon"] + 5
                alone = fed_by(folder, server, FEW, 1.0, SECONDS, warm)
                work_s = alone["cpu_us"] / 1e6
                most = int(ROOM * BIN_S / work_s)
                bytes_s = _bytes(server, size)
                common = about | {"core_us_a_bin": alone["cpu_us"], "streams_a_core": most}
                found.append(row("capacity", name, **common, bytes_s_a_stream=bytes_s))
                for load in LOADS:
                    streams = max(1, round(load * BIN_S / work_s))
                    fed = fed_by(folder, server, streams, 1.0, SECONDS, warm)
                    found.append(_compared(name, streams, load, work_s, fed))
                    print(found[-1], file=sys.stderr)
    return found


def _compared(name: str, streams: int, load: float, work_s: float, fed: Row) -> Row:
    """Return the measured latency, and that of the queue."""
    model = np.concatenate([simulated(streams, work_s, seed=seed) for seed in range(10)]) * 1e3
    late = fed["first_statuses"].get("late", 0) / max(1, fed["answered"])
    return row(
        "queue",
        name,
        load=load,
        streams=streams,
        bins=int(fed["latency_ms"]["n"]),
        core_us_a_bin=fed["cpu_us"],
        bins_a_step=fed["bins_per_step"],
        late_share=round(late, 4),
        shed=fed["shed"],
        unanswered=fed["unanswered"],
        **{f"measured_{q}_ms": fed["latency_ms"][q] for q in ("p50", "p90", "p99")},
        **{f"model_p{q}_ms": round(float(np.percentile(model, q)), 3) for q in (50, 90, 99)},
    )


def _memory(name: str, server: Row, process: psutil.Process, about: Row) -> Row:
    """Return the memory that the server takes for open sessions with full windows."""
    rng = np.random.default_rng(0)
    units, horizon = about["units"], about["horizon"]
    names = tuple(f"unit{i}" for i in range(units))
    sessions: list[Session] = []

    def grown(client: ServiceClient, first: int, count: int) -> int:
        for k in range(first, first + count):
            session = client.open(f"memory{k}", units=names, bin_width=BIN_S, deadline=60.0)
            assert isinstance(session, Session)
            for i in range(horizon + 5):
                session.step(i, rng.poisson(RATE, units), timeout=30.0)
            sessions.append(session)
        return int(process.memory_info().rss)

    with ServiceClient(server["ingest"]) as client:
        before = grown(client, 0, 10)
        after = grown(client, 10, OPENED)
    for session in sessions:
        session.close()
    kib = round((after - before) / OPENED / 1024, 1)
    return row("memory", name, **about, kib_a_session=kib, server_mib=round(before / 2**20))


def _bytes(server: Row, size: Row) -> int:
    """Return bytes per second of the bins and answers of one stream, as ZeroMQ frames."""
    units = size["units"]
    context: zmq.Context[Any] = zmq.Context()
    try:
        sub: zmq.Socket[bytes] = context.socket(zmq.SUB)
        sub.connect(server["results"])
        sub.setsockopt(zmq.SUBSCRIBE, messages.topic("bytes"))
        names = tuple(f"unit{i}" for i in range(units))
        with ServiceClient(server["ingest"]) as client:
            session = client.open("bytes", units=names, bin_width=BIN_S)
            assert isinstance(session, Session)
            sent: list[int] = []
            send = session.send_raw

            def counted(frame: bytes) -> None:
                sent.append(len(frame))
                send(frame)

            session.send_raw = counted
            came = 0
            for i in range(20):
                session.step(i, np.ones(units, dtype=np.uint16), timeout=30.0)
            while sub.poll(200):
                came += sum(map(len, sub.recv_multipart()))
            session.close()
    finally:
        context.destroy(linger=0)
    return round((sum(sent) + came) / 20 / BIN_S)


def _fleet() -> list[Row]:
    """Measure the cost of the redirect: opening at the fleet's address and at the server's."""
    from ilqr_service.fleet.fleet import Fleet
    from ilqr_service.settings import ServiceSettings

    settings = ServiceSettings(
        ingest="tcp://127.0.0.1:*", results="tcp://127.0.0.1:*", http="", device="cpu"
    )
    size = SIZES["middle"]
    names = tuple(f"unit{i}" for i in range(size["units"]))
    with tempfile.TemporaryDirectory() as text, connected(cpus=2):
        folder = Path(text)
        fleet = Fleet(
            model_file(folder / "model.safetensors", **size), settings, folder / "j", fewest=1
        )
        try:
            (server,) = fleet.servers()
            places = {"the server's address": server.ingest, "the fleet's": fleet.gateway.ingest}
            found: list[Row] = []
            for k, (place, address) in enumerate(places.items()):
                with ServiceClient(address) as client:
                    spent: list[float] = []
                    for i in range(OPENED):
                        began = time.perf_counter()
                        session = client.open(f"o{k}-{i}", units=names, bin_width=BIN_S)
                        spent.append(time.perf_counter() - began)
                        session.close()
                found.append(row("open", f"at {place}", **quantiles(spent)))
            return found
        finally:
            fleet.close()


def carried(measured: list[Row], streams: int) -> list[Row]:
    """Extrapolate cores, network and gateway load to this many streams from one core."""
    found: list[Row] = []
    for one in measured:
        if one["benchmark"] != "capacity":
            continue
        cores = -(-streams // one["streams_a_core"])
        memory = next(
            r
            for r in measured
            if r["benchmark"] == "memory" and r["implementation"] == one["implementation"]
        )
        found.append(
            {
                "model": one["implementation"],
                "streams": streams,
                "cores": cores,
                "machines of 64 cores": -(-cores // 64),
                "Gbit/s in all": round(8 * streams * one["bytes_s_a_stream"] / 1e9, 2),
                "Mbit/s a machine": round(
                    8 * min(streams, 64 * one["streams_a_core"]) * one["bytes_s_a_stream"] / 1e6
                ),
                "GiB of memory": round(
                    (streams * memory["kib_a_session"] / 1024 + cores * memory["server_mib"])
                    / 1024,
                    1,
                ),
            }
        )
    return found


def main() -> int:
    """Measure, or extrapolate from results."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.capacity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("streams", "fleet"):
        commands.add_parser(name).add_argument("--json", type=Path, required=True)
    commands.add_parser("carry").add_argument("file", type=Path)
    given = parser.parse_args()
    if given.command == "carry":
        measured = json.loads(given.file.read_text())["rows"]
        for streams in (10**3, 10**5, 10**6):
            for line in carried(measured, streams):
                print(", ".join(f"{k} {v}" for k, v in line.items()))
        return 0
    machine = rows.machine()
    found = _streams() if given.command == "streams" else _fleet()
    content = {"benchmark": given.command, "machine": machine, "rows": found}
    given.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
