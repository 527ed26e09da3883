"""The engine: a model file, its moving-horizon estimator, and the estimator's state of every run.

One thread uses it. ``solve`` takes a list of bins, each of another run, and returns their answers;
``batch`` says how many it can use at once. A bin that comes late is put into the window and every
bin from it on is answered again.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from msgspec.structs import replace

from ilqr_service import logs
from ilqr_service.settings import ServiceSettings
from ilqr_service.solving.run import Entry, PackedRun, Run, pack_run, unpack_state, unpack_work
from ilqr_service.solving.stepper import Clock, Cost, Stepped, Stepper
from ilqr_service.work import FAILED, NO_SOLVE, SHED, STOPPED, Answer, ModelFacts, Work
from ilqr_vae.artifact import Artifact, load_artifact
from ilqr_vae.errors import ServiceError
from ilqr_vae.kernels.backend import device_of
from ilqr_vae.machine import available_memory
from ilqr_vae.streaming.horizon import MovingHorizon
from ilqr_vae.streaming.unit_watch import UnitWatch

_NOBODY = -1
_ROUND = 16
_MAX_ROUNDS = 24
_STEADY = 1.25
_WARM_S = 20.0
"""The longest that the steps of a warm-up may take, without the first, which compiles."""
_RUN_SHARE = 0.25
"""Of the memory that is available, what one run may take."""

SHARE = 8
"""A step takes no more bins than are solved in a bin width divided by this: so long may a bin that
has just come wait for others."""


@dataclass(frozen=True, slots=True)
class WarmUp:
    """What warming up took. Times in milliseconds."""

    steps: int
    seconds: float
    first_ms: float
    steady_ms: float


def _check_memory(estimator: MovingHorizon, horizon: int) -> None:
    """Raises ServiceError where one run would take too much memory."""
    state = sum(t.nbytes for t in estimator.init(batch=1).tensors())
    needed, most = (horizon + 2) * state, int(_RUN_SHARE * available_memory())
    if needed > most:
        raise ServiceError(
            "model",
            expected=f"one whose run takes at most {most >> 20} MB",
            got=f"{needed >> 20} MB for a window of {horizon} bins",
        )


class Engine:
    """Solves bins.

    Args:
        artifact: the loaded model.
        settings: device, threads, and what overrides the model's own horizon and iterations.
        clock: nanoseconds; monotonic.

    Attributes:
        facts: what the sessions must know of the model.
        manifest: the model file's manifest, JSON-like.
        device: where it computes.
        cost: of a step.
        threads: to share a step among, as set; 0 is all cores.
    """

    def __init__(
        self,
        artifact: Artifact,
        settings: ServiceSettings | None = None,
        *,
        clock: Clock = time.monotonic_ns,
    ) -> None:
        settings = settings or ServiceSettings()
        manifest = artifact.manifest
        horizon = settings.horizon or manifest.horizon.horizon
        iterations = settings.iterations or manifest.horizon.iterations
        self.facts = ModelFacts(
            model=manifest.model_id,
            unit_names=tuple(manifest.unit_names),
            bin_width_ns=round(manifest.bin_width * 1e9),
            latents=manifest.latents,
            kinematic_names=tuple(manifest.kinematic_names),
            kinematic_units=tuple(manifest.kinematic_units),
            horizon=horizon,
            iterations=iterations,
        )
        self.manifest: dict[str, Any] = msgspec.to_builtins(manifest)
        self.device = device_of(settings.device)
        self.cost = Cost()
        self.threads, self._most = settings.threads, settings.max_sessions
        estimator = artifact.estimator(iterations=iterations, horizon=horizon)
        _check_memory(estimator, horizon)
        self._stepper = Stepper(estimator, self.facts, self._most, clock=clock)
        self._clock = clock
        self._runs: dict[int, Run] = {}

    @classmethod
    def load(cls, path: Path, settings: ServiceSettings) -> Engine:
        """From a model file. Raises ArtifactError, ConfigError (device)."""
        device = device_of(settings.device)
        return cls(load_artifact(path, device=str(device)), settings)

    def __len__(self) -> int:
        """Runs whose state is held."""
        return len(self._runs) - (_NOBODY in self._runs)

    @property
    def slice_ns(self) -> float:
        """The longest that one step should take."""
        return self.facts.bin_width_ns / SHARE

    @property
    def batch(self) -> int:
        """How many runs are solved in that time; 1 where each is solved alone."""
        if not self._stepper.batches:
            return 1
        room = (self.slice_ns - self.cost.ns(1)) / (self.cost.ns(2) - self.cost.ns(1))
        return max(1, min(self._most, 1 + int(room)))

    def forget(self, run: int) -> None:
        """Drop a run's state."""
        self._runs.pop(run, None)

    def window(self, run: int) -> list[Work]:
        """The bins held of a run, oldest first."""
        held = self._runs.get(run)
        return [] if held is None else [e.work for e in held.entries]

    def watched(self, run: int) -> UnitWatch | None:
        """What was known of a run's units before the bins held; None where they are not watched."""
        held = self._runs.get(run)
        return None if held is None or not held.entries else held.entries[0].watch

    def flagged(self, run: int) -> tuple[str, ...]:
        """``NAME:reason`` of a run's masked units."""
        held = self._runs.get(run)
        return (
            () if held is None or held.watch is None else held.watch.flagged(self.facts.unit_names)
        )

    def adopt(
        self, run: int, works: list[Work], serial: int = -1, watch: UnitWatch | None = None
    ) -> None:
        """Begin a run from the bins that another model held of it, and from what was known of its
        units before them."""
        self.forget(run)
        if not works:
            return
        if watch is None and works[0].watch:
            watch = UnitWatch.fresh(len(self.facts.unit_names))
        self._begin(run, works, watch, serial)

    def _begin(self, run: int, works: list[Work], watch: UnitWatch | None, serial: int) -> None:
        """Solve bins anew, whatever the clock said then, from the state that every run begins
        with; ``serial`` of the newest work in them."""
        self._runs[run] = Run(self.facts.horizon, self._stepper.fresh, watch)
        model = self.facts.model
        for work in works:
            again = replace(work, fresh=False, late=False, anytime=False, budget=0, model=model)
            self._solve([again])
        held = self._runs.get(run)
        if held is not None:  # a solve that fails may lose it
            held.serial = serial

    def keep_warm(self) -> None:
        """A step that nobody sees, on the run that ``warm_up`` uses."""
        n_units = len(self.facts.unit_names)
        fresh = _NOBODY not in self._runs
        self._solve([Work(_NOBODY, 0, np.ones(n_units), None, fresh, 0, 0, 2**62, False)])

    def pack(self, run: int) -> PackedRun | None:
        """A run as a snapshot keeps it; None where nothing is held."""
        held = self._runs.get(run)
        return None if held is None else pack_run(run, self.facts.model, held, self._stepper.pool)

    def restore(self, packed: PackedRun) -> None:
        """Take up a run from a snapshot. One that was made with another horizon gives the bins
        alone: the window is solved anew. Raises ProtocolError: bytes that do not fit."""
        state, watch = unpack_state(packed, self.device)
        if not self._stepper.pool.takes(state):
            logs.warning(
                "a snapshot with another horizon: its bins are solved anew", run=packed.run
            )
            works = [unpack_work(one) for one in packed.works]
            self._begin(packed.run, works, watch, packed.serial)
            return
        (row,) = self._stepper.pool.put(state)
        held = Run(self.facts.horizon, row, watch)
        self._runs[packed.run] = held
        for one in packed.works:
            # as it was solved then, whatever the clock says now
            self.solve([replace(unpack_work(one), fresh=False, late=False, anytime=False)])
        held.serial = packed.serial

    def warm_up(self) -> WarmUp:
        """Compile and touch everything: a growing window, a moving one, and bins of all
        kinds.

        Real steps on made-up counts, in rounds, until the typical step is no longer getting faster
        (or a bound is met). To be called in the thread that will solve.

        Raises:
            ServiceError: a solve failed, or a window takes too long to fill.
        """
        torch.set_num_threads(1)  # the kernels have the cores; torch would only be in their way
        rng = np.random.default_rng(0)
        n_units = len(self.facts.unit_names)
        began = self._clock()
        run, steps, first_ns, best_ns, typical = _NOBODY, 0, 0, 0, 0
        rates = np.ones(n_units)
        for round_ in range(_MAX_ROUNDS):
            spent: list[int] = []
            for k in range(max(_ROUND, self.facts.horizon + 4)):
                mask = None if k % 8 else rng.random(n_units) < 0.8
                work = Work(
                    run=run,
                    index=steps,
                    counts=None if k % 8 == 4 else rng.poisson(rates).astype(np.float64),
                    mask=mask,
                    # every other round grows a window afresh
                    fresh=k == 0 and round_ % 2 == 0,
                    source_ns=0,
                    received_ns=0,
                    due_ns=2**62,
                    anytime=k % 8 == 6,
                    budget=NO_SOLVE if k % 8 == 2 else 0,
                )
                (answer,) = self.solve([work])
                if answer.solver == FAILED:
                    raise ServiceError(
                        "model", expected="one whose solves succeed", got="a failed solve (see log)"
                    )
                rates = np.nan_to_num(answer.rates, nan=1.0).clip(0.0, 10.0)
                spent.append(answer.solve_end_ns - answer.solve_start_ns)
                first_ns = first_ns or spent[0]
                steps += 1
                if self._clock() - began - first_ns > _WARM_S * 1e9:
                    break
            if steps <= self.facts.horizon:
                raise ServiceError(
                    "model",
                    expected=f"a window of {self.facts.horizon} bins that fills in {_WARM_S:g} s",
                    got=f"{steps} bins",
                )
            typical = int(np.median(spent))
            late = self._clock() - began - first_ns > _WARM_S * 1e9
            if late or (round_ >= 2 and typical <= _STEADY * best_ns):
                break
            best_ns = min(best_ns or typical, typical)
        self.cost = Cost(0.0, float(max(typical, 1)))
        bins, many = self._fill()
        self.cost = Cost.measured(float(typical), many, bins)
        seconds = (self._clock() - began) / 1e9
        return WarmUp(steps, seconds, first_ns / 1e6, typical / 1e6)

    def _fill(self) -> tuple[int, float]:
        """Steps of more and more runs, up to what fits; the last number and what it takes."""
        size, took = 1, self.cost.ns(1)
        counts = np.ones(len(self.facts.unit_names))
        while self._stepper.batches and size < self._most and took < self.slice_ns:
            size = min(2 * size, self._most)
            spent: list[int] = []
            for k in range(5):
                works = [
                    Work(_NOBODY - r, k, counts, None, k == 0, 0, 0, 2**62, False)
                    for r in range(size)
                ]
                started = self._clock()
                self._solve(works)
                spent.append(self._clock() - started)
            took = float(np.median(spent))
        for r in range(size):
            self.forget(_NOBODY - r)
        return size, took

    def solve(self, works: list[Work]) -> list[Answer]:
        """Answer bins of different runs, the late ones last; the others in one step where that
        changes no bit. Never raises for what a bin or a state holds: a bin whose solve fails is
        answered with the prediction of the run so far (solver ``FAILED``)."""
        answers: list[Answer] = []
        size = self._most if self._stepper.batches else 1
        for shed in (False, True):
            bins = [w for w in works if not w.late and (w.budget == NO_SOLVE) == shed]
            for first in range(0, len(bins), size):
                answers += self._solve(bins[first : first + size], shed)
        for work in works:
            if work.late:
                answers += self._insert(work)
        return answers

    def _solve(self, works: list[Work], shed: bool = False) -> list[Answer]:
        started = self._clock()
        # Where a state was lost to a failure, the run starts again.
        runs = [self._run_of(work) for work in works]
        step = self._stepper.pass_by if shed else self._stepper.step
        try:
            stepped = step([run.state for run in runs], works, [run.watch for run in runs])
        except Exception:
            if len(works) > 1:  # whichever it was, the others are not to know
                return [answer for work in works for answer in self._solve([work], shed)]
            logs.exception("a solve failed", run=works[0].run, index=works[0].index)
            return [self._predict(works[0], runs[0], FAILED, started)]
        if works[0].run > _NOBODY and not shed:
            self.cost.learn(len(works), self._clock() - started)
        return [
            self._keep(run, work, one)
            if one.sound
            else self._predict(work, run, one.answer.solver, started)
            for run, work, one in zip(runs, works, stepped, strict=True)
        ]

    def _run_of(self, work: Work) -> Run:
        held = None if work.fresh else self._runs.get(work.run)
        if held is not None:
            return held
        # It begins; or, where its state was lost to a failure, begins again.
        watch = UnitWatch.fresh(len(self.facts.unit_names)) if work.watch else None
        return Run(self.facts.horizon, self._stepper.fresh, watch)

    def _keep(self, held: Run, work: Work, stepped: Stepped) -> Answer:
        """Put a solved bin into its run and answer it."""
        answer = stepped.answer
        before, watch = held.watch, held.watch
        if before is not None:
            watch = before.after(work.counts, work.mask, answer.rates)
            names = self.facts.unit_names
            answer = replace(
                answer, flags=watch.changes(before, names), flagged=watch.flagged(names)
            )
        kept = work
        if work.late or work.budget or answer.solver == STOPPED:
            budget = {STOPPED: answer.iterations, SHED: NO_SOLVE}.get(answer.solver, 0)
            kept = replace(work, budget=budget, late=False)
        held.add(Entry(kept, held.state, before), stepped.after, watch)
        held.serial = max(held.serial, work.serial)
        self._runs[work.run] = held
        return answer

    def _insert(self, work: Work) -> list[Answer]:
        """Put a late bin in its place; all answers from there on, or one that is void."""
        held = self._runs.get(work.run)
        place = None if held is None else held.place(work.index)
        if held is not None and place is not None:
            entries = list(held.entries)
            again = Run(held.size, entries[place].before, entries[place].watch, held.serial)
            again.entries.extend(entries[:place])
            works = [replace(work, fresh=entries[place].work.fresh, anytime=False)]
            works += [replace(e.work, budget=0, anytime=False) for e in entries[place + 1 :]]
            answers: list[Answer] = []
            try:
                for one in works:
                    (stepped,) = self._stepper.step([again.state], [one], [again.watch])
                    if not stepped.sound:
                        break
                    answer = self._keep(again, one, stepped)
                    answers.append(
                        replace(
                            answer,
                            revised=True,
                            settles=False,
                            flags=(),
                            due_ns=work.due_ns,
                            serial=work.serial,
                        )
                    )
            except Exception:
                logs.exception("a late bin could not be solved", run=work.run, index=work.index)
            if len(answers) == len(works):
                flags = ()
                if again.watch is not None and held.watch is not None:
                    flags = again.watch.changes(held.watch, self.facts.unit_names)
                again.serial = work.serial
                answers[-1] = replace(answers[-1], settles=True, flags=flags)
                return answers
            self._runs[work.run] = held
            held.serial = work.serial
        now = self._clock()
        return [replace(self._nothing(work, FAILED, now), void=True, revised=True)]

    def _predict(self, work: Work, held: Run, solver: str, started: int) -> Answer:
        """The bin as if it had not come; all NaN, and the run starts again, where not even that
        can be had."""
        blind = replace(work, counts=None, mask=None, anytime=False, budget=0)
        try:
            (stepped,) = self._stepper.step([held.state], [blind], [held.watch])
            if stepped.sound:
                answer = self._keep(held, blind, stepped)
                return replace(answer, work=work, solver=solver, solve_start_ns=started)
        except Exception:
            logs.exception("a prediction failed", run=work.run, index=work.index)
        self.forget(work.run)
        return self._nothing(work, solver, started)

    def _nothing(self, work: Work, solver: str, started: int) -> Answer:
        n, d = self.facts.latents, len(self.facts.kinematic_names)
        return Answer(
            work=work,
            latent=np.full(n, np.nan),
            latent_std=np.full(n, np.nan),
            rates=np.full(len(self.facts.unit_names), np.nan),
            kinematics=np.full(d, np.nan),
            kinematics_std=np.full(d, np.nan),
            bits=0.0,
            spikes=0,
            iterations=0,
            solver=solver,
            solve_start_ns=started,
            solve_end_ns=self._clock(),
            model=self.facts.model,
            serial=work.serial,
        )
