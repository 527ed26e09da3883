"""The arguments of the compiled kernels, bundled by what they belong to.

Arrays of a batch have the problem or stream as their first axis: S streams, B problems, T steps, H
bins in a window, N units, n latents, m inputs, D kinematic channels, F numbers that the readout
reads.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Bounds(NamedTuple):
    """What is believable; see ``streaming.bounds``.

    Attributes:
        counts: (N,) the most spikes of each unit in a bin.
        latent_centre, latent_reach, latent_lost: (n,).
        decode_centre, decode_reach: (D,).
    """

    counts: Any
    latent_centre: Any
    latent_reach: Any
    latent_lost: Any
    decode_centre: Any
    decode_reach: Any


class Streams(NamedTuple):
    """The fields of ``HorizonState``: age (S,), mean (S, n), precision (S, n, n), z (S, H + 1, n),
    u (S, H, m), counts and mask (S, H, N)."""

    age: Any
    mean: Any
    precision: Any
    z: Any
    u: Any
    counts: Any
    mask: Any


class Bins(NamedTuple):
    """Bins that arrive: counts and mask (S, N)."""

    counts: Any
    mask: Any


class Trajectory(NamedTuple):
    """z (S, H + 1, n) and u (S, H, m), and the state z0 (S, n) that z begins with."""

    z0: Any
    z: Any
    u: Any


class Estimates(NamedTuple):
    """The fields of ``Estimate``: window (S, F), z_cov (S, n, n), rates (S, N), kinematics and
    kinematics_std (S, D), and one number a stream of each of the others."""

    window: Any
    z_cov: Any
    rates: Any
    kinematics: Any
    kinematics_std: Any
    bits: Any
    spikes: Any
    iterations: Any
    status: Any
    ignored: Any
    beyond: Any
    restarted: Any


class Fixed(NamedTuple):
    """What a step needs beside its streams, the same for all of them.

    Attributes:
        model: (family, weights, channels, prior).
        prior_precision, prior_covariance: (n, n), of z_0.
        mean_rates: (N,).
        options: of the solver.
        bounds: what is believable.
        initial: the state of one stream that begins.
    """

    model: Any
    prior_precision: Any
    prior_covariance: Any
    mean_rates: Any
    options: Any
    bounds: Bounds
    initial: Streams
