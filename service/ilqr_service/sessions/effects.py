"""The effects of a step of the session table, which its caller carries out."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec.structs import replace

from ilqr_service.work import EngineAnswer, Work
from ilqr_vae.errors import ProtocolError
from ilqr_vae.protocol import messages

if TYPE_CHECKING:
    from ilqr_service.sessions.session import ServedSession


def _list() -> Any:
    return msgspec.field(default_factory=list)


def _events() -> dict[str, int]:
    return defaultdict(int)  # creating a Counter takes longer than using it


class Effects(msgspec.Struct):
    """What the caller has to do now, in this order.

    Attributes:
        forget: runs whose queue and estimator state are to be dropped.
        work: bins to solve.
        overran: runs with too many queued bins, which may be shed.
        fed, happened: batches of spikes and events that were taken, by run, for the journal.
        opened: runs that start, for the journal.
        ended: runs that end and why, for the journal.
        again: earlier results to be published again unchanged.
        published: results, notices and events for subscribers.
        detailed: sessions, revisions and answers, for subscribers to details.
        replies: messages by feeder.
        served: slot, model and manifest of models that serve from now on, for the journal.
        events: events to count; ``refused:REASON`` for refusals.
        bits, spikes: log-likelihood gained over the mean rates, and spikes, of bins that came.
        expected, met: bits expected for these spikes from the validation of their models, and bits
            gained now; for models that state the former.
    """

    forget: list[int] = _list()
    work: list[Work] = _list()
    overran: list[int] = _list()
    fed: list[tuple[int, messages.Spikes]] = _list()
    happened: list[tuple[int, messages.Event]] = _list()
    opened: list[ServedSession] = _list()
    ended: list[tuple[int, str]] = _list()
    again: list[messages.Result] = _list()
    published: list[messages.Published] = _list()
    detailed: list[tuple[ServedSession, int, EngineAnswer]] = _list()
    replies: list[tuple[bytes, messages.Message]] = _list()
    events: dict[str, int] = msgspec.field(default_factory=_events)
    served: list[tuple[str, str, dict[str, Any]]] = _list()
    bits: float = 0.0
    spikes: int = 0
    expected: float = 0.0
    met: float = 0.0
    _frames: list[bytes] | None = None

    @property
    def frames(self) -> list[bytes]:
        """The encoded messages to publish; nothing may be added afterwards."""
        if self._frames is None:
            self._frames = [messages.encode(message) for message in self.published]
        return self._frames

    def name_ignored(self, fields: tuple[str, ...]) -> None:
        """Name the ignored fields of an ``Open`` in its reply."""
        if fields:
            for k, (to, reply) in enumerate(self.replies):
                if isinstance(reply, messages.Opened):
                    self.replies[k] = to, replace(reply, ignored=fields)

    def refuse(
        self, owner: bytes, error: ProtocolError, session: str = "", index: int = -1
    ) -> Effects:
        """Reply what is wrong with a message, and count it by the invalid field."""
        reason = error.field.split(".")[0].split("[")[0]
        refused = messages.Refused(
            field=error.field,
            expected=error.expected,
            got=error.got[:200],
            session=session[:64],
            index=index,
        )
        self.replies.append((owner, refused))
        self.events[f"refused:{reason}"] += 1
        return self

    @staticmethod
    def refusal(owner: bytes, error: ProtocolError, session: str = "") -> Effects:
        """Return effects that only refuse a message."""
        return Effects().refuse(owner, error, session)


def counted(steps: list[Effects]) -> tuple[dict[str, int], float, int, float, float]:
    """Sum events, bits, spikes, and bits expected and met, over several steps."""
    events = _events()
    bits, spikes, expected, met = 0.0, 0, 0.0, 0.0
    for effects in steps:
        for event, times in effects.events.items():
            events[event] += times
        bits += effects.bits
        spikes += effects.spikes
        expected += effects.expected
        met += effects.met
    return events, bits, spikes, expected, met
