"""The fields of an answer, spelled once: the engine fills them, the wire carries them, the client
reads them. They differ in what holds a vector: a numpy array, or its bytes on the wire.

n latents, N units, D kinematic channels (0 where the model has none), C classes. Times are
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
"""The fields of an answer that are vectors; ``classes`` is one too where the model has classes."""


class Estimated(msgspec.Struct, Generic[V], frozen=True, kw_only=True, gc=False):
    """What the engine computes for one bin.

    Attributes:
        latent, latent_std: (n,).
        rates: (N,), expected counts per bin.
        kinematics, kinematics_std: (D,), in the recording's units.
        bits: one-step-ahead log-likelihood of the arriving bin in bits, against the training mean
            rate.
        spikes: how many the bin had. The running ratio of both is bits per spike.
        iterations: iLQR iterations done.
        solver: the solver's own status, e.g. converged, iteration_limit.
        solve_start_ns, solve_end_ns: of the service's monotonic clock.
        model: id of the model that answered.
        ignored: units whose counts in this bin were beyond the model's limits and were not used.
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
    """An estimate with what the service adds as it publishes it.

    Attributes:
        session, epoch, index: of the bin.
        revision: 0 for the first answer for a bin; higher supersedes. A bin that comes late within
            the window, after it was answered as missing, is put in its place: it and all bins
            after it are answered again.
        status: ok, degraded (stopped early), late, missing (no bin came: prediction), extrapolated.
        source_ns: what the bin was sent with; 0 for a bin that never came.
        received_ns, published_ns: of the service's monotonic clock.
        clock: as it came with the bin; ``source_ns`` + its offset is by the service's clock. None
            where the feeder did not state it.
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
    """The most probable class; empty where its probability is below ``least`` or not a number."""
    best = int(np.argmax(probabilities))
    return names[best] if probabilities[best] >= least else ""
