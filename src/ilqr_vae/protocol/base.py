"""The base of all messages."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

PROTOCOL = 2
"""Increased only for changes that older peers could not understand; see docs/protocol.md."""

Token = Annotated[str, msgspec.Meta(max_length=64)]

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]

Status = Literal["ok", "degraded", "late", "missing", "extrapolated"]


class Message(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    tag=str.lower,
    tag_field="type",
    gc=False,
):
    """Base of the tagged, immutable messages. Unknown fields are ignored."""


class Offset(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The service's clock minus the sender's, and its uncertainty, in nanoseconds.

    0, 0 if they are the same clock.
    """

    offset_ns: Annotated[int, msgspec.Meta(ge=-(2**62), le=2**62)]
    uncertainty_ns: Annotated[int, msgspec.Meta(ge=0, le=2**62)]
