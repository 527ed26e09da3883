"""What a fleet takes: measured, compared with a queueing model, and carried to more streams.

    python -m benchmarks.capacity --json F --page docs/capacity.md    measure, within 5 minutes
    python -m benchmarks.capacity --read F --page docs/capacity.md    write the tables again

A server runs on one core of its own, with a journal; the load comes from one process on the other
cores. The model (``benchmarks.queueing``) is calibrated on streams at three loads, and predicts
three others.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import zmq
from numpy.typing import NDArray

from benchmarks import rows
from benchmarks.capacity_page import write
from benchmarks.models import BIN_S
from benchmarks.queueing import Core, Sends, Simulation, interruptions
from benchmarks.rows import Row, quantiles, row
from benchmarks.service import RATE, model_file, running
from ilqr_clients import ServiceClient, Session
from ilqr_clients.load import Generator, LoadResult
from ilqr_clients.load_schedule import Faults, LoadSize
from ilqr_vae.cluster import connected
from ilqr_vae.protocol import messages

SIZES = {
    "small": {"n": 10, "m": 3, "units": 50, "horizon": 10},
    "middle": {"n": 20, "m": 5, "units": 196, "horizon": 20},
    "large": {"n": 32, "m": 8, "units": 192, "horizon": 64},
}
LOADS = (0.3, 0.6, 0.85)
CALIBRATED = 0.5
"""Load at which the model is calibrated, besides two low ones."""
SECONDS, CALIBRATION_S, OPENED, FEW = 12.0, 5.0, 40, 12


def _fed(server: Row, streams: int, seconds: float, warm: int) -> tuple[LoadResult, float]:
    """A load in real time, and the server's processor time a bin in microseconds."""
    process = psutil.Process(server["pid"])
    load = LoadSize(sessions=streams, bins=warm + int(seconds / BIN_S), warm_up=warm, rate=RATE)
    with Generator(server["ingest"], load, Faults()) as made:
        made.open()
        before = process.cpu_times()
        outcome = made.run()
        after = process.cpu_times()
    spent = after.user + after.system - before.user - before.system
    return outcome, round(spent / max(1, outcome.sent) * 1e6, 1)


def _streams(device: str) -> list[Row]:
    found: list[Row] = []
    mine = psutil.Process()
    allowed = mine.cpu_affinity() or [0]
    core, *others = sorted(allowed)
    mine.cpu_affinity(others or [core])
    try:
        for name, size in SIZES.items():
            with tempfile.TemporaryDirectory() as text:
                found += _size(name, size, Path(text), core, device)
    finally:
        mine.cpu_affinity(allowed)
    return found


def _size(name: str, size: Row, folder: Path, core: int, device: str) -> list[Row]:
    """One size of model, on a server of its own."""
    model, found = model_file(folder / "model.safetensors", **size), list[Row]()
    (folder / "s.toml").write_text("max_sessions = 1000\n")
    serve = (
        *("-m", "ilqr_vae.cli", "serve", str(model), "--device", device, "--http", ""),
        *("--ingest", "tcp://127.0.0.1:*", "--results", "tcp://127.0.0.1:*"),
        *("--threads", "1", "--journal", str(folder / "journal"), "--ready-file", "-"),
        *("--config", str(folder / "s.toml")),
    )
    with running(serve) as server:
        process = psutil.Process(server["pid"])
        for thread in process.threads():
            psutil.Process(thread.id).cpu_affinity([core])
        about = size | {"iterations": 2, "device": device}
        warm = size["horizon"] + 5
        found.append(_memory(name, server, process, about))
        few, few_us = _fed(server, FEW, CALIBRATION_S, warm)
        some, _ = _fed(server, 2 * FEW, CALIBRATION_S, warm)
        most = Core.fitted([few.stamps, some.stamps]).most_streams(BIN_S)
        half = max(FEW, round(CALIBRATED * most))
        many, _ = _fed(server, half, CALIBRATION_S, warm)
        fitted = Core.fitted([few.stamps, some.stamps, many.stamps])
        most = fitted.most_streams(BIN_S)
        loaded = [
            _compared(name, load, max(1, round(load * most)), fitted, server, warm)
            for load in LOADS
        ]
        kept_up = [r["streams"] for r in loaded if r["late_share"] < 0.01 and not r["shed"]]
        found.append(
            row(
                "capacity",
                name,
                **about,
                core_us_a_bin=few_us,
                core_us_a_bin_most=loaded[-1]["core_us_a_bin"],
                streams_a_core=max(kept_up, default=half),
                bytes_s_a_stream=_bytes(server, size),
                calibrated_at=[FEW, 2 * FEW, half],
                most_streams=round(most, 1),
                times_us={k: round(v * 1e6, 1) for k, v in fitted.times._asdict().items()},
                way_in_us=round(float(np.median(fitted.way_in)) * 1e6, 1),
                way_out_us=round(float(np.median(fitted.way_out)) * 1e6, 1),
            )
        )
        found += loaded
    print(*found, sep="\n", file=sys.stderr)
    return found


