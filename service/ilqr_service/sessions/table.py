"""The session table: which bins are accepted, in which order, and how they are answered.

Pure: no sockets, no threads, no clock. Methods take the time as an integer of nanoseconds and
    return ``Effects``, which the caller carries out.

Rules:

- A session belongs to the user and the feeder that opened it (``feeders``). To open it again while
  it is open needs a higher epoch; the older run then ends with a notice, and its queued bins are
  dropped and counted. The name and epoch of an ended session are free again.
- Opening with ``resume`` and the epoch of an open session continues it, if its feeder is gone or
  after a restart of the service. Its own feeder may use this to request answers that it has not
  received.
- Indices start at 0 and increase, but may arrive out of order. When bin k+g arrives after bin k,
  the bins between are first answered as ``missing``: predictions from a fully masked bin. A gap of
  more than ``gap_limit`` bins is not answered, nor is one while twice ``backlog`` works are queued:
  the estimate restarts at the bin that arrived, a notice names the range without answers, and a
  reset is counted.
- A bin whose index or source time jumps is held back until another one confirms it, else it is
  refused (``arrivals``). So a message never causes more than 2 (``gap_limit`` + 1) new bins.
- A ``clocked`` session does not wait for a later bin: a bin is answered as missing once its
  expected time and the grace have passed, for up to ``gap_limit`` consecutive bins. Expected times
  follow the feeder (``clocked``).
- A bin that arrives after it was answered as missing is inserted if it is within the newest H bins;
  it and all later bins are answered again with a higher revision. An older one is refused
  (``late``), unless the session is clocked and all bins from it on are missing: then its feeder has
  paused, and the session goes back to the first of them. A second bin of the same index is refused
  (``index``).
- The bins of a spike session are built from batches (``intake``). The same rules apply, except that
  a bin whose counts change is inserted again.
- A feeder may have ``credits`` bins unanswered. A credit returns when its bin is answered or
  refused, at the latest with the next tick. A bin beyond the credits is refused, and its index is a
  gap.
- An ``anytime`` session sheds bins, and so does any other that exceeded its credits, until it was
  in time for H consecutive bins: see ``Policy.shed``. Bins of a gap beyond ``backlog`` queued works
  are not solved either. Every index is answered.
- A session that is idle for ``idle_ns`` with nothing queued ends, with a notice.
"""

from __future__ import annotations

from collections.abc import Iterator

from msgspec.structs import replace

from ilqr_service.sessions.arrivals import Arrival
from ilqr_service.sessions.checks import check_bin, check_event, check_open
from ilqr_service.sessions.clocked import TimeTable, arrived, pause
from ilqr_service.sessions.credits import Credits
from ilqr_service.sessions.effects import Effects
from ilqr_service.sessions.feeders import Feeders, Reaches, Sender
from ilqr_service.sessions.intake import Intake
from ilqr_service.sessions.session import Limits, ServedSession
from ilqr_service.work import EngineAnswer, EngineInfo
from ilqr_vae.errors import ProtocolError, number_of
from ilqr_vae.protocol import messages


