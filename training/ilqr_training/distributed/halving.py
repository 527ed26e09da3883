"""Early stopping that survives a restart of its driver."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from ray.tune.schedulers import ASHAScheduler


class Halving(ASHAScheduler):
    """Asynchronous successive halving that remembers what trials reported before a crash.

    Ray Tune restores trials but restarts their scheduler: a resumed trial would not be compared
    with earlier ones, and a poor one would run on. So the reports in the trials' files are read
    when the first trial is added.

    Args:
        trials: folder of the trials, each with its reports in ``result.json``.
        settings: settings of ``ASHAScheduler``.
    """

    def __init__(self, trials: Path, **settings: Any) -> None:
        super().__init__(**settings)
        self._trials, self._read = trials, False

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)
        if not self._read:
            self._read = True
            sign = self._metric_op or 1.0
            for report in _reports(self._trials):
                named: Any = report
                self._brackets[0].on_result(named, report.validation, sign * report.score)

    @property
    def recorded(self) -> dict[int, list[float]]:
        """Return the scores that trials are compared with, by the number of validations."""
        sign, bracket = self._metric_op or 1.0, self._brackets[0]
        rungs: Any = bracket._rungs  # pyright: ignore[reportPrivateUsage]
        return {int(at): sorted(sign * s for s in scores.values()) for at, scores in rungs}


class _Report(NamedTuple):
    """A report, with the field names that the scheduler expects."""

    trial_id: str
    validation: int
    score: float


def _reports(trials: Path) -> list[_Report]:
    """Return the reports of a trial; an incomplete line is skipped."""
    found: list[_Report] = []
    for file in sorted(trials.glob("*/result.json")):
        for line in file.read_text(errors="replace").splitlines():
            try:
                values = json.loads(line)
                report = _Report(values["trial_id"], values["validation"], values["score"])
            except (ValueError, KeyError):
                continue
            found.append(report)
    return found
