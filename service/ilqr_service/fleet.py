"""All engines of a service behind one door: the solver thread's view of the models.

A work names its model; a run's state lies with the engine of the model it is on. A swap moves a run
to another engine, whose window is filled again from the bins the first one held. Beside an engine
a shadow may run, which solves the same bins after their answers are out; both scores are kept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ilqr_service import logs
from ilqr_service.engine import Engine, WarmUp
from ilqr_service.runs import PackedRun
from ilqr_service.work import Answer, Work


@dataclass(slots=True)
class Score:
    """Bits gained over the mean rates, and spikes, of bins that came."""

    bins: int = 0
    bits: float = 0.0
    spikes: int = 0

    def add(self, answer: Answer) -> None:
        self.bins += 1
        self.bits += answer.bits
        self.spikes += answer.spikes

    @property
    def bits_per_spike(self) -> float:
        return self.bits / self.spikes if self.spikes else 0.0


@dataclass(slots=True)
class Shadow:
    """An engine beside another, and both scores since it began."""

    engine: Engine
    own: Score
    other: Score


class Fleet:
    """Engines by model id.

    Args:
        engine: the first one, also for works that name none.
    """

    batch = 1

    def __init__(self, engine: Engine) -> None:
        self.first = engine
        self.engines: dict[str, Engine] = {engine.facts.model: engine}
        self.shadows: dict[str, Shadow] = {}
        self._pending: list[tuple[Work, Answer]] = []

    def __len__(self) -> int:
        """Runs whose state is held."""
        return sum(len(e) for e in self.engines.values())

    def engine(self, model: str) -> Engine:
        return self.engines[model] if model else self.first

    def spacing_ns(self, work: Work) -> int:
        """The bin width of the model a work is for."""
        return self.engine(work.model).facts.bin_width_ns

    def warm_up(self) -> list[WarmUp]:
        """Warm every engine. Raises ServiceError: a solve failed."""
        return [engine.warm_up() for engine in self.engines.values()]

    def forget(self, run: int) -> None:
        for engine in list(self.engines.values()):
            engine.forget(run)
        for shadow in list(self.shadows.values()):
            shadow.engine.forget(run)

    def solve(self, works: list[Work]) -> list[Answer]:
        """Answers to bins of different runs; a swap has none. See ``Engine.solve``."""
        answers: list[Answer] = []
        for work in works:
            engine = self.engine(work.model)
            if work.swap:
                other = self.engines[work.swap]
                other.adopt(work.run, engine.window(work.run), work.serial)
                if other is not engine:
                    engine.forget(work.run)
                continue
            got = engine.solve([work])
            answers += got
            if work.model in self.shadows:
                self._pending.append((work, got[-1]))
        return answers

    def between(self) -> None:
        """What may wait until answers are out: the shadows."""
        pending, self._pending = self._pending, []
        for work, answer in pending:
            shadow = self.shadows.get(work.model)
            if shadow is None or work.late:
                continue
            engine = shadow.engine
            held = engine.window(work.run)
            if not held and not work.fresh:
                engine.adopt(work.run, self.engine(work.model).window(work.run)[:-1])
            try:
                (own,) = engine.solve([replace(work, anytime=False)])
            except Exception:
                logs.exception("the shadow broke and is dropped", model=engine.facts.model)
                self.shadows.pop(work.model, None)
                continue
            if not work.missing:
                shadow.own.add(own)
                shadow.other.add(answer)

    def pack(self, work: Work) -> PackedRun | None:
        """A snapshot of the run that ``work`` is of."""
        return self.engine(work.swap or work.model).pack(work.run)

    def restore(self, packed: PackedRun) -> None:
        """Take up a run from a snapshot. Raises ProtocolError: bytes that do not fit."""
        self.engine(packed.model).restore(packed)

    def keep_warm(self) -> None:
        """One step that nobody sees, so that caches and clocks are not cold for the next bin."""
        for engine in list(self.engines.values()):
            engine.keep_warm()
