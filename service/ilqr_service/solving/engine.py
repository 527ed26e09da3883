"""The engine: a model, its moving-horizon estimator, and the state of each run.

Only one thread may use it. ``solve`` takes a step of the policy, bins of different runs, and
returns their answers. A late bin is inserted into the window, and all bins from it on are answered
again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from msgspec.structs import replace

from ilqr_service import logs
from ilqr_service.settings import ServiceSettings
from ilqr_service.solving.policy import Cost
from ilqr_service.solving.pool import rows_of
from ilqr_service.solving.run import Entry, PackedRun, Run, pack_run, unpack_state, unpack_work
from ilqr_service.solving.stepper import Clock, Stepped, Stepper
from ilqr_service.work import (
    FAILED,
    NO_SOLVE,
    STOPPED,
    EngineAnswer,
    EngineInfo,
    Insert,
    Solve,
    Work,
    budget_of,
)
from ilqr_vae.artifact import Artifact, load_artifact
from ilqr_vae.errors import ServiceError
from ilqr_vae.kernels.backend import device_of
from ilqr_vae.machine import available_memory, cores
from ilqr_vae.model.likelihoods import Counts
from ilqr_vae.streaming.ensemble import Horizon
from ilqr_vae.streaming.fixed_lag import FixedLags
from ilqr_vae.streaming.unit_watch import UnitWatch

NOBODY = -1
"""Runs up to this number belong to no session: they warm up the engine."""
_RUN_SHARE = 0.25
"""Share of the available memory that a run may take."""


def _check_memory(estimator: Horizon, horizon: int) -> None:
    """Raise ServiceError if a run would take too much memory."""
    state = sum(t.nbytes for t in estimator.init(batch=1).tensors())
    needed, most = rows_of(horizon) * state, int(_RUN_SHARE * available_memory())
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
        settings: device, threads, and overrides of horizon and iterations.
        clock: monotonic, nanoseconds.

    Attributes:
        model_info: what sessions need to know about the model.
        manifest: manifest of the model file, for JSON.
        device: device of the computation.
        cost: cost model of steps.
        threads: number of threads per step as set; 0 for all cores.
        clock: monotonic, nanoseconds.
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
        estimator = artifact.estimator(iterations=iterations, horizon=horizon)
        features = manifest.features or ()
        counted = isinstance(estimator.spikes.parts[0], Counts)
        mean_rates = artifact.mean_rate[: len(manifest.unit_names) - len(features)].tolist()
        self.model_info = EngineInfo(
            model=manifest.model_id,
            unit_names=tuple(manifest.unit_names),
            bin_width_ns=round(manifest.bin_width * 1e9),
            latents=manifest.latents,
            kinematic_names=tuple(manifest.kinematic_names),
            kinematic_units=tuple(manifest.kinematic_units),
            horizon=horizon,
            iterations=iterations,
            class_names=tuple(manifest.classes or ()),
            feature_names=features,
            bits_per_spike=manifest.scores.get("bits_per_spike", math.nan),
            mean_rates=tuple(mean_rates) if counted else (),
            lags=FixedLags(estimator).lags,
        )
        self.manifest: dict[str, Any] = msgspec.to_builtins(manifest)
        self.device = device_of(settings.device)
        self.threads, self.clock = settings.threads, clock
        _check_memory(estimator, horizon)
        self._stepper = Stepper(
            estimator, self.model_info, settings.max_sessions, artifact.classes, clock=clock
        )
        most = self._stepper.most(settings.max_sessions, self.threads or cores())
        self.cost = Cost(self.model_info.bin_width_ns, horizon, most)
        self._runs: dict[int, Run] = {}

    @classmethod
    def load(cls, path: Path, settings: ServiceSettings) -> Engine:
        """Load a model file. Raises ArtifactError, ConfigError (device).

        A GPU computes in float32, with sums and pivots in float64; the CPU in float64.
        """
        device = device_of(settings.device)
        dtype = torch.float32 if device.type == "cuda" else torch.float64
        return cls(load_artifact(path, device=str(device), dtype=dtype), settings)

    def __len__(self) -> int:
        """Return the number of runs with a state."""
        return sum(run > NOBODY for run in self._runs)

    def forget(self, run: int) -> None:
        """Drop the state of a run."""
        self._runs.pop(run, None)

    def window(self, run: int) -> list[Solve]:
        """Return the bins in the window of a run, oldest first."""
        found = self._runs.get(run)
        return [] if found is None else [e.work for e in found.entries]

    def watched(self, run: int) -> UnitWatch | None:
        """Return the unit watch of a run before its window; None if units are not watched."""
        found = self._runs.get(run)
        return None if found is None or not found.entries else found.entries[0].watch

    def flagged(self, run: int) -> tuple[str, ...]:
        """Return ``NAME:reason`` of a run's masked units."""
        found = self._runs.get(run)
        if found is None or found.watch is None:
            return ()
        return found.watch.flagged(self.model_info.unit_names)

    def adopt(
        self, run: int, works: list[Solve], serial: int = -1, watch: UnitWatch | None = None
    ) -> None:
        """Start a run from its bins under another model, and the unit watch before them."""
        self.forget(run)
        if not works:
            return
        if watch is None and works[0].watch:
            watch = UnitWatch.fresh(self.model_info.counted)
        self._begin(run, works, watch, serial)

    def _begin(self, run: int, works: list[Solve], watch: UnitWatch | None, serial: int) -> None:
        """Solve bins from the initial state, without the clock.

        ``serial`` is that of the newest work in them.
        """
        self._runs[run] = Run(self.model_info.horizon, self._stepper.initial, watch)
        model = self.model_info.model
        for work in works:
            again = replace(work, restart=False, anytime=False, budget=0, model=model)
            self.solve([again])
        found = self._runs.get(run)
        if found is not None:  # a failed solve may lose it
            found.serial = serial

    def paused(self, run: int) -> bool:
        """Return whether the newest bins of a run are missing."""
        return (found := self._runs.get(run)) is not None and found.paused is not None

    def pack(self, run: int) -> PackedRun | None:
        """Return a snapshot of a run; None if there is no such run."""
        found = self._runs.get(run)
        return found and pack_run(run, self.model_info.model, found, self._stepper.pool)

    def restore(self, packed: PackedRun) -> None:
        """Restore a run from a snapshot.

        From a snapshot with another horizon only the bins are used: the window is solved again.
        Raises ProtocolError if array bytes do not match.
        """
        state, watch = unpack_state(packed, self.device)
        if not self._stepper.pool.takes(state):
            logs.warning(
                "a snapshot with another horizon: its bins are solved anew", run=packed.run
            )
            works = [one for one in map(unpack_work, packed.works) if isinstance(one, Solve)]
            self._begin(packed.run, works, watch, packed.serial)
            return
        (row,) = self._stepper.pool.put(state)
        found = Run(self.model_info.horizon, row, watch)
        self._runs[packed.run] = found
        for one in map(unpack_work, packed.works):
            if isinstance(one, Solve):  # with the recorded iterations, not by the clock
                self.solve([replace(one, restart=False, anytime=False)])
        found.serial = packed.serial

    def solve(self, step: Sequence[Work]) -> list[EngineAnswer]:
        """Answer a step of the policy (see ``policy.steps``).

        A step holds bins of different runs, all with a solve or all without, or one late bin.

        Never raises for the contents of a bin or state: a bin whose solve fails is answered with
        the prediction of the run so far (solver ``FAILED``).
        """
        answers: list[EngineAnswer] = []
        for work in step:
            if isinstance(work, Insert):
                answers += self._insert(work)
        bins = [work for work in step if isinstance(work, Solve)]
        return answers + (self._solve(bins, bins[0].budget == NO_SOLVE) if bins else [])

    def _solve(self, works: list[Solve], shed: bool) -> list[EngineAnswer]:
        started = self.clock()
        # After a failure that lost its state, the run restarts.
        runs = [self._run_of(work) for work in works]
        step = self._stepper.predict_only if shed else self._stepper.step
        try:
            stepped = step([run.state for run in runs], works, [run.watch for run in runs])
        except Exception:
            if len(works) > 1:  # retry one by one, so that one bad run does not fail the step
                return [answer for work in works for answer in self._solve([work], shed)]
            logs.exception("a solve failed", run=works[0].run, index=works[0].index)
            return self._predict(works[0], runs[0], FAILED, started)
        if works[0].run > NOBODY and not shed:
            self.cost.learn(len(works), self.clock() - started)
        return [
            answer
            for run, work, one in zip(runs, works, stepped, strict=True)
            for answer in (
                self._keep(run, work, one, one.answer)
                if one.finite
                else self._predict(work, run, one.answer.solver, started)
            )
        ]

    def _run_of(self, work: Solve) -> Run:
        found = None if work.restart else self._runs.get(work.run)
        if found is not None and work.rewind:
            found = found.before(work.index)
        if found is not None:
            return found
        # It starts, or restarts after a failure that lost its state.
        watch = UnitWatch.fresh(self.model_info.counted) if work.watch else None
        return Run(self.model_info.horizon, self._stepper.initial, watch)

    def _keep(
        self, found: Run, work: Solve, stepped: Stepped, answer: EngineAnswer
    ) -> list[EngineAnswer]:
        """Add a solved bin to its run; answer first the bin that waited for it, then this one."""
        before, watch = found.watch, found.watch
        if before is not None:
            watch = before.after(work.counts, work.mask, answer.rates)
            names = self.model_info.unit_names
            answer = replace(
                answer, flags=watch.changes(before, names), flagged=watch.flagged(names)
            )
        kept = replace(work, rewind=False) if work.rewind else work
        if work.budget or stepped.answer.solver == STOPPED:
            kept = replace(kept, budget=budget_of(stepped.answer))
        if work.rewind and not found.entries:  # its model was changed meanwhile
            answer = replace(answer, restarted=True)
        remembered = (answer, stepped.later) if work.lag else (None, None)
        found.add(Entry(kept, found.state, before, *remembered), stepped.after, watch)
        found.serial = max(found.serial, work.serial)
        self._runs[work.run] = found
        return [*self._waited(found, work.lag), answer]

    def _waited(self, found: Run, lag: int) -> list[EngineAnswer]:
        """Return the fixed-lag answer for the bin ``lag`` bins before the newest.

        None if the run, or its estimate, started after it.
        """
        lag = min(lag, self.model_info.lags)
        if not lag or len(found.entries) <= lag:
            return []
        first, newest = found.entries[-1 - lag], found.entries[-1]
        answers = [entry.answer for entry in list(found.entries)[-lag:]]
        if any(answer is None or answer.restarted for answer in answers):
            return []
        if first.answer is None or first.later is None or newest.later is None:
            return []
        was, now = first.answer, newest.answer
        assert now is not None  # checked above
        moved = newest.later.projected[lag] - first.later.projected[0]
        return [
            replace(
                was,
                latent=newest.later.latents[lag - 1],
                rates=newest.later.rates[lag - 1],
                kinematics=was.kinematics + moved,
                kinematics_std=was.kinematics_std * self._stepper.fixed_lags.scales[lag - 1],
                solve_start_ns=now.solve_start_ns,
                solve_end_ns=now.solve_end_ns,
                revised=True,
                settles=False,
                flags=(),
                flagged=None,
                due_ns=now.due_ns or now.work.due_ns,
                serial=now.serial,
                members=None,
            )
        ]

    def _insert(self, work: Insert) -> list[EngineAnswer]:
        """Insert a late bin; return all answers from it on, or one that is void."""
        found = self._runs.get(work.run)
        place = None if found is None else found.place(work.index)
        if found is not None and place is not None:
            entries = list(found.entries)
            again = Run(found.size, entries[place].before, entries[place].watch, found.serial)
            again.entries.extend(entries[:place])
            fields = {name: getattr(work, name) for name in Insert.__struct_fields__}
            works = [Solve(**fields, restart=entries[place].work.restart)]
            works += [replace(e.work, budget=0, anytime=False) for e in entries[place + 1 :]]
            answers: list[EngineAnswer] = []
            solved = 0
            try:
                for one in works:
                    (stepped,) = self._stepper.step([again.state], [one], [again.watch])
                    if not stepped.finite:
                        break
                    solved += 1
                    answers += [
                        replace(
                            answer,
                            revised=True,
                            settles=False,
                            flags=(),
                            due_ns=work.due_ns,
                            serial=work.serial,
                        )
                        for answer in self._keep(again, one, stepped, stepped.answer)
                    ]
            except Exception:
                logs.exception("a late bin could not be solved", run=work.run, index=work.index)
            if solved == len(works):
                flags = ()
                if again.watch is not None and found.watch is not None:
                    flags = again.watch.changes(found.watch, self.model_info.unit_names)
                again.serial = work.serial
                answers[-1] = replace(answers[-1], settles=True, flags=flags)
                return answers
            self._runs[work.run] = found
            found.serial = work.serial
        now = self.clock()
        return [replace(self._nothing(work, FAILED, now), void=True, revised=True)]

    def _predict(self, work: Solve, found: Run, solver: str, started: int) -> list[EngineAnswer]:
        """Answer a bin as if it were missing.

        If even that fails, the answer is all NaN and the run restarts.
        """
        blind = replace(work, counts=None, mask=None, anytime=False, budget=0)
        try:
            (stepped,) = self._stepper.step([found.state], [blind], [found.watch])
            if stepped.finite:
                answer = replace(stepped.answer, work=work, solver=solver, solve_start_ns=started)
                return self._keep(found, blind, stepped, answer)
        except Exception:
            logs.exception("a prediction failed", run=work.run, index=work.index)
        self.forget(work.run)
        return [self._nothing(work, solver, started)]

    def _nothing(self, work: Solve | Insert, solver: str, started: int) -> EngineAnswer:
        n, d = self.model_info.latents, len(self.model_info.kinematic_names)
        classes = len(self.model_info.class_names)
        return EngineAnswer(
            work=work,
            latent=np.full(n, np.nan),
            latent_std=np.full(n, np.nan),
            rates=np.full(len(self.model_info.unit_names), np.nan),
            kinematics=np.full(d, np.nan),
            kinematics_std=np.full(d, np.nan),
            bits=0.0,
            spikes=0,
            iterations=0,
            solver=solver,
            solve_start_ns=started,
            solve_end_ns=self.clock(),
            model=self.model_info.model,
            serial=work.serial,
            classes=np.full(classes, np.nan) if classes else None,
        )
