"""What a client holds of one result: arrays instead of bytes, and when it arrived."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ilqr_vae.protocol import messages
from ilqr_vae.protocol.clock import ClockOffset

Vector = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Answer:
    """The service's answer for one bin.

    Times are nanoseconds: ``source_ns`` and ``arrived_ns`` of this client's monotonic clock, the
    others of the service's. n latents, N units, D kinematic channels (0 where the model has none).

    Attributes:
        index: the bin's index in the session.
        revision: 0 for the first answer for a bin; a higher one supersedes it.
        status: ok, degraded, late, missing, extrapolated.
        solver: the solver's own status, e.g. converged.
        iterations: iLQR iterations done.
        source_ns: what the bin was sent with; 0 for a bin that never came.
        arrived_ns: when this client took the answer off its socket.
        latent, latent_std: (n,).
        rates: (N,), expected counts per bin.
        kinematics, kinematics_std: (D,), in ``Opened.kinematic_units``.
        bits: one-step-ahead log-likelihood of the bin in bits against the mean rate.
        spikes: spikes in the bin.
        ignored: units whose counts in this bin were beyond the model's limits and were not used.
        clock: how far the service's clock is from its feeder's; None where that was not said.
    """

    index: int
    revision: int
    model: str
    status: messages.Status
    solver: str
    iterations: int
    source_ns: int
    received_ns: int
    solve_start_ns: int
    solve_end_ns: int
    published_ns: int
    arrived_ns: int
    latent: Vector
    latent_std: Vector
    rates: Vector
    kinematics: Vector
    kinematics_std: Vector
    bits: float
    spikes: int
    clock: messages.Offset | None = None
    ignored: tuple[str, ...] = ()

    @classmethod
    def of(cls, result: messages.Result, arrived_ns: int) -> Answer:
        """From a message. Raises ProtocolError where an array's bytes don't fit its shape."""
        return cls(
            index=result.index,
            revision=result.revision,
            model=result.model,
            status=result.status,
            solver=result.solver,
            iterations=result.iterations,
            source_ns=result.source_ns,
            received_ns=result.received_ns,
            solve_start_ns=result.solve_start_ns,
            solve_end_ns=result.solve_end_ns,
            published_ns=result.published_ns,
            arrived_ns=arrived_ns,
            latent=messages.unpack(result.latent, "latent"),
            latent_std=messages.unpack(result.latent_std, "latent_std"),
            rates=messages.unpack(result.rates, "rates"),
            kinematics=messages.unpack(result.kinematics, "kinematics"),
            kinematics_std=messages.unpack(result.kinematics_std, "kinematics_std"),
            bits=result.bits,
            spikes=result.spikes,
            clock=result.clock,
            ignored=result.ignored,
        )

    def wire_in_ns(self) -> tuple[int, int] | None:
        """From the feeder's send to the service's arrival, and how far off that may be; None
        where no bin came or its feeder did not state its clock."""
        if self.clock is None:
            return None
        took = self.received_ns - self.source_ns - self.clock.offset_ns
        return took, self.clock.uncertainty_ns

    def wire_out_ns(self, clock: ClockOffset) -> tuple[int, int]:
        """From the service's sending to the arrival here, and how far off that may be.

        Args:
            clock: the service's against this client's.
        """
        took = self.arrived_ns + clock.offset_ns - self.published_ns
        return took, clock.uncertainty_at(self.arrived_ns)
