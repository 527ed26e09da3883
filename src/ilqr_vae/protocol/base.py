"""What all messages have in common."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

PROTOCOL = 2
"""Raised only where an older peer could not understand a newer one; see docs/protocol.md."""

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
    """Base: a tagged, immutable message without cycles. Fields that are not known are ignored."""


class Offset(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The service's clock minus the sender's, and how far from the truth that may be, both in
    nanoseconds; 0, 0 where they are the same clock."""

    offset_ns: Annotated[int, msgspec.Meta(ge=-(2**62), le=2**62)]
    uncertainty_ns: Annotated[int, msgspec.Meta(ge=0, le=2**62)]
