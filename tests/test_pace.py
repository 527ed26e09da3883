"""The time left of a training run: what is left to do is counted, what it costs is measured."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from benchmarks import time_left

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
    planned = planned_passes(data, CONFIG, thorough=thorough)
    assert passes == [bins for _, bins, _ in planned]
    assert {what for what, _ in bars.full if what.startswith("latents")} == {p[0] for p in planned}
    layers = {what for what, _ in bars.full if what.startswith("readout")}
    known = {"readout, hidden", "readout, recurrent"}
    assert layers <= known
    assert layers == (known if thorough else set())


class Hours:
    """A clock that stands still until it is told how much has passed."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += seconds


def stepped(pace: Pace, clock: Hours, count: int, seconds: float = 1.0) -> None:
    for _ in range(count):
        with pace.step():
            clock.pass_(seconds)


def test_what_is_left_is_steps_validations_and_the_end(made: tuple[Model, Prepared]) -> None:
    model, data = made
    clock = Hours()
    pace = Pace(model, data, CONFIG, clock=clock)  # nothing costs anything yet
    assert math.isnan(pace.left(0))  # not known before a step was timed
    every, steps = CONFIG.training.validate_every, CONFIG.training.steps
    stepped(pace, clock, every)
    before = pace.left(every)  # the validation of this step is still to come
    with pace.validation(SILENT) as progress:
        for what, bins, _ in planned_passes(data, CONFIG, thorough=False):
            for done in range(1, bins + 1):
                clock.pass_(0.5)
                progress(what, done, bins)
        clock.pass_(3.0)  # the linear map
    passes = sum(0.5 * bins for _, bins, _ in planned_passes(data, CONFIG, thorough=False))
    end = pace.left(steps)
    assert end == pytest.approx(
        3.0 * (1 + len(CONFIG.readout.lost))
    )  # passes were found to cost nothing: no ratio to scale by
    ahead = steps // every - 1
    assert pace.left(every) - end == pytest.approx(steps - every + ahead * (passes + 3.0))
    assert before == pytest.approx(steps - every)


def test_early_steps_are_forgotten_by_and_by(made: tuple[Model, Prepared]) -> None:
    model, data = made
    config: TrainConfig = tiny.config(validate_every=0, steps=1000)
    clock = Hours()
    pace = Pace(model, data, config, clock=clock)
    stepped(pace, clock, 101, 4.0)
    assert pace.left(1000 - 1) - pace.left(1000) == pytest.approx(4.0)
    stepped(pace, clock, 100, 1.0)
    assert pace.left(1000 - 1) - pace.left(1000) == pytest.approx(1.0)  # the newest half


def test_the_end_counts_down_by_what_its_parts_take(made: tuple[Model, Prepared]) -> None:
    model, data = made
    clock, told, bars = Hours(), list[float](), tiny.Recorder()
    pace = Pace(model, data, CONFIG, clock=clock)
    progress = pace.final(bars, told.append)
    planned = planned_passes(data, CONFIG, thorough=True)
    for what, bins, _ in planned:
        for done in range(1, bins + 1):
            clock.pass_(2.0)
            progress(what, done, bins)
    first = planned[0][1]
    # each pass turns out to take two seconds a bin, once some of its bins are done
    assert told[first - 2] == pytest.approx(2.0)
    assert told[-1] == 0.0
    progress("readout, hidden", 1, CONFIG.readout.steps)
    assert any("readout, hidden: about" in line and "left in all" in line for line in bars.lines)


def test_costs_grow_with_the_streams() -> None:
    costs = Costs(bin=0.1, stream=0.01)
    assert costs.of_pass(10, 1) == pytest.approx(10 * 0.11)
    assert costs.of_pass(5, 4) == pytest.approx(5 * 0.14)
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
    train(settings, path, tmp_path / "m.safetensors", bars, log_dir=tmp_path / "log")
    told = [line.partition(":")[0] for line in bars.lines if "left in all" in line]
    assert told[:4] == ["step 3", "step 6", "step 9", "step 12"]
    assert all(line.startswith("readout, ") for line in told[4:])
    found = time_left.told(tmp_path / "log")
    assert [one.at for one in found[:3]] == [f"{k} % of the steps" for k in (25, 50, 75)]
    assert all(one.took > 0 for one in found)
