"""A simulated subject reaches for targets with a cursor that the service's decodes move.

The loop runs in lock-step. In each bin the subject sees cursor and target and fires, the counts go
to the service, and the decoded velocity moves the cursor. If the decode does not arrive by the
deadline, the cursor keeps its last velocity and the bin is counted. A loop that runs ahead of its
answers waits once it has used up its credits.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilqr_clients.sdk import Session, refusal
from ilqr_clients.steering import Steering
from ilqr_clients.stream import MOST_BINS, StreamLog
from ilqr_vae.errors import AnswerTimeoutError, ConfigError
from ilqr_vae.recordings.physical_units import conversion
from ilqr_vae.report import Reaches
from ilqr_vae.simulated.centre_out import CentreOut, TrialRecord
from ilqr_vae.simulated.subject import TICK, Hand, Subject

Array = NDArray[np.float64]

ENDLESS = MOST_BINS
"""Number of trials that no run completes."""

WORKSPACE = 0.20
"""Metres from the centre at which the cursor stops."""
MAX_TRIAL_S = 12.0
"""Seconds per trial, on average, after which the run ends."""


@dataclass(frozen=True, slots=True)
class Reaching:
    """Results of a series of reaches.

    Attributes:
        trials: finished reaches.
        efficiency: straight distance over distance travelled, of each successful reach.
        paths: (L, 2) metres of each, the cursor from the go to the end.
    """

    trials: tuple[TrialRecord, ...]
    efficiency: tuple[float, ...]
    paths: tuple[Array, ...] = ()

    def shown(self) -> Reaches:
        """Return the reaches for a report."""
        targets = np.array([t.target for t in self.trials]).reshape(-1, 2)
        return Reaches(self.paths, targets, tuple(t.success for t in self.trials))

    def summary(self) -> dict[str, float]:
        """Return trials, successes, success_rate, time_to_target_s (median, p25, p75) and
        path_efficiency (median). The last two are of the successful reaches, NaN if there are none.
        """
        times = [t.acquired - t.go for t in self.trials if t.success]
        quartiles = np.percentile(times, [25, 50, 75]) if times else np.full(3, np.nan)
        return {
            "trials": len(self.trials),
            "successes": len(times),
            "success_rate": float(np.mean([t.success for t in self.trials]))
            if self.trials
            else float("nan"),
            "time_to_target_s": float(quartiles[1]),
            "time_to_target_p25_s": float(quartiles[0]),
            "time_to_target_p75_s": float(quartiles[2]),
            "path_efficiency": float(np.median(self.efficiency))
            if self.efficiency
            else float("nan"),
        }


class Trace:
    """Positions of the cursor, one every ``step`` seconds, for the path efficiency."""

    def __init__(self, step: float) -> None:
        self._step = step
        self._at: list[Array] = []

    def add(self, cursor: Array) -> None:
        self._at.append(np.array(cursor, dtype=np.float64))

    def path(self, trial: TrialRecord) -> Array:
        """Return the path (L, 2) from the go cue to acquisition, or else to the end of the
        trial.
        """
        end = trial.acquired if trial.success else trial.stop
        a, b = (round(t / self._step) for t in (trial.go, end))
        return np.array(self._at[a : b + 1]).reshape(-1, 2)

    def efficiency(self, trial: TrialRecord) -> float:
        """Return straight distance over path length, from go to acquisition; NaN if it failed."""
        path = self.path(trial)
        if not trial.success or len(path) < 2:
            return float("nan")
        travelled = float(np.hypot(*np.diff(path, axis=0).T).sum())
        return float(np.hypot(*(path[-1] - path[0]))) / travelled if travelled > 0 else float("nan")

    def reaching(self, trials: list[TrialRecord]) -> Reaching:
        values = (self.efficiency(t) for t in trials)
        known = tuple(v for v in values if np.isfinite(v))
        return Reaching(tuple(trials), known, tuple(self.path(t) for t in trials))


def unit_columns(model_units: tuple[str, ...], units: int) -> NDArray[np.int64]:
    """Return the index of each of the model's units among the subject's.

    Raises:
        ConfigError: a unit of the model is not one of the subject's.
    """
    index = {f"unit{i:03d}": i for i in range(units)}
    unknown = [name for name in model_units if name not in index]
    if unknown:
        raise ConfigError(
            "model",
            expected=f"one trained on the simulated subject ({units} units, unit000 ...)",
            got=f"unit {unknown[0]!r}",
        )
    return np.array([index[name] for name in model_units], dtype=np.int64)


def metres_per_second(units: tuple[str, ...]) -> list[float | None]:
    """Return the factors that convert the first two channels to m/s; None for no velocity."""
    return [conversion(unit, "m/s") for unit in units[:2]]


@dataclass(slots=True)
class LoopLog:
    """Log of a closed loop.

    Attributes:
        stream: the answers and their times.
        held: number of bins whose answer missed the deadline, so that an older velocity was kept.
        bins: number of bins sent.
        velocities: (bins, 2), m/s, applied to the cursor.
        counts: (bins, N), counts that were sent.
    """

    stream: StreamLog
    held: int = 0
    bins: int = 0
    velocities: list[Array] = field(default_factory=list[Array])
    counts: list[NDArray[np.int64]] = field(default_factory=list[NDArray[np.int64]])

    @property
    def statuses(self) -> dict[str, int]:
        return dict(Counter(s for s in self.stream.status[: self.bins] if s))


def run_loop(
    session: Session,
    subject: Subject,
    task: CentreOut,
    *,
    trials: int,
    columns: NDArray[np.int64],
    deadline: float,
    speed: float | None,
    patience: float,
    watch: Callable[[LoopLog, CentreOut], Any] | None = None,
    steering: Steering | None = None,
) -> tuple[Reaching, LoopLog]:
    """Run ``trials`` reaches, or stop after ``MAX_TRIAL_S`` per trial.

    Args:
        session: an open session, whose first two kinematic channels are velocities
            (``metres_per_second``).
        subject, task: new ones.
        columns: index of each of the session's units among the subject's.
        deadline: seconds from a bin's send to its answer.
        speed: multiple of real time; None sends the next bin as soon as one is answered.
        patience: seconds without any answer, while some are due, before giving up.
        steering: disturbances of the bins, and the decoder that steers; receives cursor and target.

    Raises:
        ServiceUnreachableError, AnswerTimeoutError: no answer for ``patience`` seconds.
        SessionEndedError: the session is not open any more.
        RequestRefusedError: a bin was refused.
    """
    width = subject.bin_width
    limit = min(int(trials * MAX_TRIAL_S / width), MOST_BINS)
    steering = steering or Steering(len(columns), width, kind="closed-loop")
    opened = session.opened
    log = LoopLog(
        StreamLog(min(limit, 4096), opened.latents, len(opened.kinematic_names), len(columns))
    )
    stream, trace = log.stream, Trace(width)
    scale = np.array(metres_per_second(opened.kinematic_units), dtype=np.float64)
    cursor, velocity = np.zeros(2), np.zeros(2)
    stream.started_ns = time.monotonic_ns()
    heard_ns, newest = stream.started_ns, -1
    begun_ns = stream.started_ns
    waiting: deque[Array] = deque()  # velocities that arrive late
    for index in range(limit):
        begun_ns += _paused(session, stream, steering, index)
        trace.add(cursor)
        cue = task.step(cursor, width)
        if len(task.trials) >= trials:
            break
        bin = subject.step(cursor, cue.target, go=cue.go)
        given = steering.disturb(index, bin.counts[columns], None)
        others = steering.decode(None) if given is None else steering.decode(*given)
        counts = np.zeros(len(columns), dtype=np.int64) if given is None else given[0]
        log.counts.append(np.asarray(counts, dtype=np.int64))
        intended = time.monotonic_ns()
        if speed is not None:
            intended = begun_ns + round(index * width / speed * 1e9)
            _listen(session, stream, until_ns=intended, index=-1)
        log.bins = index + 1
        stream.grow(index)
        if given is not None:
            _wait_for_credit(session, stream, patience)
            stream.intended[index] = intended
            stream.sent[index] = session.send(index, counts, source_ns=intended)
            _listen(session, stream, until_ns=intended + round(deadline * 1e9), index=index)
        now = time.monotonic_ns()
        while newest < index and stream.status[newest + 1]:
            newest, heard_ns = newest + 1, now
            decoded = stream.kinematics[newest, :2]
            if np.isfinite(decoded).all():
                velocity = decoded * scale
        if newest < index and given is not None:
            log.held += 1
            if now - heard_ns > patience * 1e9:
                raise _silent(session, patience)
        chosen = others.get(steering.decoder)
        waiting.append(velocity if chosen is None else chosen[:2] * scale)
        late = round(steering.settings.latency / width)
        while len(waiting) > 1 + late:
            waiting.popleft()
        used = waiting[0] if len(waiting) > late else np.zeros(2)
        log.velocities.append(used)
        steering.tell(
            index,
            truth=bin.intended / scale,
            decoders=others or None,
            cursor=cursor,
            target=cue.target,
            go=cue.go,
            radius=task.radius,
        )
        cursor = np.clip(cursor + used * width, -WORKSPACE, WORKSPACE)
        if watch is not None:
            watch(log, task)
    stream.ended_ns = time.monotonic_ns()
    return trace.reaching(task.trials[:trials]), log


def _paused(session: Session, log: StreamLog, steering: Steering, index: int) -> int:
    """Apply the changes due at a bin, and wait while paused; return the ns that this took."""
    began, took, pauses = time.monotonic_ns(), 0, 0
    while True:
        pauses += sum(round((change.pause or 0) * 1e9) for change in steering.begin(index))
        if not steering.paused and took >= pauses:
            return took
        _take(session, log, 0.05)
        took = time.monotonic_ns() - began


def _listen(session: Session, log: StreamLog, *, until_ns: int, index: int) -> None:
    """Receive answers until the given time or until ``index`` is answered; at least once."""
    while True:
        left = (until_ns - time.monotonic_ns()) / 1e9
        # Polls have a resolution of one millisecond; below that, poll without waiting.
        _take(session, log, left if left >= 0.001 else 0.0)
        if left <= 0 or (index >= 0 and log.status[index]):
            return


def _wait_for_credit(session: Session, log: StreamLog, patience: float) -> None:
    """Receive answers until the session has a credit; the service refuses bins beyond them."""
    heard_ns = time.monotonic_ns()
    while session.credits <= 0:
        answered = log.answered
        _take(session, log, 0.05)
        now = time.monotonic_ns()
        if log.answered > answered:
            heard_ns = now
        elif now - heard_ns > patience * 1e9:
            raise _silent(session, patience)


def _take(session: Session, log: StreamLog, wait: float) -> None:
    """Record all answers, waiting up to ``wait`` seconds for the first. Raises ServiceError."""
    for answer in session.receive(wait):
        log.take(answer)
    if session.refused:
        raise refusal(session.endpoint, session.refused[0])


def _silent(session: Session, patience: float) -> AnswerTimeoutError:
    return AnswerTimeoutError(
        f"service at {session.endpoint}", expected=f"an answer within {patience:g} s", got="none"
    )


def without_decoder(
    velocities: list[Array], task: CentreOut, *, trials: int, width: float, seed: int
) -> Reaching:
    """Control for chance: the same velocities, shuffled in half-second pieces, move the cursor."""
    trace, cursor = Trace(width), np.zeros(2)
    if not velocities:
        return trace.reaching([])
    rng = np.random.default_rng([seed, 77])
    piece = max(1, round(0.5 / width))
    pieces = [velocities[i : i + piece] for i in range(0, len(velocities), piece)]
    queue: list[Array] = []
    for _ in range(int(trials * MAX_TRIAL_S / width)):
        trace.add(cursor)
        task.step(cursor, width)
        if len(task.trials) >= trials:
            break
        if not queue:
            queue = [v for i in rng.permutation(len(pieces)) for v in pieces[i]]
        cursor = np.clip(cursor + queue.pop() * width, -WORKSPACE, WORKSPACE)
    return trace.reaching(task.trials[:trials])


def own_hand(subject: Subject, task: CentreOut, *, trials: int) -> Reaching:
    """Upper bound: the same subject and task with the subject's own hand as cursor."""
    hand, trace = Hand(), Trace(TICK)
    for _ in range(int(trials * MAX_TRIAL_S / TICK)):
        trace.add(hand.position)
        cue = task.step(hand.position, TICK)
        if len(task.trials) >= trials:
            break
        subject.advance(hand.position, cue.target, go=cue.go)
        hand.move(subject.intended)
    return trace.reaching(task.trials[:trials])
