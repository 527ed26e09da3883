"""One estimator step for the bins of many runs.

Runs do not affect each other's answers. The compiled step works stream by stream, so that an answer
is bit-identical alone and in any batch; in torch, on a GPU, it agrees to rounding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from ilqr_service.solving.pool import Pool, Row, rows_of
from ilqr_service.work import SHED, EngineAnswer, EngineInfo, Solve
from ilqr_vae.inference import ilqr
from ilqr_vae.inference.compiled import Array
from ilqr_vae.inference.problem import Status
from ilqr_vae.kernels.cpu.arguments import Estimates, Streams
from ilqr_vae.model.classes import ClassReadout
from ilqr_vae.streaming.compiled import Rows, States
from ilqr_vae.streaming.ensemble import Horizon, windows_of
from ilqr_vae.streaming.fixed_lag import FixedLags, Later
from ilqr_vae.streaming.state import INPUT_DELAY, Estimate, HorizonState
from ilqr_vae.streaming.unit_watch import UnitWatch

Clock = Callable[[], int]

STREAMS = 16
"""Streams of a compiled step per thread. The arrays of 16 stay in a core's caches between
iterations; of 64, each takes a quarter longer."""

_STATUS = {int(status): status.name.lower() for status in Status}


class Stepped(Struct, frozen=True, gc=False):
    """The result for the bin of one run.

    Attributes:
        after: state of the run after it.
        answer: answer to the bin.
        finite: whether the estimate is finite; if not, only ``solver`` of ``answer`` is valid.
        later: fixed-lag estimates of earlier bins, if asked for.
    """

    after: Row
    answer: EngineAnswer
    finite: bool
    later: Later | None = None


def _doubles(values: Array) -> NDArray[np.float64]:
    return values.astype(np.float64, copy=False)


class Stepper:
    """Runs steps of an estimator.

    Args:
        estimator: estimator of the model.
        model_info: description of the model.
        streams: expected number of runs, for the memory to reserve.
        classes: discrete output of the model, or None.
        clock: monotonic, nanoseconds.

    Attributes:
        pool: states of all runs.
        initial: initial state of every run.
        fixed_lags: readout of fixed-lag answers.
        separate: whether answers are bit-identical alone and in a batch.
    """

    def __init__(
        self,
        estimator: Horizon,
        model_info: EngineInfo,
        streams: int,
        classes: ClassReadout | None = None,
        *,
        clock: Clock = time.monotonic_ns,
    ) -> None:
        self._estimator, self._facts, self._clock = estimator, model_info, clock
        self._classes = classes
        initial = estimator.init(batch=1)
        # a window of states for each run, the one before a pause, and the current batch
        self.pool = Pool(initial, rows_of(model_info.horizon) * streams)
        (self.initial,) = self.pool.put(initial)
        like = estimator.mean_rate
        self._device = like.device
        self._number = torch.empty(0, dtype=like.dtype).numpy().dtype
        # work on numpy arrays: wrapping each in a tensor would cost a tenth of a step
        self._compiled = estimator.compiled(like)
        self._delay = min(INPUT_DELAY, model_info.horizon - 1)
        self._limits = estimator.bounds.counts.cpu().numpy()
        scaling = estimator.spikes.scaling
        self._scaling = scaling and tuple(t.to(like).cpu().numpy() for t in scaling)
        self.fixed_lags = FixedLags(estimator)
        self._windows = windows_of(estimator)
        self.separate = self._compiled is not None

    def most(self, sessions: int, threads: int) -> int:
        """Return the largest number of runs in a step; 1 if a batch may affect the last bits."""
        if self._device.type == "cuda":
            return sessions
        if not self.separate:
            return 1
        return min(sessions, max(1, STREAMS * threads // len(self._windows)))

    def step(
        self, states: Sequence[Row], works: Sequence[Solve], watches: Sequence[UnitWatch | None]
    ) -> list[Stepped]:
        """Step one bin of each run.

        Args:
            states: states before the bins.
            works: bins of different runs.
            watches: unit watches; masked units are not used.

        Raises:
            ValueError: counts or a mask have the wrong size.
        """
        started = self._clock()
        given, stop = self._given(works, watches), self._stop(works, started)
        if self._compiled is None:
            before = self.pool.get(states)
            rows, estimate = self._put(*self._estimator.step(before, *self._moved(*given), stop))
        else:
            rows, to = self._rows(states)
            estimate = self._compiled.step(*to, *given, ilqr.stopping(stop))
        answers, finite = self._answers(works, given, estimate, started, self._inputs(rows))
        later = self._later(works, finite, estimate)
        return [Stepped(*one) for one in zip(rows, answers, finite, later, strict=True)]

    def _rows(self, states: Sequence[Row]) -> tuple[list[Row], tuple[States, Rows]]:
        """Reserve rows for the next states; return where the compiled step reads and writes."""
        rows = self.pool.take(len(states))
        arrays = Streams(*self.pool.views())
        before, after = (np.array([row.at for row in these]) for these in (states, rows))
        return rows, ((arrays, arrays), (before, after))

    def _put(self, after: HorizonState, estimate: Estimate) -> tuple[list[Row], Estimates]:
        """Store the states; return the estimate of the compiled step."""
        names = Estimates._fields
        return self.pool.put(after), Estimates(
            *(getattr(estimate, name).detach().cpu().numpy() for name in names)
        )

    def _inputs(self, rows: Sequence[Row]) -> Array:
        """Return inputs (S, m) ``_delay`` bins before the newest, NaN if there is none.

        For an ensemble, those of the first member.
        """
        arrays, at = Streams(*self.pool.views()), np.array([row.at for row in rows])
        if self._device.type != "cpu":
            return self._inputs_there(arrays, torch.as_tensor(at, device=self._device))
        age, u = arrays.age, arrays.u
        if age.ndim == 2:
            age, u = age[:, 0], u[:, 0]
        slot = age[at] - 1 - self._delay
        picked = _doubles(u[at, np.maximum(slot, 0)])
        picked[slot < 0] = np.nan
        return picked

    def _inputs_there(self, tensors: Streams, at: torch.Tensor) -> Array:
        """Return ``_inputs`` of rows on a GPU, copying only the inputs."""
        age, u = tensors.age, tensors.u
        if age.ndim == 2:
            age, u = age[:, 0], u[:, 0]
        slot = age[at] - 1 - self._delay
        picked = u[at, slot.clamp(min=0)].double()
        return torch.where(slot.unsqueeze(1) < 0, torch.nan, picked).cpu().numpy()

    def _moved(self, counts: Array, mask: Array) -> tuple[torch.Tensor, torch.Tensor]:
        """Move to the device of the model."""
        given = torch.from_numpy(counts), torch.from_numpy(mask)
        return given[0].to(self._device), given[1].to(self._device)

    def predict_only(
        self, states: Sequence[Row], works: Sequence[Solve], watches: Sequence[UnitWatch | None]
    ) -> list[Stepped]:
        """Step one bin of each run without a solve; otherwise as ``step``.

        The answers are predictions, without uncertainty or bits.
        """
        started = self._clock()
        given = self._given(works, watches)
        if self._compiled is None:
            before = self.pool.get(states)
            rows, estimate = self._put(*self._estimator.predict_only(before, *self._moved(*given)))
        else:
            rows, to = self._rows(states)
            estimate = self._compiled.predict_only(*to, *given)
        answers, finite = self._answers(works, given, estimate, started, None)
        later = self._later(works, finite, estimate)
        return [
            Stepped(row, replace(answer, solver=SHED, bits=0.0, spikes=0), good, of_earlier)
            for row, answer, good, of_earlier in zip(rows, answers, finite, later, strict=True)
        ]

    def _later(
        self, works: Sequence[Solve], finite: Sequence[bool], estimates: Estimates
    ) -> list[Later | None]:
        """Return fixed-lag estimates of earlier bins, for the runs that ask for them."""
        lags = self.fixed_lags
        return [
            lags.after(_doubles(window)) if lags.lags and work.lag and good else None
            for work, good, window in zip(works, finite, estimates.window, strict=True)
        ]

    def _given(
        self, works: Sequence[Solve], watches: Sequence[UnitWatch | None]
    ) -> tuple[Array, Array]:
        """Return counts and mask (S, N) of bins."""
        shape = (len(works), len(self._facts.unit_names))
        counts, mask = np.empty(shape, self._number), np.ones(shape, self._number)
        for i, (work, watch) in enumerate(zip(works, watches, strict=True)):
            if work.counts is None:
                counts[i] = mask[i] = 0
                continue
            counts[i] = work.counts
            if work.mask is not None:
                mask[i] = work.mask
            if watch is not None:
                mask[i, np.flatnonzero(watch.masked)] = 0
        return counts, mask

    def _stop(self, works: Sequence[Solve], started: int) -> Callable[[], NDArray[np.bool_]] | None:
        """Return which solves to stop; called before each iteration after the first."""
        timed_too = self._device.type != "cuda"  # on a GPU one launch is a whole step
        for work in works:
            if work.budget or (work.anytime and timed_too):
                break
        else:
            return None
        budget = np.array([work.budget or 2**31 for work in works])
        timed = np.array([work.anytime and not work.budget for work in works])
        due = np.array([work.due_ns for work in works])
        done = 0

        def stop() -> NDArray[np.bool_]:
            nonlocal done
            done += 1
            # Another iteration and the answer must still fit before the due time.
            now = self._clock()
            return (done >= budget) | (timed & (now + 2 * (now - started) // done >= due))

        return stop

    def _answers(
        self,
        works: Sequence[Solve],
        given: tuple[Array, Array],
        estimates: Estimates,
        started: int,
        inputs: Array | None,
    ) -> tuple[list[EngineAnswer], list[bool]]:
        """Return the answers, and which are finite; ``given``: counts and mask; ``inputs`` (S,
        m).
        """
        e, ended = estimates, self._clock()
        z = _doubles(e.window[:, : self._facts.latents])
        # torch would release the interpreter lock
        z_std = _doubles(np.sqrt(e.z_cov.diagonal(axis1=1, axis2=2)))
        rates, kinematics = _doubles(e.rates), _doubles(e.kinematics)
        kinematics_std = _doubles(e.kinematics_std)
        # z is of the first member, rates and kinematics are of all
        sound = [np.isfinite(x).all(-1) for x in (z, rates, kinematics)]
        finite: list[bool] = np.logical_and.reduce(sound).tolist()
        known: list[bool] = [False] * len(z)
        if inputs is not None:
            known = np.isfinite(inputs).all(-1).tolist()  # pyright: ignore[reportAssignmentType]
        members = None
        if len(self._windows) > 1:
            n = self._facts.latents
            parts = [e.window[:, part.start : part.start + n] for part in self._windows]
            members = _doubles(np.stack(parts, 1))
        every: list[bool] = (given[1] > 0).all(-1).tolist()  # pyright: ignore[reportAssignmentType]
        classes = None if self._classes is None else self._classes.probabilities(e.window)
        scalars = [v.tolist() for v in e[Estimates._fields.index("bits") :]]
        answers = [
            EngineAnswer(
                work=work,
                latent=z[i],
                latent_std=z_std[i],
                rates=rates[i],
                kinematics=kinematics[i],
                kinematics_std=kinematics_std[i],
                bits=bits,
                spikes=int(spikes),
                iterations=iterations,
                solver=_STATUS[status],
                solve_start_ns=started,
                solve_end_ns=ended,
                model=self._facts.model,
                serial=work.serial,
                ignored=self._ignored(given[0][i], given[1][i]) if ignored else (),
                beyond=beyond,
                restarted=restarted,
                inputs=inputs[i] if inputs is not None and known[i] else None,
                input_delay=self._delay,
                used=None if every[i] else given[1][i] > 0,
                classes=None if classes is None else classes[i],
                members=None if members is None else members[i],
            )
            for i, (
                work,
                bits,
                spikes,
                iterations,
                status,
                ignored,
                beyond,
                restarted,
            ) in enumerate(zip(works, *scalars, strict=True))
        ]
        return answers, finite

    def _ignored(self, counts: Array, mask: Array) -> tuple[str, ...]:
        """Return the observed units whose counts exceeded the model's bounds."""
        if self._scaling:
            centre, scale = self._scaling
            counts = (counts - centre) / scale
        beyond = (np.abs(counts) > self._limits) & np.isfinite(counts) & (mask > 0)
        return tuple(self._facts.unit_names[unit] for unit in np.flatnonzero(beyond))
