"""A result as the client sees it: arrays instead of bytes, and the arrival time."""

from __future__ import annotations

from typing import Any

from ilqr_vae.protocol import messages
from ilqr_vae.protocol.answer import VECTORS, PublishedEstimate, Vector
from ilqr_vae.protocol.clock import ClockOffset

_PLAIN = tuple(
    name for name in PublishedEstimate.__struct_fields__ if name not in (*VECTORS, "classes")
)


class Answer(PublishedEstimate[Vector], frozen=True, kw_only=True, gc=False):
    """The answer of the service to a bin: the fields of a result, with float64 arrays.

    ``source_ns`` and ``arrived_ns`` are times of this client's monotonic clock, the others of the
    service's. Kinematics are in ``Opened.kinematic_units``; classes are those of ``Model.classes``.

    Attributes:
        arrived_ns: when this client read the answer from its socket.
    """

    arrived_ns: int

    @classmethod
    def of(cls, result: messages.Result, arrived_ns: int) -> Answer:
        """Build from a message. Raises ProtocolError if array bytes do not match."""
        fields: dict[str, Any] = {name: getattr(result, name) for name in _PLAIN}
        for name in VECTORS:
            fields[name] = messages.unpack(getattr(result, name), name)
        if result.classes is not None:
            fields["classes"] = messages.unpack(result.classes, "classes")
        return cls(arrived_ns=arrived_ns, **fields)

    def wire_in_ns(self) -> tuple[int, int] | None:
        """Time from the feeder's send to the service, and its uncertainty.

        None if no bin came or the feeder did not state its clock.
        """
        if self.clock is None:
            return None
        took = self.received_ns - self.source_ns - self.clock.offset_ns
        return took, self.clock.uncertainty_ns

    def wire_out_ns(self, clock: ClockOffset) -> tuple[int, int]:
        """Return the time from the service's send to the arrival here, and its uncertainty.

        Args:
            clock: offset of the service's clock from this client's.
        """
        took = self.arrived_ns + clock.offset_ns - self.published_ns
        return took, clock.uncertainty_at(self.arrived_ns)
