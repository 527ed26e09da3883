"""Progress of a long computation: one protocol, and the terminal's bar that shows it."""

from __future__ import annotations

from typing import Protocol

from rich import progress as bars
from rich.console import Console
from rich.table import Column, Table

from ilqr_vae.terminal import console, visible


class Progress(Protocol):
    """Receives how far a computation is."""

    def __call__(self, what: str, done: int, of: int, note: str = "") -> None:
        """``done`` of ``of`` units of ``what`` are done; ``note`` holds the newest numbers."""
        ...

    def log(self, line: str) -> None:
        """A line to keep."""
        ...


class Silent:
    """Shows nothing."""

    def __call__(self, what: str, done: int, of: int, note: str = "") -> None: ...

    def log(self, line: str) -> None: ...


SILENT = Silent()


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
            bars.TimeRemainingColumn(compact=True, table_column=whole),
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

    def __call__(self, what: str, done: int, of: int, note: str = "") -> None:
        if done >= of:
            if what in self._tasks:
                self._bars.remove_task(self._tasks.pop(what))
            return
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(visible(what), total=of, note=note)
        self._bars.update(self._tasks[what], completed=done, total=of, note=note)

    def log(self, line: str) -> None:
        self.console.print(line, soft_wrap=True)
