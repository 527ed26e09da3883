"""Turns messages of feeders into works for the solver: bins that arrived, are missing, or changed.

Feeders send bins, or batches of spikes that are binned here (``protocol.spikes``). A bin that a
batch closes counts as arrived with it. A bin whose counts a later batch changes is solved again
while it is in the window.
"""

from __future__ import annotations

from dataclasses import replace

from ilqr_service.sessions.arrivals import Arrival, Decision
from ilqr_service.sessions.checks import check_spikes
from ilqr_service.sessions.clocked import TimeTable, arrived, pause, rewind
from ilqr_service.sessions.credits import Credits
from ilqr_service.sessions.effects import Effects
from ilqr_service.sessions.session import Limits, ServedSession
from ilqr_service.work import NO_SOLVE, Insert, Solve, Work
from ilqr_vae.errors import ProtocolError, ShapeError
from ilqr_vae.protocol import messages
from ilqr_vae.protocol.spikes import SpikeBinner


class Intake:
    """Queues the bins of sessions.

    Args:
        limits: limits of the service.
        credits: receives the credits of refused bins.
        times: notified when the due time of a session's next bin may change.
    """

    def __init__(self, limits: Limits, credits: Credits, times: TimeTable) -> None:
        self._limits, self._credits, self._times = limits, credits, times

    def batch(
        self, session: ServedSession, message: messages.Spikes, now_ns: int, effects: Effects
    ) -> None:
        """Add a batch of spikes. Raises ProtocolError."""
        binner, held = session.binner, session.arrivals.held
        if binner is None:
            raise ProtocolError("spikes", expected="bins: it was opened without origin_ns", got="")
        check_spikes(message, session.model_info)
        index = message.index
        if binner.came(index) or (held and held.index == index):
            expected = f"{binner.next_batch} or another that has not come"
            raise ProtocolError("index", expected=expected, got=str(index))
        if session.unanswered >= self._limits.credits:
            raise ProtocolError(
                "credits",
                expected=f"at most {self._limits.credits} bins unanswered",
                got=f"batch {index} beyond them",
            )
        arrival = Arrival(message, now_ns)
        self.decide(session, session.arrivals.sort(arrival, binner.next_batch), effects)

    def settle(self, session: ServedSession, effects: Effects) -> None:
        """Decide about a held bin, without another message."""
        binner = session.binner
        following = session.next_index if binner is None else binner.next_batch
        self.decide(session, session.arrivals.settle(following), effects)

    def decide(self, session: ServedSession, decision: Decision, effects: Effects) -> None:
        """Queue accepted bins, and refuse at most one bin or batch."""
        binner = session.binner
        if decision.refused is not None:
            arrival, error = decision.refused
            effects.refuse(session.owner, error, session.name, arrival.index)
            if binner is None:
                session.unanswered -= 1
                self._credits.owe(session)
        if decision.step_ns:
            first, step_s = decision.accepted[0].index, decision.step_ns / 1e9
            what = "bin" if binner is None else "batch"
            self._say(
                session, f"clock: source times step by {step_s:+.3f} s at {what} {first}", effects
            )
            effects.events["clock_steps"] += 1
        for arrival in decision.accepted:
            if binner is not None:
                self._bins_of(session, binner, arrival, effects)
            else:
                self._arrived(session, arrival.index, arrival, effects)
        session.prune()
        self._times.note(session)

    def _say(self, session: ServedSession, what: str, effects: Effects) -> None:
        effects.published.append(session.notice(what))

    def _bins_of(
        self, session: ServedSession, binner: SpikeBinner, arrival: Arrival, effects: Effects
    ) -> None:
        """Queue the bins that a batch closed or changed."""
        message = arrival.message
        assert isinstance(message, messages.Spikes)
        times, units = check_spikes(message, session.model_info)
        try:
            update = binner.add(message.index, message.source_ns, times, units, message.until_ns)
        except ShapeError as error:
            refused = ProtocolError(error.field, expected=error.expected, got=error.got)
            effects.refuse(session.owner, refused, session.name, message.index)
            return
        effects.fed.append((session.run, message))
        session.silent = 0
        closed = update.closed
        unanswered = range(max(closed.start, session.next_index), closed.stop)
        if len(unanswered) > self._limits.gap_limit + 1:
            closed = unanswered[-self._limits.gap_limit - 1 :]
            self._reset(session, closed[0], "came at once", effects)
        told = [i for i in (*update.revised, *closed) if binner.complete(i)]
        late = [i for i in told if i < session.next_index and not session.in_window(i)]
        lost = {i for i in late if not pause(session, i)}
        if update.early:
            effects.events["early_spikes"] += update.early
        if update.lost or lost:
            effects.events["lost_spikes"] += update.lost
            effects.events["late_lost"] += len(lost)
            what = f"late: batch {message.index} changed bins that had left the window"
            self._say(session, what, effects)
        for index in (*update.revised, *closed):
            if not binner.complete(index):
                effects.events["uncertain_bins"] += 1
            elif index not in lost:
                session.unanswered += 1
                counted = replace(arrival, counts=binner.counts(index))
                self._arrived(session, index, counted, effects)

    def _arrived(
        self, session: ServedSession, index: int, arrival: Arrival, effects: Effects
    ) -> None:
        """Queue a bin, after the missing ones before it."""
        again = rewind(session, index)
        at_ns, late = arrival.received_ns, index < session.next_index
        arrived(session, index, at_ns, effects, again)
        session.silent = 0
        if late:
            session.missing.discard(index)
            effects.events["late_in"] += 1
        else:
            self._bridge(session, index, at_ns, effects)
        self._queue(session, index, at_ns, effects, arrival, late=late)

    def _reset(self, session: ServedSession, index: int, why: str, effects: Effects) -> None:
        """Restart the estimate at ``index``; bins before it have no answers."""
        gap = range(session.next_index, index)
        self._say(session, f"reset: bins {gap[0]} to {gap[-1]} {why} and have no answers", effects)
        effects.events["reset"] += 1
        session.started = False
        session.base = session.next_index = index

    def _bridge(self, session: ServedSession, index: int, now_ns: int, effects: Effects) -> None:
        """Answer the missing bins before ``index``, or restart there."""
        gap = range(session.next_index, index)
        if not gap:
            return
        effects.events["gap"] += 1
        effects.events["gap_bins"] += len(gap)
        if len(gap) > self._limits.gap_limit or session.waiting > 2 * self._limits.backlog:
            self._reset(session, index, "did not come", effects)
            return
        crowded = session.waiting + len(gap) > self._limits.backlog
        if crowded:
            session.overran()
        for one in gap:
            self._queue(session, one, now_ns, effects, budget=NO_SOLVE if crowded else 0)

    def overdue(self, session: ServedSession, now_ns: int, effects: Effects) -> None:
        """Answer the next bin as missing, since its due time has passed."""
        session.silent += 1
        effects.events["overdue"] += 1
        self._queue(session, session.next_index, now_ns, effects)
        self._times.note(session)

    def _queue(
        self,
        session: ServedSession,
        index: int,
        now_ns: int,
        effects: Effects,
        arrival: Arrival | None = None,
        *,
        late: bool = False,
        budget: int = 0,
    ) -> None:
        """Queue a bin; without an arrival it is missing."""
        due_ns = now_ns + session.deadline_ns
        fields = session.next_work(index)
        fields |= {"received_ns": now_ns, "due_ns": due_ns}
        fields["counts"] = None
        if arrival is not None:
            fields |= {"counts": arrival.counts, "mask": arrival.mask}
            fields |= {"source_ns": arrival.message.source_ns, "clock": arrival.message.clock}
        work: Work
        if late:
            work = Insert(**fields)
        else:
            work = Solve(
                **fields,
                restart=not session.started,
                rewind=session.rewinds,
                anytime=session.anytime,
                budget=budget,
                sheds=session.anytime or session.overrun,
            )
            session.rewinds = False
        session.started = True
        session.waiting += 1
        if arrival is None:
            session.missing.add(index)
        session.next_index = max(session.next_index, index + 1)
        effects.work.append(work)
