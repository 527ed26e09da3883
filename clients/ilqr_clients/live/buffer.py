"""The buffer of a session's last minutes, ready for the page."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import msgspec

from ilqr_clients.answer import Answer
from ilqr_vae.protocol import messages

KEPT_S = 300.0
"""Seconds of each session."""
KEPT = 72_000
"""Entries of each session, three a bin: 2 minutes at 200 bins a second."""
KEPT_BYTES = 96_000_000
"""Of all sessions together, in equal parts."""
_REPEATED = 200
"""A service may publish this many bins again; an older index belongs to another run."""
_STEERED_S = 5.0
"""Seconds after its last message for which a run counts as steerable."""


class SteeringEvent(msgspec.Struct):
    """The event ``steering`` (docs/protocol.md)."""

    address: str
    secret: str
    kind: str
    paused: bool
    loop: bool
    position: float
    length: float
    decoder: str
    decoders: list[str]
    disturbance: dict[str, float]


@dataclass
class SessionBuffer:
    """The buffer of a session.

    Attributes:
        entries: the newest entries as JSON, at most ``kept``.
        written: total number of entries so far.
        size: bytes of the entries, at most ``most``.
        epoch: epoch of the session.
        status, newest: status and bin of its newest answer.
        shape: sizes of its latents, rates and kinematics.
        begun: number of restarts of the buffer.
        run: how its feeder can be steered, and when it said so.
    """

    entries: deque[bytes] = field(default_factory=deque[bytes])
    written: int = 0
    size: int = 0
    kept: int = KEPT
    most: int = KEPT_BYTES
    epoch: int = -1
    newest: int = -1
    shape: tuple[int, ...] = ()
    begun: int = 0
    status: str = "ok"
    run: tuple[SteeringEvent, float] | None = None

    def begin(self, message: messages.Result | messages.Detail | messages.Event) -> None:
        """Drop entries of another run of the session."""
        again = (
            isinstance(message, messages.Result)
            and message.revision == 0
            and message.index < max(1, self.newest - _REPEATED)
            and self.newest > 0
        )
        if self.epoch != message.epoch or again:
            self._forget()
            self.epoch = message.epoch
        if isinstance(message, messages.Result):
            self.newest = max(self.newest, message.index)

    def shaped(self, answer: Answer) -> None:
        """Drop entries of a model with other numbers of units, latents or channels."""
        shape = answer.latent.size, answer.rates.size, answer.kinematics.size
        if self.shape and self.shape != shape:
            self._forget()
            self.newest = answer.index
        self.shape = shape

    def _forget(self) -> None:
        self.entries.clear()
        self.size, self.newest, self.status = 0, -1, "ok"
        self.begun += 1

    def add(self, entry: dict[str, Any]) -> None:
        self.entries.append(msgspec.json.encode(entry))
        self.written += 1
        self.size += len(self.entries[-1])
        while len(self.entries) > self.kept or (self.size > self.most and len(self.entries) > 1):
            self.size -= len(self.entries.popleft())

    def after(self, position: int, most: int = KEPT) -> tuple[list[bytes], int]:
        """Return the entries after ``position``, oldest first, and the new position."""
        missing = min(len(self.entries), max(0, self.written - position))
        start = len(self.entries) - missing
        found = list(islice(self.entries, start, start + most))
        return found, self.written - missing + len(found)

    def steered(self) -> SteeringEvent | None:
        """Return how the session can be steered now, if it can."""
        if self.run is None or time.monotonic() - self.run[1] > _STEERED_S:
            return None
        return self.run[0]
