"""The service's side of the journal: what of a step of the table is written, and what a service
that died left open. Where no journal is kept every method does nothing."""

from __future__ import annotations

import os
import platform
import time
from importlib.metadata import version
from pathlib import Path

import msgspec

from ilqr_service import logs
from ilqr_service.journal.records import (
    Answered,
    Began,
    Controlled,
    Ended,
    Header,
    Kept,
    Served,
    Worked,
)
from ilqr_service.journal.resume import model_of, models_of, open_runs, take_up
from ilqr_service.journal.writer import Journal, Live
from ilqr_service.sessions.session import Effects
from ilqr_service.sessions.table import SessionTable
from ilqr_service.settings import ServiceSettings
from ilqr_service.solving.engine import Engine
from ilqr_service.solving.engines import Fleet
from ilqr_service.solving.run import PackedRun, Resumed, pack_work
from ilqr_service.work import Answer
from ilqr_vae.protocol import messages


def versions() -> dict[str, str]:
    """Of what computes."""
    packages = ("ilqr-vae", "torch", "numba", "numpy")
    return {name: version(name) for name in packages} | {
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


class Ledger:
    """Keeps the journal. Used by the I/O thread alone.

    Args:
        settings: where and how.
        engines: by slot.
        fleet: to see which models are there.
        table: takes up the sessions that were open.

    Attributes:
        resumed: runs for the solver to take up.
        last: the newest answer of each, for new subscribers.

    Raises:
        JournalError: a journal that cannot be read.
    """

    def __init__(
        self,
        settings: ServiceSettings,
        engines: dict[str, Engine],
        fleet: Fleet,
        table: SessionTable,
    ) -> None:
        self.resumed: list[Resumed] = []
        self.last: list[messages.Result] = []
        self._journal: Journal | None = None
        self._live: dict[int, Live] = {}
        self._gone: list[int] = []
        if not settings.journal:
            return
        self._manifests = {e.facts.model: e.manifest for e in engines.values()}
        self._table = table
        self._settings = settings
        self._boot = os.urandom(8).hex()
        folder = Path(settings.journal)
        table.next_run, self._live = open_runs(folder)
        for run, live in list(self._live.items()):
            missing = models_of(live) - set(fleet.engines)
            if missing:
                logs.warning(
                    "a session cannot go on: its model is not served",
                    session=live.began.request.session,
                    model=min(missing),
                )
                self._gone.append(run)
                continue
            facts = fleet.engine(model_of(live)).facts
            now = time.monotonic_ns()
            session, resumed = take_up(live, facts, round(settings.deadline_ms * 1e6), now)
            table.add(session)
            self.resumed.append(resumed)
            if session.recent:
                self.last.append(session.recent[-1])
            logs.info("resumed", session=session.name, epoch=session.epoch, bin=session.next_index)
        self._journal = Journal(
            folder,
            self._header,
            sync=settings.journal_sync,
            segment_bytes=round(settings.journal_segment_mb * 1e6),
            keep=settings.journal_keep,
        )

    def _header(self, lost: int) -> Header:
        return Header(
            boot=self._boot,
            at_ns=time.time_ns(),
            clock_ns=time.monotonic_ns(),
            next_run=self._table.next_run,
            lost=lost,
            versions=versions(),
            settings=msgspec.to_builtins(self._settings),
            manifests=self._manifests,
        )

    @property
    def ok(self) -> bool:
        return self._journal is None or not self._journal.failed

    @property
    def lost(self) -> int:
        return 0 if self._journal is None else self._journal.lost

    @property
    def written(self) -> int:
        return 0 if self._journal is None else self._journal.written

    def start(self) -> None:
        """Begin to write. Raises ServiceError: it cannot be written."""
        if self._journal is not None:
            self._journal.start(self._live)
            for run in self._gone:
                self._journal.write(Ended(run=run, what="its model is not served"))
            self._journal.flush()

    def note(self, effects: Effects, answer: Answer | None) -> None:
        """Add what a step of the table brought; it is written by the next ``flush``."""
        journal = self._journal
        if journal is None:
            return
        for slot, model, manifest in effects.served:
            self._manifests = self._manifests | {model: manifest}
            journal.write(Served(slot=slot, model=model, manifest=manifest))
        ended = dict(effects.ended)
        opened = {s.run for s in effects.opened}
        for message, frame in zip(effects.published, effects.frames, strict=True):
            if isinstance(message, messages.Result) and answer is not None:
                journal.write(
                    Answered(
                        run=answer.work.run,
                        serial=answer.serial,
                        settles=answer.settles,
                        index=message.index,
                        revision=message.revision,
                        frame=frame,
                    )
                )
        for run, what in ended.items():
            if run not in opened:
                journal.write(Ended(run=run, what=what))
        for session in effects.opened:
            journal.write(
                Began(
                    run=session.run,
                    slot=session.slot,
                    model=session.facts.model,
                    user=session.user,
                    request=session.request,
                )
            )
        for work in effects.work:
            journal.write(Worked(work=pack_work(work)))

    def keep(self, packed: PackedRun) -> None:
        """Write a snapshot."""
        if self._journal is not None:
            self._journal.write(Kept(packed=packed))

    def control(self, user: str, frame: bytes) -> None:
        """Write a control message."""
        if self._journal is not None:
            self._journal.write(Controlled(at_ns=time.monotonic_ns(), user=user, frame=frame))

    def flush(self) -> None:
        if self._journal is not None:
            self._journal.flush()

    def close(self) -> None:
        if self._journal is not None:
            self._journal.close()
