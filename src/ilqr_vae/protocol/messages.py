"""Messages on the wire: MessagePack, typed, versioned, checked on arrival.

Two planes. A feeder's DEALER talks to the service's ROUTER (``Ingest`` up, ``Reply`` down). The
service's XPUB sends ``Result`` under the topic ``topic(session)``; requests about the service
itself (``Control`` up, ``ControlReply`` down) go over the same ROUTER.

Frames: a DEALER sends and gets one frame, the message (no empty delimiter). Published messages are
two frames, the topic and the message. Wherever a session is opened the service publishes
``Notice("opened")`` on its topic, and it sends the last message of a topic again to whoever
subscribes to it anew: a client that subscribes, opens, and waits for any message of its epoch on
the topic before its first bin therefore misses no result.

Arrays travel as raw bytes (``arrays``). Nothing on the wire can execute: no pickle.

Times are nanoseconds of the sender's monotonic clock (``source_ns``: the feeder's; all others: the
service's). On one machine the two are the same clock; elsewhere a feeder probes how far they are
apart and says so with each bin (``Offset``), and each result says it again: whoever computes a
latency from one clock to the other has its uncertainty.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from ilqr_vae.arrays import MAX_COUNT as MAX_COUNT
from ilqr_vae.errors import ProtocolError
from ilqr_vae.protocol.arrays import Array as Array
from ilqr_vae.protocol.arrays import DType as DType
from ilqr_vae.protocol.arrays import pack as pack
from ilqr_vae.protocol.arrays import unpack as unpack

PROTOCOL = 2

Token = Annotated[str, msgspec.Meta(max_length=64)]

Status = Literal["ok", "degraded", "late", "missing", "extrapolated"]


class Message(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag=str.lower,
    tag_field="type",
    gc=False,
):
    """Base: a tagged, immutable message without cycles; unknown fields are refused."""


class Offset(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """The service's clock minus the feeder's, and how far from the truth that may be, both in
    nanoseconds; 0, 0 where they are the same clock."""

    offset_ns: Annotated[int, msgspec.Meta(ge=-(2**62), le=2**62)]
    uncertainty_ns: Annotated[int, msgspec.Meta(ge=0, le=2**62)]


# ---- feeder -> service -------------------------------------------------------------------------


class Open(Message, frozen=True, kw_only=True):
    """Begin (or begin again, with a higher epoch) a session.

    Attributes:
        protocol: ``PROTOCOL``.
        session: name, 1-64 of [A-Za-z0-9._-].
        units: the unit names, in the order of the counts; must be the model's.
        bin_width_ns: must be the model's.
        epoch: run number; results of different epochs never mix.
        deadline_ns: an answer published later than this after ``received`` is flagged late.
        anytime: let the deadline cut a solve short (``degraded``); default is a fixed number of
            iterations, so that answers do not depend on the clock.
        clocked: a bin that has not come ``grace_ns`` after its time is answered as ``missing``
            without waiting for the next one; it is corrected if it still comes within the window.
            If false, a missing bin is noticed only when a later one arrives. The times follow the
            feeder's own: its rate (up to 10 % off the bin width), and its pauses.
        grace_ns: for ``clocked``; 0 is half a bin width.
        watch_units: mask units that are dead, saturated or drifting, and report them by notices.
        resume: continue this session and epoch where it stands (another feeder of it is gone, or
            the service was restarted).
        begin: with ``resume``, begin the session if it is not open; if false, refuse.
        answered: with ``resume``, the newest index whose answer the feeder has; later ones that
            the service still has are published again as they were.
        token: a secret of the feeder's choice. A message that states it is from the session's
            feeder, whatever connection it comes by; see ``Bin``.
        model: a slot's name or a model's id; "" is the service's first.
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


class Bin(Message, frozen=True, kw_only=True):
    """Counts of one bin.

    It is from the session's feeder if it comes by the connection that opened the session or states
    the session's token. If the session has no token, a bin of the same user, session and epoch is
    also accepted by a new connection once the old one is gone. The session then follows the new
    connection, and the reply is an ``Opened`` with ``resumed``.

    Attributes:
        source_ns: when it was complete, by the feeder's monotonic clock: of two bins the one with
            the higher index has no earlier time.
        mask: u1 per unit, 1 = observed; None = all observed.
        clock: how far the service's clock is from the feeder's; None where that is not known.
    """

    session: str
    epoch: int = 0
    index: int
    source_ns: int
    counts: Array
    mask: Array | None = None
    clock: Offset | None = None
    token: Token = ""


class Close(Message, frozen=True, kw_only=True):
    """Answer what is queued, then end the session."""

    session: str
    epoch: int = 0
    token: Token = ""


# ---- service -> feeder -------------------------------------------------------------------------