def _compared(name: str, load: float, streams: int, core: Core, server: Row, warm: int) -> Row:
    """Latency as it was measured, and as the model has it: for the bins as they were sent, and
    with the interruptions of the server that were measured."""
    fed, cpu_us = _fed(server, streams, SECONDS, warm)
    sends = Sends.of(fed.stamps)
    taken = interruptions(core, fed.stamps)
    latencies = {
        "measured": sends.measured,
        "model": Simulation(core, BIN_S).run(sends),
        "interrupted": Simulation(core, BIN_S, taken).run(sends),
    }
    report = fed.to_json()
    return row(
        "queue",
        name,
        share=load,
        streams=streams,
        bins=int(sends.sent.size),
        core_us_a_bin=cpu_us,
        busy=round(cpu_us * 1e-6 * streams / BIN_S, 3),
        bins_a_step=report["bins_per_step"],
        late_share=round(fed.first_statuses.get("late", 0) / max(1, fed.first), 4),
        shed=fed.shed,
        unanswered=fed.unanswered,
        generator_late_p99_ms=report["sent_late_ms"].get("p99"),
        interruptions=len(taken),
        interrupted_ms=round(sum(one.seconds for one in taken) * 1e3, 1),
        **{
            f"{kind}_p{q}_ms": _at(seconds * 1e3, q)
            for kind, seconds in latencies.items()
            for q in (50, 90, 99)
        },
    )


def _at(values: NDArray[np.float64], percentile: int) -> float | None:
    return round(float(np.percentile(values, percentile)), 3) if values.size else None


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


@contextmanager
def _two_nodes() -> Any:
    """A cluster of two nodes on this machine."""
    from ray.cluster_utils import Cluster

    node: Row = {"num_cpus": 1, "object_store_memory": 80 << 20}
    cluster = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": False})
    try:
        cluster.add_node(**node)
        with connected(cluster.address):
            yield
    finally:
        cluster.shutdown()


def _fleet() -> list[Row]:
    """What the redirect costs, and the copy of a journal: two servers on two nodes."""
    from ilqr_service.fleet.fleet import Fleet
    from ilqr_service.settings import ServiceSettings

    settings = ServiceSettings(
        ingest="tcp://127.0.0.1:*", results="tcp://127.0.0.1:*", http="127.0.0.1:0", device="cpu"
    )
    found: list[Row] = []
    with tempfile.TemporaryDirectory() as text, _two_nodes():
        folder = Path(text)
        model = model_file(folder / "model.safetensors", **SIZES["small"])
        for replicate in (False, True):
            journals = folder / f"journals{replicate:d}"
            fleet = Fleet(model, settings, journals, fewest=2, replicate=replicate)
            try:
                end = time.monotonic() + 60.0
                while fleet.copies < 2 * replicate:
                    if time.monotonic() > end:
                        raise TimeoutError("not every journal has a copy after 60 s")
                    time.sleep(0.05)
                servers = {s.name: s for s in fleet.servers()}
                server = servers[min(servers)]
                if not replicate:
                    found += _opened(server.ingest, fleet.gateway.ingest)
                found.append(_copied(fleet, server.ingest, server.name, replicate))
            finally:
                fleet.close()
    return found


def _opened(server: str, gateway: str) -> list[Row]:
    """Opening at the server's own address, and at the fleet's."""
    names = tuple(f"unit{i}" for i in range(SIZES["small"]["units"]))
    found: list[Row] = []
    for k, (place, address) in enumerate((("the server's", server), ("the fleet's", gateway))):
        with ServiceClient(address, timeout=30.0) as client:
            spent: list[float] = []
            for i in range(2 * OPENED):
                began = time.perf_counter()
                session = client.open(f"o{k}-{i}", units=names, bin_width=BIN_S)
                spent.append(time.perf_counter() - began)
                session.close()
        found.append(row("open", f"at {place} address", **quantiles(spent)))
    return found


def _copied(fleet: Any, ingest: str, name: str, replicate: bool) -> Row:
    """Latency of a load on one server of a fleet, and how far its journal's copy was behind."""
    load = LoadSize(sessions=FEW, bins=int(SECONDS / BIN_S), warm_up=15, rate=RATE)
    with Generator(ingest, load, Faults()) as made:
        made.open()
        outcome = made.run()
    latency = np.array(outcome.latency_ms()["latency"])
    figures: Row = {f"latency_p{q}_ms": _at(latency, q) for q in (50, 90, 99)}
    if replicate:
        families = {family.name: family for family in fleet.collect()}
        took = families["ilqr_journal_copy_seconds"].samples
        mine = [s for s in took if s.labels.get("server") == name]
        edges = {s.labels["le"]: s.value for s in mine if s.name.endswith("_bucket")}
        for share in (0.5, 0.99):
            least = share * edges["+Inf"]
            edge = next(le for le, n in edges.items() if n >= least)
            figures[f"copy_p{share * 100:g}_ms_at_most"] = float(edge) * 1e3
        pieces = edges["+Inf"]
        written = next(
            s.value
            for s in families["ilqr_journal_bytes"].samples
            if s.labels.get("server") == name
        )
        figures |= {"pieces": pieces, "bytes_a_piece": round(written / max(1, pieces))}
    return row("copy", "replicated" if replicate else "shared folder", streams=FEW, **figures)


def main() -> int:
    """Measure, and write the page's tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.capacity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--json", type=Path, help="measure, and write the rows here")
    source.add_argument("--read", type=Path, help="rows that were measured")
    parser.add_argument("--page", type=Path, help="write its tables")
    parser.add_argument("--device", default="cpu", help="of the servers: cpu or cuda")
    given = parser.parse_args()
    if given.json is not None:
        machine, began = rows.machine(), time.monotonic()
        content: Row = {"machine": machine, "rows": [*_streams(given.device), *_fleet()]}
        content["minutes"] = round((time.monotonic() - began) / 60, 1)
        given.json.write_text(json.dumps(content, indent=1) + "\n")
    else:
        content = json.loads(given.read.read_text())
    write(content, given.page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
