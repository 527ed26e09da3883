"""The time left of a training run: what is left to do is counted, what it costs is measured."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

import tiny
from ilqr_training.config import TrainConfig
from ilqr_training.fit.build import build_model
from ilqr_training.fit.crops import Prepared, prepare
from ilqr_training.fit.pace import Costs, Pace
from ilqr_training.fit.train import train
from ilqr_training.fit.validate import planned_passes, validate
from ilqr_vae.model.generative import Model
from ilqr_vae.progress import SILENT, duration
from ilqr_vae.recordings import load_recording
from rig import write_recording

CONFIG = tiny.config()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Prepared]:
    path = write_recording(tmp_path_factory.mktemp("pace") / "r.mat", n_units=6)
    data = prepare(load_recording(path, CONFIG.data), CONFIG.data, chunk=CONFIG.training.chunk)
    return build_model(CONFIG.model, data), data


class Counted(tiny.Recorder):
    """Keeps how many units each bar had, in the order in which they were full."""

    def __init__(self) -> None:
        super().__init__()
        self.full: list[tuple[str, int]] = []

    def __call__(
        self, what: str, done: int, of: int, note: str = "", left: float = math.nan
    ) -> None:
        super().__call__(what, done, of, note, left)
        if done == of:
            self.full.append((what, of))


@pytest.mark.parametrize("thorough", [False, True])
def test_the_passes_that_are_planned_are_those_that_are_made(
    made: tuple[Model, Prepared], thorough: bool
) -> None:
    model, data = made
    bars = Counted()
    validate(model, data, CONFIG, thorough=thorough, progress=bars)
    passes = [of for what, of in bars.full if what.startswith("latents")]
    assert passes == [bins for bins, _ in planned_passes(data, CONFIG, thorough=thorough)]
    layers = {what for what, _ in bars.full if what.startswith("readout")}
    known = {"readout, hidden", "readout, recurrent"}
    assert layers <= known
    assert layers == (known if thorough else set())


def ticking() -> Iterator[int]:
    return count()


def test_what_is_left_is_steps_validations_and_the_end(made: tuple[Model, Prepared]) -> None:
    model, data = made
    ticks = ticking()
    pace = Pace(model, data, CONFIG, clock=lambda: float(next(ticks)))  # everything takes a second
    assert pace.left(0) != pace.left(0)  # not known before a step was timed
    for _ in range(3):
        with pace.step():
            pass
    with pace.validation(SILENT):
        pass
    every, steps = CONFIG.training.validate_every, CONFIG.training.steps
    end = pace.left(steps)
    assert end > 0  # the thorough validation and the readout's fits
    assert pace.left(steps - 1) - end == pytest.approx(1 + 1)  # a step, and the last validation
    assert pace.left(steps - every) - pace.left(steps) == pytest.approx(every + 1)
    assert pace.left(0) - end == pytest.approx(steps + steps // every)


def test_costs_grow_with_the_streams() -> None:
    costs = Costs(bin=0.1, stream=0.01)
    assert costs.passes([(10, 1), (5, 4)]) == pytest.approx(10 * 0.11 + 5 * 0.14)
    assert [duration(s) for s in (4.4, 89, 150, 900, 7200)] == [
        "4 s",
        "89 s",
        "2.5 min",
        "15 min",
        "2.0 h",
    ]


def test_the_time_left_is_told_at_each_quarter(tmp_path: Path) -> None:
    path = write_recording(tmp_path / "r.mat", n_units=6)
    settings: TrainConfig = tiny.config(validate_every=0)
    bars = tiny.Recorder()
    train(settings, path, tmp_path / "m.safetensors", bars)
    told = [line.partition(":")[0] for line in bars.lines if "left in all" in line]
    assert told == ["step 3", "step 6", "step 9", "step 12"]
