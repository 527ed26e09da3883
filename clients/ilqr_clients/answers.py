"""What a client holds of one result: arrays instead of bytes, and when it arrived."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ilqr_vae import wire

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
    """

    index: int
    revision: int
    model: str
    status: wire.Status
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

    @classmethod
    def of(cls, result: wire.Result, arrived_ns: int) -> Answer:
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
            latent=wire.unpack(result.latent, "latent"),
            latent_std=wire.unpack(result.latent_std, "latent_std"),
            rates=wire.unpack(result.rates, "rates"),
            kinematics=wire.unpack(result.kinematics, "kinematics"),
            kinematics_std=wire.unpack(result.kinematics_std, "kinematics_std"),
            bits=result.bits,
            spikes=result.spikes,
        )


@dataclass(frozen=True, slots=True)
class ClockOffset:
    """The service's clock minus this client's, from the fastest of several probes.

    Attributes:
        offset_ns: add it to a client time to get the service's.
        uncertainty_ns: half the fastest round trip; the true offset is no further off than this.
        probes: how many were answered.
    """

    offset_ns: int
    uncertainty_ns: int
    probes: int
