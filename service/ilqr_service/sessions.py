"""The table of sessions: who may feed what, in which order, and what is said back.

Pure: no sockets, no threads, no clock; every method takes the time as an integer of nanoseconds and
returns ``Effects`` for its caller to carry out.

Rules:

- A session belongs to the feeder that opened it. Opening it again while it is open needs a higher
  epoch (from whichever feeder); the older run ends there, with a notice, and what was queued of it
  is dropped and counted. An ended session's name and epoch are free again.
- Indices rise from 0. An index at or below the newest accepted one is refused and counted.
- Gap rule: when bin k+g arrives after bin k, the bins between are answered first, as ``missing``:
  predictions from an all-masked bin. This is done for gaps up to ``gap_limit`` bins. A longer gap
  is not answered bin by bin: the estimate starts again at the bin that came, a notice names the
  range that has no answers, and a reset is counted. So one message never causes more than
  ``gap_limit`` + 1 solves.
- Credits: a feeder may have ``credits`` bins unanswered. Each bin returns its credit when it is
  answered or refused; a bin beyond them is refused (its index is then a gap).
- A session idle for ``idle_ns`` with nothing queued ends, with a notice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from ilqr_service.checks import check_bin, check_open
from ilqr_service.session import Effects, Limits, Session
from ilqr_service.work import Answer, ModelFacts, Work, status_of
from ilqr_vae import wire
from ilqr_vae.errors import ProtocolError


class SessionTable:
    """All sessions of one model.

    Attributes:
        accepting: False refuses whatever would bring new work, with ``why_not``.
    """

    def __init__(self, facts: ModelFacts, limits: Limits) -> None:
        self.facts = facts
        self.limits = limits
        self.accepting = True
        self.why_not = "the service is not taking sessions"
        self._sessions: dict[str, Session] = {}
        self._runs: dict[int, Session] = {}
        self._next_run = 0

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        return iter(self._sessions.values())

    @property
    def waiting(self) -> int:
        """Bins queued or being solved."""
        return sum(s.waiting for s in self._sessions.values())

    # ---- messages ------------------------------------------------------------------------------

    def receive(
        self, owner: bytes, message: wire.Open | wire.Bin | wire.Close, now_ns: int
    ) -> Effects:
        """Take a feeder's message that arrived at ``now_ns``. Never raises for what it holds."""
        try:
            if not self.accepting and not isinstance(message, wire.Close):
                raise ProtocolError("service", expected="ready", got=self.why_not)
            match message:
                case wire.Open():
                    return self._open(owner, message, now_ns)
                case wire.Bin():
                    return self._bin(owner, message, now_ns)
                case wire.Close():
                    return self._close(owner, message, now_ns)
        except ProtocolError as error:
            effects = self.refuse(owner, error, message.session)
            session = self._sessions.get(message.session)
            if (
                isinstance(message, wire.Bin)
                and session is not None
                and (session.owner, session.epoch) == (owner, message.epoch)
            ):
                session.owed += 1
            return effects

    def refuse(self, owner: bytes, error: ProtocolError, session: str = "") -> Effects:
        """Say what was wrong with one message, and count it by the field that was wrong."""
        reason = error.field.split(".")[0].split("[")[0]
        refused = wire.Refused(
            field=error.field,
            expected=error.expected,
            got=error.got[:200],
            session=session[:64],
        )
        return Effects(replies=[(owner, refused)], events=Counter({f"refused:{reason}": 1}))

    def _open(self, owner: bytes, message: wire.Open, now_ns: int) -> Effects:
        check_open(message, self.facts)
        effects = Effects()
        before = self._sessions.get(message.session)
        if before is not None:
            if message.epoch <= before.epoch:
                raise ProtocolError(
                    "epoch",
                    expected=f"above {before.epoch}: the session is open",
                    got=str(message.epoch),
                )
            self._end(before, f"restarted: epoch {message.epoch}", effects)
            effects.events["restarted"] += 1
        elif len(self._sessions) >= self.limits.max_sessions:
            raise ProtocolError(
                "session",
                expected=f"at most {self.limits.max_sessions} open sessions",
                got="one more",
            )
        session = Session(
            run=self._next_run,
            name=message.session,
            epoch=message.epoch,
            owner=owner,
            deadline_ns=message.deadline_ns or self.limits.deadline_ns,
            anytime=message.anytime,
            seen_ns=now_ns,
        )
        self._next_run += 1
        self._sessions[session.name] = session
        self._runs[session.run] = session
        opened = wire.Opened(
            session=session.name,
            epoch=session.epoch,
            model=self.facts.model,
            latents=self.facts.latents,
            kinematic_names=self.facts.kinematic_names,
            kinematic_units=self.facts.kinematic_units,
            horizon=self.facts.horizon,
            iterations=self.facts.iterations,
            credits=self.limits.credits,
        )
        effects.replies.append((owner, opened))
        effects.published.append(session.notice("opened"))
        effects.events["opened"] += 1
        return effects

    def _own(self, owner: bytes, name: str, epoch: int) -> Session:
        session = self._sessions.get(name)
        if session is None or session.owner != owner:
            raise ProtocolError("session", expected="one that this feeder opened", got=name[:64])
        if session.epoch != epoch:
            raise ProtocolError("epoch", expected=str(session.epoch), got=str(epoch))
        return session

    def _bin(self, owner: bytes, message: wire.Bin, now_ns: int) -> Effects:
        session = self._own(owner, message.session, message.epoch)
        session.seen_ns = now_ns
        if session.closing:
            raise ProtocolError("session", expected="open", got="closing")
        counts, mask = check_bin(message, self.facts)
        if message.index < session.next_index:
            raise ProtocolError(
                "index", expected=f"{session.next_index} or above", got=str(message.index)
            )
        if session.unanswered >= self.limits.credits:
            raise ProtocolError(
                "credits",
                expected=f"at most {self.limits.credits} bins unanswered",
                got=f"bin {message.index} beyond them",
            )
        effects = Effects()
        due_ns = now_ns + session.deadline_ns
        gap = range(session.next_index, message.index)
        if gap:
            effects.events["gap"] += 1
            effects.events["gap_bins"] += len(gap)
        if len(gap) > self.limits.gap_limit:
            what = f"reset: bins {gap[0]} to {gap[-1]} did not come and have no answers"
            effects.published.append(session.notice(what))
            effects.events["reset"] += 1
            session.started = False
            gap = range(0)
        for index in gap:
            self._queue(
                session,
                Work(
                    run=session.run,
                    index=index,
                    counts=None,
                    mask=None,
                    fresh=not session.started,
                    source_ns=0,
                    received_ns=now_ns,
                    due_ns=due_ns,
                    anytime=session.anytime,
                ),
                effects,
            )
        self._queue(
            session,
            Work(
                run=session.run,
                index=message.index,
                counts=counts,
                mask=mask,
                fresh=not session.started,
                source_ns=message.source_ns,
                received_ns=now_ns,
                due_ns=due_ns,
                anytime=session.anytime,
            ),
            effects,
        )
        session.unanswered += 1
        session.next_index = message.index + 1
        return effects

    def _queue(self, session: Session, work: Work, effects: Effects) -> None:
        session.started = True
        session.waiting += 1
        effects.work.append(work)

    def _close(self, owner: bytes, message: wire.Close, now_ns: int) -> Effects:
        session = self._own(owner, message.session, message.epoch)
        session.seen_ns = now_ns
        session.closing = True
        effects = Effects()
        self._end_if_answered(session, effects)
        return effects

    # ---- answers -------------------------------------------------------------------------------

    def answered(self, answer: Answer, published_ns: int) -> Effects:
        """An answer that is published at ``published_ns``; its status is decided here."""
        effects = Effects()
        work = answer.work
        session = self._runs.get(work.run)
        if session is None:
            effects.events["dropped"] += 1
            return effects
        status = status_of(answer, published_ns)
        session.waiting -= 1
        session.bins += 1
        session.newest = work.index
        session.statuses[status] += 1
        session.solves.add(answer.solve_end_ns - answer.solve_start_ns)
        if np.isfinite(answer.bits):
            session.bits += answer.bits
            session.spikes += answer.spikes
        if not work.missing:
            session.unanswered -= 1
            session.owed += 1
        effects.published.append(
            wire.Result(
                session=session.name,
                epoch=session.epoch,
                index=work.index,
                revision=0,
                model=self.facts.model,
                status=status,
                solver=answer.solver,
                iterations=answer.iterations,
                source_ns=work.source_ns,
                received_ns=work.received_ns,
                solve_start_ns=answer.solve_start_ns,
                solve_end_ns=answer.solve_end_ns,
                published_ns=published_ns,
                latent=wire.pack(answer.latent, "<f8"),
                latent_std=wire.pack(answer.latent_std, "<f8"),
                rates=wire.pack(answer.rates, "<f8"),
                kinematics=wire.pack(answer.kinematics, "<f8"),
                kinematics_std=wire.pack(answer.kinematics_std, "<f8"),
                bits=answer.bits,
                spikes=answer.spikes,
            )
        )
        effects.events[f"status:{status}"] += 1
        if session.closing:
            self._end_if_answered(session, effects)
        return effects

    def credits(self) -> list[tuple[bytes, wire.Credit]]:
        """The credits that came free since the last call, one message per session."""
        due: list[tuple[bytes, wire.Credit]] = []
        for session in self._sessions.values():
            if session.owed:
                due.append((session.owner, session.credit()))
        return due

    # ---- time and ends -------------------------------------------------------------------------

    def tick(self, now_ns: int) -> Effects:
        """End the sessions that have been silent for too long."""
        effects = Effects()
        for session in list(self._sessions.values()):
            if session.waiting == 0 and now_ns - session.seen_ns > self.limits.idle_ns:
                self._end(session, "idle", effects)
                effects.events["idle"] += 1
        return effects

    def drain(self, why: str) -> None:
        """Take no more bins; what is queued is still to be answered."""
        self.accepting = False
        self.why_not = why

    def end_all(self, what: str) -> Effects:
        """End every session, answered or not."""
        effects = Effects()
        for session in list(self._sessions.values()):
            self._end(session, what, effects)
        return effects

    def infos(self, now_ns: int) -> tuple[wire.SessionInfo, ...]:
        return tuple(s.info(now_ns) for s in self._sessions.values())

    def _end_if_answered(self, session: Session, effects: Effects) -> None:
        if session.waiting == 0:
            self._end(session, "closed", effects)

    def _end(self, session: Session, what: str, effects: Effects) -> None:
        del self._sessions[session.name]
        del self._runs[session.run]
        if session.owed:
            effects.replies.append((session.owner, session.credit()))
        effects.forget.append(session.run)
        effects.published.append(session.notice(what))
        effects.replies.append(
            (
                session.owner,
                wire.Closed(session=session.name, epoch=session.epoch, bins=session.bins),
            )
        )
