"""Messages: typed MessagePack, checked on arrival; see docs/protocol.md.

There are two channels. Feeders and clients send ``Upstream`` messages from a DEALER to the
service's ROUTER, and receive ``Downstream`` replies. The service's XPUB sends ``Published``
messages under their ``topic_of``.

Frames: a DEALER sends and receives one frame, the message (no empty delimiter). Published messages
    have two frames, the topic and the message. When a session is opened the service publishes
    ``Notice("opened")`` on its topic, and it sends the last message of a topic to each new
    subscriber. So a client that subscribes, opens, and waits for any message of its epoch on the
    topic before its first bin misses no result.

Arrays are raw bytes (``arrays``). No message can execute code: there is no pickle.

Times are nanoseconds of the sender's monotonic clock (``source_ns``: the feeder's; all others: the
service's). On one machine they are the same clock. Otherwise a feeder measures their offset and
states it with each bin (``Offset``), and each result repeats it, so that latencies across the
clocks have a known uncertainty.

The protocol is extended by fields with defaults, and by new message types. Both sides ignore
unknown fields, and a client ignores messages of unknown types; the service refuses those, and names
the fields of an ``Open`` that it ignored.
"""

from __future__ import annotations

from typing import Any, TypeVar, cast, get_args

import msgspec
from msgspec.structs import fields

from ilqr_vae.arrays import MAX_COUNT as MAX_COUNT
from ilqr_vae.errors import ProtocolError
from ilqr_vae.protocol.arrays import Array as Array
from ilqr_vae.protocol.arrays import DType as DType
from ilqr_vae.protocol.arrays import pack as pack
from ilqr_vae.protocol.arrays import unpack as unpack
from ilqr_vae.protocol.base import PROTOCOL as PROTOCOL
from ilqr_vae.protocol.base import Message as Message
from ilqr_vae.protocol.base import Offset as Offset
from ilqr_vae.protocol.base import Status as Status
from ilqr_vae.protocol.base import Token as Token
from ilqr_vae.protocol.feeding import TRIAL_START as TRIAL_START
from ilqr_vae.protocol.feeding import TRIAL_STOP as TRIAL_STOP
from ilqr_vae.protocol.feeding import Bin as Bin
from ilqr_vae.protocol.feeding import Close as Close
from ilqr_vae.protocol.feeding import Closed as Closed
from ilqr_vae.protocol.feeding import Credit as Credit
from ilqr_vae.protocol.feeding import Event as Event
from ilqr_vae.protocol.feeding import Moved as Moved
from ilqr_vae.protocol.feeding import Noted as Noted
from ilqr_vae.protocol.feeding import Open as Open
from ilqr_vae.protocol.feeding import Opened as Opened
from ilqr_vae.protocol.feeding import Refused as Refused
from ilqr_vae.protocol.feeding import Spikes as Spikes
from ilqr_vae.protocol.requests import Describe as Describe
from ilqr_vae.protocol.requests import Described as Described
from ilqr_vae.protocol.requests import Load as Load
from ilqr_vae.protocol.requests import ModelInfo as ModelInfo
from ilqr_vae.protocol.requests import ModelList as ModelList
from ilqr_vae.protocol.requests import Models as Models
from ilqr_vae.protocol.requests import Probe as Probe
from ilqr_vae.protocol.requests import Probed as Probed
from ilqr_vae.protocol.requests import Rollback as Rollback
from ilqr_vae.protocol.requests import SessionInfo as SessionInfo
from ilqr_vae.protocol.requests import SessionList as SessionList
from ilqr_vae.protocol.requests import Sessions as Sessions
from ilqr_vae.protocol.requests import Swap as Swap
from ilqr_vae.protocol.results import VECTORS as VECTORS
from ilqr_vae.protocol.results import Detail as Detail
from ilqr_vae.protocol.results import Notice as Notice
from ilqr_vae.protocol.results import Result as Result

Control = Load | Swap | Rollback
Feed = Open | Bin | Spikes | Event | Close
Upstream = Feed | Describe | Sessions | Probe | Models | Control
Downstream = (
    Opened
    | Moved
    | Credit
    | Noted
    | Closed
    | Refused
    | Described
    | SessionList
    | Probed
    | ModelList
)
Published = Result | Notice | Event | Detail

_encoder = msgspec.msgpack.Encoder()
_upstream = msgspec.msgpack.Decoder(Upstream)
_downstream = msgspec.msgpack.Decoder(Downstream)
_published = msgspec.msgpack.Decoder(Published)
_NAMED = 16
T = TypeVar("T")


def encode(message: Message) -> bytes:
    """Encode a message as one MessagePack frame.

    Raises:
        ProtocolError: a field holds what MessagePack cannot.
    """
    try:
        return _encoder.encode(message)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ProtocolError(
            "message", expected="integers of 64 bits, numbers, text, lists and maps", got=str(error)
        ) from error


def _decode(decoder: msgspec.msgpack.Decoder[T], frame: bytes, what: str) -> T:
    try:
        return decoder.decode(frame)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        got = str(error)
        if got.endswith("dtype`"):
            what += f" with arrays of {', '.join(get_args(DType))}"
        raise ProtocolError("message", expected=what, got=got) from error


def _decode_known(decoder: msgspec.msgpack.Decoder[T], frame: bytes, what: str) -> T | None:
    try:
        return _decode(decoder, frame, what)
    except ProtocolError:
        kind = _keys(frame).get("type")
        if kind is not None and kind not in _TYPES:
            return None
        raise


def decode_upstream(frame: bytes) -> Upstream:
    """Decode a message of a feeder or control client. Raises ProtocolError."""
    return _decode(_upstream, frame, "a message to the service")


def decode_downstream(frame: bytes) -> Downstream | None:
    """Decode a reply of the service; None for an unknown type. Raises ProtocolError."""
    return _decode_known(_downstream, frame, "an answer of the service")


def decode_published(frame: bytes) -> Published | None:
    """Decode a published message; None for an unknown type. Raises ProtocolError."""
    return _decode_known(_published, frame, "a published result")


def _keys(frame: bytes) -> dict[str, Any]:
    """Return the raw fields of a message, empty if it is none; ``type`` only if it is text."""
    try:
        decoded = msgspec.msgpack.decode(frame)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return {}
    message = cast(dict[str, Any], decoded) if isinstance(decoded, dict) else {}
    return message if isinstance(message.get("type"), str) else {}


def unknown_fields(frame: bytes, message: Message) -> tuple[str, ...]:
    """Return unknown field names in a frame, at most 16 of 64 characters each."""
    known = {field.encode_name for field in fields(message)} | {"type"}
    return tuple(str(name)[:64] for name in _keys(frame) if name not in known)[:_NAMED]


def topic(session: str) -> bytes:
    """Return the topic of a session; it ends in NUL so that "1" is not a prefix of "10"."""
    return session.encode() + b"\x00"


def event_topic(session: str) -> bytes:
    """Return the topic of a session's events."""
    return session.encode() + b"\x01"


def detail_topic(session: str) -> bytes:
    """Return the topic of a session's details."""
    return session.encode() + b"\x02"


def topic_of(message: Published) -> bytes:
    """Return the topic of a message."""
    match message:
        case Event():
            return event_topic(message.session)
        case Detail():
            return detail_topic(message.session)
        case _:
            return topic(message.session)


_TYPES = {
    kind.__struct_config__.tag
    for union in (Upstream, Downstream, Published)
    for kind in union.__args__
}
