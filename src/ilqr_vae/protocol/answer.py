"""The fields of an answer, shared by the engine, the messages and the client.

Vectors are numpy arrays, or bytes in messages.

n latents, N units, D kinematic channels (0 if the model has none), C classes. Times are in
nanoseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from ilqr_vae.protocol.base import Offset, Status

Vector = NDArray[np.float64]
V = TypeVar("V")

VECTORS = ("latent", "latent_std", "rates", "kinematics", "kinematics_std")
"""The vector fields of an answer; also ``classes`` if the model has classes."""


class Estimated(msgspec.Struct, Generic[V], frozen=True, kw_only=True, gc=False):
    """The result of the engine for one bin.

    Attributes:
        latent, latent_std: (n,).
        rates: (N,), expected counts per bin; then the features that are expected.
        kinematics, kinematics_std: (D,), in the recording's units.
        bits: one-step-ahead log-likelihood of the bin, features included, in bits, relative to the
            mean rates in training.
        spikes: number of spikes in the bin. The running ratio of both is bits per spike.
        iterations: number of iLQR iterations.
        solver: status of the solver, e.g. converged, iteration_limit.
        solve_start_ns, solve_end_ns: times of the service's monotonic clock.
        model: id of the model that answered.
        ignored: units whose counts in this bin exceeded the model's limits and were not used.
        classes: (C,), the probability of each class; None for a model without classes.
    """

    latent: V
    latent_std: V
    rates: V
    kinematics: V
    kinematics_std: V
    bits: float
    spikes: int
    iterations: int
    solver: str
    solve_start_ns: int
    solve_end_ns: int
    model: str = ""
    ignored: tuple[str, ...] = ()
    classes: V | None = None


class PublishedEstimate(Estimated[V], Generic[V], frozen=True, kw_only=True, gc=False):
    """An estimate with the fields that the service adds for publication.

    Attributes:
        session, epoch, index: session, epoch and index of the bin.
        revision: 0 for the first answer to a bin; a higher revision supersedes it. A late bin
            within the window, which was answered as missing, is inserted: it and all later bins are
            answered again.
        status: ok, degraded (stopped early), late, missing (no bin came: prediction), extrapolated.
        source_ns: time stamp of the feeder; 0 for a bin that never came.
        received_ns, published_ns: times of the service's monotonic clock.
        clock: offset sent with the bin; ``source_ns`` plus the offset is a time of the service's
            clock. None if the feeder did not state it.
        class_name: the most probable class; empty where its probability is below the session's
            ``abstain``, and without classes.
    """

    session: str
    epoch: int
    index: int
    revision: int
    status: Status
    source_ns: int
    received_ns: int
    published_ns: int
    clock: Offset | None = None
    class_name: str = ""


def class_of(probabilities: Vector, names: Sequence[str], least: float) -> str:
    """Return the most probable class; empty if its probability is below ``least`` or NaN."""
    best = int(np.argmax(probabilities))
    return names[best] if probabilities[best] >= least else ""
