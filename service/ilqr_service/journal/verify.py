"""Offline verification of a journal: every answer is recomputed and compared bit for bit.

The works of each run go through the engine in the order in which they were accepted, with the
settings in the segment's header. A solve that was cut short by the clock is cut after the same
number of iterations. If records are missing (they could not be written), the run continues from the
next snapshot.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
from msgspec.structs import replace

from ilqr_service.journal.journal import versions
from ilqr_service.journal.records import (
    Answered,
    AnyRecord,
    Checkpoint,
    Header,
    Queued,
    RunOpened,
    Snapshot,
    records,
    segments,
    survey,
)
from ilqr_service.settings import ServiceSettings
from ilqr_service.solving.engine import Engine
from ilqr_service.solving.engines import Engines
from ilqr_service.solving.run import unpack_work
from ilqr_service.work import EngineAnswer, Solve, Work, budget_of
from ilqr_vae.artifact import read_manifest
from ilqr_vae.errors import JournalError
from ilqr_vae.progress import SILENT, Progress
from ilqr_vae.protocol import messages


@dataclass(slots=True)
class Comparison:
    """The result of a verification.

    Attributes:
        runs, answers: numbers of compared runs and answers.
        identical: answers that are identical to the last bit.
        skipped: answers that could not be compared, because the state of their run is not in the
            journal.
        largest: largest absolute difference over all numbers; infinite if only one of the two is
            NaN.
        changed: answers whose solve ended with another status (``solver``).
        first: location of the first difference.
        damaged: a line for each irregularity of the journal.
        versions: what wrote the journal, where it differs from what verifies it, by name.
    """

    runs: int = 0
    answers: int = 0
    identical: int = 0
    skipped: int = 0
    largest: float = 0.0
    changed: int = 0
    first: str = ""
    damaged: list[str] = field(default_factory=list[str])
    versions: dict[str, str] = field(default_factory=dict[str, str])

    def within(self, tolerance: float) -> bool:
        """Return whether all differences are at most this, and all solves ended alike."""
        if not tolerance:
            return self.identical == self.answers
        return self.largest <= tolerance and not self.changed


@dataclass(slots=True)
class _Run:
    """A run in progress: computed up to the work ``done`` if its state is ``known``.

    ``frames``: later answers by serial, index and revision, since a segment repeats earlier ones.
    """

    opened: RunOpened
    done: int = -1
    known: bool = True
    works: dict[int, Work] = field(default_factory=dict[int, Work])
    frames: dict[tuple[int, int, int], Answered] = field(
        default_factory=dict[tuple[int, int, int], Answered]
    )


def stream(
    folder: Path,
    damage: list[str] | None = None,
    progress: Progress = SILENT,
    what: str = "journal read",
) -> Iterator[AnyRecord]:
    """Yield all valid records, oldest first.

    ``damage`` receives a line for each irregularity, ``progress`` the number of segments read.

    Raises JournalError."""
    paths, odd = survey(folder)
    if damage is not None:
        damage += odd
    for done, path in enumerate(paths):
        progress(what, done, len(paths))
        yield from records(path, damage)
    progress(what, len(paths), len(paths))


def named_and_answered(folder: Path, progress: Progress = SILENT) -> tuple[set[str], int]:
    """Return the ids of the models in a journal, and its number of answers. Raises JournalError."""
    named: set[str] = set()
    answers = 0
    for record in stream(folder, progress=progress):
        match record:
            case RunOpened():
                named.add(record.model)
            case Snapshot():
                named.add(record.packed.model)
            case Queued():
                named |= {record.work.model, record.work.swap}
            case Answered():
                answers += 1
            case _:
                pass
    return named - {""}, answers


def settings_of(header: Header) -> ServiceSettings:
    """Return the settings of a service that affect answers. Raises JournalError."""
    try:
        kept = {name: header.settings[name] for name in ("device", "horizon", "iterations")}
        return msgspec.convert(kept, ServiceSettings)
    except (KeyError, msgspec.ValidationError) as error:
        raise JournalError("journal", expected="settings of a service", got=str(error)) from error


def numbers(result: messages.Result) -> np.ndarray:
    """Return all computed numbers of a result, concatenated."""
    values = [messages.unpack(getattr(result, name), name) for name in messages.VECTORS]
    if result.classes is not None:
        values.append(messages.unpack(result.classes, "classes"))
    return np.concatenate([*values, [result.bits, result.spikes, result.iterations]])


def computed(answer: EngineAnswer) -> np.ndarray:
    """Return all computed numbers of an answer, concatenated."""
    values = [getattr(answer, name) for name in messages.VECTORS]
    if answer.classes is not None:
        values.append(answer.classes)
    return np.concatenate([*values, [answer.bits, answer.spikes, answer.iterations]])


def difference(got: np.ndarray, want: np.ndarray) -> float:
    """Return the largest absolute difference; infinite if NaNs or lengths differ."""
    if got.shape != want.shape:
        return float("inf")
    same = (got == want) | (np.isnan(got) & np.isnan(want))
    off = np.abs(got[~same] - want[~same])
    return float(np.where(np.isnan(off), np.inf, off).max(initial=0.0))


class Verifier:
    """Reads the records of a journal in order and compares the answers.

    Args:
        models: files of all models in the journal.
    """

    def __init__(self, models: list[Path]) -> None:
        self.verdict = Comparison()
        self._models = models
        self._served: dict[ServiceSettings, Engines] = {}
        self._engines: Engines | None = None
        self._runs: dict[int, _Run] = {}
        # Runs whose state comes from the beginning of a segment, because earlier works were solved
        # with other settings or a record is lost. The answers repeated there cannot be recomputed.
        self._anew: set[int] = set()

    def follow(self, record: AnyRecord) -> None:
        """Process a record.

        Raises:
            ArtifactError, ConfigError: a model file or device cannot be used.
            JournalError: a segment lacks a header, or its settings are invalid.
        """
        if isinstance(record, Header):
            here = versions()
            self.verdict.versions |= {
                name: record.versions.get(name, "not stated")
                for name in here
                if record.versions.get(name) != here[name]
            }
            self._serve(settings_of(record))
            return
        if self._engines is None:
            raise JournalError("journal", expected="a header first", got=type(record).__name__)
        match record:
            case Checkpoint():
                self._anew.clear()
            case RunOpened():
                self._begin(record)
            case Queued():
                work = unpack_work(record.work)
                run = self._runs.get(work.run)
                if run is not None and work.serial > run.done:
                    run.works.setdefault(work.serial, work)
                    if record.work.lost:
                        self._anew.add(work.run)
            case Snapshot():
                self._snapshot(self._engines, record)
            case Answered():
                run = self._runs.get(record.run)
                if run is not None and record.serial > run.done:
                    answer = record.serial, record.index, record.revision
                    run.frames.setdefault(answer, record)
                    if record.settles:
                        self._settle(self._engines, run, record.serial)
            case _:
                pass

    @property
    def served(self) -> bool:
        """Whether the header of a segment was read."""
        return self._engines is not None

    def _serve(self, settings: ServiceSettings) -> None:
        engines = self._served.get(settings)
        if engines is None:
            loaded = [Engine.load(path, settings) for path in self._models]
            engines = Engines(loaded[0])
            engines.engines |= {engine.model_info.model: engine for engine in loaded}
            self._served[settings] = engines
        if self._engines is not None and self._engines is not engines:
            for run in self._runs:
                self._engines.forget(run)
            self._anew |= self._runs.keys()
        self._engines = engines

    def _begin(self, record: RunOpened) -> None:
        known = record.run in self._runs
        if known and record.run not in self._anew:
            return
        self.verdict.runs += not known
        # without a snapshot, all its works follow
        self._runs[record.run] = _Run(record, record.serial - 1, known=record.serial == 0)
        if record.again:
            self._anew.add(record.run)

    def _snapshot(self, engines: Engines, record: Snapshot) -> None:
        run = self._runs.get(record.packed.run)
        serial = record.packed.serial
        if run is None:
            return
        if run.known and all(s in run.works for s in range(run.done + 1, serial + 1)):
            return  # all of it is recomputed anyway
        engines.forget(record.packed.run)
        engines.restore(record.packed)
        run.done, run.known = serial, True
        run.works = {s: w for s, w in run.works.items() if s > serial}
        run.frames.clear()

    def _settle(self, engines: Engines, run: _Run, serial: int) -> None:
        frames = [f for f in run.frames.values() if f.serial == serial]
        run.frames.clear()
        expected: list[messages.Result] = []
        for one in frames:
            message = messages.decode_published(one.frame)
            if isinstance(message, messages.Result):
                expected.append(message)
        answers: list[EngineAnswer] = []
        for s in range(run.done + 1, serial + 1):
            work = run.works.pop(s, None)
            run.known = run.known and work is not None
            if work is None or not run.known:
                continue
            # as it was cut by the clock
            own = [result for result in expected if s == serial and result.index == work.index]
            budget = budget_of(own[0]) if own else 0
            if isinstance(work, Solve):
                work = replace(work, anytime=False, budget=budget)
            answers = engines.solve([work])
        run.done = serial
        if run.opened.run in self._anew:
            return
        if run.known:
            # if a crash interrupted the answers to a late bin, the last ones are repeated
            self._compare(run, answers, expected[-len(answers) :] if answers else [])
        else:
            self.verdict.skipped += len(expected)

    def _compare(
        self, run: _Run, answers: list[EngineAnswer], expected: list[messages.Result]
    ) -> None:
        verdict = self.verdict
        for answer, result in zip(answers, expected, strict=False):
            verdict.answers += 1
            got, want = computed(answer), numbers(result)
            changed = answer.solver != result.solver
            if got.tobytes() == want.tobytes() and not changed:
                verdict.identical += 1
                continue
            verdict.changed += changed
            verdict.largest = max(verdict.largest, difference(got, want))
            if not verdict.first:
                name = run.opened.request.session
                verdict.first = f"session {name} epoch {result.epoch} bin {result.index}"


def verify(folder: Path, models: list[Path], progress: Progress = SILENT) -> Comparison:
    """Verify a journal.

    Args:
        folder: the journal.
        models: files of the models in the journal; at least one.
        progress: receives the number of compared answers.

    Raises:
        ArtifactError, ConfigError: a model file or device that cannot be used.
        JournalError: the journal cannot be read, or needs a model that is not given.
    """
    if not segments(folder):
        raise JournalError("journal", expected="a folder with segments", got=str(folder))
    named, answers = named_and_answered(folder, progress)
    needed = named - {read_manifest(path).model_id for path in models}
    if needed:  # check before hours of solving
        raise JournalError(
            "model", expected=f"files of {', '.join(sorted(needed))} too", got="not given"
        )
    verifier = Verifier(models)
    done = 0
    for record in stream(folder, verifier.verdict.damaged):
        verifier.follow(record)
        if isinstance(record, Answered):
            done += 1
            progress("answers compared", done, answers)
    if not verifier.served:
        raise JournalError("journal", expected="records", got=f"none in {folder}")
    return verifier.verdict
