"""The live table of a sweep."""

from __future__ import annotations

from typing import Any

from ray.tune import Callback
from rich.live import Live
from rich.text import Text

from ilqr_vae.report.table import Table, lines_of_table, number, width_of
from ilqr_vae.terminal import console, visible


class LiveTable(Callback):
    """Show a live table of the trials in a terminal; elsewhere print a line as each one ends.

    Ray Tune pickles this callback, so the display is created only when the sweep begins.
    """

    def __init__(self, keys: tuple[str, ...]) -> None:
        self._keys = keys
        self._live: Live | None = None
        self._screen = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_live": None, "_screen": None}

    def setup(
        self,
        stop: Any = None,
        num_samples: int | None = None,
        total_num_samples: int | None = None,
        **_: Any,
    ) -> None:
        self._screen = console(stderr=True, soft_wrap=True)
        if self._screen.is_terminal:
            self._live = Live(console=self._screen, transient=True, refresh_per_second=4)
            self._live.start()

    def on_step_end(self, iteration: int, trials: list[Any], **_: Any) -> None:
        if self._live is not None and self._screen is not None:
            lines = lines_of_table(self._table(trials), width_of(self._screen))
            self._live.update(Text("\n".join(map(visible, lines))))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._say(trials, trial, "")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._say(trials, trial, " failed")

    def on_experiment_end(self, trials: list[Any], **_: Any) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _say(self, trials: list[Any], trial: Any, how: str) -> None:
        if self._screen is not None and self._live is None:
            point = ", ".join(f"{k} = {trial.config.get(k)}" for k in self._keys)
            score = number(trial.last_result.get("score"))
            self._screen.print(f"trial {trials.index(trial) + 1}{how}: {point}: {score}")

    def _table(self, trials: list[Any]) -> Table:
        rows = tuple(
            (
                str(k),
                str(trial.status).lower(),
                *(_short(trial.config.get(key)) for key in self._keys),
                str(trial.last_result.get("validation", "–")),
                number(trial.last_result.get("score")),
            )
            for k, trial in enumerate(trials, 1)
        )
        return Table("Trials", "", ("trial", "state", *self._keys, "validations", "score"), rows, 2)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
