"""Bins without an answer: when to ask the service about them, and when to give up.

Pure: no sockets, no clock; times are seconds of a monotonic clock.
"""

from __future__ import annotations

from typing import Literal

from ilqr_vae.protocol import messages

REMEMBERED = 4096
"""Largest number of bins that are kept."""

_ASK_S, _ASK_MOST_S, _LOST_S = 1.0, 8.0, 0.5
_OPEN_LOOP = 12

Verdict = Literal["wait", "ask", "unreachable", "unanswered"]


class Outstanding:
    """The bins of a session without an answer.

    Args:
        patience: how long to wait without progress while no bin is sent; twelve times as long
            while bins are sent.
        newest: index of the newest answered bin.
        now: start of the wait.

    Attributes:
        heard: time of the last message from the service.
    """

    def __init__(self, patience: float, newest: int, now: float) -> None:
        self.patience, self.heard = patience, now
        self._bins: dict[int, tuple[bytes, float]] = {}
        self._newest = newest
        self._progress = self._answered = self._sent = now
        self._asking = False
        self._asked = self._looked = 0.0
        self._asked_for = -1
        self._ask_after = _ASK_S
        self._resent: set[int] = set()

    def __contains__(self, index: int) -> bool:
        return index in self._bins

    @property
    def first(self) -> int:
        """Lowest index without an answer, or else the one after the newest answered."""
        return min(self._bins, default=self._newest + 1)

    def sent(self, index: int, frame: bytes, now: float) -> None:
        """Record a sent bin."""
        if not self._bins:
            self._progress = now
        self._bins[index] = (frame, now)
        if len(self._bins) > REMEMBERED:
            del self._bins[next(iter(self._bins))]
        self._sent = now

    def answered(self, index: int) -> None:
        """Record an answer."""
        self._newest, self._answered = max(self._newest, index), self.heard
        if self._bins.pop(index, None) is not None:
            self._progress, self._ask_after = self.heard, _ASK_S

    def granted(self, opened: messages.Opened) -> tuple[int, list[bytes]]:
        """Process the service's state; return the credits left, and bins to send again.

        The latter are those that it does not have, among the ones sent before the question.
        """
        missing = [i for i in self._bins if i >= opened.next_index]
        lost = [i for i in missing if self._asking and i <= self._asked_for]
        self._asking = False
        self._resent.update(lost)
        return opened.credits - len(missing), [self._bins[i][0] for i in lost]

    def not_yet(self) -> None:
        """Ask again soon: another server was asked too, and has nothing new."""
        self._ask_after = _ASK_S

    def refused(self, refused: messages.Refused) -> Literal["for good", "for now", "unknown"]:
        """Process a refusal: permanent, temporary, or because the session is not known."""
        if refused.index in self._resent and refused.field == "index":
            return "for now"  # it had arrived the first time
        if refused.field in ("session", "service", "epoch"):
            if refused.index >= 0:  # the service does not know its feeder, or is not ready
                self._ask_after = self._ask_after if self._asking else 0.0
                return "for now"
            if refused.field == "service":  # it is warming up or draining
                self._asking, self._ask_after = False, _ASK_S
                if self.heard - self._answered < _OPEN_LOOP * self.patience:
                    self._progress = self.heard
                return "for now"
            if self._asking:
                self._asking = False
                return "unknown"
        self._bins.pop(refused.index, None)
        return "for good"

    def check(self, now: float) -> Verdict:
        """Return what to do now."""
        if not self._bins:
            return "wait"
        silent = now - self._progress
        if min(silent, now - self._sent) > self.patience or silent > _OPEN_LOOP * self.patience:
            self._progress = now  # a caller that continues has as much time again
            return "unreachable" if now - self.heard > self.patience else "unanswered"
        asked_long_ago = now - max(self._progress, self._asked) > self._ask_after
        return "ask" if asked_long_ago or self._lost(now) else "wait"

    def asked(self, now: float) -> int:
        """Record a question; return the newest index up to which all bins are answered."""
        first, self._looked = self.first, 0.0
        for index in self._lost(now):  # asked once: answers that do not arrive now are gone
            del self._bins[index]
        self._asking, self._asked = True, now
        self._asked_for = max(self._bins, default=-1)
        self._ask_after = min(_ASK_MOST_S, 2 * self._ask_after or _ASK_S)
        return first - 1

    def _lost(self, now: float) -> list[int]:
        """Return bins whose answers must be lost, since a later one was answered."""
        if now - self._looked < _LOST_S:
            return []
        self._looked = now
        return [i for i, (_, at) in self._bins.items() if i < self._newest and now - at > _LOST_S]
