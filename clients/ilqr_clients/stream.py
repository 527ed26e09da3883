"""Streams a recording through a session: open loop at a given speed, or as fast as credits allow.

At a given speed the send times are fixed beforehand (bin k is sent at start + k * bin width /
speed) and latency counts from them, so that a feeder that falls behind shows in the latencies.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ilqr_clients.answer import Answer
from ilqr_clients.sdk import Session
from ilqr_vae.errors import AnswerTimeoutError, RequestRefusedError, ServiceError
from ilqr_vae.protocol import messages
from ilqr_vae.protocol.clock import ClockTrack

Array = NDArray[np.float64]
Times = NDArray[np.int64]

IN_FLIGHT = 4
"""Unanswered bins at full speed: enough to keep the service busy, without a long queue."""

CROSSING: tuple[str, ...] = ("wire_in", "wire_out")
"""Stages across the two clocks, as uncertain as their offset."""

_RESET = re.compile(r"reset: bins (\d+) to (\d+) did not come")
"""The service's notice of a gap beyond its limit, whose bins it does not answer."""

PATIENCE_S = 10.0
"""Seconds without any answer, while some are due, before giving up."""


MOST_BINS = 72_000
"""Largest number of bins in a log: an hour at 20 per second."""

_TIMES = (
    *("intended", "sent", "arrived", "received", "solve_start", "solve_end", "published"),
    "iterations",
)
_ARRAYS = (
    *_TIMES,
    *("latent", "latent_std", "kinematics", "kinematics_std", "bits", "spikes", "rates"),
)


def _nan(*shape: int) -> Array:
    return np.full(shape, np.nan)


@dataclass(slots=True)
class StreamLog:
    """Bins sent and answers received, for T bins; NaN, 0 or "" if a bin has no answer.

    ``units`` is the number of units whose rates are kept. Values are those of each bin's first
    answer, which a closed loop would have used; ``revised`` holds later answers for a bin,
    ``classes`` the classes' probabilities and ``inputs`` the inferred inputs (where details are
    heard). Times are in ns: ``intended``, ``sent`` and ``arrived`` by this client's clock, the
    others by the service's. ``unbridged`` counts the bins of gaps too long for the service.
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
    inputs: dict[int, Array] = field(default_factory=dict[int, Array])
    classes: dict[int, Array] = field(default_factory=dict[int, Array])
    answered: int = 0
    refused: int = 0
    unbridged: int = 0
    started_ns: int = 0
    ended_ns: int = 0

    def __post_init__(self) -> None:
        n = self.n_bins
        for name in _TIMES:
            setattr(self, name, np.zeros(n, dtype=np.int64))
        self.latent, self.latent_std = _nan(n, self.latents), _nan(n, self.latents)
        self.kinematics, self.kinematics_std = _nan(n, self.channels), _nan(n, self.channels)
        self.bits, self.spikes = _nan(n), _nan(n)
        self.rates = np.full((n, self.units), np.nan, dtype=np.float32)
        self.status = [""] * n

    def grow(self, index: int) -> None:
        """Make room for a bin, up to ``MOST_BINS``; later ones are not kept."""
        if index < self.n_bins or self.n_bins >= MOST_BINS:
            return
        before = self.n_bins
        self.n_bins = min(MOST_BINS, max(2 * before, index + 1))
        kept = {name: getattr(self, name) for name in _ARRAYS}
        status = self.status
        self.__post_init__()
        self.status[:before] = status
        for name, values in kept.items():
            getattr(self, name)[:before] = values

    def take(self, answer: Answer) -> None:
        """Record an answer."""
        i = answer.index
        if i < 0:
            return
        if i >= self.n_bins:
            self.answered += answer.revision == 0
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
        if answer.classes is not None:
            self.classes[i] = answer.classes

    def take_details(self, details: list[messages.Detail]) -> None:
        for detail in details:
            of = detail.index - detail.input_delay
            if detail.revision == 0 and detail.inputs is not None and 0 <= of < self.n_bins:
                self.inputs[of] = messages.unpack(detail.inputs, "inputs")

    def table(self, found: dict[int, Array], rows: slice) -> Array | None:
        """Return ``inputs`` or ``classes`` as (T, m), NaN if not known; None if there are none."""
        if not found:
            return None
        out = _nan(self.n_bins, len(next(iter(found.values()))))
        out[list(found)] = list(found.values())
        return out[rows]

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


@dataclass(frozen=True, slots=True)
class NextBin:
    """A bin to be sent.

    Attributes:
        index: its index in the stream.
        counts, mask: (N,), features last; None as mask means all observed.
        intended_ns: when it was complete, by this client's clock.
        due_ns: when to send it; None for as soon as there are credits.
    """

    index: int
    counts: NDArray[Any]
    mask: NDArray[np.bool_] | None
    intended_ns: int
    due_ns: int | None


class Source(Protocol):
    """The source of the bins of a stream.

    Attributes:
        ended: whether there is no further bin.
    """

    @property
    def ended(self) -> bool: ...

    def next(self, now_ns: int) -> NextBin | None:
        """Return the next bin, the same until it is sent; None if there is none now."""
        ...

    def sent(self) -> None:
        """Mark the bin that ``next`` returned as sent."""
        ...


class Planned:
    """The bins of an array, one after another; see ``stream``."""

    def __init__(
        self,
        counts: NDArray[Any],
        mask: NDArray[np.bool_] | None = None,
        dropped: NDArray[np.bool_] | None = None,
        interval: float | None = None,
    ) -> None:
        self._counts, self._mask = counts, mask
        self._to_send = np.arange(len(counts)) if dropped is None else np.flatnonzero(~dropped)
        self._step_ns = None if interval is None else round(interval * 1e9)
        self._position = 0
        self._first_ns: int | None = None

    @property
    def ended(self) -> bool:
        return self._position >= len(self._to_send)

    def next(self, now_ns: int) -> NextBin | None:
        if self.ended:
            return None
        if self._first_ns is None:
            self._first_ns = now_ns + min(self._step_ns or 0, 50_000_000)
        index = int(self._to_send[self._position])
        mask = None if self._mask is None else seen(self._mask[index])
        if self._step_ns is None:
            return NextBin(index, self._counts[index], mask, now_ns, None)
        due = self._first_ns + index * self._step_ns
        return NextBin(index, self._counts[index], mask, due, due)

    def sent(self) -> None:
        self._position += 1


def seen(mask: NDArray[np.bool_]) -> NDArray[np.bool_] | None:
    """Return the mask to send: None if all units were observed."""
    return None if mask.all() else mask


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
        watch, patience: as for ``stream_from``.

    Raises:
        As ``stream_from``.
    """
    source = Planned(counts, mask, dropped, interval)
    return stream_from(session, source, len(counts), watch=watch, patience=patience)


