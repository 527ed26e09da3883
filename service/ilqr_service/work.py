"""What travels between the sessions and the engine: what to do for a run, and a bin's answer.

Plain data: numpy arrays and integers, no sockets, no torch. Times are nanoseconds of the service's
monotonic clock. N units, n latents, D kinematic channels. Structs, because one of each is made for
every bin; nothing in them can refer back to them, so the garbage collector need not look.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ilqr_vae.protocol.answer import Estimated
from ilqr_vae.protocol.answer import Vector as Vector
from ilqr_vae.protocol.base import Offset, Status

STOPPED = "stopped"
"""The solver's own status where the deadline cut a solve short."""

FAILED = "failed"
"""In place of the solver's status where the solve raised: the answer is a prediction."""

NOT_FINITE = "not_finite"

SHED = "shed"
"""In place of the solver's status where a bin was taken into the window without a solve."""

TROUBLE = {
    FAILED: "solve_failed",
    SHED: "shed",
    NOT_FINITE: "non_converged",
    "stalled": "non_converged",
}
"""What answers are counted as beside their status, by the solver's status."""

NO_SOLVE = -1
"""A ``budget``: take the bin in without a solve."""


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What the sessions must know of the model.

    Attributes:
        model: its id.
        unit_names: N names, in the order of the counts.
        bin_width_ns: nanoseconds.
        latents: n.
        kinematic_names, kinematic_units: D each.
        horizon: bins in the estimator's window.
        iterations: iLQR iterations per bin.
        class_names: C; none for a model without classes.
        bits_per_spike: on data that it was not fitted on; NaN where that is not known.
        mean_rates: of training, N; none where the units are not counted.
        lags: bins after which it can answer a bin once more, at most.
    """

    model: str
    unit_names: tuple[str, ...]
    bin_width_ns: int
    latents: int
    kinematic_names: tuple[str, ...]
    kinematic_units: tuple[str, ...]
    horizon: int
    iterations: int
    class_names: tuple[str, ...] = ()
    bits_per_spike: float = math.nan
    mean_rates: tuple[float, ...] = ()
    lags: int = 0


class _Queued(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Something to do for a run of a session, in the run's order.

    Attributes:
        run: serial number of the run; two runs never share one, whatever they are called.
        index: the bin's index.
        serial: the work's place in its run, from 0.
        received_ns: arrival of the bin, or of the bin that showed this one to be missing.
        due_ns: when the answer is due.
        model: id of the model that the run is on; "" is the only one.
        slot: that the session is of.
        watch: mask units that misbehave.
        lag: answer each bin once more after so many others; 0 is not.
    """

    run: int
    index: int
    serial: int = 0
    received_ns: int = 0
    due_ns: int = 0
    model: str = ""
    slot: str = ""
    watch: bool = False
    lag: int = 0


class _Bin(_Queued, frozen=True, kw_only=True, gc=False):
    """A bin.

    Attributes:
        counts: (N,) spikes, or None where no bin came.
        mask: bool (N,), True where observed; None means all.
        source_ns: the feeder's time stamp; 0 where no bin came.
        clock: of the feeder, where it states one.
    """

    counts: Vector | None
    mask: NDArray[np.bool_] | None = None
    source_ns: int = 0
    clock: Offset | None = None

    @property
    def missing(self) -> bool:
        """No bin came."""
        return self.counts is None

    @property
    def blind(self) -> bool:
        """No unit of the bin was observed."""
        return self.counts is None or (self.mask is not None and not self.mask.any())


class Solve(_Bin, frozen=True, kw_only=True, gc=False):
    """The next bin of a run, to be solved.

    Attributes:
        restart: start from the model's initial condition instead of the previous bin.
        anytime: the solver stops at ``due_ns`` with what it has.
        budget: stop the solve after so many iterations (how a replay repeats a solve that the
            clock had cut short); 0 is none, ``NO_SOLVE`` not at all.
        sheds: while it is the newest of its run, older ones may go without a solve.
    """

    restart: bool = False
    anytime: bool = False
    budget: int = 0
    sheds: bool = False


class Insert(_Bin, frozen=True, kw_only=True, gc=False):
    """A late bin, or one whose counts changed: put it in its place in the window, and solve again
    from there."""


class SwapModel(_Queued, frozen=True, kw_only=True, gc=False):
    """Go on with the model ``to``, its window refilled from the bins of the run."""

    to: str


Work = Solve | Insert | SwapModel


class EngineAnswer(Estimated[Vector], frozen=True, kw_only=True, gc=False):
    """The engine's answer for one bin.

    Attributes:
        work: the bin.
        solver: the solver's status in lower case, or ``FAILED``.
        revised: the bin was answered before.
        settles: no other answer follows for the work that caused this one.
        void: no answer; the late bin could not be put in its place.
        due_ns: instead of the work's own; 0 is that.
        serial: of the work that caused this answer.
        flags: what changed about units, for people.
        flagged: ``NAME:reason`` of all masked units, None where they are not watched.
        beyond: the answer is beyond what training showed (``ilqr_vae.streaming.bounds``).
        restarted: the estimate began anew with this bin, its state being lost.
        inputs: (m,), of the dynamics, ``input_delay`` bins before this one; None where nothing was
            solved or its window does not reach so far back.
        used: bool (N,), the units that were used; None means all.
        members: (K, n), the latents of an ensemble's members; None for one model.
    """

    work: Solve | Insert
    revised: bool = False
    settles: bool = True
    void: bool = False
    due_ns: int = 0
    serial: int = 0
    flags: tuple[str, ...] = ()
    flagged: tuple[str, ...] | None = None
    beyond: bool = False
    restarted: bool = False
    inputs: Vector | None = None
    input_delay: int = 0
    used: NDArray[np.bool_] | None = None
    members: Vector | None = None


def status_of(answer: EngineAnswer, published_ns: int) -> Status:
    """The flag an answer goes out with: a pure function of the answer and the clock.

    First that holds: ``missing`` (no bin came), ``extrapolated`` (a bin came and the answer is a
    prediction all the same: none of its units could be used, its solve failed or was shed; or the
    answer is beyond what training showed), ``late`` (after its due time), ``degraded`` (the
    deadline cut the solve short), ``ok``.
    """
    if answer.work.missing:
        return "missing"
    if answer.work.blind or answer.beyond or answer.solver in (FAILED, NOT_FINITE, SHED):
        return "extrapolated"
    if published_ns > (answer.due_ns or answer.work.due_ns):
        return "late"
    return "degraded" if answer.solver == STOPPED else "ok"


def budget_of(result: Estimated[Any]) -> int:
    """The ``budget`` that solves a bin again as the clock had it solved for this answer."""
    return {STOPPED: result.iterations, SHED: NO_SOLVE}.get(result.solver, 0)
