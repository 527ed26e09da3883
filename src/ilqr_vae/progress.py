"""Progress of a long computation: one protocol, and the terminal's bar that shows it."""

from __future__ import annotations

import math
from typing import Protocol

from rich import progress as bars
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from ilqr_vae.terminal import console, visible


class Progress(Protocol):
    """Receives how far a computation is."""

    def __call__(
        self, what: str, done: int, of: int, note: str = "", left: float = math.nan
    ) -> None:
        """``done`` of ``of`` units of ``what`` are done.

        Args:
            note: the newest numbers.
            left: seconds until everything is done, where that is known better than from the units
                done so far.
        """
        ...

    def log(self, line: str) -> None:
        """A line to keep."""
        ...


class Silent:
    """Shows nothing."""

    def __call__(
        self, what: str, done: int, of: int, note: str = "", left: float = math.nan
    ) -> None: ...

    def log(self, line: str) -> None: ...


SILENT = Silent()


def duration(seconds: float) -> str:
    """A duration for people, to two figures or so."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


class _Left(bars.ProgressColumn):
    """The time that is left: as it was told, else as the speed so far suggests."""

    def render(self, task: bars.Task) -> Text:
        seconds = task.time_remaining if math.isnan(task.fields["left"]) else task.fields["left"]
        return Text("" if seconds is None else f"{duration(seconds)} left")


class Bar:
    """Shows progress in a terminal: a bar for each computation that is not done, lines above them.

    A context manager. Bars fit the terminal's width and disappear once their work is done.
    """

    def __init__(self, screen: Console | None = None) -> None:
        self.console = console(stderr=True) if screen is None else screen
        whole, cut = Column(no_wrap=True), Column(no_wrap=True, overflow="ellipsis", ratio=1)
        self._bars = bars.Progress(
            bars.TextColumn("{task.description}", markup=False, table_column=whole),
            bars.BarColumn(10),
            bars.TextColumn("{task.completed}/{task.total}", table_column=whole),
            _Left(table_column=whole),
            bars.TextColumn("{task.fields[note]}", markup=False, table_column=cut),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,  # else it ends with an empty line in a file
            expand=True,
        )
        self._tasks: dict[str, bars.TaskID] = {}

    @property
    def renderable(self) -> Table:
        """The bars as they are now."""
        return self._bars.make_tasks_table(self._bars.tasks)

    def __enter__(self) -> Bar:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def __call__(
        self, what: str, done: int, of: int, note: str = "", left: float = math.nan
    ) -> None:
        if done >= of:
            if what in self._tasks:
                self._bars.remove_task(self._tasks.pop(what))
            return
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(visible(what), total=of, note=note, left=left)
        self._bars.update(self._tasks[what], completed=done, total=of, note=note, left=left)

    def log(self, line: str) -> None:
        self.console.print(line, soft_wrap=True)
