"""A run of a session, and the limits of the service."""

from __future__ import annotations

import math
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from msgspec import UNSET

from ilqr_service.metrics.histogram import Recent
from ilqr_service.sessions.arrivals import Arrivals
from ilqr_service.sessions.calibration import Calibration
from ilqr_service.sessions.clocked import FeederClock
from ilqr_service.sessions.effects import Effects
from ilqr_service.settings import ServiceSettings
from ilqr_service.work import SHED, TROUBLE, EngineAnswer, EngineInfo, SwapModel, Vector, status_of
from ilqr_vae.protocol import messages
from ilqr_vae.protocol.answer import Estimated, class_of
from ilqr_vae.protocol.spikes import SpikeBinner


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The limits of the service.

    Attributes:
        credits: number of bins that a feeder may have unanswered.
        gap_limit: longest gap that is answered bin by bin.
        max_sessions: largest number of open sessions.
        deadline_ns: deadline of a session that asks for 0; if 0, the model's bin width.
        idle_ns: a session that is silent for longer ends.
        backlog: number of queued works of a session above which bins of a gap are not solved.
    """

    credits: int = 64
    gap_limit: int = 100
    max_sessions: int = 256
    deadline_ns: int = 0
    idle_ns: int = 600_000_000_000
    backlog: int = 256

    @classmethod
    def of(cls, settings: ServiceSettings) -> Limits:
        """Return the limits in the settings."""
        return cls(
            credits=settings.credits,
            gap_limit=settings.gap_limit,
            max_sessions=settings.max_sessions,
            deadline_ns=round(settings.deadline_ms * 1e6),
            idle_ns=round(settings.idle_s * 1e9),
            backlog=max(2 * settings.credits, settings.gap_limit + settings.credits),
        )


_F8 = np.dtype("<f8")
_SCALARS = tuple(
    name
    for name in Estimated.__struct_fields__
    if name not in (*messages.VECTORS, "classes", "model")
)


# One tuple for equal shapes: the garbage collector visits each that a kept result holds.
_shapes: dict[tuple[int, ...], tuple[int, ...]] = {}


def _packed(values: Vector) -> messages.Array:
    shape = values.shape
    data = values.astype(_F8, copy=False).tobytes()
    return messages.Array("<f8", _shapes.setdefault(shape, shape), data)


RECENT = 64
"""Number of newest results kept, to be published again if the feeder asks."""

_REMEMBERED = 4096
# extra bins beyond the window, for spikes that arrive before the bins of the window are queued
_KEPT = 16
_NOTED = 1024


@dataclass(slots=True)
class ServedSession:
    """One run of a session.

    Attributes:
        run: serial number.
        slot, model_info: slot and model that serve it.
        request: the message that opened it.
        owner: connection of its feeder; empty until one resumes a session of an earlier service.
        user: user of the feeder, if known.
        next_index: first bin that has not arrived.
        token: proves that a message is from the session's feeder; empty if it stated none.
        denied: connections that were refused this session, which can never replace its feeder's.
        arrivals, clock: recent arrivals, with which later bins are compared.
        binner: bins spikes; None if the feeder sends bins.
        noted: newest events, by source and number.
        base: first bin of the current estimate.
        serial: number of works queued so far.
        rewinds: the next work goes back to before the feeder's pause.
        missing: indices answered without a bin.
        revisions: revisions of the bins from ``known_from`` on that were answered again.
        revised_to: highest revision of an answer so far.
        ignored: units whose counts in the newest answered bin were not used.
        overrun: it exceeded its credits, and has not been in time for a whole window since;
            ``calm`` counts the bins in time.
    """

    run: int
    name: str
    epoch: int
    owner: bytes
    deadline_ns: int
    anytime: bool
    seen_ns: int
    slot: str
    model_info: EngineInfo
    request: messages.Open
    user: str = ""
    next_index: int = 0
    base: int = 0
    serial: int = 0
    newest: int = -1
    started: bool = False
    rewinds: bool = False
    closing: bool = False
    waiting: int = 0
    unanswered: int = 0
    owed: int = 0
    bins: int = 0
    revised: int = 0
    bits: float = 0.0
    spikes: int = 0
    silent: int = 0
    overrun: bool = False
    calm: int = 0
    flagged: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    missing: set[int] = field(default_factory=set[int])
    revisions: dict[int, int] = field(default_factory=dict[int, int])
    revised_to: int = 0
    known_from: int = 0
    statuses: Counter[str] = field(default_factory=Counter[str])
    solves: Recent = field(default_factory=Recent)
    recent: deque[messages.Result] = field(
        default_factory=lambda: deque[messages.Result](maxlen=RECENT)
    )
    denied: set[bytes] = field(default_factory=set[bytes])
    noted: dict[tuple[str, int], messages.Noted] = field(
        default_factory=dict[tuple[str, int], messages.Noted]
    )
    binner: SpikeBinner | None = field(init=False, default=None)
    calibration: Calibration | None = field(init=False, default=None)
    token: str = field(init=False)
    arrivals: Arrivals = field(init=False)
    clock: FeederClock = field(init=False)

    def __post_init__(self) -> None:
        width = self.model_info.bin_width_ns
        if self.request.lag:  # twice as many answers
            self.recent = deque(maxlen=2 * RECENT)
        self.token = self.request.token
        self.arrivals = Arrivals(width)
        grace_ns = self.request.grace_ns or width // 2
        self.clock = FeederClock(width, grace_ns)
        if (origin_ns := self.request.origin_ns) is not None:
            model_info = self.model_info
            kept = model_info.horizon + _KEPT
            self.binner = SpikeBinner(
                len(model_info.unit_names), width, origin_ns, grace_ns=grace_ns, keep=kept
            )

    def due_ns(self, limits: Limits) -> int | None:
        """Return when the next bin is answered as missing; None if not clocked."""
        waits = not self.request.clocked or self.closing
        if waits or self.silent >= limits.gap_limit or self.waiting >= limits.backlog:
            return None
        return self.clock.due_ns(self.next_index)

    def in_window(self, index: int) -> bool:
        """Return whether a bin that was answered as missing can still be inserted."""
        return index >= max(self.base, self.next_index - self.model_info.horizon)

    def prune(self) -> None:
        """Drop entries that are too old to matter."""
        if len(self.missing) > _REMEMBERED:
            self.missing = {i for i in self.missing if i >= self.next_index - _REMEMBERED // 2}
        if len(self.revisions) > 4 * self.model_info.horizon:
            # by answers, not by arrivals: answers to late bins may still be queued
            limit = self.newest - 2 * self.model_info.horizon
            self.revisions = {i: r for i, r in self.revisions.items() if i >= limit}
            self.known_from = max(self.known_from, limit)

    def info(self, now_ns: int) -> messages.SessionInfo:
        p50, p99 = self.solves.quantiles(0.5, 0.99)
        return messages.SessionInfo(
            session=self.name,
            epoch=self.epoch,
            bins=self.bins,
            next_index=self.next_index,
            deadline_ns=self.deadline_ns,
            statuses=dict(self.statuses),
            solve_p50_ns=p50,
            solve_p99_ns=p99,
            bits_per_spike=self.bits / self.spikes if self.spikes else 0.0,
            idle_ns=max(0, now_ns - self.seen_ns),
            model=self.model_info.model,
            revised=self.revised,
            flagged=self.flagged,
            calibration=None if self.calibration is None else self.calibration.index,
        )

    def opened(
        self, credits: int, *, next_index: int = 0, resumed: bool = False
    ) -> messages.Opened:
        model_info = self.model_info
        return messages.Opened(
            session=self.name,
            epoch=self.epoch,
            model=model_info.model,
            latents=model_info.latents,
            kinematic_names=model_info.kinematic_names,
            kinematic_units=model_info.kinematic_units,
            horizon=model_info.horizon,
            iterations=model_info.iterations,
            credits=credits,
            next_index=next_index,
            resumed=resumed,
            next_batch=UNSET if self.binner is None else self.binner.next_batch,
            features=model_info.feature_names or UNSET,
        )

    def note(self, event: messages.Event, received_ns: int) -> messages.Noted:
        """Record an event; return its acknowledgement."""
        noted = messages.Noted(
            session=self.name,
            epoch=self.epoch,
            source=event.source,
            index=event.index,
            received_ns=received_ns,
            bin=self.next_index,
        )
        self.remember(noted)
        return noted

    def remember(self, noted: messages.Noted) -> None:
        """Record an event, so that a repetition is recognised."""
        self.noted[noted.source, noted.index] = noted
        if len(self.noted) > _NOTED:
            del self.noted[next(iter(self.noted))]

    def swap(self, model_info: EngineInfo) -> SwapModel:
        """Continue with another model from the next bin; return the work that does it."""
        place = self.next_work(self.next_index)
        self.model_info = model_info
        return SwapModel(**place, to=model_info.model)

    def next_work(self, index: int) -> dict[str, Any]:
        """Return the identifying fields of the next work, and advance the serial."""
        self.serial += 1
        return {
            "run": self.run,
            "index": index,
            "serial": self.serial - 1,
            "model": self.model_info.model,
            "slot": self.slot,
            "watch": self.request.watch_units,
            "lag": self.request.lag,
        }

    def closed(self, reason: str) -> messages.Closed:
        return messages.Closed(session=self.name, epoch=self.epoch, bins=self.bins, reason=reason)

    def notice(self, what: str) -> messages.Notice:
        return messages.Notice(session=self.name, epoch=self.epoch, what=what)

    def credit(self) -> messages.Credit:
        """Return the owed credits, and reset them."""
        owed, self.owed = self.owed, 0
        return messages.Credit(session=self.name, epoch=self.epoch, index=self.newest, credits=owed)

    def result(
        self, answer: EngineAnswer, revision: int, status: messages.Status, published_ns: int
    ) -> messages.Result:
        """Return an answer in its published form."""
        work, classes, names = answer.work, answer.classes, self.model_info.class_names
        return messages.Result(
            session=self.name,
            epoch=self.epoch,
            index=work.index,
            revision=revision,
            model=answer.model or self.model_info.model,
            status=status,
            source_ns=work.source_ns,
            received_ns=work.received_ns,
            published_ns=published_ns,
            clock=work.clock,
            classes=None if classes is None else _packed(classes),
            class_name="" if classes is None else class_of(classes, names, self.request.abstain),
            **{name: _packed(getattr(answer, name)) for name in messages.VECTORS},
            **{name: getattr(answer, name) for name in _SCALARS},
        )

    def detail(self, revision: int, answer: EngineAnswer) -> messages.Detail:
        """Return the inputs of an answer."""
        work, used, inputs = answer.work, answer.used, answer.inputs
        counts, features = work.counts, None
        if counts is not None and self.model_info.feature_names:
            counts, features = np.split(counts, [self.model_info.counted])
        return messages.Detail(
            session=self.name,
            epoch=self.epoch,
            index=work.index,
            revision=revision,
            counts=None if counts is None else messages.pack(counts, "<u2"),
            features=None if features is None else _packed(features),
            mask=None if used is None or work.missing else messages.pack(used, "u1"),
            inputs=None if inputs is None else _packed(inputs),
            input_delay=answer.input_delay,
            members=None if answer.members is None else _packed(answer.members),
        )

    def publish(self, answer: EngineAnswer, published_ns: int, effects: Effects) -> None:
        """Account for an answer; add it and its reports on units to the effects."""
        work = answer.work
        status = status_of(answer, published_ns)
        if trouble := TROUBLE.get(answer.solver):
            effects.events[trouble] += 1
        revision = 0
        if answer.revised or work.index <= self.newest:
            highest = 0 if work.index >= self.known_from else self.revised_to
            revision = self.revisions[work.index] = self.revisions.get(work.index, highest) + 1
            self.revised_to = max(self.revised_to, revision)
            self.revised += 1
            effects.events["revised"] += 1
        else:
            self.bins += 1
            self.newest = work.index
            self.statuses[status] += 1
            effects.events[f"status:{status}"] += 1
        if not answer.revised:
            self.solves.add(answer.solve_end_ns - answer.solve_start_ns)
            self._calm(answer, published_ns)
        first = work.serial == answer.serial or not answer.revised
        if math.isfinite(answer.bits) and first:
            self.bits += answer.bits
            self.spikes += answer.spikes
            effects.spikes += answer.spikes
            effects.bits += answer.bits
            if (calibration := self._calibrated()) is not None:
                met, expected = calibration.add(answer)
                effects.met += met
                effects.expected += expected
        result = self.result(answer, revision, status, published_ns)
        self.recent.append(result)
        effects.published.append(result)
        effects.detailed.append((self, revision, answer))
        for flag in answer.flags:
            effects.published.append(self.notice(flag))
            effects.events["unit_changes"] += 1
        if answer.flagged is not None:
            self.flagged = answer.flagged
        if first:
            self._unbelievable(answer, effects)

    def _calibrated(self) -> Calibration | None:
        """The calibration index; None if the model does not state its expected score."""
        model_info = self.model_info
        if self.calibration is None or self.calibration.model_info is not model_info:
            known = model_info.bits_per_spike > 0 and model_info.mean_rates
            self.calibration = Calibration(model_info) if known else None
        return self.calibration

    def _unbelievable(self, answer: EngineAnswer, effects: Effects) -> None:
        """Report ignored counts, and a lost estimate."""
        index = answer.work.index
        if answer.beyond:
            effects.events["beyond"] += 1
        if answer.ignored:
            effects.events["ignored_counts"] += len(answer.ignored)
        for unit in answer.ignored:
            if unit not in self.ignored:  # once per episode
                kind = "feature" if unit in self.model_info.feature_names else "unit"
                what = f"{kind} {unit} ignored from bin {index}: "
                what += f"its {'count' if kind == 'unit' else 'value'} is beyond the model's limit"
                effects.published.append(self.notice(what))
        self.ignored = answer.ignored
        if answer.restarted:
            effects.published.append(self.notice(f"lost: the estimate began anew at bin {index}"))
            effects.events["lost"] += 1

    def overran(self) -> None:
        """Mark that too many bins are queued: the session sheds from now on."""
        self.overrun, self.calm = True, 0

    def _calm(self, answer: EngineAnswer, published_ns: int) -> None:
        """Count consecutive answers in time, without shed bins."""
        in_time = answer.solver != SHED and published_ns <= answer.work.due_ns
        self.calm = self.calm + 1 if in_time else 0
        self.overrun &= self.calm < self.model_info.horizon
