"""Progress of long computations: the protocol, and a progress bar for the terminal."""

from __future__ import annotations

import math
from typing import Protocol

from rich import progress as bars
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from ilqr_vae.terminal import console, visible


class Progress(Protocol):
    """Receives the progress of a computation."""

    def __call__(
        self, what: str, done: int, of: int, note: str = "", left: float = math.nan
    ) -> None:
        """Report that ``done`` of ``of`` units of ``what`` are done.

        Args:
            note: the latest numbers.
            left: estimated seconds left, if better known than from the units done so far.
        """
        ...

    def log(self, line: str) -> None:
        """Print a line that stays."""
        ...


class Silent:
    """A progress that is not shown."""

    def __call__(
        self, what: str, done: int, of: int, note: str = "", left: float = math.nan
    ) -> None: ...

    def log(self, line: str) -> None: ...


SILENT = Silent()


def duration(seconds: float) -> str:
    """Format a duration with about two significant figures."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


class _Left(bars.ProgressColumn):
    """A column with the time left: as reported, else from the speed so far."""

    def render(self, task: bars.Task) -> Text:
        seconds = task.time_remaining if math.isnan(task.fields["left"]) else task.fields["left"]
        return Text("" if seconds is None else f"{duration(seconds)} left")


class Bar:
    """Shows progress in a terminal: a bar for each running computation, below the log lines.

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
            disable=not self.console.is_terminal,  # otherwise it ends with an empty line in a file
            expand=True,
        )
        self._tasks: dict[str, bars.TaskID] = {}

    @property
    def renderable(self) -> Table:
        """Return the current bars."""
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
