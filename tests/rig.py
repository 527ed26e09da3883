"""A tiny served model and recordings to stream through it, for the clients' tests."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from scipy import io

from ilqr_clients.answer import Answer
from ilqr_clients.connection import model_of
from ilqr_clients.sdk import ServiceClient
from ilqr_service.journal.writer import Copy
from ilqr_service.server import Service
from ilqr_service.settings import ServiceSettings
from ilqr_service.solving.engine import Engine
from ilqr_vae.artifact import Artifact, GroupSpec, Manifest, ModelSpec, build, save_artifact
from ilqr_vae.model.classes import ClassReadout
from ilqr_vae.model.generative import Model
from ilqr_vae.model.readout import KinematicReadout, ReadoutShape
from ilqr_vae.recordings import MatSpec, RecordingSpec, SplitSpec
from ilqr_vae.streaming.horizon import HorizonConfig

BIN_S = 0.05
N_BINS = 400
SPLIT = SplitSpec(train=0.5, validation=0.7)


def spec(*, kinematics: bool = True, trials: bool = False) -> RecordingSpec:
    """How to read what ``write_recording`` writes."""
    mat = MatSpec(spikes="spikes")
    if kinematics:
        mat = MatSpec(
            spikes="spikes",
            kinematics="velocity",
            kinematic_names=("vx", "vy"),
            kinematic_units=("m/s", "m/s"),
        )
    if trials:
        names = {"trial_starts": "starts", "trial_stops": "stops", "trial_conditions": "sides"}
        mat = msgspec.structs.replace(mat, **names)
    return RecordingSpec(bin_width=BIN_S, mat=mat, split=SPLIT)


def write_recording(path: Path, *, n_units: int, seed: int = 0) -> Path:
    """A MAT file of ``N_BINS`` bins: velocity in the plane and units tuned to it."""
    rng = np.random.default_rng(seed)
    phase = np.arange(N_BINS) * BIN_S * 2 * np.pi
    velocity = 0.2 * np.stack([np.cos(0.31 * phase), np.sin(0.47 * phase)])
    rates = np.exp(-0.5 + rng.normal(size=(n_units, 2)) @ velocity * 4)
    starts = np.arange(1, N_BINS, 16)  # one-based; trials of 14 bins
    sides = np.where(velocity[0, starts + 6] > 0, "right", "left").astype(object)
    trials = {"starts": starts, "stops": starts + 13, "sides": sides}
    io.savemat(path, {"spikes": rng.poisson(rates), "velocity": velocity, **trials})
    return path


def make_model(
    path: Path,
    *,
    n_units: int,
    kinematics: bool = True,
    names: tuple[str, ...] | None = None,
    seed: int = 0,
    horizon: int = 5,
    bin_width: float = BIN_S,
    kinematic_unit: str = "m/s",
    members: int = 1,
    classes: tuple[str, ...] = (),
    later: int = 0,
) -> Path:
    """A tiny model file that was never trained but answers: 4 latents."""
    shapes = ModelSpec(
        dynamics="mgu2",
        latents=4,
        inputs=2,
        groups={"spikes": GroupSpec(family="poisson", channels=n_units)},
    )
    shape = ReadoutShape(lags=later, later=later)
    made: list[tuple[Model, KinematicReadout | None]] = []
    for member in range(members):
        with torch.random.fork_rng():
            torch.manual_seed(seed + 100 * member)
            model = build(shapes)
            readout = None
            if kinematics:
                readout = KinematicReadout(4, 2, shape, units=n_units)
                readout.W = torch.randn(2, 4 * (later + 1), dtype=torch.float64) * 0.1
                if later:
                    readout.later_maps.normal_()
                    readout.later_scales.uniform_(0.5, 0.9)
        made.append((model, readout))
    manifest = Manifest(
        bin_width=bin_width,
        unit_names=names or tuple(f"unit{i}" for i in range(n_units)),
        kinematic_names=("vx", "vy") if kinematics else (),
        kinematic_units=(kinematic_unit,) * 2 if kinematics else (),
        data=msgspec.structs.replace(spec(kinematics=kinematics), bin_width=bin_width),
        horizon=HorizonConfig(horizon=horizon, iterations=2),
        model=shapes,
        readout=shape if kinematics else None,
        classes=classes or msgspec.UNSET,
    )
    discrete = None
    if classes:
        W = np.random.default_rng(seed).normal(size=(len(classes), 4 * (later + 1))) * 3
        discrete = ClassReadout(torch.as_tensor(W), torch.zeros(len(classes)).double())
    rate = torch.ones(n_units, dtype=torch.float64)
    others = [Artifact(manifest, *one, rate) for one in made[1:]]
    save_artifact(path, manifest, *made[0], rate, others=others, classes=discrete)
    return path


@contextmanager
def serving(
    model: Path,
    *,
    extra: dict[str, Path] | None = None,
    copy: Copy | None = None,
    **settings: object,
) -> Iterator[Service]:
    """The real service on free ports, warm; ``extra`` are further slots; ``copy`` its journal's."""
    options = ServiceSettings(
        **(
            {
                "ingest": "tcp://127.0.0.1:*",
                "results": "tcp://127.0.0.1:*",
                "http": "",
                "device": "cpu",
                "control_rate": 1e9,  # tests ask without pause until something is so
            }
            | settings
        )  # pyright: ignore[reportArgumentType]  # a mapping of settings by name
    )
    more = {name: Engine.load(path, options) for name, path in (extra or {}).items()}
    engine = Engine.load(model, options)
    service = Service(engine, options, more=more, folder=model.parent, copy=copy)
    service.start()
    try:
        assert service.wait_ready(120)
        yield service
    finally:
        service.stop()


def until(what: str, true: Callable[[], Any]) -> None:
    """Wait for what nothing announces. Fails, saying ``what`` did not come, after a minute."""
    end = time.monotonic() + 60.0
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.005)


def through_sdk(service: Service, name: str, bins: dict[int, Any]) -> dict[int, Answer]:
    """The answers to these bins sent with the SDK, by index; those not there are missing."""
    with ServiceClient(service.ingest) as client:
        model = model_of(client.describe())
        options: dict[str, Any] = {"units": model.unit_names, "bin_width": model.bin_width}
        answers: dict[int, Answer] = {}
        with client.open(name, deadline=60.0, **options) as session:
            for index in sorted(bins):
                while session.credits <= 0:
                    answers |= {a.index: a for a in session.receive(60.0)}
                session.send(index, bins[index])
            while max(bins) not in answers:
                answers |= {a.index: a for a in session.receive(60.0)}
    return answers
