"""All engines of a service, for the solver thread.

A work names its model; the engine of that model holds the state of the run. A swap moves a run to
another engine, which refills its window from the bins of the first. A slot may have a shadow, an
engine that solves the same bins after their answers are published; both are scored.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from msgspec.structs import replace

from ilqr_service import logs
from ilqr_service.solving.engine import Engine
from ilqr_service.solving.policy import CATCH_UP, Cost, steps
from ilqr_service.solving.run import PackedRun
from ilqr_service.solving.warm_up import WarmUp, keep_warm, warm_up
from ilqr_service.work import EngineAnswer, Solve, SwapModel, Work
from ilqr_vae.kernels.cpu import threads
from ilqr_vae.machine import cores


@dataclass(slots=True)
class Score:
    """Bits gained over the mean rates, and number of spikes, of bins that arrived."""

    bins: int = 0
    bits: float = 0.0
    spikes: int = 0

    def add(self, answer: EngineAnswer) -> None:
        self.bins += 1
        self.bits += answer.bits
        self.spikes += answer.spikes

    @property
    def bits_per_spike(self) -> float:
        return self.bits / self.spikes if self.spikes else 0.0


@dataclass(slots=True)
class Shadow:
    """A shadow engine, both scores since it started, and the runs that it follows.

    The engine may also hold earlier states of other runs.
    """

    engine: Engine
    own: Score = field(default_factory=Score)
    other: Score = field(default_factory=Score)
    runs: set[int] = field(default_factory=set[int])


class Engines:
    """Engines by model id.

    Args:
        engine: the first engine, also for works that name no model.

    Attributes:
        engines: by model id.
        shadows: by slot.
    """

    def __init__(self, engine: Engine) -> None:
        self.first = engine
        self.engines: dict[str, Engine] = {engine.model_info.model: engine}
        self.shadows: dict[str, Shadow] = {}
        self._pending: list[tuple[Solve, EngineAnswer]] = []

    def __len__(self) -> int:
        """Return the number of runs with a state."""
        return sum(len(e) for e in self.engines.values())

    @property
    def batch(self) -> int:
        """Largest number of bins to solve together."""
        return CATCH_UP * max(engine.cost.batch for engine in list(self.engines.values()))

    def cost(self, model: str) -> Cost:
        """Return the cost model of a model's steps."""
        return self.engine(model).cost

    def engine(self, model: str) -> Engine:
        return self.engines[model] if model else self.first

    def warm_up(self) -> list[WarmUp]:
        """Warm up all engines, in the solver thread. Raises ServiceError if a solve fails."""
        threads.use(self.first.threads or cores())
        return [warm_up(engine) for engine in self.engines.values()]

    def forget(self, run: int) -> None:
        for engine in list(self.engines.values()):
            engine.forget(run)
        for shadow in list(self.shadows.values()):
            shadow.engine.forget(run)
            shadow.runs.discard(run)

    def solve(self, step: list[Work]) -> list[EngineAnswer]:
        """Return the answers to a step of the policy; a swap has none. See ``Engine.solve``."""
        first = step[0]
        engine = self.engine(first.model)
        if isinstance(first, SwapModel):
            other = self.engines[first.to]
            window, watch = engine.window(first.run), engine.watched(first.run)
            other.adopt(first.run, window, first.serial, watch)
            if other is not engine:
                engine.forget(first.run)
            return []
        answers = engine.solve(step)
        for answer in answers:
            work = answer.work
            shadow = None if answer.revised else self.shadows.get(work.slot)
            # after a restart a session may use the model that is the shadow of its slot
            if isinstance(work, Solve) and shadow is not None and shadow.engine is not engine:
                self._pending.append((work, answer))
        return answers

    def between(self) -> None:
        """Do what can wait until answers are published: run the shadows."""
        pending, self._pending = self._pending, []
        by_slot: dict[str, dict[int, tuple[Solve, EngineAnswer]]] = {}
        for work, answer in pending:
            by_slot.setdefault(work.slot, {})[work.run] = (work, answer)
        for slot, answered in by_slot.items():
            shadow = self.shadows.get(slot)
            if shadow is None:
                continue
            engine = shadow.engine
            works: list[Work] = [
                replace(work, anytime=False, lag=0) for work, _ in answered.values()
            ]
            try:
                for work, _ in answered.values():
                    if not work.restart and work.run not in shadow.runs:
                        engine.adopt(work.run, self.engine(work.model).window(work.run)[:-1])
                    shadow.runs.add(work.run)
                own: list[EngineAnswer] = []
                for step in steps(works, lambda _, cost=engine.cost: cost):
                    own += engine.solve(step)
            except Exception:
                logs.exception("the shadow broke and is dropped", model=engine.model_info.model)
                self.shadows.pop(slot, None)
                continue
            for mine in own:
                work, answer = answered[mine.work.run]
                if not work.missing:
                    shadow.own.add(mine)
                    shadow.other.add(answer)

    def pack(self, work: Work) -> PackedRun | None:
        """Return a snapshot of the run of ``work``; None while bins are missing.

        After a swap the run needs only the new model, so then there is always one.
        """
        if isinstance(work, SwapModel):
            return self.engine(work.to).pack(work.run)
        engine = self.engine(work.model)
        return None if engine.paused(work.run) else engine.pack(work.run)

    def restore(self, packed: PackedRun) -> None:
        """Restore a run from a snapshot. Raises ProtocolError if array bytes do not match."""
        self.engine(packed.model).restore(packed)

    def keep_warm(self) -> None:
        """Make a hidden step, to keep caches and clocks warm for the next bin."""
        for engine in list(self.engines.values()):
            keep_warm(engine)
