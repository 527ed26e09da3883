"""What the service publishes."""

from __future__ import annotations

from ilqr_vae.protocol.arrays import Array
from ilqr_vae.protocol.base import Message, Offset, Status

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
