"""What a fleet takes: measured, compared with a queue, and carried to more streams.

    python -m benchmarks.capacity --json F --page docs/capacity.md    measure, within 8 minutes
    python -m benchmarks.capacity --read F --page docs/capacity.md    write the tables again

A server runs on one core of its own, with a journal, the load on the others. Waiting times are
compared with a queue of one server and gated batches: it takes all bins that wait and answers them
together; bins come from streams with a period of one bin width and phases of their own (sum of
D_i / G / 1). How long a batch takes is drawn from what was measured of that very server, sent 1, 2,
4, ... bins at once while it was idle: from the first arrival to the last answer. The ways there and
back are drawn too, and keep nobody busy. The queue is simulated.
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
from benchmarks.rows import Row, quantiles, row
from benchmarks.service import RATE, model_file, running
from ilqr_clients import ServiceClient, Session
from ilqr_clients.load import Generator, LoadResult, Stamps
from ilqr_clients.load_schedule import Faults, LoadSize
from ilqr_vae.cluster import connected
from ilqr_vae.protocol import messages

SIZES = {
    "small": {"n": 10, "m": 3, "units": 50, "horizon": 10},
    "middle": {"n": 20, "m": 5, "units": 196, "horizon": 20},
    "large": {"n": 32, "m": 8, "units": 192, "horizon": 64},
}
LOADS = (0.3, 0.6, 0.85)
BURSTS, DRAWS = (1, 2, 4, 8, 16, 32), 24
SECONDS, OPENED, FEW = 12.0, 40, 12
Spans = dict[int, NDArray[np.float64]]
"""Seconds that batches took, by the number of bins in them."""


class Batches:
    """Draws how long a batch takes: the same quantile of the two sizes that were measured beside
    it, in proportion; beyond the largest, by what a bin more of it takes."""

    def __init__(self, spans: Spans, ways: NDArray[np.float64]) -> None:
        self.ways = ways
        self._sizes = np.array(sorted(spans))
        self._at = np.linspace(0.0, 1.0, 101)
        self._table = np.array([np.quantile(spans[k], self._at) for k in sorted(spans)])

    def seconds(self, bins: int, quantile: float) -> float:
        """Of a batch of so many bins."""
        spans = [float(np.interp(quantile, self._at, column)) for column in self._table]
        if bins > self._sizes[-1] and len(spans) > 1:
            each = (spans[-1] - spans[-2]) / (self._sizes[-1] - self._sizes[-2])
            return spans[-1] + max(each, 0.0) * float(bins - self._sizes[-1])
        return float(np.interp(bins, self._sizes, spans))

    @property
    def streams(self) -> float:
        """At which a server of such batches is busy all the time, in the largest ones."""
        medians = self._table[:, 50]
        return float(max(self._sizes * BIN_S / medians))


def simulated(
    streams: int, batches: Batches, seconds: float = 30.0, seed: int = 0
) -> NDArray[np.float64]:
    """Seconds from each bin's arrival to its answer, by the queue above."""
    rng = np.random.default_rng(seed)
    phases = rng.uniform(0, BIN_S, streams)
    times = np.sort((phases[:, None] + BIN_S * np.arange(int(seconds / BIN_S))).ravel())
    spent, first, now = np.empty_like(times), 0, 0.0
    while first < times.size:
        now = max(now, times[first])
        last = int(np.searchsorted(times, now, side="right"))
        now += batches.seconds(last - first, rng.random())
        spent[first:last] = now - times[first:last]
        first = last
    return spent + rng.choice(batches.ways, times.size)


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


def _bursts(server: Row, warm: int) -> tuple[Spans, NDArray[np.float64]]:
    """How long the idle server takes for so many bins at once, and the ways of single bins to it
    and back, in seconds."""
    most = max(BURSTS)
    bins = warm + DRAWS * len(BURSTS)
    load = LoadSize(sessions=most, bins=bins, warm_up=warm, rate=RATE, deadline=10.0)
    sizes = np.random.default_rng(0).permutation(np.repeat(BURSTS, DRAWS))
    step, period = round(BIN_S * 1e9), round(2 * BIN_S * 1e9)
    plan = [(step * i, k, i) for i in range(warm) for k in range(most)]
    began, sent = step * warm + period, [warm] * most
    for j, size in enumerate(sizes):
        for k in range(size):
            plan.append((began + period * j, k, sent[k]))
            sent[k] += 1
    with Generator(server["ingest"], load, Faults()) as made:
        made.open()
        outcome = made.run(plan)
    bursts: dict[int, list[Stamps]] = {}
    for stamps in outcome.stamps:
        bursts.setdefault(stamps.intended, []).append(stamps)
    spans: dict[int, list[float]] = {}
    for came in bursts.values():
        span = max(s.published for s in came) - min(s.received for s in came)
        spans.setdefault(len(came), []).append(span / 1e9)
    alone = [came[0] for came in bursts.values() if len(came) == 1]
    ways = [s.received - s.intended + s.arrived - s.published for s in alone]
    found = {k: np.array(v) for k, v in spans.items() if k in BURSTS and len(v) >= DRAWS // 2}
    return found, np.array(ways) / 1e9


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
        _, few_us = _fed(server, FEW, SECONDS / 2, warm)
        spans, ways = _bursts(server, warm)
        batches = Batches(spans, ways)
        loaded = [
            _compared(name, load, max(1, round(load * batches.streams)), batches, server, warm)
            for load in LOADS
        ]
        kept_up = [r["streams"] for r in loaded if r["late_share"] < 0.01 and not r["shed"]]
        most = max(kept_up, default=int(LOADS[0] * batches.streams))
        found.append(
            row(
                "capacity",
                name,
                **about,
                core_us_a_bin=few_us,
                core_us_a_bin_most=loaded[-1]["core_us_a_bin"],
                streams_a_core=most,
                bytes_s_a_stream=_bytes(server, size),
                batch_ms={str(k): _quantiles(v) for k, v in sorted(spans.items())},
            )
        )
        found += loaded
    print(*found, sep="\n", file=sys.stderr)
    return found


def _quantiles(seconds: NDArray[np.float64]) -> list[float]:
    """Milliseconds of the 10th, 50th, 90th and 99th percentile."""
    return [round(float(q) * 1e3, 3) for q in np.percentile(seconds, (10, 50, 90, 99))]


def _compared(
    name: str, load: float, streams: int, batches: Batches, server: Row, warm: int
) -> Row:
    """Latency as it was measured, and as the queue has it."""
    fed, cpu_us = _fed(server, streams, SECONDS, warm)
    measured = np.array(fed.latency_ms()["latency"])
    model = np.concatenate([simulated(streams, batches, seed=seed) for seed in range(3)]) * 1e3
    report = fed.to_json()
    percentiles = (50, 90, 99)
    return row(
        "queue",
        name,
        share=load,
        streams=streams,
        bins=int(measured.size),
        core_us_a_bin=cpu_us,
        busy=round(cpu_us * 1e-6 * streams / BIN_S, 3),
        bins_a_step=report["bins_per_step"],
        late_share=round(fed.first_statuses.get("late", 0) / max(1, fed.first), 4),
        shed=fed.shed,
        unanswered=fed.unanswered,
        generator_late_p99_ms=report["sent_late_ms"].get("p99"),
        **{f"measured_p{q}_ms": _at(measured, q) for q in percentiles},
        **{f"model_p{q}_ms": _at(model, q) for q in percentiles},
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
