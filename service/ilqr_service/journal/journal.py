"""The journal as the service uses it: records steps of the session table and resumes sessions.

Without a journal folder all methods do nothing.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec

from ilqr_service import logs
from ilqr_service.journal.live import Live
from ilqr_service.journal.records import (
    Answered,
    Controlled,
    Deployed,
    Fed,
    Happened,
    Header,
    Queued,
    RunClosed,
    RunOpened,
    Snapshot,
)
from ilqr_service.journal.resume import model_of, models_of, open_runs, take_up
from ilqr_service.journal.writer import Copy, Writer
from ilqr_service.sessions.effects import Effects
from ilqr_service.sessions.table import SessionTable
from ilqr_service.settings import ServiceSettings
from ilqr_service.solving.engine import Engine
from ilqr_service.solving.engines import Engines
from ilqr_service.solving.run import PackedRun, Resumed, pack_work
from ilqr_service.work import EngineAnswer
from ilqr_vae.errors import IlqrVaeError
from ilqr_vae.kernels import ARITHMETIC
from ilqr_vae.protocol import messages

Find = Callable[[str], Engine | None]


@cache
def versions() -> dict[str, str]:
    """Return the versions of what computes, cached at the first call.

    The packages may be replaced while the service runs.
    """
    found = {"python": platform.python_version(), "machine": platform.machine()}
    found["arithmetic"] = str(ARITHMETIC)
    for name in ("ilqr-vae", "torch", "numba", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


class Journal:
    """Keeps the journal. Only the I/O thread may use it.

    Args:
        settings: folder and policy of the journal.
        slots: engine of each slot.
        engines: available models.
        table: session table, to which open sessions are added.
        find: returns an engine by model id, for sessions of models in no slot.
        copy: copy on another node.

    Attributes:
        resumed: runs for the solver to resume.
        last: newest answer of each run, for new subscribers.

    Raises:
        JournalError: the journal cannot be read.
        ServiceError: the folder cannot be written, or another service uses it.
    """

    def __init__(
        self,
        settings: ServiceSettings,
        slots: dict[str, Engine],
        engines: Engines,
        table: SessionTable,
        find: Find | None = None,
        copy: Copy | None = None,
    ) -> None:
        self.resumed: list[Resumed] = []
        self.last: list[messages.Result] = []
        self._writer: Writer | None = None
        self._live: dict[int, Live] = {}
        self._superseded: list[int] = []
        if not settings.journal:
            return
        self._manifests = {e.model_info.model: e.manifest for e in slots.values()}
        self._table = table
        self._settings = settings
        self._boot = os.urandom(8).hex()
        versions()
        # Lock before reading: another service may still be ending its sessions.
        self._writer = Writer(
            Path(settings.journal),
            self._header,
            sync=settings.journal_sync,
            segment_bytes=round(settings.journal_segment_mb * 1e6),
            keep=settings.journal_keep,
            copy=copy,
        )
        try:
            self._resume(Path(settings.journal), engines, find or (lambda _: None))
        except IlqrVaeError:
            self._writer.close()
            raise

    def _resume(self, folder: Path, engines: Engines, find: Find) -> None:
        """Resume open sessions.

        A session whose model is not served stays open in the journal until it is served again. Of
        two sessions with the same name the newer one is resumed.
        """
        odd: list[str] = []
        self._table.next_run, self._live = open_runs(folder, odd)
        for line in odd:
            logs.warning("the journal is not as it was written", what=line)
        deadline_ns = round(self._settings.deadline_ms * 1e6)
        for run, live in sorted(self._live.items(), reverse=True):
            for model in models_of(live) - set(engines.engines):
                if (engine := find(model)) is not None:
                    engines.engines[model] = engine
                    self._manifests = self._manifests | {model: engine.manifest}
            missing = models_of(live) - set(engines.engines)
            name = live.opened.request.session
            if missing:
                logs.warning(
                    "a session cannot go on: its model is not served",
                    session=name,
                    model=min(missing),
                )
                continue
            if any(session.name == name for session in self._table):
                self._superseded.append(run)
                continue
            model_info = engines.engine(model_of(live)).model_info
            session, resumed = take_up(live, model_info, deadline_ns, time.monotonic_ns())
            self._table.add(session)
            self.resumed.append(resumed)
            if session.recent:
                self.last.append(session.recent[-1])
            logs.info("resumed", session=session.name, epoch=session.epoch, bin=session.next_index)

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
        return self._writer is None or self._writer.ok

    @property
    def lost(self) -> int:
        return 0 if self._writer is None else self._writer.lost

    @property
    def written(self) -> int:
        return 0 if self._writer is None else self._writer.written

    @property
    def position(self) -> int:
        """Position of the last write, for ``copied``."""
        return 0 if self._writer is None else self._writer.position

    def copied(self) -> int:
        """Position up to which a copy is complete; later results must not be published yet."""
        return 0 if self._writer is None else self._writer.copied()

    def start(self) -> None:
        """Start to write. Raises ServiceError if the journal cannot be written."""
        if self._writer is not None:
            self._writer.start(self._live)
            for run in self._superseded:
                self._writer.write(RunClosed(run=run, what="its name was used anew"))

    def note(self, effects: Effects, answer: EngineAnswer | None) -> None:
        """Add the effects of a step of the table; the next ``flush`` writes them."""
        writer = self._writer
        if writer is None:
            return
        for slot, model, manifest in effects.served:
            self._manifests = self._manifests | {model: manifest}
            writer.write(Deployed(slot=slot, model=model, manifest=manifest))
        for message, frame in zip(effects.published, effects.frames, strict=True):
            if isinstance(message, messages.Result) and answer is not None:
                writer.write(
                    Answered(
                        run=answer.work.run,
                        serial=answer.serial,
                        settles=answer.settles,
                        index=message.index,
                        revision=message.revision,
                        frame=frame,
                    )
                )
        opened = {s.run for s in effects.opened}
        for run, what in effects.ended:
            if run not in opened:
                writer.write(RunClosed(run=run, what=what))
        for session in effects.opened:
            writer.write(
                RunOpened(
                    run=session.run,
                    slot=session.slot,
                    model=session.model_info.model,
                    user=session.user,
                    request=session.request,
                )
            )
        for work in effects.work:
            writer.write(Queued(work=pack_work(work)))
        for run, batch in effects.fed:
            writer.write(Fed(run=run, batch=batch))
        for run, event in effects.happened:
            writer.write(Happened(run=run, event=event))

    def keep(self, packed: PackedRun) -> None:
        """Write a snapshot."""
        if self._writer is not None:
            self._writer.write(Snapshot(packed=packed))

    def control(self, user: str, frame: bytes) -> None:
        """Write a control message."""
        if self._writer is not None:
            self._writer.write(Controlled(at_ns=time.monotonic_ns(), user=user, frame=frame))

    def flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
