"""What the service publishes."""

from __future__ import annotations

from ilqr_vae.protocol.answer import VECTORS as VECTORS
from ilqr_vae.protocol.answer import PublishedEstimate
from ilqr_vae.protocol.arrays import Array
from ilqr_vae.protocol.base import Message


class Result(PublishedEstimate[Array], Message, frozen=True, kw_only=True, omit_defaults=True):
    """The answer for one bin; its vectors are <f8."""


class Detail(Message, frozen=True, kw_only=True, omit_defaults=True):
    """What the answer for one bin was inferred from, and the inputs inferred; published before the
    result, under a topic of its own, for those who look closely.

    Attributes:
        revision: of the result.
        counts: <u2 (N,), as the service took them; None for a bin that did not come.
        mask: u1 (N,), 1 = used; None = all used.
        inputs: <f8 (m,), of the model's dynamics ``input_delay`` bins before; None where nothing
            was solved, or where the session has not lasted so long. A bin alone tells little of its
            own.
        members: <f8 (K, n), the latents of all members of an ensemble, each in coordinates of its
            own; None for one model.
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


class Notice(Message, frozen=True, kw_only=True):
    """News of a session; docs/operations.md lists them."""

    session: str
    epoch: int
    what: str
