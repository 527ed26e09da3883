"""Bins lost, repeated, out of order, jittered and held back: a real service process on loopback.

Every bin is answered once under a revision, and the newest answers are, bit for bit, those of an
offline run in order with the same bins missing. CHAOS=full runs more and longer.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from feeder import UNITS, numbers
from ilqr_clients.load import Generator, LoadResult
from ilqr_clients.load_schedule import Faults, LoadSize, counts_of
from ilqr_vae.protocol import messages
from process import Served, offline, served
from rig import make_model

pytestmark = pytest.mark.chaos
FULL = os.environ.get("CHAOS") == "full"
BINS = 2000 if FULL else 150


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "m.safetensors"
    return make_model(path, n_units=7, names=UNITS, horizon=10)


@pytest.fixture(scope="module")
def service(model_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("service")
    # room for what a busy machine holds up, so that nothing is shed where nothing should be
    (folder / "s.toml").write_text("credits = 1000\n")
    with served(model_file, folder / "log", "--config", str(folder / "s.toml")) as running:
        yield running
        assert running.stop() == 0


def drive(service: Served, name: str, load: LoadSize, faults: Faults) -> LoadResult:
    with Generator(service.ingest, load, faults, prefix=name, keep=True) as generator:
        generator.open()
        return generator.run()


def held_against_offline(outcome: LoadResult, load: LoadSize, faults: Faults, model: Path) -> None:
    """Every index answered, none twice under a revision, flags and numbers right."""
    assert outcome.repeated == outcome.unanswered == 0
    lost = 0
    for k, (name, results) in enumerate(sorted(outcome.results.items())):
        newest = max(results)
        assert sorted(results) == list(range(newest + 1))
        sent = outcome.sends[name]
        came = np.array([results[i].status != "missing" for i in range(newest + 1)])
        assert not {i for i in range(newest + 1) if came[i]} - sent
        lost += len(sent) - int(came.sum())
        counts = counts_of(load, faults, k, len(UNITS))[: newest + 1]
        observed = np.repeat(came[:, None], len(UNITS), axis=1)
        for i, expected in enumerate(offline(model, counts, observed)):
            np.testing.assert_array_equal(numbers(results[i]), expected)
    # whatever was sent and has no answer of its own was refused as too late, and counted
    assert outcome.refused["late"] == lost
    assert set(outcome.refused) <= {"late", "index"}


@pytest.mark.parametrize(
    "faults",
    [
        Faults(drop=0.01),
        Faults(drop=0.1),
        Faults(drop=0.3),
        Faults(duplicate=0.2),
        Faults(reorder=5),
        Faults(jitter=3.0),
        Faults(drop=0.1, duplicate=0.1, reorder=5, jitter=1.0, seed=1),
    ],
    ids=["loss-1%", "loss-10%", "loss-30%", "duplicates", "reordering", "jitter", "all"],
)
def test_faults_on_the_way(
    service: Served, model_file: Path, faults: Faults, request: pytest.FixtureRequest
) -> None:
    load = LoadSize(sessions=2, bins=BINS, speed=10.0, deadline=60.0, patience=20.0)
    name = "f" + "".join(c for c in request.node.name if c.isalnum())
    outcome = drive(service, name, load, faults)
    held_against_offline(outcome, load, faults, model_file)
    duplicates = outcome.refused["index"]
    assert (duplicates > 0) == (faults.duplicate > 0)
    if faults.reorder or faults.jitter > 1:
        assert outcome.revised > 0
    if faults.reorder == 5 and not faults.jitter:
        assert outcome.refused["late"] == 0
        assert set(outcome.statuses) == {"ok"}


def test_a_clocked_stream_that_stalls_and_bursts(service: Served, model_file: Path) -> None:
    """Answered as missing while it stalls, and corrected afterwards."""
    stall = 5.0 if FULL else 1.0
    load = LoadSize(bins=round(2 * stall / 0.05), deadline=60.0, clocked=True, patience=20.0)
    faults = Faults(stall=stall)
    outcome = drive(service, "stall", load, faults)
    held_against_offline(outcome, load, faults, model_file)
    assert outcome.first_statuses["missing"] >= 0.5 * stall / 0.05
    assert outcome.revised > 0
    assert outcome.refused["late"] == 0


def test_overload_sheds_by_policy_and_recovers(service: Served, model_file: Path) -> None:
    """Several times what can be solved; refusals and resets are counted, and the next session
    is served as ever."""
    bins = 60_000 if FULL else 8_000
    load = LoadSize(sessions=4, bins=bins, speed=4000.0, patience=30.0)
    outcome = drive(service, "flood", load, Faults())
    assert outcome.repeated == 0
    assert outcome.refused["credits"] > 0
    assert outcome.first + outcome.refused["credits"] >= outcome.sent
    after = LoadSize(bins=40, speed=2.0, deadline=60.0, patience=20.0)
    quiet = drive(service, "after", after, Faults())
    assert quiet.statuses == {"ok": 40}
    held_against_offline(quiet, after, Faults(), model_file)


def test_wire_defaults_are_additive() -> None:
    """A feeder that knows none of the newer options opens as it did."""
    old = {
        "type": "open",
        "protocol": 1,
        "session": "s",
        "units": ["a"],
        "bin_width_ns": 1,
        "deadline_ns": 0,
    }
    message = messages.decode_upstream(msgspec.msgpack.encode(old))
    assert isinstance(message, messages.Open)
    assert (message.clocked, message.resume, message.watch_units) == (False, False, False)
