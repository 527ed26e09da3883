"""Messages of feeders: sessions, bins, spikes and events, and the replies of the service.

Messages to the service omit fields with default values, so that a service that does not know a
field ignores or refuses it only if it is used.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import UNSET, UnsetType

from ilqr_vae.protocol.arrays import Array
from ilqr_vae.protocol.base import Message, Name, Offset, Token

# ---- feeder -> service -------------------------------------------------------------------------


class Open(Message, frozen=True, kw_only=True, omit_defaults=True):
    """Open a session (or open it again, with a higher epoch).

    Attributes:
        protocol: ``PROTOCOL``.
        session: name, 1-64 of [A-Za-z0-9._-].
        units: names of the model's units, in the order of the counts, then those of features.
        bin_width_ns: bin width of the model.
        epoch: run number; results of different epochs never mix.
        deadline_ns: an answer published later than this after ``received`` is flagged late.
        anytime: let the deadline cut a solve short (``degraded``); default is a fixed number of
            iterations, so that answers do not depend on the clock.
        clocked: a bin that has not arrived ``grace_ns`` after its expected time is answered as
            ``missing`` without waiting for the next one; it is corrected if it still arrives within
            the window. If false, a missing bin is noticed only when a later one arrives. Expected
            times follow the feeder: its rate (up to 10 % from the bin width), and its pauses.
        grace_ns: for ``clocked`` and for spikes; 0 is half a bin width.
        watch_units: mask units that are dead, saturated or drifting, and report them by notices.
        resume: continue this session and epoch (its other feeder is gone, or the service was
            restarted).
        begin: with ``resume``, begin the session if it is not open; if false, refuse.
        answered: with ``resume``, the newest index whose answer the feeder has; later ones that
            the service still has are published again as they were.
        token: a secret chosen by the feeder. A message that states it is from the session's feeder,
            on any connection; see ``Bin``.
        model: name of a slot or id of a model; "" is the first slot.
        origin_ns: if given, the feeder sends ``Spikes`` instead of ``Bin``, and bin k covers
            [origin_ns + k bin_width_ns, origin_ns + (k + 1) bin_width_ns) of its clock.
        follow: the client follows ``Moved``; a fleet refuses one that does not.
        abstain: 0 to 1; an answer names no class if the largest probability is lower.
        lag: answer each bin again, with a higher revision, after this many later bins.
    """

    protocol: int
    session: str
    units: Annotated[tuple[str, ...], msgspec.Meta(max_length=2**16)]
    bin_width_ns: int
    epoch: int = 0
    deadline_ns: int
    anytime: bool = False
    clocked: bool = False
    grace_ns: int = 0
    watch_units: bool = False
    resume: bool = False
    answered: int = -1
    model: str = ""
    token: Token = ""
    begin: bool = True
    origin_ns: Annotated[int, msgspec.Meta(ge=-(2**62), le=2**62)] | None = None
    follow: bool = False
    abstain: float = 0.0
    lag: Annotated[int, msgspec.Meta(ge=0, le=100)] = 0


class Bin(Message, frozen=True, kw_only=True, omit_defaults=True):
    """Counts of one bin, and features.

    It is from the session's feeder if it arrives on the connection that opened the session or
    states the session's token. If the session has no token, a bin of the same user, session and
    epoch is also accepted on a new connection once the old one is gone. The session then follows
    the new connection, and the reply is an ``Opened`` with ``resumed``.

    Attributes:
        source_ns: when it was complete, by the feeder's monotonic clock; must not decrease with the
            index.
        mask: u1 per unit and feature, 1 = observed; None = all observed.
        clock: how far the service's clock is from the feeder's; None where that is not known.
        features: <f8 (F,) or another dtype, in the recording's units; NaN = not observed, None =
            none of them.
    """

    session: str
    epoch: int = 0
    index: int
    source_ns: int
    counts: Array
    mask: Array | None = None
    clock: Offset | None = None
    token: Token = ""
    features: Array | None = None


class Spikes(Message, frozen=True, kw_only=True, omit_defaults=True):
    """A batch of spikes for a session that was opened with ``origin_ns``.

    Its feeder is determined as for ``Bin``.

    A feeder sends at least one batch per bin width, empty if there was no spike: a silent feeder
    cannot be distinguished from one that is gone.

    Attributes:
        index: number of the batch, consecutive from 0. A repeated number is refused.
        source_ns: when it was sent, by the feeder's clock; must not decrease with the index, and no
            spike is later.
        times_ns: <i8 (S,), time of each spike by the feeder's clock, in any order.
        units: u1, <u2 or <u4 (S,), each spike's position in ``Open.units``.
        until_ns: all spikes before this time are in this batch or an earlier one, so that bins that
            end by then are closed; None is ``source_ns`` minus the grace.
        clock, token: see ``Bin``.
    """

    session: str
    epoch: int = 0
    index: int
    source_ns: int
    times_ns: Array
    units: Array
    until_ns: int | None = None
    clock: Offset | None = None
    token: Token = ""


TRIAL_START, TRIAL_STOP = "trial_start", "trial_stop"
"""Names of the events that start and end a trial."""


class Event(Message, frozen=True, kw_only=True, omit_defaults=True):
    """Something that happened in the experiment: a target, a cue, a reward, a stimulus.

    It may be sent on any connection with the session's token or by its user; the reply is
    ``Noted``. The service fills in ``received_ns``, ``bin`` and ``epoch`` and publishes it under
    ``event_topic``.

    Attributes:
        name: what it is; ``trial_start`` and ``trial_stop`` become trials when exported.
        time_ns: when it happened, by the sender's monotonic clock.
        payload: names with numbers, text, lists or maps.
        source, index: the sender, and its number of the event; a repeated event is acknowledged but
            not published again.
        clock: how far the service's clock is from the sender's; None where that is not known.
        received_ns: arrival, by the service's clock; 0 when sent.
        bin: the next bin at that moment; -1 when sent.
        epoch: epoch of the session at that moment; ignored when sent.
    """

    session: str
    name: Name
    time_ns: Annotated[int, msgspec.Meta(ge=-(2**62), le=2**62)]
    payload: dict[str, Any] = msgspec.field(default_factory=dict[str, Any])
    source: Annotated[str, msgspec.Meta(max_length=64)] = ""
    index: Annotated[int, msgspec.Meta(ge=0, le=2**53)] = 0
    clock: Offset | None = None
    token: Token = ""
    received_ns: int = 0
    bin: int = -1
    epoch: int = 0


class Close(Message, frozen=True, kw_only=True, omit_defaults=True):
    """Answer the queued bins, then end the session."""

    session: str
    epoch: int = 0
    token: Token = ""


# ---- service -> feeder -------------------------------------------------------------------------


class Opened(Message, frozen=True, kw_only=True):
    """The session is open.

    Attributes:
        credits: number of bins that may be unanswered.
        next_index: first bin that was not accepted yet.
        resumed: whether the session continues, from ``next_index``.
        next_batch: first batch of spikes that was not accepted yet; only for spikes.
        ignored: fields of ``Open`` that the service does not know, if any.
        features: names of the model's features, the last of its units, if any.
    """

    session: str
    epoch: int
    model: str
    latents: int
    kinematic_names: tuple[str, ...]
    kinematic_units: tuple[str, ...]
    horizon: int
    iterations: int
    credits: int
    next_index: int = 0
    resumed: bool = False
    next_batch: int | UnsetType = UNSET
    ignored: tuple[str, ...] | UnsetType = UNSET
    features: tuple[str, ...] | UnsetType = UNSET


class Moved(Message, frozen=True, kw_only=True, omit_defaults=True):
    """The session is at another service: send the same ``Open`` there.

    Attributes:
        ingest, results: its addresses.
        down_ns: downtime, if the previous service died; else 0.
    """

    session: str
    epoch: int
    ingest: str
    results: str
    down_ns: int = 0


class Credit(Message, frozen=True, kw_only=True):
    """``credits`` more bins may be sent; ``index``: the newest bin answered."""

    session: str
    epoch: int
    index: int
    credits: int


class Noted(Message, frozen=True, kw_only=True):
    """An event has been taken. ``source`` and ``index`` are its own; the rest as published."""

    session: str
    epoch: int
    source: str
    index: int
    received_ns: int
    bin: int


class Closed(Message, frozen=True, kw_only=True, omit_defaults=True):
    """The session has ended after ``bins`` answers; ``reason`` is that of its last notice."""

    session: str
    epoch: int
    bins: int
    reason: str = ""


class Refused(Message, frozen=True, kw_only=True, omit_defaults=True):
    """Something was wrong with one message; nothing else is disturbed.

    Attributes:
        index: index of the refused bin, batch or event; -1 for other messages.
    """

    field: str
    expected: str
    got: str
    session: str = ""
    index: int = -1
