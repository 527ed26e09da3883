"""What holds for every test: one torch thread, so that no test depends on the number of cores.

Shape checking of the library under pytest is switched on in pyproject.toml (``addopts``).
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from feeder import UNITS, Feeder, bin_, open_, spikes
from ilqr_service.server import Service
from ilqr_vae.artifact import GroupSpec, ModelSpec, build
from ilqr_vae.protocol import messages
from ilqr_vae.streaming.horizon import HorizonConfig, MovingHorizon
from ray_rig import two_nodes
from rig import make_model, serving

torch.set_num_threads(1)

# A shell that runs the tests in the background has SIGINT ignored, and programs started by them
# would inherit that; a handler of our own they do not inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Compile the kernels before the first test, so that no test's time limit includes it.

    numba keeps what it compiled beside the sources: the child processes of the tests find it there.
    """
    del session
    for dtype in (torch.float32, torch.float64):
        spec = ModelSpec(
            dynamics="mgu2",
            latents=3,
            inputs=2,
            groups={"spikes": GroupSpec(family="poisson", channels=4)},
        )
        model = build(spec).to(dtype)
        ones = torch.ones(4, dtype=dtype)
        estimator = MovingHorizon(model, None, ones, HorizonConfig(horizon=2))
        state = estimator.init(2)
        for _ in range(3):
            state, _ = estimator.step(state, ones.expand(2, 4), ones.expand(2, 4))
        estimator.predict_only(state, ones.expand(2, 4), ones.expand(2, 4))


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A Ray cluster of two nodes, which this process is connected to.

    Not for the whole run: other tests look for processes that are left behind.
    """
    with two_nodes() as cluster:
        yield cluster


@pytest.fixture
def ray_cluster(nodes: Any) -> str:
    """Its address."""
    return str(nodes.address)


@pytest.fixture
def no_orphans() -> Iterator[None]:
    """Whatever a test does, its processes are gone when it ends."""
    before = set(psutil.Process().children(recursive=True))  # multiprocessing's tracker, say
    yield
    left = set(psutil.Process().children(recursive=True)) - before
    assert [p.cmdline() for p in left if p.status() != psutil.STATUS_ZOMBIE] == []


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "m.safetensors", n_units=7, names=UNITS)


@pytest.fixture(scope="module")
def service(model_file: Path) -> Iterator[Service]:
    with serving(model_file, credits=200, gap_limit=20, http="127.0.0.1:0") as running:
        yield running
    assert running.failure is None


@pytest.fixture
def feeder(service: Service) -> Iterator[Feeder]:
    with Feeder(service.ingest, service.results) as f:
        yield f


@pytest.fixture
def left_open(model_file: Path, tmp_path: Path) -> tuple[Path, list[messages.Result]]:
    """A journal copied while its session is open, and the answers given."""
    with (
        serving(model_file, journal=str(tmp_path / "live"), snapshot_every=8) as service,
        Feeder(service.ingest, service.results) as feeder,
    ):
        feeder.subscribe("s")
        feeder.ask(open_("s"), messages.Opened)
        feeder.send(*(bin_("s", i, x) for i, x in enumerate(spikes(30))))
        results = feeder.results(30)
        feeder.ask(messages.Describe(), messages.Described)
        shutil.copytree(tmp_path / "live", tmp_path / "copy")
    return tmp_path / "copy", results
