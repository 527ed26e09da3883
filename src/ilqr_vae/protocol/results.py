"""What the service publishes."""

from __future__ import annotations

from ilqr_vae.protocol.answer import VECTORS as VECTORS
from ilqr_vae.protocol.answer import PublishedEstimate
from ilqr_vae.protocol.arrays import Array
from ilqr_vae.protocol.base import Message


class Result(PublishedEstimate[Array], Message, frozen=True, kw_only=True, omit_defaults=True):
    """The answer for one bin; its vectors are <f8."""


class Notice(Message, frozen=True, kw_only=True):
    """News of a session; docs/operations.md lists them."""

    session: str
    epoch: int
    what: str
