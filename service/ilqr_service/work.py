"""Data passed between sessions and engine: works of a run, and answers to bins.

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
"""Status of a solve that the deadline cut short."""

FAILED = "failed"
"""Status if the solve raised an error: the answer is a prediction."""

NOT_FINITE = "not_finite"

SHED = "shed"
"""Status if a bin was taken into the window without a solve."""

TROUBLE = {
    FAILED: "solve_failed",
    SHED: "shed",
    NOT_FINITE: "non_converged",
    "stalled": "non_converged",
}
"""Further event to count per answer, by the status of its solve."""

NO_SOLVE = -1
"""A ``budget``: take the bin in without a solve."""


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What sessions need to know about a model.

    Attributes:
        model: id of the model.
        unit_names: N names, in the order of the counts; the last are those of features.
        feature_names: F names; none for a model of counts alone.
        bin_width_ns: nanoseconds.
        latents: n.
        kinematic_names, kinematic_units: D each.
        horizon: bins in the estimator's window.
        iterations: iLQR iterations per bin.
        class_names: C; none for a model without classes.
        bits_per_spike: on data that it was not fitted on; NaN if not known.
        mean_rates: N mean rates in training; empty if units are not counts.
        lags: largest number of later bins after which a bin can be answered again.
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
    feature_names: tuple[str, ...] = ()
    bits_per_spike: float = math.nan
    mean_rates: tuple[float, ...] = ()
    lags: int = 0

    @property
    def counted(self) -> int:
        """Units that are counted: all but the features."""
        return len(self.unit_names) - len(self.feature_names)


class _Queued(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A work for a run of a session; the works of a run are done in order.

    Attributes:
        run: serial number of the run, which is unique over all sessions.
        index: index of the bin.
        serial: position of the work in its run, from 0.
        received_ns: arrival of the bin, or of the bin that showed this one to be missing.
        due_ns: time when the answer is due.
        model: id of the model of the run; "" is the only one.
        slot: slot of the session.
        watch: whether to mask implausible units.
        lag: answer each bin again after this many later bins; 0 for never.
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
        counts: (N,) spike counts, then the features as they came; or None if no bin came.
        mask: bool (N,), True where observed; None means all.
        source_ns: time stamp of the feeder; 0 if no bin came.
        clock: clock offset that the feeder stated, if any.
    """

    counts: Vector | None
    mask: NDArray[np.bool_] | None = None
    source_ns: int = 0
    clock: Offset | None = None

    @property
    def missing(self) -> bool:
        """Whether no bin came."""
        return self.counts is None

    @property
    def blind(self) -> bool:
        """Whether no unit of the bin was observed."""
        return self.counts is None or (self.mask is not None and not self.mask.any())


class Solve(_Bin, frozen=True, kw_only=True, gc=False):
    """The next bin of a run, to be solved.

    Attributes:
        restart: start from the model's initial condition instead of the previous bin.
        rewind: the bins from this one on were answered as missing; continue from the bin before it.
        anytime: the solver stops at ``due_ns`` with its current solution.
        budget: stop the solve after this many iterations, to repeat one that the clock cut short; 0
            for no limit, ``NO_SOLVE`` for no solve.
        sheds: while this is the newest bin of its run, older ones may go without a solve.
    """

    restart: bool = False
    rewind: bool = False
    anytime: bool = False
    budget: int = 0
    sheds: bool = False


class Insert(_Bin, frozen=True, kw_only=True, gc=False):
    """A late bin, or one whose counts changed: insert it into the window and solve again from
    it.
    """


class SwapModel(_Queued, frozen=True, kw_only=True, gc=False):
    """Continue with the model ``to``, whose window is refilled from the bins of the run."""

    to: str


Work = Solve | Insert | SwapModel


class EngineAnswer(Estimated[Vector], frozen=True, kw_only=True, gc=False):
    """The answer of the engine to a bin.

    Attributes:
        work: the bin.
        solver: status of the solver in lower case, or ``FAILED``.
        revised: the bin was answered before.
        settles: no other answer follows for the work that caused this one.
        void: not an answer; the late bin could not be inserted.
        due_ns: overrides the due time of the work; 0 keeps it.
        serial: serial of the work that caused this answer.
        flags: changes of masked units, as text.
        flagged: ``NAME:reason`` of all masked units; None if units are not watched.
        beyond: the answer exceeds the range in training (``ilqr_vae.streaming.bounds``).
        restarted: the estimate restarted with this bin, because its state was lost.
        inputs: (m,) input of the dynamics ``input_delay`` bins before this one; None if nothing was
            solved or the window is shorter.
        used: bool (N,), units that were used; None means all.
        members: (K, n) latents of the members of an ensemble; None for a single model.
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
    """Return the status of an answer: a pure function of the answer and the clock.

    The first that applies: ``missing`` (no bin came), ``extrapolated`` (a bin came, but the answer
    is a prediction, since no unit could be used or its solve failed or was shed; or the answer
    exceeds the range in training), ``late`` (after its due time), ``degraded`` (the deadline cut
    the solve short), ``ok``.
    """
    if answer.work.missing:
        return "missing"
    if answer.work.blind or answer.beyond or answer.solver in (FAILED, NOT_FINITE, SHED):
        return "extrapolated"
    if published_ns > (answer.due_ns or answer.work.due_ns):
        return "late"
    return "degraded" if answer.solver == STOPPED else "ok"


def budget_of(result: Estimated[Any]) -> int:
    """Return the ``budget`` that repeats the solve of this answer without the clock."""
    return {STOPPED: result.iterations, SHED: NO_SOLVE}.get(result.solver, 0)