class SessionTable:
    """All sessions.

    Args:
        model_info: description of the first slot's model.
        limits: limits of the service.
        slot: name of the first slot.
        reaches: sends a message to a connection; returns False if it is gone.

    Attributes:
        accepting: if False, messages that would add work are refused with ``why_not``.
        slots: served models by slot; the first is for sessions that name none.
        next_run: number of the next run.
    """

    def __init__(
        self,
        model_info: EngineInfo,
        limits: Limits,
        slot: str = "main",
        reaches: Reaches = lambda *_: True,
    ) -> None:
        self.limits = limits
        self.accepting = True
        self.why_not = "the service is not taking sessions"
        self.slots: dict[str, EngineInfo] = {slot: model_info}
        self.next_run = 0
        self._sessions: dict[str, ServedSession] = {}
        self._runs: dict[int, ServedSession] = {}
        self._credits = Credits(limits)
        self._times = TimeTable(self._runs, limits)
        self._feeders = Feeders(limits, reaches)
        self._intake = Intake(limits, self._credits, self._times)

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[ServedSession]:
        return iter(self._sessions.values())

    @property
    def waiting(self) -> int:
        """Number of bins queued or being solved."""
        return sum(s.waiting for s in self._sessions.values())

    def slot_of(self, model: str) -> str:
        """Return the slot of this name or model. Raises ProtocolError."""
        if not model:
            return next(iter(self.slots))
        for slot, model_info in self.slots.items():
            if model in (slot, model_info.model):
                return slot
        known = ", ".join(f"{slot} ({model_info.model})" for slot, model_info in self.slots.items())
        raise ProtocolError("model", expected=f"one of {known}", got=repr(model[:64]))

    # ---- messages ------------------------------------------------------------------------------

    def receive(self, owner: bytes, message: messages.Feed, now_ns: int, user: str = "") -> Effects:
        """Handle a message that arrived at ``now_ns``. Never raises for its contents."""
        sender = Sender(owner, user, now_ns, Effects())
        session = self._sessions.get(message.session)
        try:
            if not self.accepting and not isinstance(message, messages.Close):
                raise ProtocolError("service", expected="ready", got=self.why_not)
            match message:
                case messages.Open():
                    self._open(session, sender, message)
                case messages.Bin():
                    self._bin(self._feeders.check(session, sender, message), sender, message)
                case messages.Spikes():
                    self._spikes(self._feeders.check(session, sender, message), sender, message)
                case messages.Event():
                    self._event(session, sender, message)
                case messages.Close():
                    self._close(self._feeders.check(session, sender, message), sender)
        except ProtocolError as error:
            self._refuse(session, sender, message, error)
        return sender.effects

    def _refuse(
        self,
        session: ServedSession | None,
        sender: Sender,
        message: messages.Feed,
        error: ProtocolError,
    ) -> None:
        """Refuse a message; return the credit of a bin."""
        numberless = isinstance(message, messages.Open | messages.Close)
        index = -1 if numberless else message.index
        sender.effects.refuse(sender.owner, error, message.session, index)
        if session is None or isinstance(message, messages.Close | messages.Event):
            return
        if isinstance(message, messages.Open):
            self._feeders.deny(session, sender)
        elif (session.owner, session.epoch) == (sender.owner, message.epoch):
            if isinstance(message, messages.Bin):
                self._credits.owe(session)
            if error.field == "credits":
                session.overran()
                sender.effects.overran.append(session.run)

    def _open(self, before: ServedSession | None, sender: Sender, message: messages.Open) -> None:
        if message.resume and before is not None and message.epoch == before.epoch:
            self._feeders.resume(before, sender, message)
            return
        if message.resume and not message.begin:
            got = "none" if before is None else f"epoch {before.epoch}"
            raise ProtocolError("session", expected=f"epoch {message.epoch} to be open", got=got)
        slot, effects = self.slot_of(message.model), sender.effects
        model_info = self.slots[slot]
        check_open(message, model_info)
        self._feeders.begin(before, sender, message)
        if before is not None:
            self._end(before, f"restarted: epoch {message.epoch}", effects)
            effects.events["restarted"] += 1
        elif len(self._sessions) >= self.limits.max_sessions:
            raise ProtocolError(
                "session",
                expected=f"at most {number_of(self.limits.max_sessions, 'open session')}",
                got="one more",
            )
        session = ServedSession(
            run=self.next_run,
            name=message.session,
            epoch=message.epoch,
            owner=sender.owner,
            deadline_ns=message.deadline_ns or self.limits.deadline_ns or model_info.bin_width_ns,
            anytime=message.anytime,
            seen_ns=sender.at_ns,
            slot=slot,
            model_info=model_info,
            request=message,
            user=sender.user,
        )
        self.add(session)
        effects.opened.append(session)
        effects.replies.append((sender.owner, session.opened(self.limits.credits)))
        effects.published.append(session.notice("opened"))
        effects.events["opened"] += 1

    def add(self, session: ServedSession) -> None:
        """Add a session, new or resumed from a journal."""
        reach = self.limits.gap_limit
        if session.request.clocked and session.binner is None:
            # bins come in real time: of one ahead by less, those between are put in their place
            reach = min(reach, session.model_info.horizon)
        session.arrivals.reach = reach
        self.next_run = max(self.next_run, session.run + 1)
        self._sessions[session.name] = session
        self._runs[session.run] = session

    def _bin(self, session: ServedSession, sender: Sender, message: messages.Bin) -> None:
        now_ns, effects = sender.at_ns, sender.effects
        session.seen_ns = now_ns
        if session.closing:
            raise ProtocolError("session", expected="open", got="closing")
        if session.binner is not None:
            raise ProtocolError("bin", expected="spikes: it was opened with origin_ns", got="a bin")
        counts, mask = check_bin(message, session.model_info)
        index, held, late = message.index, session.arrivals.held, message.index < session.next_index
        if (late and index not in session.missing) or (held and held.index == index):
            raise ProtocolError("index", expected=f"{session.next_index} or above", got=str(index))
        if late and not session.in_window(index) and not pause(session, index):
            arrived(session, index, now_ns, effects)
            self._times.note(session)
            raise ProtocolError(
                "late",
                expected=f"a bin of the newest {session.model_info.horizon}",
                got=f"bin {index} after bin {session.next_index - 1}",
            )
        if session.unanswered >= self.limits.credits:
            raise ProtocolError(
                "credits",
                expected=f"at most {self.limits.credits} bins unanswered",
                got=f"bin {index} beyond them",
            )
        session.unanswered += 1
        arrivals, arrival = session.arrivals, Arrival(message, now_ns, counts, mask)
        self._intake.decide(session, arrivals.sort(arrival, session.next_index), effects)

    def _spikes(self, session: ServedSession, sender: Sender, message: messages.Spikes) -> None:
        session.seen_ns = sender.at_ns
        if session.closing:
            raise ProtocolError("session", expected="open", got="closing")
        self._intake.batch(session, message, sender.at_ns, sender.effects)

    def _event(self, session: ServedSession | None, sender: Sender, event: messages.Event) -> None:
        """Publish an event once, and acknowledge it each time."""
        session = self._feeders.check_event(session, sender, event)
        check_event(event)
        number = (event.source, event.index)
        noted = session.noted.get(number)
        if noted is None:
            noted = session.note(event, sender.at_ns)
            event = replace(
                event, token="", received_ns=noted.received_ns, bin=noted.bin, epoch=noted.epoch
            )
            sender.effects.happened.append((session.run, event))
            sender.effects.published.append(event)
            sender.effects.events["noted"] += 1
        else:
            sender.effects.events["noted_again"] += 1
        sender.effects.replies.append((sender.owner, noted))

    def _close(self, session: ServedSession, sender: Sender) -> None:
        session.seen_ns = sender.at_ns
        self._intake.settle(session, sender.effects)
        session.closing = True
        self._end_if_answered(session, sender.effects)

    # ---- answers -------------------------------------------------------------------------------

    def answered(self, answer: EngineAnswer, published_ns: int) -> Effects:
        """Handle an answer that is published at ``published_ns``, and decide its status."""
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
        """Return the credits freed since the last call, one message per session.

        With ``all_owed``, also those that are too few to matter to the feeder yet.
        """
        return self._credits.take(all_owed=all_owed)

    # ---- time and ends -------------------------------------------------------------------------

    def next_due(self) -> int | None:
        """Return when ``tick`` has the next missing bin to answer."""
        return self._times.next()

    def tick(self, now_ns: int) -> Effects:
        """Answer overdue bins, decide about held bins, and end silent sessions."""
        effects = Effects()
        for session in list(self._sessions.values()):
            if session.arrivals.expired(now_ns):
                self._intake.settle(session, effects)
            while (due := session.due_ns(self.limits)) is not None and due <= now_ns:
                self._intake.overdue(session, now_ns, effects)
            if session.waiting == 0 and now_ns - session.seen_ns > self.limits.idle_ns:
                self._end(session, "idle", effects)
                effects.events["idle"] += 1
        return effects

    def swap(self, slot: str, model_info: EngineInfo) -> Effects:
        """Serve a slot with another model, each session from its next bin on.

        A session resumed after a restart may use that model already, and does not change.
        """
        self.slots[slot] = model_info
        effects = Effects()
        for session in self:
            if session.slot != slot or session.model_info.model == model_info.model:
                continue
            effects.work.append(session.swap(model_info))
            what = f"model: {model_info.model} from bin {session.next_index}"
            effects.published.append(session.notice(what))
        return effects

    def drain(self, why: str) -> None:
        """Accept no more bins; queued ones are still answered."""
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

    def _end_if_answered(self, session: ServedSession, effects: Effects) -> None:
        if session.waiting == 0:
            self._end(session, "closed", effects)

    def _end(self, session: ServedSession, what: str, effects: Effects) -> None:
        del self._sessions[session.name]
        del self._runs[session.run]
        self._credits.forget(session.run)
        if session.owed:
            effects.replies.append((session.owner, session.credit()))
        effects.forget.append(session.run)
        effects.ended.append((session.run, what))
        effects.published.append(session.notice(what))
        effects.replies.append((session.owner, session.closed(what)))