class Opened(Message, frozen=True, kw_only=True):
    """The session is open.

    Attributes:
        credits: bins that may be in flight unanswered.
        next_index: the first bin that has not been taken yet.
        resumed: it goes on where it stood, from ``next_index``.
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


class Credit(Message, frozen=True, kw_only=True):
    """``credits`` more bins may be sent; ``index``: the newest bin answered."""

    session: str
    epoch: int
    index: int
    credits: int


class Closed(Message, frozen=True, kw_only=True, omit_defaults=True):
    """The session has ended after ``bins`` answers; ``reason`` is that of its last notice."""

    session: str
    epoch: int
    bins: int
    reason: str = ""


class Refused(Message, frozen=True, kw_only=True, omit_defaults=True):
    """Something was wrong with one message; nothing else is disturbed.

    Attributes:
        index: of the bin that was refused; -1 if the message was no bin.
    """

    field: str
    expected: str
    got: str
    session: str = ""
    index: int = -1


# ---- control -----------------------------------------------------------------------------------


class Describe(Message, frozen=True, kw_only=True):
    """Ask what is served."""


class Described(Message, frozen=True, kw_only=True):
    """The model's manifest (JSON-like) and the service's settings."""

    protocol: int
    model: str
    ready: bool
    device: str
    results: str
    manifest: dict[str, Any]


class Sessions(Message, frozen=True, kw_only=True):
    """Ask for the open sessions."""


class SessionInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    session: str
    epoch: int
    bins: int
    next_index: int
    deadline_ns: int
    statuses: dict[str, int]
    solve_p50_ns: int
    solve_p99_ns: int
    bits_per_spike: float
    idle_ns: int
    model: str = ""
    revised: int = 0
    flagged: tuple[str, ...] = ()


class SessionList(Message, frozen=True, kw_only=True):
    sessions: tuple[SessionInfo, ...]


class Probe(Message, frozen=True, kw_only=True):
    """Clock probe: the service answers with its own clock."""

    client_ns: int


class Probed(Message, frozen=True, kw_only=True):
    """``clock`` names the service's clock (see ``protocol.clock``); "" where it has no name."""

    client_ns: int
    service_ns: int
    clock: str = ""


class Load(Message, frozen=True, kw_only=True):
    """Load a model file into a slot ("" is the first) beside what is served there.

    Attributes:
        path: on the service's machine, inside its model folder.
        shadow: run it beside the serving model and keep both scores; else serve it once warm.
    """

    path: str
    slot: str = ""
    shadow: bool = False


class Swap(Message, frozen=True, kw_only=True):
    """Serve the slot's shadow from each session's next bin on."""

    slot: str = ""


class Rollback(Message, frozen=True, kw_only=True):
    """Serve again what the slot served before, or drop its shadow where there is one."""

    slot: str = ""


class Models(Message, frozen=True, kw_only=True):
    """Ask for the models."""


class ModelInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A model of a slot. ``bits_per_spike`` is over the ``bins`` that it and its slot's other one
    both answered."""

    slot: str
    model: str
    role: Literal["serving", "shadow", "loading", "before"]
    bins: int = 0
    bits_per_spike: float = 0.0


class ModelList(Message, frozen=True, kw_only=True):
    models: tuple[ModelInfo, ...]


# ---- results -----------------------------------------------------------------------------------


VECTORS = ("latent", "latent_std", "rates", "kinematics", "kinematics_std")
"""The arrays of a result."""


class Result(Message, frozen=True, kw_only=True, omit_defaults=True):
    """The answer for one bin.

    Attributes:
        revision: 0 for the first answer for a bin; higher supersedes. A bin that comes late within
            the window, after it was answered as missing, is put in its place: it and all bins
            after it are answered again.
        status: ok, degraded (stopped early), late, missing (no bin came: prediction), extrapolated.
        solver: the solver's own status, e.g. converged, iteration_limit.
        iterations: iLQR iterations done.
        source_ns ... published_ns: stage times; ``source_ns`` is echoed (0 for a missing bin).
        clock: as it came with the bin; ``source_ns`` + its offset is by the service's clock.
        latent, latent_std: <f8 (n,).
        rates: <f8 (N,), expected counts per bin.
        kinematics, kinematics_std: <f8 (D,), in the recording's units; D = 0 without kinematics.
        bits: one-step-ahead log-likelihood of the arriving bin in bits, against the training mean
            rate; ``spikes`` is how many spikes it had. Their running ratio is bits per spike.
        ignored: units whose counts in this bin were beyond the model's limits and were not used.
    """

    session: str
    epoch: int
    index: int
    revision: int
    model: str
    status: Status
    solver: str
    iterations: int
    source_ns: int
    received_ns: int
    solve_start_ns: int
    solve_end_ns: int
    published_ns: int
    latent: Array
    latent_std: Array
    rates: Array
    kinematics: Array
    kinematics_std: Array
    bits: float
    spikes: int
    clock: Offset | None = None
    ignored: tuple[str, ...] = ()


class Notice(Message, frozen=True, kw_only=True):
    """News of a session; docs/operations.md lists them."""

    session: str
    epoch: int
    what: str


Control = Load | Swap | Rollback
Upstream = Open | Bin | Close | Describe | Sessions | Probe | Models | Load | Swap | Rollback
Downstream = Opened | Credit | Closed | Refused | Described | SessionList | Probed | ModelList
Published = Result | Notice

_encoder = msgspec.msgpack.Encoder()
_upstream = msgspec.msgpack.Decoder(Upstream)
_downstream = msgspec.msgpack.Decoder(Downstream)
_published = msgspec.msgpack.Decoder(Published)


def encode(message: Message) -> bytes:
    """One MessagePack frame."""
    return _encoder.encode(message)


def _decode(decoder: msgspec.msgpack.Decoder[Any], frame: bytes, what: str) -> Any:
    try:
        return decoder.decode(frame)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError("message", expected=what, got=str(error)) from error


def decode_upstream(frame: bytes) -> Upstream:
    """What a feeder or a control client sent. Raises ProtocolError."""
    return _decode(_upstream, frame, "a message to the service")


def decode_downstream(frame: bytes) -> Downstream:
    """What the service answered. Raises ProtocolError."""
    return _decode(_downstream, frame, "an answer of the service")


def decode_published(frame: bytes) -> Published:
    """What the service published. Raises ProtocolError."""
    return _decode(_published, frame, "a published result")


def topic(session: str) -> bytes:
    """Subscription prefix of a session; ends in NUL so that "1" is no prefix of "10"."""
    return session.encode() + b"\x00"
