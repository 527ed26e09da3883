"""Stream a recording through a session: open loop at a given speed, or as fast as credits allow.

At a given speed the send times are fixed beforehand (bin k is sent at start + k * bin width /
speed) and latency counts from them, so that a feeder that falls behind shows in the latencies.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilqr_clients.answer import Answer
from ilqr_clients.sdk import Session
from ilqr_vae.errors import AnswerTimeoutError, RequestRefusedError, ServiceError
from ilqr_vae.protocol.clock import ClockTrack

Array = NDArray[np.float64]
Times = NDArray[np.int64]

IN_FLIGHT = 4
"""Most unanswered bins at full speed: enough to keep the service busy, without a long queue."""

CROSSING: tuple[str, ...] = ("wire_in", "wire_out")
"""Stages between the two clocks, known only as well as the offset between them."""

_RESET = re.compile(r"reset: bins (\d+) to (\d+) did not come")
"""The service's notice of a gap beyond its limit, whose bins it does not answer."""

PATIENCE_S = 10.0
"""Seconds without any answer, while some are due, before giving up."""


def _nan(*shape: int) -> Array:
    return np.full(shape, np.nan)


@dataclass(slots=True)
class StreamLog:
    """Bins sent and answers received, for T bins; NaN, 0 or "" if a bin has no answer.

    ``units`` is the number of units whose rates are kept. Values are those of each bin's first
    answer, which a closed loop would have used; ``revised`` holds later answers for a bin. Times
    are in ns: ``intended``, ``sent`` and ``arrived`` by this client's clock, the others by the
    service's. ``unbridged`` counts the bins of gaps that are too long for the service, which have
    no answers.
    """

    n_bins: int
    latents: int
    channels: int
    units: int = 0
    intended: Times = field(init=False)
    sent: Times = field(init=False)
    arrived: Times = field(init=False)
    received: Times = field(init=False)
    solve_start: Times = field(init=False)
    solve_end: Times = field(init=False)
    published: Times = field(init=False)
    iterations: Times = field(init=False)
    latent: Array = field(init=False)
    latent_std: Array = field(init=False)
    kinematics: Array = field(init=False)
    kinematics_std: Array = field(init=False)
    bits: Array = field(init=False)
    spikes: Array = field(init=False)
    rates: NDArray[np.float32] = field(init=False)
    status: list[str] = field(init=False)
    solver: Counter[str] = field(default_factory=Counter[str])
    revised: dict[int, Answer] = field(default_factory=dict[int, Answer])
    answered: int = 0
    refused: int = 0
    unbridged: int = 0
    started_ns: int = 0
    ended_ns: int = 0

    def __post_init__(self) -> None:
        n = self.n_bins
        times = ("received", "solve_start", "solve_end", "published")
        for name in ("intended", "sent", "arrived", *times, "iterations"):
            setattr(self, name, np.zeros(n, dtype=np.int64))
        self.latent, self.latent_std = _nan(n, self.latents), _nan(n, self.latents)
        self.kinematics, self.kinematics_std = _nan(n, self.channels), _nan(n, self.channels)
        self.bits, self.spikes = _nan(n), _nan(n)
        self.rates = np.full((n, self.units), np.nan, dtype=np.float32)
        self.status = [""] * n

    def take(self, answer: Answer) -> None:
        """Record one answer."""
        i = answer.index
        if not 0 <= i < self.n_bins:
            return
        if self.status[i]:
            known = self.revised.get(i)
            if answer.revision > (0 if known is None else known.revision):
                self.revised[i] = answer
            return
        self.answered += 1
        self.status[i] = answer.status
        self.solver[answer.solver] += 1
        self.iterations[i] = answer.iterations
        self.arrived[i] = answer.arrived_ns
        self.received[i] = answer.received_ns
        self.solve_start[i] = answer.solve_start_ns
        self.solve_end[i] = answer.solve_end_ns
        self.published[i] = answer.published_ns
        self.latent[i], self.latent_std[i] = answer.latent, answer.latent_std
        self.kinematics[i], self.kinematics_std[i] = answer.kinematics, answer.kinematics_std
        self.bits[i], self.spikes[i] = answer.bits, answer.spikes
        self.rates[i] = answer.rates[: self.units]

    def latency_ms(self, rows: slice, clock: ClockTrack | None = None) -> dict[str, Array]:
        """Return milliseconds by stage for ``rows``; NaN for bins not sent or not answered.

        feeder: intended to sent. queue: received to solve. solve. publish: solve to published.
        wire: both ways together, from differences within each clock, without their offset. total:
        intended send to arrival. With ``clock`` also each way, across the two clocks: wire_in: sent
        to received. wire_out: published to arrived.
        """
        known = (self.sent[rows] > 0) & (self.arrived[rows] > 0)

        def stage(nanoseconds: Times) -> Array:
            return np.where(known, nanoseconds[rows] / 1e6, np.nan)

        here = self.arrived - self.sent
        there = self.published - self.received
        stages = {
            "solve": stage(self.solve_end - self.solve_start),
            "queue": stage(self.solve_start - self.received),
            "publish": stage(self.published - self.solve_end),
            "wire": stage(here - there),
            "feeder": stage(self.sent - self.intended),
            "total": stage(self.arrived - self.intended),
        }
        if clock is not None:
            sent = self.sent + clock.offset_ns(self.sent)
            arrived = self.arrived + clock.offset_ns(self.arrived)
            stages["wire_in"] = stage(self.received - sent)
            stages["wire_out"] = stage(arrived - self.published)
        return stages

    def bits_per_spike(self, rows: slice | NDArray[np.int64]) -> float:
        """Return the one-step-ahead bits per spike of the bins answered; NaN without spikes."""
        known = np.isfinite(self.bits[rows])
        spikes = float(self.spikes[rows][known].sum())
        return float(self.bits[rows][known].sum()) / spikes if spikes else float("nan")


