"""The engine: a model file, its moving-horizon estimator, and the estimator's state of every run.

One thread uses it. ``solve`` takes a list of bins, each of another run, and returns their answers
in order; ``batch`` says how many it can use at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numba
import numpy as np
import torch
from numpy.typing import NDArray

from ilqr_service import logs
from ilqr_service.settings import ServiceSettings
from ilqr_service.work import FAILED, Answer, ModelFacts, Work
from ilqr_vae.artifact import Artifact, load_artifact
from ilqr_vae.errors import ConfigError, ServiceError
from ilqr_vae.horizon import Estimate, HorizonState
from ilqr_vae.ilqr import Status

Clock = Callable[[], int]

_ROUND = 16
_MAX_ROUNDS = 24
_STEADY = 1.25


def choose_device(name: str) -> torch.device:
    """``auto`` is cuda where torch sees one, else cpu. Raises ConfigError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError("device", expected="auto, cpu, cuda or cuda:N", got=repr(name)) from error
    if device.type not in {"cpu", "cuda"}:
        raise ConfigError("device", expected="auto, cpu, cuda or cuda:N", got=repr(name))
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            "device", expected=f"one of {torch.cuda.device_count()} CUDA devices", got=repr(name)
        )
    return device


@dataclass(frozen=True, slots=True)
class WarmUp:
    """What warming up took. Times in milliseconds."""

    steps: int
    seconds: float
    first_ms: float
    steady_ms: float


def _array(values: torch.Tensor) -> NDArray[np.float64]:
    """The only row of (1, K), as float64 (K,)."""
    return values[0].detach().cpu().numpy().astype(np.float64, copy=False)


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
        batch: how many runs one call of ``solve`` should bring at most.
    """

    batch = 1

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
        self.device = choose_device(settings.device)
        self._threads = settings.threads
        self._estimator = artifact.estimator(iterations=iterations, horizon=horizon)
        self._clock = clock
        self._states: dict[int, HorizonState] = {}
        self._iteration_ns = 0

    @classmethod
    def load(cls, path: Path, settings: ServiceSettings) -> Engine:
        """From a model file. Raises ArtifactError, ConfigError (device)."""
        device = choose_device(settings.device)
        return cls(load_artifact(path, device=str(device)), settings)

    def __len__(self) -> int:
        """Runs whose state is held."""
        return len(self._states)

    def forget(self, run: int) -> None:
        """Drop a run's state."""
        self._states.pop(run, None)

    def warm_up(self) -> WarmUp:
        """Compile and touch everything: a growing window, a moving one, masked and missing bins.

        Real steps on made-up counts, in rounds, until the typical step is no longer getting faster
        (or a bound is met). To be called in the thread that will solve.

        Raises:
            ServiceError: a solve failed.
        """
        torch.set_num_threads(self._threads)
        numba.set_num_threads(min(self._threads, numba.get_num_threads()))
        rng = np.random.default_rng(0)
        n_units = len(self.facts.unit_names)
        began = self._clock()
        run, steps, first_ns, best_ns, typical = -1, 0, 0, 0, 0
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
                    anytime=True,
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
            typical = int(np.median(spent))
            self._iteration_ns = typical // max(1, self.facts.iterations)
            if round_ >= 2 and typical <= _STEADY * best_ns:
                break
            best_ns = min(best_ns or typical, typical)
        self.forget(run)
        seconds = (self._clock() - began) / 1e9
        return WarmUp(steps, seconds, first_ns / 1e6, typical / 1e6)

    def solve(self, works: list[Work]) -> list[Answer]:
        """Answer bins of different runs. Never raises for what a bin or a state holds: a bin whose
        solve fails is answered with the prediction of the run so far (solver ``FAILED``)."""
        return [self._solve(work) for work in works]

    def _solve(self, work: Work) -> Answer:
        started = self._clock()
        state = None if work.fresh else self._states.get(work.run)
        # Where a state was lost to a failure, the run starts again.
        try:
            state = self._estimator.init(batch=1) if state is None else state
            after, estimate = self._step(state, work)
            solver = Status(int(estimate.status[0])).name.lower()
            if bool(torch.isfinite(estimate.z).all()):
                self._states[work.run] = after
                return self._answer(work, estimate, solver, started)
        except Exception:
            logs.exception("a solve failed", run=work.run, index=work.index)
            solver = FAILED
        return self._predict(work, state, solver, started)

    def _predict(self, work: Work, state: HorizonState | None, solver: str, started: int) -> Answer:
        """The bin as if it had not come; all NaN, and the run starts again, where not even that
        can be had."""
        blind = replace(work, counts=None, mask=None)
        try:
            if state is not None:
                after, estimate = self._step(state, blind)
                if bool(torch.isfinite(estimate.z).all()):
                    self._states[work.run] = after
                    return self._answer(work, estimate, solver, started)
        except Exception:
            logs.exception("a prediction failed", run=work.run, index=work.index)
        self.forget(work.run)
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
        )

    def _step(self, state: HorizonState, work: Work) -> tuple[HorizonState, Estimate]:
        n_units = len(self.facts.unit_names)
        if work.counts is None:
            counts = np.zeros(n_units)
            mask: NDArray[np.bool_] = np.zeros(n_units, dtype=bool)
        else:
            counts = work.counts
            mask = np.ones(n_units, dtype=bool) if work.mask is None else work.mask
        dtype = self._estimator.mean_rate.dtype
        # One more iteration must still fit before the answer is due.
        last_start = work.due_ns - 2 * self._iteration_ns
        return self._estimator.step(
            state,
            torch.from_numpy(counts).unsqueeze(0).to(self.device, dtype),
            torch.from_numpy(mask).unsqueeze(0).to(self.device, dtype),
            stop=(lambda: self._clock() >= last_start) if work.anytime else None,
        )

    def _answer(self, work: Work, estimate: Estimate, solver: str, started: int) -> Answer:
        return Answer(
            work=work,
            latent=_array(estimate.z),
            latent_std=_array(estimate.z_std),
            rates=_array(estimate.rates),
            kinematics=_array(estimate.kinematics),
            kinematics_std=_array(estimate.kinematics_std),
            bits=float(estimate.bits[0]),
            spikes=int(estimate.spikes[0]),
            iterations=int(estimate.iterations[0]),
            solver=solver,
            solve_start_ns=started,
            solve_end_ns=self._clock(),
        )
