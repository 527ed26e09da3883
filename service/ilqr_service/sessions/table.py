"""The table of sessions: who may feed what, in which order, and what is said back.

Pure: no sockets, no threads, no clock; every method takes the time as an integer of nanoseconds and
returns ``Effects`` for its caller to carry out.

Rules:

- A session belongs to the feeder that opened it. Opening it again while it is open needs a higher
  epoch (from any feeder); the older run ends there, with a notice, and what was queued of it is
  dropped and counted. An ended session's name and epoch are free again.
- Opening with ``resume`` and the epoch of an open session takes it over where it stands, from a
  feeder that is gone or after a restart of the service.
- Indices rise from 0, but may come out of order. Gap rule: when bin k+g arrives after bin k, the
  bins between are answered first, as ``missing``: predictions from an all-masked bin. A gap of more
  than ``gap_limit`` bins is not answered bin by bin: the estimate starts again at the bin that
  came, a notice names the range that has no answers, and a reset is counted. So one message never
  causes more than ``gap_limit`` + 1 new bins.
- Overload: an ``anytime`` session sheds, and so does any other that went beyond its credits, until
  it was in time for H bins in a row: see ``Scheduler.shed``. What a gap adds to more than
  ``backlog`` queued works is not solved either. Every index has its answer.
- A ``clocked`` session does not wait for a later bin: a bin is answered as missing once its time
  and the grace have passed, for up to ``gap_limit`` bins in a row.
- A bin that comes after it was answered as missing is put in its place while it is in the window
  of the newest H bins; it and all bins after it are answered again with a higher revision. Further
  back it is refused (``late``). An index that had its bin is refused (``index``).
- Credits: a feeder may have ``credits`` bins unanswered. Each bin returns its credit when it is
  answered or refused, told at the latest with the next tick; a bin beyond them is refused (its
  index is then a gap).
- A session idle for ``idle_ns`` with nothing queued ends, with a notice.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ilqr_service.sessions.checks import check_bin, check_open
from ilqr_service.sessions.clocked import Credits, TimeTable
from ilqr_service.sessions.session import Effects, Limits, Session
from ilqr_service.work import NO_SOLVE, Answer, ModelFacts, Vector, Work
from ilqr_vae.errors import ProtocolError
from ilqr_vae.protocol import messages


class SessionTable:
    """All sessions.

    Args:
        facts: of the first slot's model.
        limits: what is granted.
        slot: the first slot's name.

    Attributes:
        accepting: False refuses whatever would bring new work, with ``why_not``.
        slots: what is served, by slot; the first is for sessions that name none.
        next_run: the next run's number.
    """

    def __init__(self, facts: ModelFacts, limits: Limits, slot: str = "main") -> None:
        self.limits = limits
        self.accepting = True
        self.why_not = "the service is not taking sessions"
        self.slots: dict[str, ModelFacts] = {slot: facts}
        self.next_run = 0
        self._sessions: dict[str, Session] = {}
        self._runs: dict[int, Session] = {}
        self._credits = Credits(limits)
        self._times = TimeTable(self._runs, limits)

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        return iter(self._sessions.values())

    @property
    def waiting(self) -> int:
        """Bins queued or being solved."""
        return sum(s.waiting for s in self._sessions.values())

    def slot_of(self, model: str) -> str:
        """The slot of that name or model. Raises ProtocolError."""
        if not model:
            return next(iter(self.slots))
        for slot, facts in self.slots.items():
            if model in (slot, facts.model):
                return slot
        known = ", ".join(f"{slot} ({facts.model})" for slot, facts in self.slots.items())
        raise ProtocolError("model", expected=f"one of {known}", got=repr(model[:64]))

    # ---- messages ------------------------------------------------------------------------------

    def receive(
        self,
        owner: bytes,
        message: messages.Open | messages.Bin | messages.Close,
        now_ns: int,
        user: str = "",
    ) -> Effects:
        """Take a feeder's message that arrived at ``now_ns``. Never raises for what it holds."""
        try:
            if not self.accepting and not isinstance(message, messages.Close):
                raise ProtocolError("service", expected="ready", got=self.why_not)
            match message:
                case messages.Open():
                    return self._open(owner, message, now_ns, user)
                case messages.Bin():
                    return self._bin(owner, message, now_ns)
                case messages.Close():
                    return self._close(owner, message, now_ns)
        except ProtocolError as error:
            effects = Effects.refusal(owner, error, message.session)
            session = self._sessions.get(message.session)
            if session is None or not isinstance(message, messages.Bin):
                return effects
            if (session.owner, session.epoch) == (owner, message.epoch):
                self._credits.owe(session)
                if error.field == "credits":
                    session.overran()
                    effects.overran.append(session.run)
            return effects

    def _open(self, owner: bytes, message: messages.Open, now_ns: int, user: str) -> Effects:
        before = self._sessions.get(message.session)
        if message.resume and before is not None and message.epoch == before.epoch:
            return self._resume(before, owner, message, now_ns, user)
        slot = self.slot_of(message.model)
        facts = self.slots[slot]
        check_open(message, facts)
        effects = Effects()
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
        deadline = message.deadline_ns or self.limits.deadline_ns or facts.bin_width_ns
        session = Session(
            run=self.next_run,
            name=message.session,
            epoch=message.epoch,
            owner=owner,
            deadline_ns=deadline,
            anytime=message.anytime,
            seen_ns=now_ns,
            slot=slot,
            facts=facts,
            request=message,
            user=user,
        )
        self.add(session)
        effects.opened.append(session)
        effects.replies.append((owner, session.opened(self.limits.credits)))
        effects.published.append(session.notice("opened"))
        effects.events["opened"] += 1
        return effects

    def add(self, session: Session) -> None:
        """Put in a session, new or resumed from a journal."""
        self.next_run = max(self.next_run, session.run + 1)
        self._sessions[session.name] = session
        self._runs[session.run] = session

    def _resume(
        self, session: Session, owner: bytes, message: messages.Open, now_ns: int, user: str
    ) -> Effects:
        check_open(message, session.facts)
        if session.closing:
            raise ProtocolError("session", expected="open", got="closing")
        if session.user != user:
            raise ProtocolError("session", expected="one of this user", got=message.session)
        session.owner, session.seen_ns, session.owed, session.silent = owner, now_ns, 0, 0
        session.arrivals.clear()
        session.source = (-1, -(2**62))  # another feeder's clock may be another
        effects = Effects(again=[r for r in session.recent if r.index > message.answered])
        credits = max(0, self.limits.credits - session.unanswered)
        effects.replies.append((owner, session.opened(credits, resumed=True)))
        effects.published.append(session.notice(f"resumed: next bin {session.next_index}"))
        effects.events["resumed"] += 1
        return effects

    def _own(self, owner: bytes, name: str, epoch: int) -> Session:
        session = self._sessions.get(name)
        if session is None or session.owner != owner:
            raise ProtocolError("session", expected="one that this feeder opened", got=name[:64])
        if session.epoch != epoch:
            raise ProtocolError("epoch", expected=str(session.epoch), got=str(epoch))
        return session

    def _bin(self, owner: bytes, message: messages.Bin, now_ns: int) -> Effects:
        session = self._own(owner, message.session, message.epoch)
        session.seen_ns = now_ns
        if session.closing:
            raise ProtocolError("session", expected="open", got="closing")
        counts, mask = check_bin(message, session.facts)
        index = message.index
        late = index < session.next_index
        if late and index not in session.missing:
            raise ProtocolError("index", expected=f"{session.next_index} or above", got=str(index))
        if late and not session.in_window(index):
            raise ProtocolError(
                "late",
                expected=f"a bin of the newest {session.facts.horizon}",
                got=f"bin {index} after bin {session.next_index - 1}",
            )
        if session.unanswered >= self.limits.credits:
            raise ProtocolError(
                "credits",
                expected=f"at most {self.limits.credits} bins unanswered",
                got=f"bin {index} beyond them",
            )
        session.check_source(index, message.source_ns)
        effects = Effects()
        session.arrived(index, now_ns)
        if late:
            session.missing.discard(index)
            effects.events["late_in"] += 1
        else:
            self._bridge(session, index, now_ns, effects)
        self._queue(session, index, now_ns, effects, message, counts, mask, late)
        session.unanswered += 1
        session.prune()
        self._times.note(session)
        return effects

    def _bridge(self, session: Session, index: int, now_ns: int, effects: Effects) -> None:
        """Answer the bins that did not come before ``index``, or start again there."""
        gap = range(session.next_index, index)
        if not gap:
            return
        effects.events["gap"] += 1
        effects.events["gap_bins"] += len(gap)
        if len(gap) > self.limits.gap_limit:
            what = f"reset: bins {gap[0]} to {gap[-1]} did not come and have no answers"
            effects.published.append(session.notice(what))
            effects.events["reset"] += 1
            session.started = False
            session.base = index
            return
        crowded = session.waiting + len(gap) > self.limits.backlog
        if crowded:
            session.overran()
        for one in gap:
            self._queue(session, one, now_ns, effects, budget=NO_SOLVE if crowded else 0)

    def _queue(
        self,
        session: Session,
        index: int,
        now_ns: int,
        effects: Effects,
        message: messages.Bin | None = None,
        counts: Vector | None = None,
        mask: NDArray[np.bool_] | None = None,
        late: bool = False,
        budget: int = 0,
    ) -> None:
        work = Work(
            run=session.run,
            index=index,
            counts=counts,
            mask=mask,
            fresh=not session.started,
            source_ns=0 if message is None else message.source_ns,
            clock=None if message is None else message.clock,
            received_ns=now_ns,
            due_ns=now_ns + session.deadline_ns,
            anytime=session.anytime,
            serial=session.serial,
            late=late,
            budget=budget,
            sheds=session.anytime or session.overrun,
            watch=session.request.watch_units,
            model=session.facts.model,
        )
        session.serial += 1
        session.started = True
        session.waiting += 1
        if counts is None:
            session.missing.add(index)
        session.next_index = max(session.next_index, index + 1)
        effects.work.append(work)

    def _close(self, owner: bytes, message: messages.Close, now_ns: int) -> Effects:
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
        if answer.settles:
            session.waiting -= 1
            if answer.revised or not work.missing:
                session.unanswered -= 1
                self._credits.owe(session)
            self._times.note(session)
        if answer.void:
            effects.events["late_lost"] += 1
        else:
            session.publish(answer, published_ns, effects)
        if session.closing:
            self._end_if_answered(session, effects)
        return effects

    def credits(self, *, all_owed: bool = True) -> list[tuple[bytes, messages.Credit]]:
        """The credits that came free since they were last told, one message per session; of
        ``all_owed`` also the few that a feeder cannot be short of yet."""
        return self._credits.told(all_owed=all_owed)

    # ---- time and ends -------------------------------------------------------------------------

    def next_due(self) -> int | None:
        """When ``tick`` has the next bin to answer without it."""
        return self._times.next()

    def tick(self, now_ns: int) -> Effects:
        """Answer bins whose time has passed; end the sessions that have been silent too long."""
        effects = Effects()
        for session in list(self._sessions.values()):
            while (due := session.overdue_ns(self.limits)) is not None and due <= now_ns:
                session.silent += 1
                effects.events["overdue"] += 1
                self._queue(session, session.next_index, now_ns, effects)
                self._times.note(session)
            if session.waiting == 0 and now_ns - session.seen_ns > self.limits.idle_ns:
                self._end(session, "idle", effects)
                effects.events["idle"] += 1
        return effects

    def swap(self, slot: str, facts: ModelFacts) -> Effects:
        """Serve a slot by another model, each of its sessions from its next bin on."""
        self.slots[slot] = facts
        effects = Effects()
        for session in self._sessions.values():
            if session.slot != slot:
                continue
            effects.work.append(session.swap(facts))
            what = f"model: {facts.model} from bin {session.next_index}"
            effects.published.append(session.notice(what))
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

    def infos(self, now_ns: int) -> tuple[messages.SessionInfo, ...]:
        return tuple(s.info(now_ns) for s in self)

    def _end_if_answered(self, session: Session, effects: Effects) -> None:
        if session.waiting == 0:
            self._end(session, "closed", effects)

    def _end(self, session: Session, what: str, effects: Effects) -> None:
        del self._sessions[session.name]
        del self._runs[session.run]
        self._credits.forget(session.run)
        if session.owed:
            effects.replies.append((session.owner, session.credit()))
        effects.forget.append(session.run)
        effects.ended.append((session.run, what))
        effects.published.append(session.notice(what))
        effects.replies.append((session.owner, session.closed()))