def stream(
    session: Session,
    counts: NDArray[Any],
    *,
    mask: NDArray[np.bool_] | None = None,
    dropped: NDArray[np.bool_] | None = None,
    interval: float | None = None,
    watch: Callable[[StreamLog, float], None] | None = None,
    patience: float = PATIENCE_S,
) -> StreamLog:
    """Send T bins and collect their answers.

    Args:
        session: open, without any bins sent.
        counts: (T, N).
        mask: bool (T, N), True where observed; None means everywhere.
        dropped: bool (T,), bins that are not sent; None means none.
        interval: seconds between sends; None means as fast as credits allow.
        watch: called with the log and the seconds left until the next send; at the end once more,
            with infinity.
        patience: seconds without any answer, while some are due, before giving up.

    Raises:
        ServiceUnreachableError, AnswerTimeoutError: no answer for ``patience`` seconds.
        SessionEndedError: the session is not open any more.
        RequestRefusedError: a bin was refused, other than for lack of credits.
    """
    opened = session.opened
    channels = len(opened.kinematic_names)
    log = StreamLog(len(counts), opened.latents, channels, counts.shape[1])

    def note(error: ServiceError) -> None:
        if not isinstance(error, RequestRefusedError) or error.field != "credits":
            raise error
        log.refused += 1  # overload does not end a run

    before, session.on_error = session.on_error, note
    try:
        _stream(session, log, counts, mask, dropped, interval, watch, patience)
    finally:
        session.on_error = before
    return log


def _stream(
    session: Session,
    log: StreamLog,
    counts: NDArray[Any],
    mask: NDArray[np.bool_] | None,
    dropped: NDArray[np.bool_] | None,
    interval: float | None,
    watch: Callable[[StreamLog, float], None] | None,
    patience: float,
) -> None:
    to_send = np.arange(len(counts)) if dropped is None else np.flatnonzero(~dropped)
    log.started_ns = session.timer.now_ns()
    step_ns = 0 if interval is None else round(interval * 1e9)
    first_ns = log.started_ns + min(step_ns, 50_000_000)
    news_ns = log.started_ns
    due = int(to_send[-1]) + 1 if len(to_send) else 0
    position = sent_answers = notices = 0
    while position < len(to_send) or log.answered < due:
        now = session.timer.now_ns()
        wait = 0.05
        if position < len(to_send):
            index = int(to_send[position])
            intended = now if interval is None else first_ns + index * step_ns
            free = session.credits > 0 and position - sent_answers < IN_FLIGHT
            if free if interval is None else now >= intended:
                seen = None if mask is None or mask[index].all() else mask[index]
                log.intended[index] = intended
                log.sent[index] = session.send(index, counts[index], mask=seen, source_ns=intended)
                position += 1
                wait = 0.0
            elif interval is not None:
                wait = min(0.05, (intended - now) / 1e9)
        # Polls have a resolution of one millisecond; below that, poll without waiting.
        refused = log.refused
        answers = session.receive(wait if wait >= 0.001 else 0.0)
        for answer in answers:
            log.take(answer)
            sent_answers += answer.revision == 0 and answer.status != "missing"
        sent_answers += log.refused - refused
        for what in session.notices[notices:]:
            if (gap := _RESET.match(what)) is not None:
                unbridged = int(gap[2]) - int(gap[1]) + 1
                log.unbridged += unbridged
                due -= unbridged
        notices = len(session.notices)
        now = session.timer.now_ns()
        if answers or (log.answered >= position and position < len(to_send)):
            news_ns = now
        elif now - news_ns > patience * 1e9:
            if log.refused and position == len(to_send):
                break  # the last bins were refused, and no later bin reveals the gap
            raise AnswerTimeoutError(
                f"service at {session.endpoint}",
                expected=f"an answer within {patience:g} s",
                got=f"none; {log.answered} of {due} bins are answered",
            )
        if watch is not None and (answers or not wait):
            watch(log, wait)
    log.ended_ns = session.timer.now_ns()
    if watch is not None:
        watch(log, float("inf"))