def stream_from(
    session: Session,
    source: Source,
    n_bins: int,
    *,
    watch: Callable[[StreamLog, float], None] | None = None,
    patience: float = PATIENCE_S,
) -> StreamLog:
    """Send the bins of a source until it has ended, and collect the answers.

    Args:
        session: open, without any bins sent.
        n_bins: expected number of bins, for the size of the log, which grows if needed.
        watch: called with the log and the seconds left until the next send; at the end once more,
            with infinity.
        patience: seconds without any answer, while some are due, before giving up.

    Raises:
        ServiceUnreachableError, AnswerTimeoutError: no answer for ``patience`` seconds.
        SessionEndedError: the session is not open any more.
        RequestRefusedError: a bin was refused, other than for lack of credits.
    """
    opened = session.opened
    units = len(session.request.units)
    log = StreamLog(n_bins, opened.latents, len(opened.kinematic_names), units)

    def note(error: ServiceError) -> None:
        if not isinstance(error, RequestRefusedError) or error.field != "credits":
            raise error
        log.refused += 1  # overload does not end a run

    before, session.on_error = session.on_error, note
    try:
        _stream(session, log, source, watch, patience)
    finally:
        session.on_error = before
    return log


def _stream(
    session: Session,
    log: StreamLog,
    source: Source,
    watch: Callable[[StreamLog, float], None] | None,
    patience: float,
) -> None:
    log.started_ns = news_ns = session.timer.now_ns()
    due = position = sent_answers = notices = 0
    while not source.ended or log.answered < due:
        now = session.timer.now_ns()
        wait = 0.05
        if (bin := source.next(now)) is not None:
            free = session.credits > 0 and position - sent_answers < IN_FLIGHT
            if free if bin.due_ns is None else now >= bin.due_ns:
                sent = session.send(bin.index, bin.counts, mask=bin.mask, source_ns=bin.intended_ns)
                source.sent()
                log.grow(bin.index)
                if bin.index < log.n_bins:
                    log.intended[bin.index], log.sent[bin.index] = bin.intended_ns, sent
                due = bin.index + 1 - log.unbridged
                position += 1
                wait = 0.0
            elif bin.due_ns is not None:
                wait = min(0.05, (bin.due_ns - now) / 1e9)
        # Polls have a resolution of one millisecond; below that, poll without waiting.
        refused = log.refused
        answers = session.receive(wait if wait >= 0.001 else 0.0)
        for answer in answers:
            log.take(answer)
            sent_answers += answer.revision == 0 and answer.status != "missing"
        sent_answers += log.refused - refused
        log.take_details(session.details)
        session.details.clear()
        for what in session.notices[notices:]:
            if (gap := _RESET.match(what)) is not None:
                unbridged = int(gap[2]) - int(gap[1]) + 1
                log.unbridged += unbridged
                due -= unbridged
        notices = len(session.notices)
        now = session.timer.now_ns()
        if answers or (log.answered >= position and not source.ended):
            news_ns = now
        elif now - news_ns > patience * 1e9:
            if log.refused and source.ended:
                break  # the last bins were refused, and no later bin shows the gap
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
