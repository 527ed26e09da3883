"""Messages that the service publishes."""

from __future__ import annotations

from ilqr_vae.protocol.answer import VECTORS as VECTORS
from ilqr_vae.protocol.answer import PublishedEstimate
from ilqr_vae.protocol.arrays import Array
from ilqr_vae.protocol.base import Message


class Result(PublishedEstimate[Array], Message, frozen=True, kw_only=True, omit_defaults=True):
    """The answer to a bin; its vectors are <f8."""


class Detail(Message, frozen=True, kw_only=True, omit_defaults=True):
    """The data and inferred inputs of an answer, published before it under a separate topic.

    Attributes:
        revision: revision of the result.
        counts: <u2 (N,), counts as used; None for a missing bin.
        features: <f8 (F,), features as used; None for a missing bin, and for a model without.
        mask: u1 (N + F,), 1 = used; None = all used.
        inputs: <f8 (m,), inputs of the dynamics ``input_delay`` bins before, since a bin alone says
            little about its own; None if nothing was solved, or the session is shorter.
        members: <f8 (K, n), latents of all members of an ensemble, each in its own coordinates;
            None for a single model.
    """

    session: str
    epoch: int
    index: int
    revision: int = 0
    counts: Array | None = None
    mask: Array | None = None
    inputs: Array | None = None
    input_delay: int = 0
    members: Array | None = None
    features: Array | None = None


class Notice(Message, frozen=True, kw_only=True):
    """News of a session; docs/operations.md lists them."""

    session: str
    epoch: int
    what: str
