"""How an iLQR solve ended: a status in its result, never an exception."""

from __future__ import annotations

from enum import IntEnum


class Status(IntEnum):
    """Why a solve ended. ``explain`` says it in words."""

    RUNNING = 0
    CONVERGED = 1
    ITERATION_LIMIT = 2
    STALLED = 3
    NOT_FINITE = 4
    STOPPED = 5

    @property
    def explain(self) -> str:
        return {
            Status.RUNNING: "the solve has not ended",
            Status.CONVERGED: "the expected decrease fell below the tolerance",
            Status.ITERATION_LIMIT: "the iteration budget was used up first",
            Status.STALLED: "no step lowered the cost, at any regularisation",
            Status.NOT_FINITE: "the cost or its model is not finite: NaN in the data, or dynamics "
            "that explode",
            Status.STOPPED: "the caller's deadline ended the solve early",
        }[self]
