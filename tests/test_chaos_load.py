"""Too much load, subscribers that do not read, and many models: a real service process.

CHAOS=full runs more and longer.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import zmq

from feeder import UNITS, Feeder, bin_, numbers, open_
from ilqr_clients.load import Generator, LoadResult, quantiles
from ilqr_clients.load_schedule import Faults, LoadSize
from ilqr_service.journal.verify import verify
from ilqr_vae.artifact import GroupSpec, Manifest, ModelSpec, build, save_artifact
from ilqr_vae.protocol import messages
from ilqr_vae.streaming.horizon import HorizonConfig
from process import Served, offline, served
from rig import BIN_S, make_model, spec

pytestmark = pytest.mark.chaos
FULL = os.environ.get("CHAOS") == "full"
QUEUE = 500
H = 10


def load(service: Served, name: str, how: LoadSize) -> LoadResult:
    with Generator(service.ingest, how, Faults(), prefix=name, keep=True) as generator:
        generator.open()
        return generator.run()


# ---- subscribers that stop reading -------------------------------------------------------------


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Served, Served]]:
    """Two services alike."""
    # many units, so that the answers soon fill the kernel's buffers too
    model = make_model(tmp_path / "m.safetensors", n_units=400, horizon=H)
    (tmp_path / "s.toml").write_text(f"results_queue = {QUEUE}\ncredits = 1000\n")
    options = ("--config", str(tmp_path / "s.toml"))
    with (
        served(model, tmp_path / "log", *options) as one,
        served(model, tmp_path / "log", *options) as other,
    ):
        yield one, other
        assert one.stop() == other.stop() == 0


def test_subscribers_that_stop_reading_cost_the_others_nothing(pair: tuple[Served, Served]) -> None:
    """p99 of a service with such subscribers over that of one without, in turns.

    Of each the lower quartile over many short stretches: on a machine that is busy with other
    things too, the p99 of the other stretches is how long it stalled.
    """
    plain, beset = pair
    how = LoadSize(sessions=4, bins=500 if FULL else 60, speed=10.0, deadline=60.0, patience=20.0)
    fill = LoadSize(sessions=4, bins=500, speed=40.0, deadline=60.0, patience=20.0)
    process = psutil.Process(beset.process.pid)
    p99: dict[str, list[float]] = {"plain": [], "beset": []}
    memory: list[int] = []
    context: zmq.Context[Any] = zmq.Context()
    try:
        deaf = [context.socket(zmq.SUB) for _ in range(3)]
        for one in deaf:
            one.rcvhwm = 1
            one.setsockopt(zmq.RCVBUF, 4096)
            one.connect(beset.results)
            one.setsockopt(zmq.SUBSCRIBE, b"")
        filling = load(beset, "fill", fill)  # all queues on the way to them
        for turn in range(30 if FULL else 12):
            for name, service in (("plain", plain), ("beset", beset)):
                outcome = load(service, f"turn{turn}", how)
                assert outcome.unanswered == outcome.repeated == 0
                assert outcome.statuses == {"ok": how.sessions * how.bins}
                p99[name].append(quantiles(outcome.latency_ms()["latency"])["p99"])
            memory.append(process.memory_info().rss >> 20)
        held = 0  # what reached a deaf one all the same, in queues on the way
        while deaf[0].poll(300):
            deaf[0].recv_multipart()
            held += 1
    finally:
        context.destroy(linger=0)
    # its queue was full before the first turn, and what came then was dropped
    assert held < filling.first + how.sessions * how.bins
    with_, without = (float(np.quantile(p99[name], 0.25)) for name in ("beset", "plain"))
    print(f"p99 with {with_:.2f}, without {without:.2f} ms of {p99}; memory {memory} MB")
    assert with_ < 1.5 * without, p99
    assert memory[-1] <= memory[0] + (16 if FULL else 8), memory


# ---- overload ----------------------------------------------------------------------------------

SESSIONS = 8
DEADLINE = 0.02
NOW = 50_000_000
"""Nanoseconds that the generator waits before a plan."""
SOLVED = ("ok", "degraded", "late", "missing")


def heavy(path: Path) -> Path:
    """A model whose solves take milliseconds, so that more than can be solved can be sent."""
    units = 200
    shapes = ModelSpec(
        dynamics="mgu2",
        latents=64,
        inputs=16,
        groups={"spikes": GroupSpec(family="poisson", channels=units)},
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build(shapes)
    manifest = Manifest(
        bin_width=BIN_S,
        unit_names=tuple(f"unit{i}" for i in range(units)),
        data=spec(kinematics=False),
        horizon=HorizonConfig(horizon=H, iterations=2),
        model=shapes,
    )
    save_artifact(path, manifest, model, None, torch.ones(units, dtype=torch.float64))
    return path


@pytest.mark.parametrize("anytime", [True, False] if FULL else [True])
def test_overload_is_shed_by_policy_and_over_within_a_window(tmp_path: Path, anytime: bool) -> None:
    """Four bins for each that is solved, which is too many for any machine; then each bin when the
    one before it is answered, which is never too many.

    How soon it is over in time, on a machine of its own, is in ``test_overload.py``.
    """
    model, journal, config = heavy(tmp_path / "m.safetensors"), tmp_path / "journal", tmp_path / "s"
    # so that even a machine that stands still for a while leaves no gap too long to answer
    config.write_text("gap_limit = 5000\ncredits = 5000\n")
    options = ("--journal", str(journal), "--config", str(config))
    flood, calm = (2000 if FULL else 200), (3 if FULL else 2) * H
    how = LoadSize(
        sessions=SESSIONS, bins=flood + calm, deadline=DEADLINE, anytime=anytime, patience=60.0
    )
    with (
        served(model, tmp_path / "log", *options) as service,
        Generator(service.ingest, how, Faults(), prefix="flood", keep=True) as generator,
    ):
        generator.open()
        sent = 0
        while sent < flood:
            results = [r for each in generator.outcome.results.values() for r in each.values()]
            solved = sum(r.solver != "shed" and r.status != "missing" for r in results)
            upto = min(flood, 48 + 4 * solved // SESSIONS)
            plan = [(-NOW, k, index) for index in range(sent, upto) for k in range(SESSIONS)]
            generator.send(plan, settle=0.01)
            sent = upto
        for index in range(flood, flood + calm - 1):
            # bins beyond their credits are refused, and answered when the next one comes: the
            # first of these may be, while the flood is being dealt with
            patience = 2.0 if index == flood else 60.0
            generator.send([(0, k, index) for k in range(SESSIONS)], settle=patience)
        outcome = generator.run([(0, k, flood + calm - 1) for k in range(SESSIONS)])
        assert service.stop() == 0
    assert outcome.repeated == outcome.unanswered == 0
    # where all stood still for longer than the credits last, bins are refused, and so missing
    assert set(outcome.refused) <= {"credits"}
    after = Counter[str]()
    for results in outcome.results.values():
        assert sorted(results) == list(range(flood + calm))  # every bin, by index
        for index, result in results.items():
            flagged = {"extrapolated", "missing"} if result.solver == "shed" else set(SOLVED)
            assert result.status in flagged
            if index >= flood + H:  # a window after the load fell
                after[result.status] += 1
    flags = Counter(r.status for results in outcome.results.values() for r in results.values())
    print(f"{dict(flags)}; after a window {dict(after)}")
    # of what came within its credits; how much that is, the machine decides
    assert flags["extrapolated"] > 0.5 * (sum(flags.values()) - flags["missing"]) > 0, flags
    assert set(after) <= {"ok", "degraded", "late"}  # nothing is shed any more
    verdict = verify(journal, [model])  # shed again what was shed, solved again what was solved
    assert verdict.answers == verdict.identical > 0, verdict


# ---- many models -------------------------------------------------------------------------------


def test_models_of_different_units_and_bin_widths_at_once(tmp_path: Path) -> None:
    """Each session is answered by its own model, bit for bit, whatever runs beside it."""
    names = {"main": UNITS, "fine": tuple(f"f{i}" for i in range(12)), "coarse": ("a", "b", "c")}
    widths = {"main": 0.05, "fine": 0.01, "coarse": 0.1}
    models = {
        slot: make_model(
            tmp_path / f"{slot}.safetensors",
            n_units=len(units),
            names=units,
            seed=k,
            horizon=4 + 3 * k,
            bin_width=widths[slot],
        )
        for k, (slot, units) in enumerate(names.items())
    }
    n_bins = 400 if FULL else 40
    counts = {
        (slot, k): np.random.default_rng(k).poisson(1.0, (n_bins, len(units)))
        for slot, units in names.items()
        for k in range(3)
    }
    slots = [f"{slot}={path}" for slot, path in models.items() if slot != "main"]
    options = [part for slot in slots for part in ("--slot", slot)]
    got: dict[str, dict[int, messages.Result]] = {}
    with (
        served(models["main"], tmp_path / "log", *options) as service,
        Feeder(service.ingest, service.results) as feeder,
    ):
        for slot, k in counts:
            name = f"{slot}-{k}"
            got[name] = {}
            feeder.subscribe(name)
            about = {"units": names[slot], "bin_width_ns": round(widths[slot] * 1e9)}
            feeder.ask(open_(name, model="" if slot == "main" else slot, **about), messages.Opened)
        wrong = open_("wrong", units=names["main"], model="fine")
        assert feeder.ask(wrong, messages.Refused).field in {"bin_width_ns", "units"}
        for first in range(0, n_bins, 20):
            for index in range(first, first + 20):
                for (slot, k), rows in counts.items():
                    feeder.send(bin_(f"{slot}-{k}", index, rows[index]))
            for result in feeder.results(20 * len(counts)):
                assert result.index not in got[result.session]
                got[result.session][result.index] = result
        assert service.stop() == 0
    for (slot, k), rows in counts.items():
        results = got[f"{slot}-{k}"]
        expected = offline(models[slot], rows, np.ones(rows.shape, dtype=bool))
        for index in range(n_bins):
            np.testing.assert_array_equal(numbers(results[index]), expected[index])
        assert {r.status for r in results.values()} == {"ok"}
