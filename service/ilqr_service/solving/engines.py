"""All engines of a service behind one door: the solver thread's view of the models.

A work names its model; a run's state lies with the engine of the model it is on. A swap moves a run
to another engine, whose window is filled again from the bins the first one held. Beside an engine
a shadow may run, which solves the same bins after their answers are out; both scores are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from msgspec.structs import replace

from ilqr_service import logs
from ilqr_service.solving.engine import Engine, WarmUp
from ilqr_service.solving.run import PackedRun
from ilqr_service.work import NO_SOLVE, Answer, Work
from ilqr_vae.kernels.cpu import threads
from ilqr_vae.machine import cores

CATCH_UP = 4
BACKLOG = 2
"""Where the most urgent bin has waited for so many of the longest steps, others are behind it."""


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
    """An engine beside another, both scores since it began, and the runs that it has taken up: the
    engine may hold states of them from before."""

    engine: Engine
    own: Score = field(default_factory=Score)
    other: Score = field(default_factory=Score)
    runs: set[int] = field(default_factory=set[int])


class Quota:
    """Says which bins still fit into the next solve: a step's longest time, and half of what is
    left until the first of them is due. Where the most urgent is overdue, a step may take
    ``CATCH_UP`` times as long: many at once are solved in less time each. For the same reason a bin
    that has waited long (``BACKLOG``) does not shorten the step: in steps that get shorter the
    nearer bins are to their due times, a backlog once there would never be worked off.

    Args:
        fleet: whose bins.
        now_ns: the time.
    """

    def __init__(self, fleet: Fleet, now_ns: int) -> None:
        self._fleet, self._now = fleet, now_ns
        self._longest = 0.0
        self._left = float("inf")
        self._spent = 0.0
        self._bins: dict[str, int] = {}

    def __call__(self, work: Work) -> bool:
        engine = self._fleet.engine(work.model)
        overdue = work.due_ns <= self._now and not work.swap
        if not self._longest:
            self._longest = engine.slice_ns * (CATCH_UP if overdue else 1)
        waited = self._now - work.received_ns
        if not overdue and work.due_ns and waited < BACKLOG * engine.slice_ns:
            self._left = min(self._left, work.due_ns - self._now)
        if work.late or work.swap:
            self._spent += engine.facts.horizon * engine.cost.ns(1)
        else:
            bins = self._bins.get(work.model, 0)
            self._bins[work.model] = bins + 1
            self._spent += engine.cost.ns(bins + 1) - engine.cost.ns(bins)
        return self._spent <= min(self._longest, self._left / 2)


class Fleet:
    """Engines by model id.

    Args:
        engine: the first one, also for works that name none.
    """

    def __init__(self, engine: Engine) -> None:
        self.first = engine
        self.engines: dict[str, Engine] = {engine.facts.model: engine}
        self.shadows: dict[str, Shadow] = {}
        self._pending: list[tuple[Work, Answer]] = []

    def __len__(self) -> int:
        """Runs whose state is held."""
        return sum(len(e) for e in self.engines.values())

    @property
    def batch(self) -> int:
        """The most bins to solve at once."""
        return CATCH_UP * max(engine.batch for engine in list(self.engines.values()))

    def engine(self, model: str) -> Engine:
        return self.engines[model] if model else self.first

    def spacing_ns(self, work: Work) -> int:
        """The bin width of the model a work is for."""
        return self.engine(work.model).facts.bin_width_ns

    def ready(self, now_ns: int) -> Callable[[Work], float]:
        """When a bin would be solved if it were next."""
        return lambda work: now_ns + self.engine(work.model).cost.ns(1)

    def warm_up(self) -> list[WarmUp]:
        """Warm every engine, in the thread that will solve. Raises ServiceError: a solve failed."""
        threads.use(self.first.threads or cores())
        return [engine.warm_up() for engine in self.engines.values()]

    def forget(self, run: int) -> None:
        for engine in list(self.engines.values()):
            engine.forget(run)
        for shadow in list(self.shadows.values()):
            shadow.engine.forget(run)
            shadow.runs.discard(run)

    def parts(self, works: list[Work]) -> list[list[Work]]:
        """Bins of different runs as the calls of ``solve`` that answer soonest: the bins of each
        model together, then one by one what takes a window, or cannot be solved together."""
        together: dict[tuple[str, bool], list[Work]] = {}
        alone: list[list[Work]] = []
        single = {m: self.engine(m).batch == 1 for m in {work.model for work in works}}
        for work in works:
            if work.late or work.swap or single[work.model]:
                alone.append([work])
            else:
                shed = work.budget == NO_SOLVE
                together.setdefault((work.model, shed), []).append(work)
        return [*together.values(), *alone]

    def solve(self, works: list[Work]) -> list[Answer]:
        """Answers to bins of different runs; a swap has none. See ``Engine.solve``."""
        answers: list[Answer] = []
        for part in self.parts(works):
            first = part[0]
            engine = self.engine(first.model)
            if first.swap:
                self._swap(engine, first)
                continue
            got = engine.solve(part)
            answers += got
            if first.model in self.shadows and not first.late:
                self._pending += zip(part, got, strict=True)
        return answers

    def _swap(self, engine: Engine, work: Work) -> None:
        other = self.engines[work.swap]
        other.adopt(work.run, engine.window(work.run), work.serial, engine.watched(work.run))
        if other is not engine:
            engine.forget(work.run)

    def between(self) -> None:
        """What may wait until answers are out: the shadows."""
        pending, self._pending = self._pending, []
        by_model: dict[str, list[tuple[Work, Answer]]] = {}
        for work, answer in pending:
            by_model.setdefault(work.model, []).append((work, answer))
        for model, answered in by_model.items():
            shadow = self.shadows.get(model)
            if shadow is None:
                continue
            engine = shadow.engine
            try:
                for work, _ in answered:
                    if not work.fresh and work.run not in shadow.runs:
                        engine.adopt(work.run, self.engine(model).window(work.run)[:-1])
                    shadow.runs.add(work.run)
                own = engine.solve([replace(work, anytime=False) for work, _ in answered])
            except Exception:
                logs.exception("the shadow broke and is dropped", model=engine.facts.model)
                self.shadows.pop(model, None)
                continue
            for mine, (work, answer) in zip(own, answered, strict=True):
                if not work.missing:
                    shadow.own.add(mine)
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
