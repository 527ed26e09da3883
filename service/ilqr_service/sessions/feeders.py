"""Ownership of sessions: which messages come from the feeder, and how to follow the feeder.

ZeroMQ reconnects by itself after a connection has broken, and the service then sees a new
connection. A message is from the session's feeder if it comes from the session's user and

- states the session's token, on any connection; or
- the session has no token, and it comes on the feeder's connection, or on another one after the
  feeder's is gone. A connection that was refused this session does not count: it belongs to someone
  else who wanted the same name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ilqr_service.sessions.checks import check_open
from ilqr_service.sessions.effects import Effects
from ilqr_service.sessions.session import Limits, ServedSession
from ilqr_vae.errors import ProtocolError
from ilqr_vae.protocol import messages

_MAX_DENIED = 64

FIRST_EPOCHS = 2**52
EPOCH_STEP = 2**32
"""A first epoch is at most ``FIRST_EPOCHS``, a restart at most ``EPOCH_STEP`` above the open one,
so that there is always a higher one.
"""

Reaches = Callable[[bytes, messages.Message], bool]
_Fed = messages.Bin | messages.Spikes | messages.Close


class Sender(NamedTuple):
    """The sender of a message, and the effects of the message.

    Attributes:
        owner: its connection.
        user: user by its key; "" without keys.
        at_ns: arrival time.
        effects: filled while the message is handled.
    """

    owner: bytes
    user: str
    at_ns: int
    effects: Effects


class Feeders:
    """Decides whether a message is from the feeder of its session.

    Args:
        limits: limits of the service.
        reaches: sends a message to a connection; returns False if it is gone.
    """

    def __init__(self, limits: Limits, reaches: Reaches) -> None:
        self._limits, self._reaches = limits, reaches

    def check(self, session: ServedSession | None, sender: Sender, message: _Fed) -> ServedSession:
        """Return the session if the message is from its feeder, and follow the feeder.

        Raises:
            ProtocolError: it is not from the feeder, or is of another epoch.
        """
        if session is None or not self._is_feeder(session, sender, message):
            raise ProtocolError(
                "session", expected="one that this feeder opened", got=message.session[:64]
            )
        if session.epoch != message.epoch:
            raise ProtocolError("epoch", expected=str(session.epoch), got=str(message.epoch))
        if session.owner != sender.owner:
            self._follow(session, sender, "reconnected")
            if isinstance(message, messages.Bin) and message.index >= session.next_index:
                # credits that remain after this bin; messages in between are lost
                self._grant(session, sender, next_index=message.index + 1, taken=1)
            elif isinstance(message, messages.Spikes):
                self._grant(session, sender, next_index=session.next_index)
        return session

    def check_event(
        self, session: ServedSession | None, sender: Sender, event: messages.Event
    ) -> ServedSession:
        """Return the session if the event is from its user or states its token.

        Raises ProtocolError otherwise.
        """
        if session is not None:
            known = bool(session.token) and event.token == session.token
            if known or session.user == sender.user:
                return session
        got = event.session[:64]
        raise ProtocolError("session", expected="an open one of this user, or its token", got=got)

    def _is_feeder(self, session: ServedSession, sender: Sender, message: _Fed) -> bool:
        if session.user != sender.user:
            return False
        if session.token:
            return message.token == session.token
        if session.owner == sender.owner:
            return True
        if session.epoch != message.epoch or sender.owner in session.denied:
            return False
        return not self._reaches(session.owner, session.credit())

    def deny(self, session: ServedSession, sender: Sender) -> None:
        """Record a connection that was refused this session."""
        if session.owner != sender.owner and len(session.denied) < _MAX_DENIED:
            session.denied.add(sender.owner)

    def begin(self, before: ServedSession | None, sender: Sender, message: messages.Open) -> None:
        """Raise ProtocolError if the session belongs to another user, or the epoch is out of
        range.
        """
        lowest, highest, why = 0, FIRST_EPOCHS, ""
        if before is not None:
            if before.user != sender.user:
                raise ProtocolError("session", expected="one of this user", got=message.session)
            lowest, highest = before.epoch + 1, before.epoch + EPOCH_STEP
            why = ": the session is open"
        if not lowest <= message.epoch <= highest:
            raise ProtocolError(
                "epoch", expected=f"{lowest} to {highest}{why}", got=str(message.epoch)
            )

    def resume(self, session: ServedSession, sender: Sender, message: messages.Open) -> None:
        """Resume a session. Raises ProtocolError."""
        check_open(message, session.model_info)
        if session.closing:
            raise ProtocolError("session", expected="open", got="closing")
        if session.user != sender.user:
            raise ProtocolError("session", expected="one of this user", got=message.session)
        same = message.token == session.token
        if session.token and not same and self._reaches(session.owner, session.credit()):
            raise ProtocolError(
                "session", expected="its token: its feeder is connected", got=message.session
            )
        sender.effects.again += [r for r in session.recent if r.index > message.answered]
        session.seen_ns = sender.at_ns
        if session.owner != sender.owner:
            self._follow(session, sender, "resumed")
        else:
            sender.effects.events["asked_again"] += 1
        if not (same and session.token):  # it may be another feeder with another clock
            session.token = message.token
            session.silent = 0
            session.arrivals.restart()
            session.clock.restart()
        self._grant(session, sender, next_index=session.next_index)

    def _grant(
        self, session: ServedSession, sender: Sender, *, next_index: int, taken: int = 0
    ) -> None:
        """Send the feeder its credits."""
        session.owed = 0
        credits = max(0, self._limits.credits - session.unanswered - taken)
        opened = session.opened(credits, next_index=next_index, resumed=True)
        sender.effects.replies.append((sender.owner, opened))

    def _follow(self, session: ServedSession, sender: Sender, how: str) -> None:
        session.owner = sender.owner
        notice = session.notice(f"{how}: next bin {session.next_index}")
        sender.effects.published.append(notice)
        sender.effects.events[how] += 1
