"""A journal run again offline: every answer computed anew and compared, bit for bit.

Each run's works go through the engine in the order they were accepted. Where the clock had cut a
solve short, it is cut after as many iterations as then. A stretch that the journal does not hold
(it could not be written) is skipped: the run goes on from the next snapshot.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from msgspec.structs import replace

from ilqr_service.engine import Engine
from ilqr_service.fleet import Fleet
from ilqr_service.records import (
    Answered,
    AnyRecord,
    Began,
    Header,
    Kept,
    Worked,
    records,
    segments,
)
from ilqr_service.runs import unpack_work
from ilqr_service.work import Answer, Work, budget_of
from ilqr_vae import wire
from ilqr_vae.errors import ServiceError


@dataclass(slots=True)
class Verdict:
    """What a comparison found.

    Attributes:
        runs, answers: compared.
        identical: answers that are the same to the last bit.
        skipped: answers that could not be compared: their run's state is not in the journal.
        largest: absolute difference over all numbers of all answers.
        first: where the first difference is.
    """

    runs: int = 0
    answers: int = 0
    identical: int = 0
    skipped: int = 0
    largest: float = 0.0
    first: str = ""


@dataclass(slots=True)
class _Run:
    """A run under way."""

    began: Began
    done: int = -1
    sound: bool = True
    works: dict[int, Work] = field(default_factory=dict[int, Work])
    frames: list[Answered] = field(default_factory=list[Answered])


def header_of(folder: Path) -> Header:
    """The first segment's header. Raises ServiceError: no journal."""
    for path in segments(folder):
        for record in records(path):
            if isinstance(record, Header):
                return record
    raise ServiceError("journal", expected="a folder with segments", got=str(folder))


def stream(folder: Path) -> Iterator[AnyRecord]:
    """All good records, oldest first."""
    for path in segments(folder):
        yield from records(path)


def numbers(result: wire.Result) -> np.ndarray:
    """Everything computed in a result, one after another."""
    arrays = ("latent", "latent_std", "rates", "kinematics", "kinematics_std")
    values = [wire.unpack(getattr(result, name), name) for name in arrays]
    return np.concatenate([*values, [result.bits, result.spikes, result.iterations]])


def computed(answer: Answer) -> np.ndarray:
    """The same of an answer."""
    arrays = (
        answer.latent,
        answer.latent_std,
        answer.rates,
        answer.kinematics,
        answer.kinematics_std,
    )
    return np.concatenate([*arrays, [answer.bits, answer.spikes, answer.iterations]])


class Verifier:
    """Follows a journal and compares.

    Args:
        engines: of all models that it names.
    """

    def __init__(self, engines: list[Engine]) -> None:
        self.verdict = Verdict()
        self._fleet = Fleet(engines[0])
        for engine in engines:
            self._fleet.engines[engine.facts.model] = engine
        self._runs: dict[int, _Run] = {}

    def follow(self, record: AnyRecord) -> None:
        """Take one record. Raises ServiceError: a model that is not there."""
        match record:
            case Began():
                if record.model not in self._fleet.engines:
                    raise ServiceError("model", expected=f"{record.model} too", got="not given")
                if record.run not in self._runs:
                    self.verdict.runs += 1
                    run = _Run(record, sound=not record.again)
                    self._runs[record.run] = run
            case Worked():
                work = unpack_work(record.work)
                run = self._runs.get(work.run)
                if run is not None and work.serial > run.done:
                    run.works.setdefault(work.serial, work)
            case Kept():
                self._snapshot(record)
            case Answered():
                run = self._runs.get(record.run)
                if run is not None and record.serial > run.done:
                    run.frames.append(record)
                    if record.settles:
                        self._settle(run, record.serial)
            case _:
                pass

    def _snapshot(self, record: Kept) -> None:
        run = self._runs.get(record.packed.run)
        serial = record.packed.serial
        if run is None:
            return
        if run.sound and all(s in run.works for s in range(run.done + 1, serial + 1)):
            return  # all of it is, or will be, computed anyway
        self._fleet.forget(record.packed.run)
        self._fleet.restore(record.packed)
        run.done, run.sound = serial, True
        run.works = {s: w for s, w in run.works.items() if s > serial}
        run.frames.clear()

    def _settle(self, run: _Run, serial: int) -> None:
        frames = [f for f in run.frames if f.serial == serial]
        run.frames.clear()
        expected: list[wire.Result] = []
        for one in frames:
            message = wire.decode_published(one.frame)
            if isinstance(message, wire.Result):
                expected.append(message)
        answers: list[Answer] = []
        for s in range(run.done + 1, serial + 1):
            work = run.works.pop(s, None)
            run.sound = run.sound and work is not None
            if work is None or not run.sound:
                continue
            # as the clock had it then
            budget = budget_of(expected[0]) if s == serial and expected else 0
            work = replace(work, anytime=False, budget=budget)
            answers = self._fleet.solve([work])
        run.done = serial
        if run.sound:
            # where a late bin's answers were cut short by a crash, the last ones are told again
            self._compare(run, answers, expected[-len(answers) :] if answers else [])
        else:
            self.verdict.skipped += len(expected)

    def _compare(self, run: _Run, answers: list[Answer], expected: list[wire.Result]) -> None:
        verdict = self.verdict
        for answer, result in zip(answers, expected, strict=False):
            verdict.answers += 1
            got, want = computed(answer), numbers(result)
            same = got.tobytes() == want.tobytes() and answer.solver == result.solver
            verdict.identical += same
            if same:
                continue
            off = float(np.nanmax(np.abs(got - want))) if got.shape == want.shape else np.inf
            verdict.largest = max(verdict.largest, off)
            if not verdict.first:
                name = run.began.request.session
                verdict.first = f"session {name} epoch {result.epoch} bin {result.index}"


def verify(folder: Path, engines: list[Engine]) -> Verdict:
    """Compare a whole journal. Raises ServiceError: it cannot be read, or needs another model."""
    verifier = Verifier(engines)
    for record in stream(folder):
        verifier.follow(record)
    return verifier.verdict
