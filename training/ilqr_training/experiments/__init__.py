"""The paper's experiments on simulated data: one settings class and one ``run`` each.

``run(settings, seed, progress) -> ExperimentResult``. The names are those of ``ilqr-vae experiment
NAME``. The module of an experiment is imported only when it is needed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec

from ilqr_training.experiments.driver import ExperimentResult
from ilqr_vae.errors import ConfigError
from ilqr_vae.progress import Progress

Run = Callable[[Any, int, Progress], ExperimentResult]

_WHERE = {
    "autonomous-linear": ("linear", "AutonomousConfig", "autonomous"),
    "lorenz": ("oscillators", "LorenzConfig", "lorenz"),
    "sparse-inputs": ("linear", "SparseConfig", "sparse"),
    "duffing": ("oscillators", "DuffingConfig", "duffing"),
    "inference-gap": ("gap", "GapConfig", "inference_gap"),
    "long-trial": ("inference", "LongConfig", "long_trial"),
    "missing-data": ("inference", "MissingConfig", "missing_data"),
    "maze-size": ("maze", "MazeConfig", "maze_size"),
}

SUMMARIES = {
    "autonomous-linear": "Fit a linear system that runs without inputs.",
    "lorenz": "Infer and forecast trials of a Lorenz system.",
    "sparse-inputs": "Recover sparse inputs into a linear system.",
    "duffing": "Infer rates of units that a Duffing oscillator drives.",
    "inference-gap": "Compare the inference gap with an encoder's.",
    "long-trial": "Train on short chunks, infer on one long trial.",
    "missing-data": "Impute missing bins and units.",
    "maze-size": "Time gradient steps at the size of MC_Maze.",
}
"""One sentence for each; docs/experiments.md has the details."""

NAMES = tuple(_WHERE)
"""Names in the order of the results table."""


class Experiment(NamedTuple):
    """An experiment: the class of its settings, and the function that runs it."""

    settings: type[msgspec.Struct]
    run: Run


def find(name: str) -> Experiment:
    """Return the experiment of that name. Raises ConfigError if there is none."""
    if name not in _WHERE:
        raise ConfigError("experiment", expected=f"one of {', '.join(NAMES)}", got=repr(name))
    module, settings, run = _WHERE[name]
    home = importlib.import_module(f"{__name__}.{module}")
    return Experiment(getattr(home, settings), getattr(home, run))
